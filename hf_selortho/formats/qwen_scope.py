"""The format of Qwen Scope: layer{N}.sae.pt, a dict of four tensors; the repository's name says model, width and k."""

from __future__ import annotations

import re

from ..errors import SelOrthoError
from .description import Description
from .place import Place

_FILE = r"layer(\d{1,3})\.sae\.pt"
_REPOSITORY = re.compile(r"(?:.*(?:/|--))?SAE-Res-(Qwen[\w.-]+?)-W(\d{1,4})K-L0_(\d{1,5})(?:/.*)?")
_NAMES = {"W_enc": "W_enc.T", "W_dec": "W_dec.T", "b_enc": "b_enc", "b_dec": "b_dec"}


def find(place: Place) -> str | None:
    """Return the file of weights, if this is the format."""
    return place.one(_FILE)


def describe(place: Place, file: str) -> Description:
    """Tell what a TopK SAE is.

    Raises:
        SelOrthoError: the path does not name the repository, which says k.
    """
    name, number = _REPOSITORY.fullmatch(str(place)), re.fullmatch(_FILE, file)
    if name is None or number is None:
        raise SelOrthoError(
            f"{place} holds SAEs of Qwen Scope, but its path does not say k: expected the name of the repository in "
            "it, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50"
        )
    layer = int(number[1])
    facts = {"lm_name": f"Qwen/{name[1]}", "site": "resid_post", "layer": layer, "hook_name": f"model.layers.{layer}"}
    return Description(place.tensors(file), _NAMES, "topk", k=int(name[3]), facts=facts, metadata={"l0": int(name[3])})
