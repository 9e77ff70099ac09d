"""Find the files of an SAE in a folder or on the Hub, and translate Hub errors into one-line messages."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import _CACHED_NO_EXIST, HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open

from ..errors import ConfigError, SelOrthoError
from .files import target_outside
from .library_errors import no_answer, one_line, storage_error
from .names import Kind

logger = logging.getLogger(__name__)

T = TypeVar("T")
CONFIG = "config.json"
# The arguments of `from_pretrained` that say where to look; functions here take them as `lookup`.
LOOKUP = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
ATTEMPTS = 4  # at what a busy server answers
_OFFICIAL: dict[str, str] = {}  # how the Hub writes a name that was typed in other cases
_WHY: dict[str, str] = {}  # the Hub did not answer, by what it was asked for
_PAUSE = 1.0  # seconds before the second attempt; each further one waits twice as long
_LARGEST_JSON = 1 << 20  # bytes; a config has a few thousand
_DTYPES = ("BF16", "F16", "F32", "F64")  # as safetensors calls them
_COMMIT = re.compile(r"[0-9a-f]{40}")

# What looking something up on the Hub may raise. Connection errors are no OSErrors, but share a parent with
# HfHubHTTPError: the error of the HTTP library below, which differs between the versions of huggingface_hub.
# ValueError: an ill-formed id. RuntimeError: Xet's, and the client's own word for an upload that failed.
LOOKUP_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, hub.HfHubHTTPError.__mro__[1], RuntimeError)
_BROKEN_OFF = {"RemoteProtocolError", "ReadError", "WriteError", "CloseError"}  # of that library: it was connected


def is_commit(revision: object) -> bool:
    """Return whether a revision is a commit of the Hub, neither a branch or tag nor the fingerprint of a folder."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def listed(names: Iterable[str], most: int = 8) -> str:
    """Join names in order with commas, the first few of many."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(name[:100] for name in ordered[:most]) + more


def patiently(request: Callable[[], T]) -> T:
    """Make a request again, a few times, while the Hub is busy or the connection breaks off.

    The client does so for some of its requests only: not for what it asks about a repository, nor while it downloads.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return request()
        except LOOKUP_ERRORS as error:
            if not is_busy(error) and type(error).__name__ not in _BROKEN_OFF:
                raise
            pause(attempt, error)
    return request()


def is_busy(error: Exception) -> bool:
    """Return whether the Hub has answered with a status that may pass (429, or above 499)."""
    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else 0
    return status == 429 or status >= 500


def pause(attempt: int, error: Exception) -> None:
    """Wait after the attempt of this number, from 0, that ended in an error."""
    seconds = _PAUSE * 2**attempt
    logger.info("the Hub does not answer (%s); again in %.0f s", no_answer(error), seconds)
    time.sleep(seconds)


def resolve_commit(kind: Kind, name: str, revision: str | None, token: str | None = None) -> str | None:
    """Return the commit that a branch or tag stands for, or None where the Hub cannot be reached.

    Asked once, before a download: where nobody answers, each download would go on trying for half a minute.

    Raises:
        SelOrthoError: the Hub answers that there is no such repository or revision, or gives no access to it.
    """
    api = HfApi(token=token)
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        info = patiently(lambda: ask(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT))
        if str(info.id).lower() == name.lower():
            _OFFICIAL[name] = str(info.id)
        if kind == "dataset" and info.gated:  # everybody sees its page; `datasets` loses why it got no further
            api.auth_check(name, repo_type=kind)
        return info.sha
    except LOOKUP_ERRORS as error:
        refused = isinstance(error, hub.HfHubHTTPError) and error.response.status_code < 500
        if refused or isinstance(error, hub.HFValidationError):
            raise hub_error(error, kind, name, revision) from error
        _WHY[name] = no_answer(error)
        logger.info('the Hub does not answer (%s), looking for "%s" in the local cache', _WHY[name], name)
        return None


def official_name(name: str) -> str:
    """Return the name of a repository as the Hub writes it, if it has been asked: it minds no upper and lower case."""
    return _OFFICIAL.get(name, name)


