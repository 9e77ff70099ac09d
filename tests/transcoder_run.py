"""A run of transcoders, one of each layer of a language model, made without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_selortho import SelOrthoConfig, SelOrthoSAE


def transcoder(lm: Path, layer: int, seed: int = 0, d_in: int = 32, **settings: Any) -> SelOrthoSAE:
    """A transcoder from mlp_in to mlp_out with random weights, means and scales, some of which fire."""
    given: dict[str, Any] = {"activation": "batchtopk", "site": "mlp_in", "target": "mlp_out", **settings}
    given |= {"k": 8} if given["activation"] in ("topk", "batchtopk") else {}
    torch.manual_seed(100 * seed + layer)
    sae = SelOrthoSAE(
        SelOrthoConfig(d_in=d_in, d_sae=48, d_out=d_in, layer=layer, lm_name=str(lm), penalty="none", **given)
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
        if given["activation"] == "batchtopk":
            sae.threshold.fill_(0.3)
        sae.set_input_statistics(torch.randn(d_in) / 3, 1.7)
        if given["target"]:
            sae.set_output_statistics(torch.randn(d_in), 0.6)
    return sae.eval()


def save_transcoders(folder: Path, lm: Path, layers: int = 4, **settings: Any) -> Path:
    """Save a transcoder of each layer into a folder; a twin of one of them lies beside."""
    for layer in range(layers):
        transcoder(lm, layer, **settings).save_pretrained(folder / f"layer_{layer}")
    transcoder(lm, 0, seed=1, **settings).save_pretrained(folder / "layer_0_twin")
    return folder
