"""The format of Gemma Scope 2: config.json and params.safetensors; JumpReLU SAEs and transcoders, with affine skip."""

from __future__ import annotations

import re
from typing import Any

from ..errors import SelOrthoError
from .description import Description
from .names import facts_of_hooks
from .place import Place

WEIGHTS = "params.safetensors"
_NAMES = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
_SKIP = "affine_skip_connection"
_REPOSITORY = re.compile(r"(?:.*(?:/|--))?gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)(?:/.*)?")
_FOLDER = re.compile(r"(?:.*/)?(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d{1,3})_width_\w+")
_HOOKS = {
    "resid_post": ("output",),
    "attn_out": ("self_attn.o_proj.input",),
    "mlp_out": ("post_feedforward_layernorm.output",),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


def find(place: Place) -> str | None:
    """Return the file of weights, if this is the format."""
    return WEIGHTS if place.has(WEIGHTS) or "hf_hook_point_in" in place.config else None


def describe(place: Place, file: str) -> Description:
    """Tell what an SAE or transcoder is by its config or, where there is none, by the names of its folders.

    Raises:
        SelOrthoError: it is a cross-layer transcoder.
    """
    config, tensors = place.config, place.tensors(file)
    if len(tensors.headers.get("w_dec", ((), ""))[0]) > 2 or re.search(r"(?:^|/)clt/", f"{place}/"):
        raise SelOrthoError(f"{place} is a cross-layer transcoder, which writes to several layers: expected one of one")
    folder, repository = _FOLDER.fullmatch(str(place)), _REPOSITORY.fullmatch(str(place))
    named = [f"model.layers.{folder[2]}.{hook}" for hook in _HOOKS[folder[1]]] if folder else [None]
    hooks = [config.get("hf_hook_point_in") or named[0], config.get("hf_hook_point_out") or named[-1]]
    facts: dict[str, Any] = {"lm_name": _lm(repository, config.get("model_name"))}
    facts |= facts_of_hooks(module=hooks[0], module_out=hooks[1])
    names = _NAMES | ({"W_skip": _SKIP} if _SKIP in tensors.headers else {})
    return Description(tensors, names, "jumprelu", facts=facts, metadata=config)


def _lm(repository: re.Match[str] | None, model: Any) -> str | None:
    """Return the id of the language model, which the configs write in several ways."""
    if repository:
        size, kind = repository.groups()
        return f"google/gemma-3-{size}{'-it' if kind == 'it' else '' if size == '270m' else '-pt'}"
    if not isinstance(model, str) or not model:
        return None
    return "google/" + model.rpartition("/")[2].replace("gemma-v3", "gemma-3").replace("270m-pt", "270m")