def hub_error(error: Exception, kind: Kind, name: str, revision: str | None = None) -> SelOrthoError:
    """Explain what the Hub client raised while it looked for `name` at `revision`."""
    if stored := storage_error(error):
        return stored
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    said = f'{kind} "{name}"'
    if isinstance(error, hub.LocalTokenNotFoundError):
        return SelOrthoError(f"{said} needs an access token: run `hf auth login` or set HF_TOKEN")
    if isinstance(error, hub.GatedRepoError):  # a kind of RepositoryNotFoundError
        account = "with the account of your token (`hf auth login` or HF_TOKEN)"
        return SelOrthoError(f"{said} is gated: accept its terms at {page}, {account}")
    if isinstance(error, (hub.RepositoryNotFoundError, hub.HFValidationError)):
        return SelOrthoError(
            f"unknown {said}: neither on the Hub nor a local path; check the spelling, or, if it is private, run "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return SelOrthoError(f'{said} has no revision "{revision}": choose a branch, tag or commit of {page}/tree/main')
    if isinstance(error, hub.RemoteEntryNotFoundError):
        file = re.search(r"/resolve/[^/]+/([^?]+)", str(error.response.url))
        return SelOrthoError(
            f'"{name}" on the Hub holds no {kind} that can be read: no {file[1] if file else "such file"}'
        )
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, hub.DisabledRepoError):
            return SelOrthoError(f"{said} is disabled on the Hub: choose another one")
        if status in (401, 403):
            remedy = "check your token (`hf auth login`, HF_TOKEN)"
            return SelOrthoError(f"the Hub refused {said} with HTTP status {status}: {remedy}")
        return SelOrthoError(f"the Hub gives no {said}: {no_answer(error)}; try again later")
    if (broken := one_line(error)).startswith("the download"):
        return SelOrthoError(f"{said}: {broken}")
    _WHY.setdefault(name, no_answer(error))
    return unreachable(kind, name)


def unreachable(kind: Kind, name: str) -> SelOrthoError:
    """Return the error for "not in the local cache, and the Hub does not answer or was not to be asked"."""
    offline = constants.HF_HUB_OFFLINE
    why = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the Hub cannot be reached, or was not to be"
    why += f" ({_WHY[name]})" if name in _WHY and not offline else ""
    other = "" if kind == "SAE" else ", or use `--preset demo`, which needs no Hub"
    return SelOrthoError(
        f'{kind} "{name}" is not in the local cache and {why}: check the connection and the spelling{other}'
    )


def in_subfolder(file: str, lookup: Mapping[str, Any]) -> str:
    """Return the path of a file from the top of its repository."""
    return f"{folder}/{file}" if (folder := lookup.get("subfolder")) else file


def find_file(name: str, file: str, lookup: Mapping[str, Any]) -> Path | None:
    """Return a file of a folder, or of a repository of the Hub from which it is downloaded; None if there is none.

    Raises:
        SelOrthoError: the repository or its revision is unknown, gives no access or cannot be reached, or the file is a
            link that leads out of the folder.
    """
    if os.path.isdir(name):
        path = Path(name, in_subfolder(file, lookup))
        if not os.path.isfile(path):
            return None
        if outside := target_outside(Path(name), path):
            raise SelOrthoError(f"{path} leads out of {name}, to {outside}: put the file itself into the folder")
        return path
    where = {key: value for key, value in lookup.items() if key != "proxies"}  # a setting of the client by now
    try:
        return Path(patiently(lambda: hf_hub_download(name, file, **where)))
    except hub.LocalEntryNotFoundError as error:
        cached = try_to_load_from_cache(name, in_subfolder(file, lookup), where.get("cache_dir"), where.get("revision"))
        if cached is _CACHED_NO_EXIST:
            return None
        raise unreachable("SAE", name) from error
    except hub.EntryNotFoundError:
        return None
    except LOOKUP_ERRORS as error:
        raise hub_error(error, "SAE", name, where.get("revision")) from error


def within_reach(name: str, lookup: Mapping[str, Any]) -> dict[str, Any]:
    """Return `lookup`, restricted to the local cache if the Hub does not answer.

    Raises:
        SelOrthoError: as [`resolve_commit`].
    """
    asks_nobody = os.path.isdir(name) or lookup.get("local_files_only") or constants.HF_HUB_OFFLINE
    revision, token = lookup.get("revision"), lookup.get("token")
    if asks_nobody or is_commit(revision) or resolve_commit("SAE", name, revision, token) is not None:
        return dict(lookup)
    return {**lookup, "local_files_only": True}


def at_one_commit(name: str, lookup: Mapping[str, Any], file: str = CONFIG) -> dict[str, Any]:
    """Return `lookup` with the commit that its revision stands for, so that all files come from the same one.

    By way of a file, not of the commit alone: so the cache learns what the branch stands for when there is no network.

    Raises:
        SelOrthoError: as [`find_file`].
    """
    lookup = within_reach(name, lookup)
    path = find_file(name, file, lookup)
    if path is None or os.path.isdir(name):
        return lookup
    return {**lookup, "revision": path.parents[in_subfolder(file, lookup).count("/")].name}  # snapshots/<commit>/...


