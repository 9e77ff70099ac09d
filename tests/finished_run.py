"""Folders as trainings leave them, made in milliseconds: random weights, invented figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hf_selortho import SelOrthoConfig, SelOrthoSAE


def save_run(folder: Path, seed: int = 0, fvu: float = 0.1, lm: Any = None, **settings: Any) -> Path:
    """A folder with an SAE, its metrics, its arguments and two pictures.

    Args:
        seed: of weights and run. fvu: that metrics.json says.
        lm: language model that it reads; default: one that does not exist.
        settings: of its config.
    """
    reads = {"lm_name": "org/lm"} if lm is None else {"lm_name": lm.name, "lm_revision": lm.revision}
    config = SelOrthoConfig(**{"d_in": 8, "d_sae": 16, "layer": 2, "hook_name": "model.layers.2", **reads, **settings})
    torch.manual_seed(seed)
    sae = SelOrthoSAE(config)
    sae.set_input_statistics(torch.randn(sae.b_dec.shape), 3.0)
    sae.save_pretrained(folder)
    evaluation = {"samples": 10, "tokens": 300, "fvu": fvu, "l0": 7.25, "dead_features": 1, "top_correlation": 0.5}
    metrics = {"schema_version": 1, "evaluation": evaluation, "training": {"steps": 5, "tokens": 640}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    run = {"command": "train.py", "arguments": {"seed": seed}, "pictures": ["pictures/b.png", "pictures/a.png"]}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (folder / "pictures" / name).write_bytes(b"png of " + name.encode())
    return folder
