"""The format of sparsify: cfg.json and sae.safetensors, a folder for each hook."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SelOrthoError
from ..utils.hub import read_object, read_tensors
from .names import layer_of
from .plain import PlainSae, checked_k, needed_files, weight_shapes

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read_sparsify(name: str, lookup: Mapping[str, Any]) -> PlainSae:
    """Read an SAE with the activation function topk; `multi_topk` and `normalize_decoder` act in training only.

    Raises:
        SelOrthoError: it is a transcoder or of another kind, its files are damaged, or do not fit one another.
    """
    path, weights = needed_files(name, (CONFIG, WEIGHTS), lookup)
    content = read_object(path)
    for key in ("transcode", "skip_connection"):
        if content.get(key):
            raise SelOrthoError(
                f"{path}: {key}={content[key]!r:.50} is not read: this is a transcoder; choose an SAE, trained without"
            )
    if content.get("signed"):  # before version 1
        raise SelOrthoError(
            f"{path}: signed={content['signed']!r:.50} is not read: features of ours are never negative"
        )
    if content.get("activation", "topk") != "topk":
        raise SelOrthoError(f"{path}: activation={content['activation']!r:.50} is not read; expected 'topk'")
    d_in, k, factor = content.get("d_in"), content.get("k"), content.get("expansion_factor", 32)
    d_sae = content.get("num_latents") or (d_in * factor if type(d_in) is type(factor) is int else None)
    shapes = weight_shapes(d_in, d_sae, False, name)
    shapes = {"encoder.weight": shapes["W_dec"], "encoder.bias": shapes["b_enc"], **shapes}
    del shapes["W_enc"], shapes["b_enc"]
    tensors = {key: tensor.float() for key, tensor in read_tensors(name, [weights], shapes).items()}
    hook = Path(str(lookup.get("subfolder") or name)).name  # the folder is called like the module
    layer = layer_of(hook)
    return PlainSae(
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        shift=tensors["b_dec"],
        k=checked_k(k, str(path)),
        facts={} if layer is None else {"layer": layer, "hook_name": hook},
        metadata=content,
    )
