"""An SAE in whatever format it comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.hub import CONFIG, LOOKUP, at_one_commit, find_file, in_subfolder, read_object, within_reach
from . import gemma_scope, saelens, sparsify
from .gemma_scope import read_gemma_scope
from .plain import PlainSae
from .saelens import read_saelens
from .sparsify import read_sparsify

_READERS: dict[str, tuple[str, Callable[[str, Mapping[str, Any]], PlainSae]]] = {
    "saelens": (saelens.WEIGHTS, read_saelens),
    "sparsify": (sparsify.WEIGHTS, read_sparsify),
    "gemma_scope": (gemma_scope.WEIGHTS, read_gemma_scope),
}
FORMATS = ("selortho", *_READERS)


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
        format: "selortho", "saelens", "sparsify", "gemma_scope", or "auto": what its files are.
        lookup: revision, subfolder, token, cache_dir, local_files_only, ... as for `SelOrthoSAE.from_pretrained`.

    Raises:
        SelOrthoError: there is no such SAE, its files are damaged, or it computes what ours cannot.
    """
    return read_sae(name, format, lookup).sae


def load_saelens(name: str | os.PathLike[str], **lookup: Any) -> SelOrthoSAE:
    """[`load_sae`] of cfg.json and sae_weights.safetensors: standard, topk or jumprelu, of SAELens 6 or before."""
    return load_sae(name, "saelens", **lookup)


def load_sparsify(name: str | os.PathLike[str], **lookup: Any) -> SelOrthoSAE:
    """[`load_sae`] of cfg.json and sae.safetensors, with the activation function topk."""
    return load_sae(name, "sparsify", **lookup)


def load_gemma_scope(name: str | os.PathLike[str], **lookup: Any) -> SelOrthoSAE:
    """[`load_sae`] of params.npz, a JumpReLU SAE."""
    return load_sae(name, "gemma_scope", **lookup)


def read_sae(name: str | os.PathLike[str], format: str, lookup: Mapping[str, Any]) -> Loaded:
    """What [`load_sae`] loads, and what is known of where it comes from; all files are of the same commit.

    Raises:
        SelOrthoError: as [`load_sae`].
    """
    name = os.fspath(name)
    if format not in ("auto", *FORMATS):
        raise SelOrthoError(f"format {format!r}: expected auto or one of {', '.join(FORMATS)}")
    if unknown := lookup.keys() - set(LOOKUP):
        raise SelOrthoError(f"{min(unknown)} says nothing about where an SAE is: expected {', '.join(LOOKUP)}")
    if any("\0" in part for part in (name, *lookup.values()) if isinstance(part, str)):
        raise SelOrthoError(
            f"{name!r:.200} or where it is looked for holds a NUL byte: give a folder or an id of the Hub"
        )
    if format == "auto":
        lookup = within_reach(name, lookup)
        format = format_of(name, lookup)
    file = CONFIG if format == "selortho" else _READERS[format][0]
    lookup = at_one_commit(name, lookup, file)
    revision = None if os.path.isdir(name) else lookup.get("revision")
    if format == "selortho":
        sae = SelOrthoSAE.from_pretrained(name, dtype=torch.float32, **lookup)
        return Loaded(sae.eval(), format, revision)
    plain = _READERS[format][1](name, lookup)
    return Loaded(plain.to_model(name), format, revision, plain.metadata)


def format_of(name: str, lookup: Mapping[str, Any]) -> str:
    """The format of the SAE in a folder or repository, by the names of its files.

    A config.json may be that of another model, which some repositories have beside the files of an SAE.

    Raises:
        SelOrthoError: it holds none.
    """
    config = find_file(name, CONFIG, lookup)
    if config and read_object(config).get("model_type", SelOrthoConfig.model_type) == SelOrthoConfig.model_type:
        return "selortho"
    for format, (file, _) in _READERS.items():
        if find_file(name, file, lookup):
            return format
    if config:
        return "selortho"  # it will say what the config is of
    files = ", ".join(in_subfolder(file, lookup) for file in (CONFIG, *(file for file, _ in _READERS.values())))
    raise SelOrthoError(f"cannot load the SAE {name!r}: expected one of {files}, with a subfolder where it has several")
