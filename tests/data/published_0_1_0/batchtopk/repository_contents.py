"""What a folder or a repository holds where an SAE was looked for in vain, in words."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi

from .hub_access import LOOKUP_ERRORS

_SHOWN = 8  # names in a message
_LOOKED_AT = 2000  # files of a folder
_DEPTH = 4  # of the folders below it
# What other libraries call the files of an SAE: all of these names beside one another.
_FORMATS = {
    "SAELens": {"cfg.json", "sae_weights.safetensors"},
    "sparsify": {"cfg.json", "sae.safetensors"},
    "Gemma Scope": {"params.npz"},
}


def listed(names: Iterable[str], most: int = _SHOWN) -> str:
    """Names in order, separated by commas, the first few of many."""
    shown = sorted(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(name[:100] for name in shown[:most]) + more


def contents_in_words(name: str, lookup: Mapping[str, Any]) -> str:
    """What there is instead, and what to do with it.

    Args:
        name: the folder or the repository.
        lookup: see `saved_files.find_file`; "subfolder" is what was looked into.
    """
    files = _files(name, lookup)
    if not files:
        return "expected a folder or repository of one"
    folders: dict[str, set[str]] = {}
    for file in map(PurePosixPath, files):
        folders.setdefault(str(file.parent), set()).add(file.name)
    saes = [folder for folder in folders if {"config.json", "model.safetensors"} <= folders[folder]]
    if "." in saes:
        return "its SAE is at the top: leave the sub-folder out" + _choose([folder for folder in saes if folder != "."])
    if saes:
        return f"it has SAEs in sub-folders{_choose(saes)}"
    for kind, names in _FORMATS.items():
        found = [folder for folder in folders if names <= folders[folder]]
        if found:
            where = "" if found == ["."] else f" in {listed(found)}"
            return f"it has files of {kind}{where}: hf_selortho.hub.interop.load_sae reads those"
    return f"it holds {listed(files)}"


def _choose(folders: Sequence[str]) -> str:
    return f": {listed(folders)}; choose one, as in subfolder={min(folders)!r}" if folders else ""


def _files(name: str, lookup: Mapping[str, Any]) -> list[str]:
    """Paths of the files; none where the Hub does not tell."""
    if os.path.isdir(name):
        return list(itertools.islice(_local_files(Path(name)), _LOOKED_AT))
    if lookup.get("local_files_only"):
        return []
    try:
        return HfApi(token=lookup.get("token")).list_repo_files(name, revision=lookup.get("revision"))
    except LOOKUP_ERRORS:
        return []


def _local_files(root: Path) -> Iterator[str]:
    for folder, below, names in os.walk(root):
        place = Path(folder).relative_to(root)
        below[:] = sorted(below) if len(place.parts) < _DEPTH else []
        yield from (str(PurePosixPath(*place.parts, file)) for file in sorted(names))
