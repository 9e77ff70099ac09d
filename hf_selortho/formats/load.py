"""Load an SAE in whatever format it comes: a table of formats, each known by the name of its weights' file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..checks import name_of
from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.hub import CONFIG, LOOKUP, at_one_commit, find_file, in_subfolder, listed, read_object, within_reach
from ..utils.names import located
from ..utils.sae_formats import FORMATS, is_own, library_of
from . import gemma_scope, saelens, sparsify
from .plain import PlainSae


class Reader(NamedTuple):
    """How a format is known, and read."""

    file: str  # whose presence says that an SAE is in this format
    read: Callable[[str, Mapping[str, Any]], PlainSae]  # of a name and where to look


READERS = {
    "saelens": Reader(saelens.WEIGHTS, saelens.read_saelens),
    "sparsify": Reader(sparsify.WEIGHTS, sparsify.read_sparsify),
    "gemma_scope": Reader(gemma_scope.WEIGHTS, gemma_scope.read_gemma_scope),
}


@dataclass(frozen=True)
class Loaded:
    """An SAE and where it comes from."""

    sae: SelOrthoSAE
    format: str  # one of FORMATS
    revision: str | None  # the commit, where the SAE is on the Hub
    metadata: Mapping[str, Any] = field(default_factory=dict)  # what its library says of it, as it is in the file


def load_sae(name: str | os.PathLike[str], format: str = "auto", **lookup: Any) -> SelOrthoSAE:
    """Load an SAE of ours, of SAELens, of sparsify or of Gemma Scope, in float32, from a folder or the Hub.

    Raw activations (..., d_in) go in and come out of it as with its own library, but for rounding. It can be used,
    evaluated, saved and published like any other; only training would scale its decoder rows to norm 1.

    Args:
        name: the folder or repository.
        format: "selortho", "saelens" (standard, topk or jumprelu, of SAELens 6 or before), "sparsify" (topk),
            "gemma_scope" (JumpReLU), or "auto": what its files are.
        lookup: revision, subfolder, token, cache_dir, local_files_only, ... as for `SelOrthoSAE.from_pretrained`.

    Raises:
        SelOrthoError: there is no such SAE, its files are damaged, or it computes what ours cannot.
    """
    return read_sae(name, format, lookup).sae


def read_sae(name: str | os.PathLike[str], format: str, lookup: Mapping[str, Any]) -> Loaded:
    """Load an SAE with what is known of where it comes from; all files are of the same commit.

    Raises:
        SelOrthoError: as [`load_sae`].
    """
    name = name_of(name, "the SAE")
    if format not in ("auto", *FORMATS):
        raise SelOrthoError(f"format {format!r}: expected auto or one of {', '.join(FORMATS)}")
    if unknown := lookup.keys() - set(LOOKUP):
        raise SelOrthoError(f"{min(unknown)} says nothing about where an SAE is: expected {', '.join(LOOKUP)}")
    name, lookup = located(name, lookup)
    if format == "auto":
        lookup = within_reach(name, lookup)
        format = format_of(name, lookup)
    lookup = at_one_commit(name, lookup, CONFIG if format == "selortho" else READERS[format].file)
    revision = None if os.path.isdir(name) else lookup.get("revision")
    if format == "selortho":
        sae = SelOrthoSAE.from_pretrained(name, dtype=torch.float32, **lookup)
        return Loaded(sae.eval(), format, revision)
    plain = READERS[format].read(name, lookup)
    return Loaded(plain.to_model(name), format, revision, plain.metadata)


def format_of(name: str, lookup: Mapping[str, Any]) -> str:
    """Return the format of the SAE in a folder or repository, by the names of its files.

    A config.json may be that of another model, which some repositories have beside the files of an SAE.

    Raises:
        SelOrthoError: it holds none.
    """
    config = find_file(name, CONFIG, lookup)
    content = read_object(config) if config else {}
    other = library_of(content) and not find_file(name, saelens.CONFIG, lookup)
    if is_own(content, SelOrthoConfig.model_type) or other:
        return "selortho"  # in the latter case it will say what the config is of
    for format, reader in READERS.items():
        if find_file(name, reader.file, lookup):
            return format
    if config:
        return "selortho"
    place = os.path.join(name, lookup.get("subfolder") or "")
    there = f"it holds {listed(os.listdir(place)) or 'nothing'}; " if os.path.isdir(place) else ""
    files = ", ".join(in_subfolder(file, lookup) for file in (CONFIG, *(reader.file for reader in READERS.values())))
    raise SelOrthoError(
        f"cannot load the SAE {name!r}: {there}expected one of {files}, with a subfolder where it has several"
    )
