"""Load an SAE in whatever format it comes: a table of formats, each of which is known by its files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checks import name_of
from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.hub import CONFIG, LOOKUP, at_one_commit, listed
from ..utils.names import located
from ..utils.sae_formats import FORMATS, is_own
from . import (
    circuit_tracer_layer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    lm_saes,
    qwen_scope,
    saelens,
    sparsify,
    torch_dicts,
)
from .description import Description
from .place import Place

logger = logging.getLogger(__name__)


class Reader(NamedTuple):
    """How a format is called and known, and how an SAE in it is told."""

    title: str
    find: Callable[[Place], str | None]  # the file of weights, if the files of a folder are in this format
    describe: Callable[[Place, str], Description]  # of a folder and that file


READERS = {
    "saelens": Reader("SAELens", saelens.find, saelens.describe),
    "sparsify": Reader("sparsify", sparsify.find, sparsify.describe),
    "gemma_scope": Reader("Gemma Scope", gemma_scope.find, gemma_scope.describe),
    "gemma_scope_2": Reader("Gemma Scope 2", gemma_scope_2.find, gemma_scope_2.describe),
    "dictionary_learning": Reader("dictionary_learning", dictionary_learning.find, dictionary_learning.describe),
    "qwen_scope": Reader("Qwen Scope", qwen_scope.find, qwen_scope.describe),
    "circuit_tracer_layer": Reader("circuit-tracer", circuit_tracer_layer.find, circuit_tracer_layer.describe),
    "cross_layer": Reader(
        "cross-layer transcoders", circuit_tracer_layer.find_cross_layer, circuit_tracer_layer.describe_cross_layer
    ),
    "llama_scope": Reader("Llama Scope", lm_saes.find_llama_scope, lm_saes.describe_llama_scope),
    "llamascopium": Reader("Llamascopium", lm_saes.find, lm_saes.describe),
    "hook_z": Reader("attention SAEs of hook_z", torch_dicts.find_hook_z, torch_dicts.describe_hook_z),
    # known by the names of their tensors, which are looked at where no format is known by the names of the files
    "goodfire": Reader("Goodfire", torch_dicts.find_goodfire, torch_dicts.describe_goodfire),
    "qresearch": Reader("qresearch", torch_dicts.find_qresearch, torch_dicts.describe_qresearch),
    "openai": Reader("OpenAI's sparse_autoencoder", torch_dicts.find_openai, torch_dicts.describe_openai),
}
_BY_TENSORS = ("goodfire", "qresearch", "openai")
# What is known and not read, by a file, with the reason.
_REFUSED = {
    "latest_ckpt.safetensors": "a temporal SAE, whose features of a token depend on those of the tokens before it",
    "sae_weights.dcp": "a distributed checkpoint of torch, a pickle, which can run code: save it as safetensors",
}
_PICKLES = (".bin", ".pkl", ".pickle", ".ckpt", ".joblib")


@dataclass(frozen=True)
class Loaded:
    """An SAE and where it comes from."""

    sae: SelOrthoSAE
    format: str  # one of FORMATS
    revision: str | None  # the commit, where the SAE is on the Hub
    metadata: Mapping[str, Any] = field(default_factory=dict)  # what its library says of it, as it is in the file


def load(
    name: str | os.PathLike[str], format: str = "auto", *, approximate: bool = False, **lookup: Any
) -> SelOrthoSAE:
    """Load an SAE or transcoder of ours or of another library, in float32, from a folder or the Hub.

    Raw activations (..., d_in) go in and come out of it as with its own library, but for rounding. It can be used,
    evaluated, saved and published like any other; only training would scale its decoder rows to norm 1.

    Args:
        name: a folder, a file of weights or a repository, owner/name[@revision][/subfolder].
        format: one of `FORMATS`, or "auto": what its files are.
        approximate: read what cannot be read exactly, and say in a warning what is lost.
        lookup: revision, subfolder, token, cache_dir, local_files_only, ... as for `SelOrthoSAE.from_pretrained`.

    Raises:
        SelOrthoError: there is no such SAE, its files are damaged or of two formats, or it computes what ours cannot.
    """
    return read_sae(name, format, lookup, approximate).sae


def read_sae(name: str | os.PathLike[str], format: str, lookup: Mapping[str, Any], approximate: bool = False) -> Loaded:
    """Load an SAE with what is known of where it comes from; all files are of the same commit.

    Raises:
        SelOrthoError: as [`load`].
    """
    format, place, description = describe_sae(name, format, lookup, approximate)
    revision = None if os.path.isdir(place.name) else place.lookup.get("revision")
    if description is None:
        sae = SelOrthoSAE.from_pretrained(place.name, dtype=torch.float32, **place.lookup)
        return Loaded(sae.eval(), format, revision)
    if description.lost:
        logger.warning("%s is not read exactly: %s", place, description.lost)
    return Loaded(description.plain(place.name).to_model(place.name), format, revision, description.metadata)


def describe_sae(
    name: str | os.PathLike[str],
    format: str,
    lookup: Mapping[str, Any],
    approximate: bool = False,
    headers_only: bool = False,
) -> tuple[str, Place, Description | None]:
    """Tell format, place and description of an SAE, without its weights; no description of one of ours.

    Args:
        name, format, lookup, approximate: as for [`load`].
        headers_only: of weights on the Hub, the headers are enough, where these can be had alone.

    Raises:
        SelOrthoError: as [`load`].
    """
    name = name_of(name, "the SAE")
    if format not in ("auto", *FORMATS):
        raise SelOrthoError(f"format {format!r}: expected auto or one of {', '.join(FORMATS)}")
    if unknown := lookup.keys() - set(LOOKUP):
        raise SelOrthoError(f"{min(unknown)} says nothing about where an SAE is: expected {', '.join(LOOKUP)}")
    name, lookup = located(name, lookup)
    place = Place.of(name, lookup, approximate=approximate, headers_only=headers_only)
    if format == "auto":
        format, file = _format_of(place)
    elif format == "selortho":
        file = CONFIG
    elif (found := READERS[format].find(place)) is None:
        raise SelOrthoError(f"{place} holds no SAE in the format {format}: leave it out, or choose another folder")
    else:
        file = found
    known_by = CONFIG if headers_only and file.endswith(".safetensors") and CONFIG in place.names else file
    place = replace(place, lookup=at_one_commit(name, place.lookup, known_by))
    return format, place, None if format == "selortho" else READERS[format].describe(place, file)


def _format_of(place: Place) -> tuple[str, str]:
    """Return format and file of weights of the SAE in a folder, by its files.

    A config.json may be that of another model, which some repositories have beside the files of an SAE.

    Raises:
        SelOrthoError: it holds none, or those of two formats.
    """
    found = {"selortho": CONFIG} if is_own(place.config, SelOrthoConfig.model_type) else {}
    for by_tensors in (False, True):
        if not found:
            readers = {key: reader for key, reader in READERS.items() if (key in _BY_TENSORS) == by_tensors}
            found = {key: file for key, reader in readers.items() if (file := reader.find(place))}
    if place.file in found.values():
        found = {key: file for key, file in found.items() if file == place.file}
    if len(found) > 1:
        titles = " and ".join(READERS[key].title for key in found)
        raise SelOrthoError(f"{place} holds the files of {titles}: say which with format, {' or '.join(found)}")
    if found:
        return next(iter(found.items()))
    there = "".join(f"; {file} is of {why}" for file, why in _REFUSED.items() if file in place.names)
    if pickles := [name for name in place.names if Path(name).suffix in _PICKLES]:
        there += f"; {listed(pickles, 3)} can run code when it is loaded and is never read: ask for safetensors"
    if place.config:
        return "selortho", CONFIG  # which says what the config is of
    raise SelOrthoError(
        f"cannot load the SAE {str(place)!r}: it holds {listed(place.names) or 'nothing'}{there}; expected {CONFIG}, "
        f"or the files of {', '.join(reader.title for reader in READERS.values())}, with a subfolder "
        "where it has several"
    )


load_sae = load
