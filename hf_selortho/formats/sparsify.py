"""The format of sparsify: cfg.json and sae.safetensors, a folder for each hook."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.hub import read_object, read_tensors
from .keys import KeyTable, unless, warn_of_unknown
from .names import layer_of
from .plain import PlainSae, checked_k, needed_files, weight_shapes

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_TRANSCODER = unless(None, False, reason="this is a transcoder; choose an SAE, trained without")
_KEYS = KeyTable(
    obeyed=dict.fromkeys(("d_in", "k", "num_latents", "expansion_factor"), object),
    meaningless="normalize_decoder multi_topk",  # they act in training only
    refused={
        "activation": unless("topk", reason="expected 'topk'"),
        "transcode": _TRANSCODER,
        "skip_connection": _TRANSCODER,
        "signed": unless(None, False, reason="features of ours are never negative"),  # before version 1
    },
)
_MODULE = re.compile(r"(?:layers|h)\.\d+\..+|embed_tokens|embed_in|wte")  # other modules than decoder layers


def read_sparsify(name: str, lookup: Mapping[str, Any]) -> PlainSae:
    """Read an SAE with the activation function topk.

    Raises:
        SelOrthoError: it is a transcoder or of another kind, its files are damaged, or do not fit one another.
    """
    path, weights = needed_files(name, (CONFIG, WEIGHTS), lookup)
    content = read_object(path)
    warn_of_unknown(_KEYS.check(content, str(path)), str(path))
    d_in, k, factor = content.get("d_in"), content.get("k"), content.get("expansion_factor", 32)
    d_sae = content.get("num_latents") or (d_in * factor if type(d_in) is type(factor) is int else None)
    shapes = weight_shapes(d_in, d_sae, False, name)
    shapes = {"encoder.weight": shapes["W_dec"], "encoder.bias": shapes["b_enc"], **shapes}
    del shapes["W_enc"], shapes["b_enc"]
    tensors = {key: tensor.float() for key, tensor in read_tensors(name, [weights], shapes).items()}
    hook = Path(str(lookup.get("subfolder") or name)).name  # the folder is called like the module
    layer = layer_of(hook)
    facts = {"layer": layer, "hook_name": hook if layer is not None or _MODULE.fullmatch(hook) else None}
    return PlainSae(
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        shift=tensors["b_dec"],
        k=checked_k(k, str(path)),
        facts={key: value for key, value in facts.items() if value is not None},
        metadata=content,
    )
