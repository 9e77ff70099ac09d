"""What libraries raise is said in the words of our command line; what they said themselves is for --verbose."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path
from pickle import UnpicklingError

import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub

from hf_selortho.errors import SelOrthoError
from hf_selortho.utils.command_line import run_script
from hf_selortho.utils.library_errors import explained, no_answer, one_line, storage_error

ROOT = Path(__file__).parents[2]
http = importlib.import_module(hub.HfHubHTTPError.__mro__[1].__module__.split(".")[0])  # httpx, or one like it


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            ValueError("Error while deserializing header: incomplete metadata, file not fully covered"),
            "damaged or cut off",
        ),
        (OSError("Parquet magic bytes not found in footer. Either the file is corrupted"), "no parquet file"),
        (
            ValueError("The checkpoint you are trying to load has model type `new-lm` but Transformers does not"),
            "its model type new-lm is unknown to the transformers installed here: pip install -U transformers",
        ),
        (OSError("Error no file named model.safetensors, or pytorch_model.bin, found in directory x."), "it holds no"),
        (AssertionError("Torch not compiled with CUDA enabled"), "use --cpu"),
        (AssertionError(), "AssertionError, of which --verbose"),
        (ImportError("HQQ is not available. Please follow `x`"), "a library that is missing (HQQ is not available);"),
        (UnpicklingError("Weights only load failed"), "a pickle that could run code"),
        (
            OSError("Consistency check failed: file should be of size 3. Please"),
            "cut off or damaged",
        ),
        (ModuleNotFoundError("No module named 'zstandard'", name="zstandard"), "pip install zstandard"),
        (TypeError("Foo.__init__() got an unexpected keyword argument 'x'"), "TypeError, of which --verbose"),
        (ValueError(""), "ValueError, of which --verbose"),
        (ValueError("row 7 has 3 columns, expected 2. Please set `x=1`"), "row 7 has 3 columns, expected 2"),
        (SelOrthoError("our own words: pip install x"), "our own words: pip install x"),
    ],
)
def test_a_message_of_a_library_is_put_in_our_words(raised: Exception, said: str) -> None:
    assert said in one_line(raised) and "Please" not in one_line(raised)


def status(code: int) -> Exception:
    request = http.Request("GET", "https://huggingface.co/x")
    return hub.HfHubHTTPError("Client error, see https://...", response=http.Response(code, request=request))


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (lambda: status(429), "asked too often"),
        (lambda: status(503), "HTTP status 503"),
        (lambda: http.ConnectTimeout("timed out"), "HF_HUB_ETAG_TIMEOUT"),
        (lambda: http.ProxyError("407 Proxy Authentication Required"), "HTTPS_PROXY"),
        (lambda: http.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), "SSL_CERT_FILE"),
        (lambda: http.ConnectError("[Errno 111] Connection refused"), "no connection to"),
        (lambda: http.UnsupportedProtocol("Request URL is missing"), "HF_ENDPOINT="),
        (lambda: http.LocalProtocolError("Illegal header value"), "HF_TOKEN"),
        (lambda: hub.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
    ],
)
def test_why_the_hub_gives_no_answer_is_said(raised, said: str) -> None:
    assert said in no_answer(raised())
    wrapped = ValueError("a library around it")
    wrapped.__cause__ = raised()
    assert said in no_answer(wrapped)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "texts"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.mark.parametrize(
    ("number", "path", "said"),
    [
        (errno.ENOSPC, "texts/json/x.arrow", "the disk of {}/texts is full: make room there, or set HF_DATASETS_CACHE"),
        (errno.EROFS, "texts", "cannot write to {}/texts (Read-only file system): set HF_DATASETS_CACHE to a folder"),
        (errno.EACCES, "home/hub/models--x", "set HF_HOME to a folder that can be written"),
        (errno.ENOTDIR, "home", "set HF_HOME"),
        (errno.EEXIST, "home/xet", "set HF_HOME to a folder that can be written"),
        (errno.ENOSPC, "tmp/tmpabc/x", "or set TMPDIR to a folder on another one"),
        (errno.ENOSPC, "elsewhere/x", "elsewhere/x is full: make room there, or name another folder"),
        (errno.EDQUOT, None, "is full: make room there, or set HF_"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_with_what_moves_it(number, path, said, caches: Path) -> None:
    error = OSError(number, os.strerror(number), *([str(caches / path)] if path else []))
    around = RuntimeError("An error occurred while generating the dataset")
    around.__cause__ = error
    assert said.format(caches) in str(storage_error(around))


def test_what_is_no_fault_of_a_disk_is_not_blamed_on_one(caches: Path) -> None:
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "", "x"), PermissionError(13, "", "/home/me/t.txt")):
        assert storage_error(error) is None
    assert "cannot use /home/me/t.txt" in str(explained(PermissionError(13, "Permission denied", "/home/me/t.txt")))
    assert "refuses to go on: Too many open files" in str(explained(OSError(errno.EMFILE, "Too many open files")))
    assert explained(ZeroDivisionError()) is None  # a fault of ours keeps its traceback


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    code = "from hf_selortho.utils.command_line import run_script; run_script(lambda: print('x\\n' * 200000))"
    command = f"set -o pipefail; '{sys.executable}' -c \"{code}\" | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x\n", "")


@pytest.mark.parametrize("verbose", [False, True])
def test_the_libraries_own_words_follow_with_verbose(verbose: bool, capsys, monkeypatch) -> None:
    def main() -> None:
        raise SelOrthoError("ours") from ValueError("theirs, with hf_" + "aB3" * 11)

    monkeypatch.setattr(sys, "argv", ["selortho x", *["--verbose"] * verbose])
    with pytest.raises(SystemExit) as end:
        run_script(main)
    first, *rest = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and first.endswith("error: ours") and bool(rest) == verbose
    assert ("ValueError: theirs, with ***" in rest) == verbose


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="a disk is mounted")
@pytest.mark.parametrize("home", ["read-only", "a file", "full"])
def test_a_home_that_cannot_be_written_is_named_on_the_command_line(home: str, tmp_path: Path, small_disks) -> None:
    disk = small_disks("400k")
    if not disk.mounted:
        pytest.skip("nothing may be mounted here")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "{"word " * 2000}{row}"}}\n' for row in range(100)))
    place = disk.folder
    if home == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(disk.folder)], check=True)
    if home == "a file":
        place = tmp_path / "home"
        place.touch()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    code = f"""
from hf_selortho.utils.command_line import run_script
from hf_selortho.data.texts import TextSource, open_documents
run_script(lambda: open_documents(TextSource({str(texts)!r})))
"""
    environment |= {"HF_HOME": str(place), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert str(place) in said[0] and "set HF_HOME" in said[0] and "texts.jsonl" not in said[0]
