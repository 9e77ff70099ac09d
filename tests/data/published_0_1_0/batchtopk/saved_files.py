"""The files of a saved SAE, in a folder or a repository of the Hub: checked before anything is made of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConfigError, SelOrthoError
from .hub_access import LOOKUP_ERRORS, hub_error, patiently, resolve_commit, unreachable
from .repository_contents import contents_in_words, listed
from .safe_paths import is_commit, snapshot_of, target_outside

CONFIG = "config.json"
LOOKUP = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_LARGEST_JSON = _LARGEST_HEADER = 1 << 20  # bytes; an SAE's have a few thousand
_DTYPES = ("BF16", "F16", "F32", "F64")  # as safetensors calls them
_SHOWN = 5  # names in a message
_HASHES = {64: hashlib.sha256, 40: hashlib.sha1}  # by the number of hexadecimal digits


def find_file(name: str, file: str, lookup: Mapping[str, Any]) -> Path | None:
    """A file of a local folder, or of a repository of the Hub from which it is downloaded; None if there is none.

    Args:
        name: the folder or the repository.
        file: its name in it.
        lookup: those arguments of `from_pretrained` that say where to look ([`LOOKUP`]).

    Raises:
        SelOrthoError: the repository or its revision is unknown, gives no access or cannot be reached, or the file is a
            link that leads out of the folder, or its bytes are not those of the Hub.
    """
    if os.path.isdir(name):
        path = Path(name, lookup.get("subfolder") or "", file)
        if not os.path.isfile(path):
            return None
        if outside := target_outside(Path(name), path):
            raise SelOrthoError(f"{path} leads out of {name}, to {outside}: put the file itself into the folder")
        check_download(path)
        return path
    where = {key: value for key, value in lookup.items() if key != "proxies"}  # a setting of the client by now
    try:
        path = Path(patiently(lambda: hf_hub_download(name, file, **where)))
    except LocalEntryNotFoundError as error:
        if _cached(name, file, lookup) is _CACHED_NO_EXIST:
            return None
        raise unreachable("SAE", name, local_only=bool(lookup.get("local_files_only"))) from error
    except EntryNotFoundError:
        return None
    except LOOKUP_ERRORS as error:
        raise hub_error(error, "SAE", name, lookup.get("revision"), lookup.get("token")) from error
    check_download(path)
    return path


def at_one_commit(name: str, lookup: Mapping[str, Any], file: str = CONFIG) -> dict[str, Any]:
    """`lookup` with the commit that its revision stands for now, so that all files are those of the same commit."""
    lookup = within_reach(name, lookup, file)
    config = find_file(name, file, lookup)
    snapshot = None if config is None or os.path.isdir(name) else snapshot_of(config)
    return dict(lookup) if snapshot is None else {**lookup, "revision": snapshot.name}


def within_reach(name: str, lookup: Mapping[str, Any], file: str | Sequence[str] = CONFIG) -> dict[str, Any]:
    """`lookup`, for the local cache alone if the Hub does not answer: its client would go on trying for half a minute.

    Args:
        name: the folder or the repository.
        lookup: see [`find_file`].
        file: which has to be in the cache then, or files of which one has to be.

    Raises:
        SelOrthoError: the Hub answers that there is no such repository or revision, or it is needed and does not.
    """
    found = dict(lookup)
    if os.path.isdir(name) or lookup.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return found
    revision, token = lookup.get("revision"), lookup.get("token")
    files = (file,) if isinstance(file, str) else file
    known = any(isinstance(_cached(name, one, lookup), str) for one in files)
    if known and is_commit(revision):  # it will never change
        return found
    if resolve_commit("SAE", name, revision, token) is None:
        if not known:
            raise unreachable("SAE", name)
        found["local_files_only"] = True
    return found


def _cached(name: str, file: str, lookup: Mapping[str, Any]) -> Any:
    """Path of a file in the local cache, or _CACHED_NO_EXIST if the cache knows that there is none; else None."""
    try:
        return try_to_load_from_cache(name, in_subfolder(file, lookup), lookup.get("cache_dir"), lookup.get("revision"))
    except ValueError:  # an ill-formed id
        return None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ConfigError: it holds something else, or more than a megabyte.
        SelOrthoError: it cannot be read.
    """
    remedy = "download it again, or take it from the run's folder"
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise ConfigError(f"{path} has {size:,} bytes, expected at most {_LARGEST_JSON:,}; {remedy}")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise SelOrthoError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a JSON {type(content).__name__}, expected an object; {remedy}")
    return content


