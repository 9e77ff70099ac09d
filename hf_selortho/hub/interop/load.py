"""An SAE in whatever format it comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import SelOrthoError
from ...modeling_selortho import SelOrthoSAE
from ...repository_contents import contents_in_words
from ...saved_files import CONFIG, LOOKUP, at_one_commit, find_file
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


def load_sae(name: str | os.PathLike[str], format: str = "auto", **lookup: Any) -> SelOrthoSAE:
    """Load an SAE of ours, of SAELens, of sparsify or of Gemma Scope, in float32, from a folder or the Hub.

    Args:
        name: the folder or repository.
        format: "selortho", "saelens", "sparsify", "gemma_scope", or "auto": what its files are.
        lookup: revision, subfolder, token, cache_dir, local_files_only, ... as for `SelOrthoSAE.from_pretrained`.

    Raises:
        SelOrthoError: there is no such SAE, its files are damaged, or it computes what ours cannot.
    """
    name = os.fspath(name)
    if format not in ("auto", *FORMATS):
        raise SelOrthoError(f"format {format!r}: expected auto or one of {', '.join(FORMATS)}")
    if unknown := lookup.keys() - set(LOOKUP):
        raise SelOrthoError(f"{min(unknown)} says nothing about where an SAE is: expected {', '.join(LOOKUP)}")
    if format == "auto":
        format = format_of(name, lookup)
    if format == "selortho":
        return SelOrthoSAE.from_pretrained(name, **lookup)
    file, read = _READERS[format]
    return read(name, at_one_commit(name, lookup, file)).to_model(name)


def format_of(name: str, lookup: Mapping[str, Any]) -> str:
    """The format of the SAE in a folder or repository, by the names of its files.

    Raises:
        SelOrthoError: it holds none.
    """
    if find_file(name, CONFIG, lookup):
        return "selortho"
    for format, (file, _) in _READERS.items():
        if find_file(name, file, lookup):
            return format
    raise SelOrthoError(f"cannot load the SAE {name!r}: {contents_in_words(name, lookup)}")
