"""What users can see stays: names, signatures, settings, options, keys of files, columns; public_surface.json lists it.

`python -m tests.test_public_surface` writes public_surface.json anew.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import hf_selortho
from hf_selortho import SelOrthoConfig, features
from hf_selortho.commands.main import COMMANDS
from tests.goldens import trainings

ROOT = Path(__file__).parents[1]
SURFACE = Path(__file__).with_name("public_surface.json")
METHODS = {
    "SelOrthoConfig": ("from_pretrained", "save_pretrained", "push_to_hub", "describe"),
    "SelOrthoSAE": (
        "from_pretrained", "save_pretrained", "push_to_hub", "encode", "decode", "forward", "capture", "select_pairs",
        "set_input_statistics",
    ),
}  # fmt: skip
_NUMBERED = re.compile(r"\d+|layer_\w+|.*\.\w+")  # keys that are data: numbers, SAEs, files
FREE_MAPS = ("versions",)  # whose keys depend on what is installed


class ParserFound(BaseException):
    """Carries the parser of a program out of it."""


def names() -> list[str]:
    """Everything that the package and its features export."""
    return [f"{module.__name__}.{name}" for module in (hf_selortho, features) for name in module.__all__]


def signatures() -> list[str]:
    """Parameters with defaults of every exported function, class and method, and fields of exported results."""
    lines = []
    for module in (hf_selortho, features):
        for name in module.__all__:
            thing, place = getattr(module, name), f"{module.__name__}.{name}"
            lines += [f"{place}{_parameters(thing)}"]
            if inspect.isclass(thing):
                own = METHODS.get(name, [key for key in vars(thing) if not key.startswith("_")])
                lines += [f"{place}.{key}{_parameters(inspect.getattr_static(thing, key))}" for key in own]
    return lines


def _parameters(thing: Any) -> str:
    thing = getattr(thing, "__func__", thing)
    if isinstance(thing, property) or not callable(thing):
        return ""
    if inspect.isclass(thing) and issubclass(thing, (SelOrthoConfig, BaseException)):
        return ""  # the fields are listed by themselves
    parameters = inspect.signature(thing).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def settings() -> list[str]:
    """Every field of the configuration with its default."""
    return [f"{name} = {value!r}" for name, value in SelOrthoConfig.default_settings().items()]


def programs() -> dict[str, str]:
    """The module of each program, by what users type."""
    found = {f"selortho {name}": f"hf_selortho.commands.{name}" for name in COMMANDS}
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    modules = re.findall(r"python -m (hf_selortho\.[\w.]+)", "\n".join(texts))
    return found | {f"python -m {name}": name for name in sorted(set(modules))}


def run_program(place: str, arguments: Sequence[str]) -> None:
    """Run a command or a module in this process, as its command line would."""
    threads = torch.get_num_threads()
    with mock.patch.object(sys, "argv", [place, *arguments]):
        try:
            importlib.import_module(place).main()
        except SystemExit as end:
            assert not end.code, f"{place} ended with {end.code}"
        finally:
            torch.set_num_threads(threads)
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()


def options() -> list[str]:
    """Every option of every program with its default."""

    def stop(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise ParserFound(self)

    lines = []
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        for name, place in programs().items():
            try:
                run_program(place, [])
            except ParserFound as found:
                lines += _options_of(name, found.args[0])
            else:
                lines.append(f"{name}: takes no options")
    return lines


def _options_of(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from _options_of(f"{name} {word}", inner)
        elif not isinstance(action, argparse._HelpAction):
            default = action.default.value if isinstance(action.default, enum.Enum) else action.default
            choices = f" of {sorted(map(str, action.choices))}" if action.choices else ""
            yield f"{name} {' '.join(action.option_strings) or action.dest} = {default!r}{choices}"


def files(folder: Path) -> list[str]:
    """Keys and columns of what small runs of the programs write."""
    inputs = {name: str(value) for name, value in trainings.write_inputs(folder).items()}
    small = {"max_steps": 6, "eval_samples": 12, "eval_ce_samples": 4, "held_out_fraction": 0.3}
    one = trainings.command_line(folder / "one", inputs, small)
    several = trainings.command_line(folder / "several", inputs, small, {"variants": {"topk": trainings.TOPK}})
    read = ["--cpu", "--lm_dtype", "float32"]
    cached = [
        *("--model", inputs["model"], "--dataset", inputs["dataset"], "--layers", "0", "1", "--context_length", "32"),
        *("--held_out_fraction", "0.3", "--eval_samples", "12", "--output_dir", str(folder / "acts"), *read),
    ]
    sae = str(folder / "one")
    for name, arguments in {
        "train": one,
        "train ": several,
        "cache": cached,
        "index": [sae, "--tokens", "400", *read],
        "evaluate": [sae, "--output", str(folder / "evaluation.json"), "--eval_samples", "12", *read],
        "convert": [sae, str(folder / "saelens"), "--to", "saelens"],
    }.items():
        run_program(f"hf_selortho.commands.{name.strip()}", arguments)
    lines = []
    for path in sorted({*folder.rglob("*.json"), *folder.rglob("*.jsonl")}):
        shown = str(path.relative_to(folder))
        if not shown.startswith(("lm/", "texts", "several-variants")):
            text = path.read_text(encoding="utf-8")
            content = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
            lines += [f"{shown} {key}" for key in sorted(set(_keys(content)))]
    for path in sorted(folder.rglob("*.parquet")):
        schema = pyarrow.parquet.read_schema(path)
        lines += [f"{path.relative_to(folder)} {field.name}: {field.type}" for field in schema]
    return lines


def _keys(content: Any, path: str = "") -> Iterator[str]:
    """Paths of the values: lists and maps by number, SAE or file are one entry."""
    if isinstance(content, dict) and content:
        for key, value in content.items():
            name = "*" if _NUMBERED.fullmatch(key) or path in FREE_MAPS else key
            yield from _keys(value, f"{path}.{name}" if path else name)
    elif isinstance(content, list) and content:
        for value in content:
            yield from _keys(value, f"{path}[]")
    else:
        yield path


def surface(folder: Path) -> dict[str, list[str]]:
    return {
        "names": names(),
        "signatures": signatures(),
        "settings": settings(),
        "options": options(),
        "files": files(folder),
    }


@pytest.mark.parametrize("part", ["names", "signatures", "settings", "options", "files"])
def test_the_public_surface_is_the_listed_one(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if part == "options":
        pytest.importorskip("gradio")
    monkeypatch.chdir(ROOT)
    found = files(tmp_path) if part == "files" else globals()[part]()
    listed = json.loads(SURFACE.read_text(encoding="utf-8"))[part]
    gone = [f"- {line}" for line in listed if line not in found]
    new = [f"+ {line}" for line in found if line not in listed]
    assert not gone and not new, (
        f"the public surface ({part}) has changed; if that is meant, run python -m tests.test_public_surface and name "
        "the change in the commit:\n" + "\n".join(gone + new)
    )


def write_surface() -> None:
    """Write public_surface.json, one entry a line."""
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        content = surface(Path(folder))
    SURFACE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_surface()
