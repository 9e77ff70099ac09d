"""SAEs in the formats of other libraries, evaluated by the script with every metric that our own have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.formats import load_sae, write_saelens
from scripts import evaluate_sae

D_IN, D_SAE = 32, 64


def random_weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=draw), dim=1)
    return {
        "W_enc": directions.T.contiguous(),
        "W_dec": directions,
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(D_IN),
    }


def saelens(folder: Path) -> Path:
    sae = SelOrthoSAE(
        SelOrthoConfig(d_in=D_IN, d_sae=D_SAE, activation="topk", k=5, input_normalization="none", layer=1)
    )
    sae.load_state_dict({**sae.state_dict(), **random_weights()})
    write_saelens(sae, folder / "lens")
    return folder / "lens"


def sparsify(folder: Path) -> Path:
    w = random_weights()
    target = folder / "layers.1"
    target.mkdir()
    tensors = {"encoder.weight": w["W_dec"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target / "sae.safetensors")
    settings = {"k": 5, "num_latents": D_SAE, "d_in": D_IN, "expansion_factor": 2, "activation": "topk"}
    (target / "cfg.json").write_text(json.dumps(settings))
    return target


def gemma_scope(folder: Path) -> Path:
    target = folder / "layer_1" / "width_64" / "average_l0_9"
    target.mkdir(parents=True)
    arrays = {name: tensor.numpy() for name, tensor in random_weights().items()}
    np.savez(target / "params.npz", threshold=np.full(D_SAE, 0.1, np.float32), **arrays)
    return target


@pytest.mark.parametrize("write", [saelens, sparsify, gemma_scope])
def test_every_format_gets_the_metrics_of_its_copy_in_ours(write, tiny_lm_dir, sample_text_files, tmp_path) -> None:
    theirs, ours, lm = write(tmp_path), tmp_path / "ours", tmp_path / "lm"
    shutil.copytree(tiny_lm_dir("llama"), lm)
    config = json.loads((lm / "config.json").read_text())
    (lm / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))  # as Gemma Scope reads
    load_sae(str(theirs)).save_pretrained(ours)
    reads = ["--model", str(lm), "--lm_dtype", "float32", "--dataset", str(sample_text_files.csv)]
    sizes = ["--batch_size", "128", "--eval_samples", "30", "--eval_ce_samples", "8", "--held_out_fraction", "0.3"]
    tasks = ["--label_column", "label", "--probing_texts", "60", "--compare_with", str(ours)]
    found = {}
    for name, folder in (("theirs", theirs), ("ours", ours)):
        output = tmp_path / f"{name}.json"
        evaluate_sae.main([str(folder), *reads, *sizes, *tasks, "--cpu", "--layer", "1", "--output", str(output)])
        found[name] = json.loads(output.read_text())["evaluation"]
    assert found["theirs"] == found["ours"]
    expected = {
        "fvu", "l0", "dead_features", "top_correlation", "peak_correlation", "max_decoder_cosine", "loss_recovered",
        "probing_accuracy_k1", "probing_accuracy_k5", "compared_with",
    }  # fmt: skip
    assert expected <= set(found["theirs"])
    assert found["theirs"]["l0"] > 1 and np.isfinite(found["theirs"]["fvu"])
    assert found["theirs"]["compared_with"][str(ours)]["matched_cosine"] == pytest.approx(1, abs=1e-4)


def test_a_layer_that_nobody_says_is_asked_for(tiny_lm_dir, sample_text_files, tmp_path) -> None:
    folder = sparsify(tmp_path)
    folder = folder.rename(tmp_path / "mine")
    reads = ["--model", str(tiny_lm_dir("llama")), "--dataset", str(sample_text_files.csv), "--cpu"]
    with pytest.raises(SelOrthoError, match="--layer is needed"):
        evaluate_sae.main([str(folder), *reads])
    with pytest.raises(SelOrthoError, match="layer 7"):
        evaluate_sae.main([str(folder), *reads, "--layer", "7"])
