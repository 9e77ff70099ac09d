"""Say in the words of our command line what the libraries below raise; their own words are for `--verbose`."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub import errors as hub

from ..errors import SelOrthoError
from .files import as_os_error, is_full, reason

_LONGEST = 200  # characters of what a library says that are shown
# What libraries say, and what that means here; the groups of a pattern are filled in.
_WORDS = tuple(
    (re.compile(pattern, re.DOTALL), words)
    for pattern, words in {
        r"deserializing header|incomplete metadata|HeaderTooLarge|[Hh]eader too (large|small)": (
            "a safetensors file is damaged or cut off: its header does not fit its bytes"
        ),
        r"[Pp]arquet magic bytes|[Cc]ouldn't deserialize thrift|Parquet file size is": (
            "it is no parquet file, or a damaged one"
        ),
        r"model type `([\w.-]+)` but Transformers does not": (
            "its model type {0} is unknown to the transformers installed here: pip install -U transformers, or choose "
            "another --model"
        ),
        r"Unrecognized model in|[Ss]hould have a `model_type`": "its config.json names no model of transformers",
        r"Unrecognized configuration class .*?\.(\w+)'>": "a {0} is that of no causal language model",
        r"(no file named|does not appear to have a file named) (\S+?),? ": "it holds no {1}",
        r"size mismatch|ignore_mismatched_sizes": "its weights do not fit its config.json",
        r"[Cc]an't load tokenizer|tokenizer (class|config)|instantiate the backend tokenizer": (
            "its tokenizer is missing, or of a kind that cannot be read here; a tokenizer.json beside the model can"
        ),
        r"Torch not compiled with CUDA|No CUDA GPUs|Found no NVIDIA": "there is no GPU here: use --cpu",
        r"trust_remote_code": (
            "it needs code of its own repository, which is not run; choose a model that transformers knows"
        ),
        r"[Dd]ataset scripts are no longer supported": (
            "it is a program, which is not run: choose a --dataset of parquet, json, csv or text files"
        ),
        r"(?:among the available configs|BuilderConfig .* not found\. Available): (\[.*?\])": (
            "it has several configurations: choose --dataset_config from {0}"
        ),
        r"[Nn]o \(supported\) data files|Couldn't infer the same data file format": (
            "it holds no files of texts of one kind: expected parquet, json, csv or text files"
        ),
        r"Consistency check failed|Data processing error|CAS service error": (
            "the download was cut off or damaged: run the same command again"
        ),
        r"Invalid metadata in README\.md\.? (.*)": "the header of README.md: {0}",
        r"mixed precision requires|bf16 mixed precision": "this device cannot compute so: choose --mixed_precision no",
        r"valid LoggerType|[Uu]nsupported logging": "a tracker of --report_to is unknown or not installed",
    }.items()
)
_CODE = re.compile(r"`|\w\(|\w=|://|https?:|pip install|huggingface-cli|[Pp]lease|[A-Z]\w+Error|0x[0-9a-f]{6}")
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
_NO_SPACE, _NO_TEMPORARY = "Not enough disk space", "No usable temporary directory"


def one_line(error: BaseException) -> str:
    """Return what an exception means in at most 200 characters, without the advice that it gives to programmers."""
    text = " ".join(str(error).split())
    if isinstance(error, SelOrthoError):
        return text
    if isinstance(error, hub.HfHubHTTPError):
        text = f"{no_answer(error)}" + (f": {error.server_message:.200}" if error.server_message else "")
        return " ".join(text.split())
    for pattern, words in _WORDS:
        if match := pattern.search(text):
            return words.format(*match.groups())[: 2 * _LONGEST]
    if isinstance(error, OSError) and error.strerror:
        return reason(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name} is not installed: pip install {error.name}"
    sentence = re.split(r"(?<=[.;]) (?=[A-Z])", text, maxsplit=1)[0].rstrip(".:;")
    if not sentence or _CODE.search(sentence):
        return f"a {type(error).__name__}, of which --verbose shows all"
    return sentence if len(sentence) <= _LONGEST else sentence[: _LONGEST - 3] + "..."


def no_answer(error: BaseException) -> str:
    """Say why the Hub gave no answer, or none that is of use, and what to look at."""
    for cause in _causes(error):
        name, text = type(cause).__name__, str(cause)
        status = cause.response.status_code if isinstance(cause, hub.HfHubHTTPError) else 0
        if status == 429:
            return "it is asked too often (HTTP status 429): wait some minutes, or log in with `hf auth login`"
        if status:
            return f"it answers with HTTP status {status}"
        if isinstance(cause, hub.OfflineModeIsEnabled):
            return "offline mode is on (HF_HUB_OFFLINE)"
        if "Proxy" in name or ("proxy" in text.lower() and not isinstance(cause, UnicodeError)):
            return "the proxy lets nothing through: check HTTPS_PROXY"
        if "Timeout" in name:
            return "no answer in time; HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT set how long to wait"
        if isinstance(cause, UnicodeError) or name == "LocalProtocolError":
            return "the access token has characters that none has: check HF_TOKEN"
        if "CERTIFICATE" in text:
            return "its certificate is not trusted here: set SSL_CERT_FILE to those of your network"
        if name in ("UnsupportedProtocol", "InvalidURL", "InvalidSchema", "MissingSchema"):
            return f"HF_ENDPOINT={constants.ENDPOINT} is no address"
    return f"no connection to {constants.ENDPOINT}: check the network, HTTPS_PROXY and HF_ENDPOINT"


def storage_error(error: BaseException) -> SelOrthoError | None:
    """Explain a full disk, or a folder that cannot be written, under the caches of the libraries; None for all else."""
    for cause in _causes(error):
        fault = as_os_error(cause) if isinstance(cause, Exception) else OSError()
        if _NO_TEMPORARY in str(cause):
            return SelOrthoError("no folder for temporary files can be written: set TMPDIR to one with some room")
        full = is_full(fault) or _NO_SPACE in str(cause)
        if not full and fault.errno not in _NOT_WRITABLE:
            continue
        path = fault.filename if isinstance(fault.filename, (str, bytes, os.PathLike)) else None
        places = _places_of(os.path.abspath(os.fsdecode(path))) if path else _places()
        if not places and not full:
            return None  # a file of the user's own
        variable, folder = min(places.items() or [("", os.fsdecode(path or ""))], key=lambda place: _room(place[1]))
        whole = Path(folder).is_relative_to(constants.HF_HOME) and variable != "HF_HOME"
        variables = f"HF_HOME, or {variable} alone," if whole else variable
        if not variable:
            return SelOrthoError(f"the disk of {folder} is full: make room there, or name another folder")
        if full:
            advice = f"the disk of {folder} is full: make room there, or set {variables} to a folder on another one"
            return SelOrthoError(advice)
        said = f"cannot write to {folder} ({reason(fault)})"
        return SelOrthoError(f"{said}: set {variables} to a folder that can be written")
    return None


def explained(error: BaseException) -> SelOrthoError | None:
    """Explain what no part of the package has caught, if a user can mend it: disks, folders, the Hub."""
    if said := storage_error(error):
        return said
    if isinstance(error, OSError) and error.filename and error.errno:
        return SelOrthoError(f"cannot use {error.filename}: {reason(error)}; name another file or folder")
    if isinstance(error, (hub.HfHubHTTPError.__mro__[1], hub.OfflineModeIsEnabled)):
        return SelOrthoError(f"the Hub cannot be used: {one_line(error)}")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _places() -> dict[str, str]:
    """The folders that libraries write to, by the environment variable that moves each."""
    datasets = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
    places = {"HF_DATASETS_CACHE": datasets, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HOME": constants.HF_HOME}
    places = {name: os.path.abspath(os.path.expanduser(place)) for name, place in places.items()}
    return places | {"TMPDIR": tempfile.gettempdir()}


def _places_of(path: str) -> dict[str, str]:
    """Those that a path is in, or is above of while they are made; all that is not ours in TMPDIR may be the user's."""
    places, temporary = _places(), tempfile.gettempdir()
    ours = re.match(r"(tmp|hf_selortho-|matplotlib)", os.path.relpath(path, temporary))
    inside = {name: place for name, place in places.items() if Path(path).is_relative_to(place) and name != "TMPDIR"}
    above = {name: place for name, place in places.items() if Path(place).is_relative_to(path)}
    return inside or ({"TMPDIR": temporary} if ours else {}) or above


def _room(folder: str) -> tuple[bool, int]:
    """Whether a folder, or the one that it will be made in, can be written, and the room on its disk."""
    there = next(place for place in (Path(folder), *Path(folder).parents) if os.path.exists(place))
    return there.is_dir() and os.access(there, os.W_OK), shutil.disk_usage(there).free
