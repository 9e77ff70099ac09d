"""What is imported when: nothing heavy for a text on the screen, and our classes as soon as transformers is there."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.utils.imports import after_import

ROOT = Path(__file__).parents[1]
UNUSED_BY_OPTIONS = {
    "accelerate", "datasets", "evaluate", "gradio", "matplotlib", "pandas", "scipy", "sklearn",
    "transformers.modeling_utils",
}  # fmt: skip
HEAVY = {*UNUSED_BY_OPTIONS, "huggingface_hub", "numpy", "pyarrow", "torch", "transformers"}


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        (["--help"], HEAVY),
        (["--version"], HEAVY),
        (["trian"], HEAVY),
        (["train", "--help"], UNUSED_BY_OPTIONS),
        (["train", "--layer", "x"], UNUSED_BY_OPTIONS),
        (["cache", "--help"], UNUSED_BY_OPTIONS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_slips_wait_for_no_heavy_library(command, unused) -> None:
    code = """
import atexit, sys
atexit.register(lambda: sys.stderr.write(" ".join(["\\nimported:", *sys.modules])))
from hf_selortho.commands.main import main
main()
"""
    done = run_python(code, *command)
    said, imported = done.stderr.split("\nimported: ")
    assert done.stdout or "error: " in said, done.stderr
    assert set(imported.split()) & unused == set()


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_selortho\nassert 'transformers' not in sys.modules\nhf_selortho.penalties\n"
        "from transformers import AutoConfig, AutoModel",
        "from transformers import AutoConfig, AutoModel\nimport hf_selortho",
    ],
    ids=["package first", "transformers first"],
)
def test_the_auto_classes_know_our_saes_in_whatever_order_things_are_imported(imports, tmp_path) -> None:
    SelOrthoSAE(SelOrthoConfig(d_in=4, d_sae=8)).save_pretrained(tmp_path)
    code = f"""
import sys
{imports}
names = [type(auto.from_pretrained(sys.argv[1])).__name__ for auto in (AutoConfig, AutoModel)]
assert names == ["SelOrthoConfig", "SelOrthoSAE"], names
"""
    done = run_python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_an_action_waits_for_its_module_and_happens_once(tmp_path, monkeypatch) -> None:
    (tmp_path / "awaited_module.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen, finders = [], list(sys.meta_path)
    after_import("awaited_module", lambda: seen.append(sys.modules["awaited_module"].value))
    assert seen == []
    module = import_module("awaited_module")
    assert seen == [1] and sys.meta_path == finders
    after_import("awaited_module", lambda: seen.append(module.value + 1))
    assert seen == [1, 2]
