"""The format of Gemma Scope: params.npz, in a folder that says layer, width and L0; JumpReLU SAEs and transcoders."""

from __future__ import annotations

import logging
import re
from typing import Any

from .description import LENS, Description, factors_of_one
from .place import Place

logger = logging.getLogger(__name__)

WEIGHTS = "params.npz"
_REPOSITORY = re.compile(r"(?:.*(?:/|--))?gemma-scope-(2b|9b|27b)-(pt|it)-(res|att|mlp|transcoders)(?:[-/].*)?")
_FOLDER = re.compile(r"(?:.*/)?layer_(\d{1,3})/width_\w+/\w+")
_EMBEDDING = re.compile(r"(?:.*/)?embedding/width_\w+/\w+")
_SITES = {
    "res": {"site": "resid_post", "hook_name": "model.layers.{}"},
    "att": {"site": "attn_z", "hook_name": "model.layers.{}.self_attn.o_proj", "hook_side": "input"},
    "mlp": {"site": "mlp_out", "hook_name": "model.layers.{}.post_feedforward_layernorm"},
    "transcoders": {
        "hook_name": "blocks.{}.ln2.hook_normalized",
        "target": "mlp_out",
        "target_hook_name": "model.layers.{}.post_feedforward_layernorm",
    },
}


def find(place: Place) -> str | None:
    """Return the file of weights, if this is the format."""
    return place.has(WEIGHTS)


def describe(place: Place, file: str) -> Description:
    """Tell what a JumpReLU SAE or transcoder of Gemma Scope is."""
    tensors, facts = place.tensors(file), facts_of(str(place))
    lower = "w_enc" in tensors.headers
    names = {name: name.lower() if lower and name[0] == "W" else name for name in (*LENS, "threshold")}
    factors, folded = (1.0, 1.0), []
    if facts.get("hook_name") == "model.embed_tokens":  # trained before they are multiplied by the root of d_model
        d_in = next(iter(tensors.headers.get(names["W_enc"], ((), ""))[0]), 1)
        factors, folded = (max(d_in, 1) ** -0.5,) * 2, ["the root of d_model, by which embeddings are multiplied"]
    return Description(
        tensors, names, "jumprelu", factors=factors, ignored=factors_of_one(tensors), facts=facts, folded=folded
    )


def facts_of(place: str) -> dict[str, Any]:
    """Tell language model, site and layer from the names of repository and folder."""
    facts: dict[str, Any] = {"context_length": 1024}
    repository, folder = _REPOSITORY.fullmatch(place), _FOLDER.fullmatch(place)
    if repository:
        size, kind, _ = repository.groups()
        facts["lm_name"] = f"google/gemma-2-{size}{'-it' if kind == 'it' else ''}"
    if folder is None:
        if _EMBEDDING.fullmatch(place):
            facts |= {"site": "model.embed_tokens:output", "hook_name": "model.embed_tokens"}
        return facts
    layer, site = int(folder[1]), repository[3] if repository else "res"
    if not repository:
        logger.warning(
            "%s is taken for an SAE of the output of model.layers.%d: its path does not name the repository, which may "
            "be that of another site (att, mlp) or of transcoders, and tells its language model",
            place,
            layer,
        )
    named = {key: value.format(layer) for key, value in _SITES[site].items()}
    return facts | named | ({"layer": layer} if site != "transcoders" else {})
