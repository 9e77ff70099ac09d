"""README, docs and docstrings hold what they say: commands parse, snippets run, options exist, links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import evaluate
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import AutoModel

from hf_selortho import SelOrthoSAE
from hf_selortho.commands.main import COMMANDS
from hf_selortho.features.build import IndexSettings, build_feature_index
from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.index_writer import INDEX, IndexWriter
from hf_selortho.training.arguments import parse_arguments
from hf_selortho.training.cache_arguments import parse_cache_arguments
from tests.features.index_sources import make_sae, make_sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "RESULTS")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = {"scripts/train.py": "train", "scripts/cache_activations.py": "cache"}
LAUNCHERS = {"accelerate": launch_command_parser, "torchrun": get_args_parser}
OURS = ("selortho", "python", ".venv/bin/python", "make", "pip", *LAUNCHERS)
OF_OTHERS = ("git", "hf")


class Parsed(BaseException):
    """Ends a program once its arguments are parsed; carries those that it does not know."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def typed(text: str) -> Iterator[str]:
    """The command lines of a block, without comments and prefixes."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words and words[0] != "cd":
                yield shlex.join(words)


def examples() -> list[str]:
    """The command lines of every block of a page and of docstrings."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    lines = {line for text in texts for block in blocks(text, "bash") for line in typed(block)}
    for folder in ("hf_selortho", "scripts", "experiments", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            lines |= {line for line in typed_lines_of(doc) if not line.endswith(("...", ":"))}
    return sorted(lines)


def typed_lines_of(doc: str) -> Iterator[str]:
    for line in re.sub(r"\\\n\s*", "", doc).splitlines():
        if re.match(rf"({'|'.join(OURS)}) (?!does)", line):
            yield from typed(line)


def unknown_arguments(main: Callable[[], Any], name: str, arguments: list[str]) -> list[str]:
    """Start a program as its command line would and stop when its parser is done."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(parse(self, args, namespace)[1])

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [name, *arguments]),
        pytest.raises(Parsed) as parsed,
    ):
        main()
    return parsed.value.args[0]


def check(words: list[str]) -> None:
    """Parse a command line with the parser of its program."""
    program, *rest = words
    if program in LAUNCHERS:
        launched = LAUNCHERS[program]().parse_args(rest[1:] if program == "accelerate" else rest)
        script, arguments = launched.training_script, launched.training_script_args
        check(["selortho", SCRIPTS[script], *arguments])
    elif program == "selortho":
        name, *arguments = rest
        main = importlib.import_module(f"hf_selortho.commands.{name}").main
        assert name in COMMANDS and unknown_arguments(main, f"selortho {name}", arguments) == []
        if {"train": "--preset", "cache": "--layers"}.get(name) in arguments:
            {"train": parse_arguments, "cache": parse_cache_arguments}[name](arguments)
    elif program.startswith(".venv-circuits/"):  # an environment of its own
        assert program == ".venv-circuits/bin/python" or {"circuit-tracer==0.5.0", "nnsight>=0.6,<0.8"} <= set(rest)
    elif program.endswith("python") and rest[0] == "-c":
        compile(rest[1], "page", "exec")
    elif program.endswith("python"):
        assert rest[0] == "-m", words
        if rest[1].startswith(("hf_selortho.", "experiments.", "benchmarks.")):
            module = importlib.import_module(rest[1])
            assert unknown_arguments(module.main, rest[1], rest[2:]) == []
        else:
            assert find_spec(rest[1]), words
    elif program == "make":
        targets = [word for word in rest if "=" not in word]
        subprocess.run(["make", "-n", "-C", ROOT, *targets], capture_output=True, check=True)
    elif program == "pip":
        if "--no-deps" in rest:  # whose version tests/data/test_sae_probes.py looks at
            return
        [extras] = re.findall(r"\.\[([\w,]+)\]", " ".join(rest))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    else:
        assert program in (*OF_OTHERS, "export"), words


@pytest.mark.parametrize("line", examples())
def test_command_line_parses(line, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    check(shlex.split(line))


def test_every_option_that_a_page_names_exists() -> None:
    options = json.loads((ROOT / "tests/public_surface.json").read_text(encoding="utf-8"))["options"]
    known = {word for line in options for word in line.split() if word.startswith("--")}
    known |= {f"--{action.dest}" for make in LAUNCHERS.values() for action in make()._actions} | {"--help"}
    known |= {"--repo-type", "--memory", "--extra-index-url", "--index-url", "--no-deps"}  # of hf, a benchmark, pip
    named = {(page.name, name) for page in PAGES for name in re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text())}
    assert len(named) > 60 and {pair for pair in named if pair[1] not in known} == set()


def test_every_link_and_every_path_leads_somewhere() -> None:
    lost = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            place, _, anchor = target.partition("#")
            path = page.parent / place if place else page
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            slugs = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
            if not path.exists() or (anchor and anchor not in slugs):
                lost.append(f"{page.name}: {target}")
        for path in re.findall(r"`((?:hf_selortho|tests|docs|examples|experiments|benchmarks|scripts)/[\w./]+)`", text):
            if not (ROOT / path).exists():
                lost.append(f"{page.name}: {path}")
    assert lost == []


@pytest.fixture(scope="module")
def demo(tiny_lm, sample_text_files, tmp_path_factory) -> Path:
    """A folder in which `runs/demo` is a small SAE with an index."""
    folder, lm = tmp_path_factory.mktemp("readme"), tiny_lm("gemma3")
    sae = make_sae(lm, d_sae=64, context_length=64)
    sae.save_pretrained(folder / "runs/demo")
    with IndexWriter(folder / "runs/demo" / INDEX) as writer:
        build_feature_index(
            make_sources(lm, sample_text_files.txt, sae), IndexSettings(tokens=2000), writer, progress=False
        )
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_python_snippets_run_one_after_the_other(page, demo, monkeypatch) -> None:
    monkeypatch.chdir(demo)
    index = FeatureIndex.open("runs/demo")
    a, b = next(pair for feature in index.firing_features() for pair in index.pairs_of(feature))
    h = torch.rand(64, 16).relu().requires_grad_()
    names = {"x": torch.randn(3, 32), "h": h, "loss": torch.tensor(0.0), "SelOrthoSAE": SelOrthoSAE}
    names |= {"AutoModel": AutoModel, "evaluate": evaluate}
    snippets = blocks((ROOT / page).read_text(encoding="utf-8"), "python")
    assert len(snippets) == (3 if page == "README.md" else 4)
    for snippet in snippets:
        code = re.sub(r"^.*\b(SAE\.from_pretrained|hf_selortho\.load).*$", "", snippet, flags=re.MULTILINE)  # of others
        code = code.replace("org/gemma-3-270m-l8", "runs/demo").replace("108, 853", f"{a}, {b}")
        exec(code, names)
    assert names["text"].tokens and names["index"].feature(61).contexts is not None
    assert page != "README.md" or names["loss"].requires_grad
