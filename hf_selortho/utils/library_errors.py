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

TOKENIZER_REMEDY = "put the tokenizer.json and tokenizer_config.json that belong to its weights beside them"
_LONGEST = 200  # characters of what a library says that are shown
# What libraries say, after the name of the exception, and what that means here; groups of a pattern are filled in.
_WORDS = {
    r"^UnpicklingError": "its weights are a pickle that could run code; choose a model with safetensors weights",
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
    r"(?:no file named|does not appear to have a file named) (\S+?),? ": "it holds no {0}",
    r"size mismatch|ignore_mismatched_sizes": "its weights do not fit its config.json",
    r"[Cc]an't load tokenizer|tokenizer (class|config)|instantiate the backend tokenizer": (
        f"it has no tokenizer that can be read; {TOKENIZER_REMEDY}"
    ),
    r"Torch not compiled with CUDA|No CUDA GPUs|Found no NVIDIA": "there is no GPU here: use --cpu",
    r"trust_remote_code": (
        "it needs code of its own repository, which is not run; choose a model that transformers knows"
    ),
    r"Consistency check failed|Data processing error|CAS service error": (
        "the download was cut off or damaged: run the same command again"
    ),
    r"Invalid metadata in README\.md\.? (.*)": "the header of README.md: {0}",
    r"mixed precision requires|bf16 mixed precision": "this device cannot compute so: choose --mixed_precision no",
    r"valid LoggerType|[Uu]nsupported logging": "a tracker of --report_to is unknown or not installed",
    r"^ImportError: ([^.`(]*)": (
        "it needs a library that is missing ({0}); install it, or choose the model with plain weights"
    ),
    r"^ModuleNotFoundError: No module named '([\w.]+)'": "the package {0} is not installed: pip install {0}",
}
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
    for pattern, words in _WORDS.items():
        if match := re.search(pattern, f"{type(error).__name__}: {text}"):
            return words.format(*match.groups())[: 2 * _LONGEST]
    if isinstance(error, OSError) and error.strerror:
        return reason(error)
    sentence = re.split(r"(?<=[.;]) (?=[A-Z])", text, maxsplit=1)[0].rstrip(".:;")
    if not sentence or _CODE.search(sentence):
        return f"{type(error).__name__}, of which --verbose shows all"
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
        if _NO_TEMPORARY in str(cause):
            return SelOrthoError("no folder for temporary files can be written: set TMPDIR to one with some room")
        fault = as_os_error(cause) if isinstance(cause, Exception) else OSError()
        full = is_full(fault) or _NO_SPACE in str(cause)
        if not full and fault.errno not in _NOT_WRITABLE:
            continue
        path = fault.filename if isinstance(fault.filename, (str, bytes, os.PathLike)) else None
        place = None if path is None else os.path.abspath(os.fsdecode(path))
        variable, folder = min(_places(place).items(), key=lambda item: _room(item[1]), default=("", place))
        said, other = f"cannot write to {folder} ({reason(fault)}):", "that can be written"
        if full:
            said, other = f"the disk of {folder} is full: make room there, or", "on another one"
        if variable:
            return SelOrthoError(f"{said} set {variable} to a folder {other}")
        return SelOrthoError(f"{said} name another folder") if full else None  # else a file of the user's own
    return None


def explained(error: BaseException) -> SelOrthoError | None:
    """Explain what no part of the package has caught, if a user can mend it: disks, folders, the Hub."""
    if stored := storage_error(error):
        return stored
    if isinstance(error, OSError) and error.errno:
        said, remedy = f"cannot use {error.filename}", "name another file or folder"
        if not error.filename:
            said, remedy = "the operating system refuses to go on", "--verbose shows where"
        return SelOrthoError(f"{said}: {reason(error)}; {remedy}")
    if isinstance(error, (hub.HfHubHTTPError.__mro__[1], hub.OfflineModeIsEnabled)):
        return SelOrthoError(f"the Hub cannot be used: {one_line(error)}")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _places(path: str | None) -> dict[str, str]:
    """The folders that libraries write to, by the variable that moves each; with a path, those that it may be of."""
    places = {"HF_DATASETS_CACHE": os.environ.get("HF_DATASETS_CACHE", ""), "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    places = {name: os.path.abspath(os.path.expanduser(place)) for name, place in places.items() if place}
    apart = {name: p for name, p in places.items() if name in os.environ or not _is_in(p, constants.HF_HOME)}
    places = apart | {"HF_HOME": os.path.abspath(constants.HF_HOME)}
    temporary = {"TMPDIR": tempfile.gettempdir()}
    if path is None:
        return places | temporary
    if inside := {name: place for name, place in places.items() if _is_in(path, place)}:
        return inside
    if re.match(r"(tmp|hf_selortho-|matplotlib)", os.path.relpath(path, temporary["TMPDIR"])):
        return temporary  # all else there may be the user's
    return {name: place for name, place in places.items() if _is_in(place, path)}  # while they are made


def _is_in(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _room(folder: str) -> tuple[bool, int]:
    """Whether a folder, or the one that it will be made in, can be written, and the room on its disk."""
    there = next(place for place in (Path(folder), *Path(folder).parents) if os.path.exists(place))
    return there.is_dir() and os.access(there, os.W_OK), shutil.disk_usage(there).free
