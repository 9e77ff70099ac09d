"""The command `selortho`: what each name runs, what it says of itself, and how a mistake ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import hf_selortho
from hf_selortho.commands.main import COMMANDS, main, usage

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "train.py": "train",
    "cache_activations.py": "cache",
    "evaluate_sae.py": "evaluate",
    "build_feature_index.py": "index",
    "push_to_hub.py": "push",
    "deploy_space.py": "space",
}


@dataclass
class Done:
    """How a command ended."""

    code: object
    out: str
    err: str


@pytest.fixture
def selortho(capsys, monkeypatch) -> Callable[..., Done]:
    """Runs `selortho` in this process."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/selortho", *arguments])
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return Done(code, *capsys.readouterr())

    return run


def test_every_command_is_a_short_file_of_its_own() -> None:
    folder = Path(hf_selortho.__file__).parent / "commands"
    files = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.py")}
    assert set(COMMANDS) <= set(files) and max(files.values()) <= 150, files


def test_usage_and_version(selortho) -> None:
    for arguments in ((), ("--help",)):
        done = selortho(*arguments)
        assert (done.code, done.out) == (0, usage())
    assert selortho("--version").out == f"selortho {hf_selortho.__version__}\n"


def test_an_unknown_command_is_one_line(selortho) -> None:
    done = selortho("tran")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("selortho: error: unknown command 'tran': expected one of train, cache, ")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_and_refuses_what_it_does_not_know(name, selortho) -> None:
    done = selortho(name, "--help")
    assert done.code == 0 and done.out.startswith(f"usage: selortho {name} "), done.err
    done = selortho(name, "--no_such_option", "1")
    assert done.code == 2 and len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith(f"selortho {name}: error: "), done.err


@pytest.mark.parametrize(("script", "name"), SCRIPTS.items())
def test_each_script_is_a_few_lines_over_its_command(script, name) -> None:
    lines = (ROOT / "scripts" / script).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 10 and f"from hf_selortho.commands.{name} import main" in lines


@pytest.mark.parametrize("program", [("-m", "hf_selortho", "train"), ("scripts/train.py",)])
def test_a_real_process_ends_a_mistake_in_one_line(program) -> None:
    command = [sys.executable, *program, "--layer", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    called = "selortho train" if "-m" in program else "train.py"
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{called}: error: no language model given: pass --model"), done.stderr
