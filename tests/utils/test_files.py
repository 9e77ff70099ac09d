from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from hf_selortho.utils.files import write_json


def test_json_has_no_nan_and_no_half_files(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": float("nan"), "b": [1.5, float("inf")]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [1.5, None]


@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), signal.SIGTERM)", "raise KeyboardInterrupt"])
def test_a_temporary_folder_goes_however_its_process_ends(ending, tmp_path) -> None:
    code = f"""
import os, signal, tempfile
from hf_selortho.utils.files import temporary_folder
tempfile.tempdir = {str(tmp_path)!r}
with temporary_folder("test-") as folder:
    (folder / "file").touch()
    {ending or "pass"}
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (128 + signal.SIGTERM if "SIGTERM" in ending else done.returncode), done.stderr
    assert "AssertionError" not in done.stderr and list(tmp_path.iterdir()) == []
