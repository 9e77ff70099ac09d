"""The format of sparsify, as the library itself writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_selortho import SelOrthoError, SelOrthoSAE
from hf_selortho.formats import load_sae


@pytest.fixture(scope="module")
def sparsify():
    return pytest.importorskip("sparsify")


def save(sparsify, folder: Path, **settings):
    """A coder of the library itself with random weights, as it saves it."""
    theirs = sparsify.SparseCoder(24, sparsify.SparseCoderConfig(k=5, **settings))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    theirs.save_to_disk(folder)
    return theirs


def change(folder: Path, **changes) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_latents": 48},
        {"expansion_factor": 3},
        {"num_latents": 50, "multi_topk": True},
        {"normalize_decoder": False},
    ],
)
@torch.no_grad()
def test_large_means_and_every_way_to_say_how_many_features(sparsify, settings, tmp_path) -> None:
    theirs = save(sparsify, tmp_path, **settings)
    x = 900 * torch.randn(24) + 60 * torch.randn(100, 24)
    theirs.b_dec.copy_(x.mean(0))
    theirs.save_to_disk(tmp_path)
    sae, out = load_sae(tmp_path), theirs.encode(x)
    dense = torch.zeros(100, theirs.num_latents).scatter(1, out.top_indices, out.top_acts)
    h, scale = sae.encode(x), dense.abs().max()
    torch.testing.assert_close(h / scale, dense / scale, atol=1e-5, rtol=0)
    decoded = theirs.decode(out.top_acts, out.top_indices)
    torch.testing.assert_close(sae.decode(h), decoded, atol=1e-5 * decoded.abs().max().item(), rtol=0)
    sae.save_pretrained(tmp_path / "own")
    assert torch.equal(SelOrthoSAE.from_pretrained(tmp_path / "own").encode(x), h)


@pytest.mark.parametrize(
    ("folder", "layer"), [("layers.7", 7), ("h.3", 3), ("layers.7.mlp", 7), ("run", None), ("layers.99999", None)]
)
def test_the_layer_is_that_of_the_folder(sparsify, folder, layer, tmp_path, caplog) -> None:
    save(sparsify, tmp_path / folder)
    config = load_sae(tmp_path, subfolder=folder).config
    assert (config.layer, config.hook_name) == (layer, None if folder in ("run", "layers.99999") else folder)
    assert ("does not say that it reads a site that is known here" in caplog.text) == (layer is None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signed": 1}, "signed=1, expected true or false"),
        ({"k": 10**6}, "k=1000000: expected at most d_sae"),
        ({"k": None}, "k=None, expected the number"),
        ({"num_latents": 10**9}, "has the shape"),
        ({"num_latents": 0, "expansion_factor": "x"}, "d_sae=None, expected a positive"),
        ({"transcode": "\0"}, "expected true or false"),
        ({"skip_connection": True}, "missing: W_skip"),
        ({"activation": "groupmax"}, "activation='groupmax' is not read"),
    ],
)
def test_configs_are_not_believed(sparsify, changes, message, tmp_path) -> None:
    save(sparsify, tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(SelOrthoError, match=message) as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_dec": None}, "missing: W_dec"),
        ({"b_dec": torch.zeros(23)}, r"b_dec has the shape \(23,\)"),
        ({"b_dec": torch.zeros(24, dtype=torch.int32)}, "b_dec is of dtype I32"),
    ],
)
def test_tensors_are_not_believed(sparsify, changes, message, tmp_path) -> None:
    save(sparsify, tmp_path, num_latents=48)
    tensors = {**load_file(tmp_path / "sae.safetensors"), **changes}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, tmp_path / "sae.safetensors")
    with pytest.raises(SelOrthoError, match=message):
        load_sae(tmp_path)


def test_a_missing_config_is_named(sparsify, tmp_path) -> None:
    save(sparsify, tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(SelOrthoError, match=r"lacks cfg\.json: expected cfg\.json and sae\.safetensors"):
        load_sae(tmp_path)