def read_weights(
    name: str, shapes: Mapping[str, tuple[int, ...]], lookup: Mapping[str, Any], variant: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a saved SAE on the CPU, from safetensors only, once all of them are known to be what they should.

    Args:
        name: the folder or the repository.
        shapes: of every tensor, by name.
        lookup: see [`find_file`].
        variant: of the file names, as in `from_pretrained`.

    Raises:
        SelOrthoError: there is no such file, it is damaged, or holds other names, shapes or dtypes than expected.
    """
    return read_tensors(name, _weight_files(name, lookup, variant), shapes)


def read_tensors(name: str, paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of safetensors files on the CPU, once all of them are known to be what they should.

    Args:
        name: of the SAE, for messages.
        paths: the files, which hold each tensor once.
        shapes: of every tensor, by name.

    Raises:
        SelOrthoError: a file is damaged, or the tensors have other names, shapes or dtypes than expected.
    """
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for path in paths:
            try:
                _check_header_length(path)
                files[path] = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                fault = f"{path} is damaged or incomplete ({_brief(error)})"
                raise SelOrthoError(f"{fault}; download it again, or use an earlier checkpoint") from error
        _check_tensors(name, files, shapes)
        return {key: file.get_tensor(key) for file in files.values() for key in file.keys()}


def check_download(path: Path) -> None:
    """Compare a file of huggingface_hub's cache with the hash under which the Hub keeps it.

    The cache calls a file what the Hub has named as its hash: sha256 of the bytes for large files, such as weights, and
    git's sha1 for small ones. huggingface_hub compares sizes alone. Files of other folders pass.

    Raises:
        SelOrthoError: the bytes are others.
    """
    target = path.resolve()
    if snapshot_of(path) is None or target.parent.name != "blobs" or len(target.name) not in _HASHES:
        return
    digest = _HASHES[len(target.name)]()
    if digest.name == "sha1":
        digest.update(f"blob {target.stat().st_size}\0".encode())
    with target.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != target.name:
        raise SelOrthoError(
            f"{path} was damaged on its way or on this disk: its {digest.name} is {digest.hexdigest()[:12]}..., the "
            f"Hub's is {target.name[:12]}...; load it again with force_download=True"
        )


def _weight_files(name: str, lookup: Mapping[str, Any], variant: str | None) -> list[Path]:
    infix = f".{variant}" if variant else ""
    single, index = f"model{infix}.safetensors", f"model.safetensors.index{infix}.json"
    if path := find_file(name, single, lookup):
        return [path]
    if path := find_file(name, index, lookup):
        return [_part(name, part, path, lookup) for part in _parts(path)]
    raise SelOrthoError(
        f"cannot load the SAE {name!r}: it holds no {in_subfolder(single, lookup)}; other formats, such as "
        "pytorch_model.bin, can run code when they are loaded and are never read: save the SAE with save_pretrained"
    )


def in_subfolder(file: str, lookup: Mapping[str, Any]) -> str:
    """Path of a file from the top of its repository."""
    return f"{folder}/{file}" if (folder := lookup.get("subfolder")) else file


def no_such_sae(name: str, lookup: Mapping[str, Any]) -> SelOrthoError:
    """The error for a folder or repository without the config of an SAE; it says what is there instead."""
    return SelOrthoError(
        f"cannot load the SAE {name!r}: it holds no {in_subfolder(CONFIG, lookup)}; {contents_in_words(name, lookup)}"
    )


def _parts(index: Path) -> list[str]:
    """The files that an index of weights names."""
    found = read_object(index).get("weight_map")
    parts = set(map(str, found.values())) if isinstance(found, dict) else set()
    wrong = [part for part in parts if Path(part).name != part or not part.endswith(".safetensors")]
    if wrong or not parts:
        said = f"names {wrong[0][:100]!r}" if wrong else "names no file"
        raise SelOrthoError(f"{index} {said}: expected safetensors files beside it; download the SAE again")
    return sorted(parts)


def _part(name: str, part: str, index: Path, lookup: Mapping[str, Any]) -> Path:
    path = find_file(name, part, lookup)
    if path is None:
        raise SelOrthoError(f"{index} names {part[:100]!r}, which is missing: download the SAE again")
    return path


def _check_header_length(path: Path) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LARGEST_HEADER:
        raise SelOrthoError(
            f"{path} has a header of {length:,} bytes, expected at most {_LARGEST_HEADER:,}: these are not the weights "
            "of an SAE, or damaged ones; download them again"
        )


def _check_tensors(name: str, files: Mapping[Path, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    found: dict[str, Path] = {}
    for path, file in files.items():
        for key in file.keys():
            header = file.get_slice(key)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            if key in found:
                raise SelOrthoError(f"{key[:100]} is in {found[key]} and in {path}: take all files from the same run")
            if key in shapes and shape != shapes[key]:
                raise SelOrthoError(
                    f"{path}: {key} has the shape {shape}, d_in and d_sae of the config give {shapes[key]}: the "
                    "weights do not fit its config.json; take both files from the same run"
                )
            if key in shapes and dtype not in _DTYPES:
                raise SelOrthoError(
                    f"{path}: {key} is of dtype {dtype}, expected one of {', '.join(_DTYPES)}; convert the weights to "
                    "float32 and save them again"
                )
            found[key] = path
    missing, unexpected = shapes.keys() - found.keys(), found.keys() - shapes.keys()
    if missing or unexpected:
        faults = {"missing": missing, "unexpected": unexpected}
        said = "; ".join(f"{kind}: {listed(names, _SHOWN)}" for kind, names in faults.items() if names)
        raise SelOrthoError(f"{name} does not hold the weights of a SelOrthoSAE ({said}): is it another kind of model?")


def _brief(error: Exception) -> str:
    """The message of an exception on one line, without the whole file that it may quote."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
