"""The command `selortho`: what each name runs, what it says of itself, and how a mistake ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hf_selortho
from hf_selortho.commands.main import COMMANDS, usage

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "train.py": "train",
    "cache_activations.py": "cache",
    "evaluate_sae.py": "evaluate",
    "build_feature_index.py": "index",
    "push_to_hub.py": "push",
    "deploy_space.py": "space",
}


def selortho(*arguments: str, program: tuple[str, ...] = ("-m", "hf_selortho")) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_command_is_a_short_file_of_its_own() -> None:
    folder = Path(hf_selortho.__file__).parent / "commands"
    files = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.py")}
    assert set(COMMANDS) <= set(files) and max(files.values()) <= 150, files


def test_usage_and_version() -> None:
    for arguments in ((), ("--help",)):
        done = selortho(*arguments)
        assert (done.returncode, done.stdout) == (0, usage())
    assert selortho("--version").stdout == f"selortho {hf_selortho.__version__}\n"


def test_an_unknown_command_is_one_line() -> None:
    done = selortho("tran")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("selortho: error: unknown command 'tran': expected one of train, cache, ")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_and_refuses_what_it_does_not_know(name) -> None:
    done = selortho(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: selortho {name} "), done.stderr
    done = selortho(name, "--no_such_option", "1")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"selortho {name}: error: "), done.stderr


@pytest.mark.parametrize(("script", "name"), SCRIPTS.items())
def test_each_script_is_a_few_lines_over_its_command(script, name) -> None:
    lines = (ROOT / "scripts" / script).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 10 and f"from hf_selortho.commands.{name} import main" in lines
    done = selortho("--help", program=(f"scripts/{script}",))
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script} "), done.stderr