def read_object(path: Path, largest: int = _LARGEST_JSON) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ConfigError: it holds something else, or more bytes than the `largest`, a megabyte.
        SelOrthoError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= largest else None
    except OSError as error:
        raise SelOrthoError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({one_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object of at most {largest:,} bytes; download it again")
    return content


def find_config(name: str, lookup: Mapping[str, Any]) -> Path:
    """Return the config.json of an SAE; raises as [`find_file`], and if there is none."""
    path = find_file(name, CONFIG, within_reach(name, lookup))
    if path is None:
        raise SelOrthoError(
            f"cannot load the SAE {name!r}: it holds no {in_subfolder(CONFIG, lookup)}; name the folder or repository "
            "of an SAE, with a subfolder where it has several; hf_selortho.load reads other formats"
        )
    return path


def weight_files(name: str, lookup: Mapping[str, Any], variant: str | None = None) -> list[Path]:
    """Return the safetensors files of an SAE, one or those that its index names, of a variant of the file names.

    Raises:
        SelOrthoError: there are none, or the index is damaged or names other files than safetensors beside it.
    """
    infix = f".{variant}" if variant else ""
    single = f"model{infix}.safetensors"
    if path := find_file(name, single, lookup):
        return [path]
    index = find_file(name, f"model.safetensors.index{infix}.json", lookup)
    if index is None:
        raise SelOrthoError(
            f"cannot load the SAE {name!r}: it holds no {in_subfolder(single, lookup)}; other formats, such as "
            "pytorch_model.bin, can run code when they are loaded and are never read: save the SAE with save_pretrained"
        )
    content = read_object(index)
    weight_map = content.get("weight_map")
    parts = list(weight_map.values()) if isinstance(weight_map, dict) else []
    beside = all(isinstance(part, str) and re.fullmatch(r"[^/\\]+\.safetensors", part) for part in parts)
    if not parts or not beside or not isinstance(content.get("metadata"), dict):
        raise SelOrthoError(f"{index} does not name safetensors files beside it: download the SAE again")
    paths = {part: find_file(name, part, lookup) for part in sorted(set(parts))}
    if missing := [part for part, path in paths.items() if path is None]:
        raise SelOrthoError(f"{index} names {listed(missing)}, which is missing: download the SAE again")
    return [path for path in paths.values() if path is not None]


def safetensors_headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read shape and dtype of each tensor of a safetensors file; raises a SelOrthoError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}
            return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
    except (SafetensorError, OSError) as error:
        fault = f"{path} is damaged or incomplete ({one_line(error)})"
        raise SelOrthoError(f"{fault}; download it again, or use an earlier checkpoint") from error


def check_tensors(name: str, paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the headers of safetensors files with the shapes that are expected, before anything is allocated.

    Raises:
        SelOrthoError: a file is damaged, or the tensors have other names, shapes or dtypes.
    """
    found = [(path, safetensors_headers(path)) for path in paths]
    check_names(name, {key for _, headers in found for key in headers}, shapes)
    for path, headers in found:
        check_shapes(path, headers, shapes)


def check_names(name: str, found: Set[str], expected: Iterable[str]) -> None:
    """Compare the names of tensors; raise a SelOrthoError if one is missing or more than are expected."""
    faults = {"missing": set(expected) - found, "unexpected": found - set(expected)}
    if any(faults.values()):
        said = "; ".join(f"{fault}: {listed(names, 5)}" for fault, names in faults.items() if names)
        raise SelOrthoError(f"{name} does not hold the weights of its config ({said}): is it another kind of model?")


def check_shapes(
    path: Path, headers: Mapping[str, tuple[tuple[int, ...], str]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare shapes and dtypes of the tensors of a file; raise a SelOrthoError if one is another."""
    for key, (shape, dtype) in headers.items():
        fault = ""
        if shape != shapes[key]:
            fault = f"has the shape {shape}, d_in and d_sae of the config give {shapes[key]}"
        elif dtype not in _DTYPES:
            fault = f"is of dtype {dtype}, expected one of {', '.join(_DTYPES)}"
        if fault:
            raise SelOrthoError(f"{path}: {key} {fault}; take config.json and weights from the same run")
