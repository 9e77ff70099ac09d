"""A transcoder computes what its equations say, trains sparse as dense, and is stored, folded and refused as such."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE, training_step
from hf_selortho.formats.plain import PlainSae
from hf_selortho.training.resampling import resample_dead

D_IN, D_OUT, D_SAE, TOKENS = 12, 7, 64, 40
KINDS = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 5},
    "batchtopk": {"activation": "batchtopk", "k": 5},
    "matryoshka": {"activation": "batchtopk", "k": 5, "matryoshka_prefixes": [4, 20, 64]},
    "jumprelu": {"activation": "jumprelu", "jumprelu_threshold": 0.3, "jumprelu_bandwidth": 0.4, "l0_coefficient": 0.1},
}
SITES = {"layer": 1, "site": "mlp_in", "target": "mlp_out"}


def make(skip: bool = False, **settings) -> SelOrthoSAE:
    """A transcoder in float64 whose every number is at random."""
    torch.manual_seed(0)
    sizes = {"d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "pair_fraction": 0.02}
    sae = SelOrthoSAE(SelOrthoConfig(**sizes, **SITES, skip=skip, **settings)).double()
    with torch.no_grad():
        for tensor in (sae.b_enc, sae.b_dec, sae.input_mean, sae.output_mean, *([sae.W_skip] if skip else [])):
            tensor.normal_(-0.2, 0.3)
        sae.input_scale.fill_(1.7)
        sae.output_scale.fill_(0.6)
        if settings.get("activation") == "batchtopk":
            sae.threshold.fill_(0.4)
    return sae


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, generator=generator)
    return x, torch.randn(TOKENS, D_OUT, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_and_loss_are_those_of_the_equations(kind: str, skip: bool) -> None:
    sae, (x, y) = make(skip, penalty="none", l1_coefficient=0.0, aux_k=0, **KINDS[kind]).eval(), batch()
    z = (x - sae.input_mean) / sae.input_scale
    h = sae.encode(x)
    assert h.shape == (TOKENS, D_SAE) and 0 < float((h > 0).double().mean()) < 1
    normalised = h @ sae.W_dec + sae.b_dec + (z @ sae.W_skip if skip else 0)
    expected = normalised * sae.output_scale + sae.output_mean
    torch.testing.assert_close(sae.reconstruct(x), expected)
    torch.testing.assert_close(sae.reconstruct(x, h), expected)
    output = sae(x, target=y)
    torch.testing.assert_close(output.reconstruction, expected)
    if kind != "matryoshka":  # whose loss is that of its prefixes
        goal = (y - sae.output_mean) / sae.output_scale
        torch.testing.assert_close(output.losses["reconstruction"], (normalised - goal).square().sum(1).mean())


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sparse_step_gives_the_gradients_of_the_dense_one(kind: str, skip: bool, monkeypatch) -> None:
    monkeypatch.setattr(training_step, "CHUNK_ROWS", 7)
    monkeypatch.setattr(training_step, "CHUNK_ELEMENTS", {"cpu": 1})
    x, y = batch()
    found = []
    for sparse in (False, True):
        monkeypatch.setattr(training_step, "SPARSE_BELOW", {"cpu": 2.0 if sparse else 0.0})
        sae = make(skip, ortho_coefficient=0.5, **KINDS[kind]).train()
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        dead[:3] = True
        output = sae(x, target=y, dead=dead, return_feature_acts=False)
        output.loss.backward()
        found.append({name: p.grad for name, p in sae.named_parameters()} | {"loss": output.loss.detach()})
    assert found[0].keys() == found[1].keys() and ("W_skip" in found[0]) == skip
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_saved_and_loaded_it_computes_the_same(tmp_path) -> None:
    sae, (x, _) = make(skip=True, **KINDS["jumprelu"]).float().eval(), batch()
    sae.save_pretrained(tmp_path)
    loaded = SelOrthoSAE.from_pretrained(tmp_path)
    assert loaded.config.is_transcoder and loaded.config.width_out == D_OUT and loaded.config.site == "mlp_in"
    assert torch.equal(loaded.reconstruct(x.float()), sae.reconstruct(x.float()))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu"])
def test_folded_into_plain_weights_it_computes_the_same(kind: str, skip: bool) -> None:
    sae, (x, _) = make(skip, **KINDS[kind]).float().eval(), batch()
    plain = PlainSae.of(sae)
    z = x.float() @ plain.W_enc + plain.b_enc
    if plain.threshold is not None:
        h = z * (z > plain.threshold) * (z > 0)
    else:
        h = z.relu()
        if plain.k is not None:
            h = torch.where(z >= z.topk(plain.k).values[:, -1:], h, 0)
    y_hat = h @ plain.W_dec + plain.b_dec
    if skip:
        y_hat = y_hat + x.float() @ plain.W_skip
    torch.testing.assert_close(y_hat, sae.reconstruct(x.float()), rtol=1e-4, atol=1e-4)
    again = PlainSae(**{**vars(plain), "facts": SITES}).to_model("it")
    torch.testing.assert_close(again.reconstruct(x.float()), y_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_a_resampled_feature_reads_its_token_and_writes_what_that_is_to_become(skip) -> None:
    sae, (x, y) = make(skip, activation="relu"), batch()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[4] = True
    errors = torch.zeros(TOKENS)
    errors[17] = 1.0  # the only token that can be drawn
    assert resample_dead(sae, {}, dead, x, errors, torch.Generator().manual_seed(0), target=y) == 1
    token, goal = (x[17] - sae.input_mean) / sae.input_scale, (y[17] - sae.output_mean) / sae.output_scale - sae.b_dec
    goal = goal - token @ sae.W_skip if skip else goal
    torch.testing.assert_close(sae.W_dec.detach()[4], goal.detach() / goal.detach().norm())
    column = sae.W_enc.detach()[:, 4]
    torch.testing.assert_close(column / column.norm(), token / token.norm())
    torch.testing.assert_close(sae.encode(x[17]).detach()[4], column.norm() * token.norm())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"skip": True}, "only a transcoder takes it"),
        ({"d_out": 5}, "reconstructs what it reads"),
        ({"site": "mlp_out", "target": "mlp_out"}, "leave the target out"),
        ({"site": "mlp"}, "expected one of resid_pre"),
        ({"site": "mlp_in", "target": "model.layers.3.mlp"}, "PATH:input or PATH:output"),
        ({"site": "mlp_in", "target": "mlp_out", "centered": True}, "as they are"),
    ],
)
def test_settings_that_make_no_transcoder_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(SelOrthoError, match=words):
        SelOrthoConfig(d_in=4, d_sae=8, **settings)


def test_a_target_that_is_missing_or_of_other_tokens_is_refused() -> None:
    sae, (x, y) = make(), batch()
    with pytest.raises(SelOrthoError, match="pass its activations of the same tokens as target="):
        sae(x)
    with pytest.raises(SelOrthoError, match="expected the same tokens"):
        sae(x, target=y[1:])
    with pytest.raises(SelOrthoError, match="d_out=7"):
        sae(x, target=x)
    plain = SelOrthoSAE(SelOrthoConfig(d_in=D_IN, d_sae=D_SAE)).double()
    with pytest.raises(SelOrthoError, match="leave it out"):
        plain(x, target=x)
