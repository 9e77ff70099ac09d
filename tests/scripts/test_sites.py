"""Training at any site and of transcoders, live and from shards, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_selortho import SelOrthoError, SelOrthoSAE
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_batches import held_out_batches
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.training.arguments import parse_arguments
from scripts import cache_activations, train
from tests.scripts.conftest import command
from tests.scripts.test_metrics_doc import documented

SITES = {"site": "mlp_in", "target": "mlp_out"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def shards(tiny_lm_dir, sample_text_files, tmp_path) -> Path:
    """Both sides of the MLPs of layers 1 and 2 of the small Llama."""
    settings = {
        "model": tiny_lm_dir("llama"), "lm_dtype": "float32", "dataset": sample_text_files.csv, "layers": [1, 2],
        "context_length": 32, "stored_dtype": "float32", "eval_samples": 30, "output_dir": tmp_path / "acts",
        "cpu": True, **SITES,
    }  # fmt: skip
    cache_activations.main(command(settings, {}))
    return tmp_path / "acts"


@pytest.mark.parametrize("site", ["resid_mid", "attn_z"])
def test_an_sae_is_trained_at_a_site_within_the_layer(site, live, tmp_path) -> None:
    train.main(live(layer=1, site=site, max_steps=3, eval_samples=10, eval_ce_samples=2))
    config = SelOrthoSAE.from_pretrained(tmp_path / "run").config
    assert (config.site, config.layer, config.target) == (site, 1, None)
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluation"]
    assert {"fvu", "l0", "loss_recovered", "kl", "top1_agreement"} <= figures.keys()


def test_any_module_is_read(live, tmp_path) -> None:
    train.main(live(module="model.layers.2.mlp.down_proj", side="input", max_steps=3))
    config = SelOrthoSAE.from_pretrained(tmp_path / "run").config
    assert (config.site, config.layer) == ("model.layers.2.mlp.down_proj:input", 2)
    assert (config.hook_name, config.hook_side) == ("model.layers.2.mlp.down_proj", "input")


def test_transcoders_of_several_layers_learn_the_mlps_and_are_replaced_together(live, tmp_path, capsys) -> None:
    train.main(
        live(layers=[1, 2], twin=True, skip="true", max_steps=60, learning_rate=1e-2, activation="topk", k=8, **SITES)
    )
    capsys.readouterr()
    content = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(content["all_layers"]) == {"", "twin"} and content["all_layers"][""]["layers"] == 2
    assert content["all_layers"][""].keys() == documented()["all_layers"]
    for name, sae in content["saes"].items():
        start, end = sae["training_start"]["fvu"], sae["evaluation"]["fvu"]
        assert end < 0.7, (name, start, end)
    sae = SelOrthoSAE.from_pretrained(tmp_path / "run", subfolder="layer_2")
    assert sae.config.skip and float(sae.W_skip.detach().norm()) > 0
    assert float(sae.output_scale) != pytest.approx(float(sae.input_scale), rel=0.01)


def test_shards_hold_both_sites_as_the_language_model_gives_them(tiny_lm, sourceless, shards, tmp_path) -> None:
    cache = ActivationCache(str(shards))
    contexts = cache.held_out_contexts()
    (batch,) = held_out_batches(cache, [2], 10**6, **SITES)
    read = ActivationCapture(tiny_lm("llama"), [1, 2], **SITES).capture_all(contexts)
    for rows, direct in zip(batch[2], (read.by_layer[2], read.targets[2]), strict=True):
        assert rows.shape == direct.shape
        torch.testing.assert_close(rows.norm(dim=1).sort().values, direct.norm(dim=1).sort().values)
        torch.testing.assert_close(rows.mean(0), direct.mean(0))
    # token by token: what is stored side by side belongs together
    pairs = [torch.cat([x, y], dim=1).double() for x, y in (batch[2], (read.by_layer[2], read.targets[2]))]
    torch.testing.assert_close(pairs[0].T @ pairs[0], pairs[1].T @ pairs[1], rtol=1e-4, atol=1e-4)

    train.main(sourceless(activations=shards, layer=2, output_dir=tmp_path / "cached", **SITES))
    config = SelOrthoSAE.from_pretrained(tmp_path / "cached").config
    assert (config.target, config.target_hook_name) == ("mlp_out", "model.layers.2.mlp")
    train.main(sourceless(activations=shards, layer=2, site="mlp_out", output_dir=tmp_path / "out"))
    assert torch.equal(weights(tmp_path / "out")["input_mean"], weights(tmp_path / "cached")["output_mean"])
    train.main(sourceless(activations=shards, layer=2, target="mlp_out", output_dir=tmp_path / "same"))
    assert torch.equal(weights(tmp_path / "same")["W_enc"], weights(tmp_path / "cached")["W_enc"])
    with pytest.raises(SelOrthoError, match="not mlp_out at mlp_in: choose --site mlp_in --target mlp_out"):
        train.main(sourceless(activations=shards, layer=2, site="mlp_out", target="mlp_in", output_dir=tmp_path / "no"))
    with pytest.raises(SelOrthoError, match=r"not model\.layers\.2\.mlp:input"):
        train.main(
            sourceless(activations=shards, module="model.layers.2.mlp", side="input", output_dir=tmp_path / "no")
        )
    with pytest.raises(SelOrthoError, match=r"holds the sites mlp_in and mlp_out, not attn_z"):
        train.main(sourceless(activations=shards, layer=2, site="attn_z", output_dir=tmp_path / "no"))


def test_an_interrupted_run_of_transcoders_ends_as_if_nothing_had_happened(live, tmp_path) -> None:
    settings = {"layers": [0, 1], "checkpoint_every": 4, "skip": "true", **SITES}
    train.main(live(output_dir=tmp_path / "whole", **settings))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_000004"
    train.main(live(output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint, **settings))
    for name in ("layer_0", "layer_1"):
        whole, resumed = weights(tmp_path / "whole" / name), weights(tmp_path / "resumed" / name)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 1, "skip": "true"}, "only a transcoder takes it"),
        ({"module": "model.layers.1.mlp", "site": "mlp_in"}, "both say where to read"),
        ({"module": "model.layers.1.mlp", "layer": 2}, "its path says in which layer"),
        ({"layer": 1, "side": "input"}, "it acts only with --module"),
        ({"layer": 1, "site": "mlp"}, "expected one of resid_pre"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options, words, live) -> None:
    with pytest.raises(SelOrthoError, match=words):
        train.main(live(**options))


def test_the_preset_of_transcoders_covers_every_layer() -> None:
    preset = parse_arguments(["--preset", "gemma-3-270m-transcoders"])
    assert preset.run.layers == list(range(18))
    assert (preset.sae.site, preset.sae.target) == ("mlp_in", "mlp_out")
