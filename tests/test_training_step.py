"""The active entries of a training step give the loss, the gradients and the features of dense arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoSAE, training_step
from hf_selortho.penalties import PenaltyPlan

D_IN, D_SAE, TOKENS = 12, 64, 40

SETTINGS = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 5},
    "batchtopk": {"activation": "batchtopk", "k": 5},
    "matryoshka": {"activation": "batchtopk", "k": 5, "matryoshka_prefixes": [4, 20, 64]},
    "jumprelu": {"activation": "jumprelu", "jumprelu_threshold": 0.3, "jumprelu_bandwidth": 0.4, "l0_coefficient": 0.1},
}
PENALTIES = {
    "selective": {"penalty": "selective"},
    "pearson": {"penalty": "selective", "correlation": "pearson"},
    "decoder": {"penalty_space": "decoder"},
    "exclusion": {"penalty_space": "exclusion"},
    "both": {"penalty": "selective", "decoder_ratio": 2.0},
    "by directions": {"penalty_space": "activation", "selection_space": "decoder"},
    "full": {"penalty": "full"},
    "ortsae": {"penalty": "ortsae", "ortsae_chunk": 30},
    "none": {"penalty": "none"},
}


def make_sae(**settings) -> SelOrthoSAE:
    torch.manual_seed(0)
    config = SelOrthoConfig(d_in=D_IN, d_sae=D_SAE, pair_fraction=0.02, ortho_coefficient=0.5, **settings)
    sae = SelOrthoSAE(config).double()
    with torch.no_grad():
        sae.b_enc.normal_(-0.2, 0.2)  # some features fire often, some rarely
        sae.b_dec.normal_()
    return sae


def train_once(sae: SelOrthoSAE, sparse: bool, monkeypatch, **arguments) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and features; gradients."""
    monkeypatch.setattr(training_step, "SPARSE_BELOW", {"cpu": 2.0 if sparse else 0.0})
    monkeypatch.setattr(training_step, "CHUNK_ROWS", 7)
    monkeypatch.setattr(training_step, "CHUNK_ELEMENTS", {"cpu": 1})
    torch.manual_seed(1)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    sae.zero_grad()
    output = sae.train()(x, return_feature_acts=False, **arguments)
    output.loss.backward()
    assert (output.active is not None) == sparse
    h = output.active.to_dense() if sparse else output.feature_acts
    found = {**output.losses, "h": h.detach(), "reconstruction": output.reconstruction.detach()}
    return found, {name: parameter.grad for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("activation", SETTINGS)
def test_active_entries_give_the_loss_and_the_gradients_of_dense_arithmetic(activation, penalty, monkeypatch) -> None:
    sae = make_sae(**SETTINGS[activation], **PENALTIES[penalty])
    dense, dense_gradients = train_once(sae, False, monkeypatch)
    sparse, sparse_gradients = train_once(sae, True, monkeypatch)
    torch.testing.assert_close(sparse, dense)
    torch.testing.assert_close(sparse_gradients, dense_gradients)
    assert penalty == "none" or dense["ortho"] > 0


@pytest.mark.parametrize("sparse", [False, True])
def test_dead_features_explain_what_is_left_over(sparse, monkeypatch) -> None:
    sae = make_sae(**SETTINGS["topk"], penalty="none", aux_k=3)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[10:20] = True
    found, gradients = train_once(sae, sparse, monkeypatch, dead=dead)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = torch.relu(x @ sae.W_enc + sae.b_enc)
    z[:, ~dead] = -1
    values, indices = z.topk(3)
    explained = torch.zeros_like(z).scatter(1, indices, values) @ sae.W_dec
    expected = (explained - (x - found["reconstruction"])).square().sum(1).mean() / 32
    torch.testing.assert_close(found["aux"], expected)
    assert gradients["W_dec"][10:20].abs().sum() > 0


def test_nothing_is_dead_nothing_to_explain(monkeypatch) -> None:
    found, _ = train_once(make_sae(**SETTINGS["topk"]), True, monkeypatch, dead=torch.zeros(D_SAE, dtype=torch.bool))
    assert found["aux"] == 0


def test_batchtopk_keeps_k_on_average_and_its_threshold_is_used_at_inference(monkeypatch) -> None:
    sae = make_sae(**SETTINGS["batchtopk"], penalty="none")
    found, _ = train_once(sae, True, monkeypatch)
    assert (found["h"] > 0).sum() == TOKENS * 5 and len((found["h"] > 0).sum(1).unique()) > 1
    torch.manual_seed(1)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    sae.eval().update_threshold(found["h"][found["h"] > 0].min() * (1 - 1e-9))
    one_by_one = torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(one_by_one, found["h"])


def test_jumprelu_gradients_are_the_straight_through_estimators(monkeypatch) -> None:
    sae = make_sae(**SETTINGS["jumprelu"], penalty="none")
    found, gradients = train_once(sae, True, monkeypatch)
    torch.manual_seed(1)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    z, threshold, eps = (x @ sae.W_enc + sae.b_enc).detach(), sae.log_threshold.exp().detach(), 0.4
    residual = found["h"] @ sae.W_dec + sae.b_dec - x
    upstream = 2 * residual @ sae.W_dec.T / TOKENS
    kernel = ((z - threshold).abs() / eps < 0.5).double()
    expected = -(kernel * (threshold * upstream + 0.1 / TOKENS)).sum(0) / eps * threshold  # d exp(t) = exp(t) dt
    torch.testing.assert_close(gradients["log_threshold"], expected.detach())
    torch.testing.assert_close(found["l0_penalty"], 0.1 * (z > threshold).double().sum() / TOKENS)


@pytest.mark.parametrize("activation", SETTINGS)
def test_every_activation_function_is_saved_and_loaded(activation, tmp_path) -> None:
    torch.manual_seed(0)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=D_IN, d_sae=D_SAE, **SETTINGS[activation]))
    if activation == "batchtopk":
        sae.update_threshold(torch.tensor(0.7))
    x = torch.randn(9, D_IN)
    sae.eval().save_pretrained(tmp_path)
    loaded = SelOrthoSAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert loaded.W_enc.stride() == sae.W_enc.stride() == (1, D_IN)  # products of another order round differently
    assert loaded.config.own_settings() == sae.config.own_settings()
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == {
        name: value.dtype for name, value in sae.state_dict().items()
    }


def test_thresholds_stay_in_float32(tmp_path) -> None:
    sae = SelOrthoSAE(SelOrthoConfig(d_in=D_IN, d_sae=D_SAE, **SETTINGS["jumprelu"]))
    sae.save_pretrained(tmp_path)
    loaded = SelOrthoSAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.log_threshold.dtype == torch.float32 and loaded.W_enc.dtype == torch.bfloat16
    assert loaded(torch.randn(4, D_IN)).loss.isfinite()


def test_a_resting_penalty_is_none_and_a_weight_multiplies_it(monkeypatch) -> None:
    sae = make_sae(activation="relu")
    once, _ = train_once(sae, True, monkeypatch)
    resting, _ = train_once(sae, True, monkeypatch, plan=PenaltyPlan(acts=False))
    five_fold, _ = train_once(sae, True, monkeypatch, plan=PenaltyPlan(weight=5))
    steered, _ = train_once(sae, True, monkeypatch, plan=PenaltyPlan(coefficient=1.0))
    assert resting["ortho"] == 0
    torch.testing.assert_close(five_fold["ortho"], 5 * once["ortho"])
    torch.testing.assert_close(steered["ortho"], 2 * once["ortho"])


def test_dense_activations_are_not_handled_entry_by_entry(monkeypatch) -> None:
    sae = make_sae(activation="relu")
    monkeypatch.setattr(training_step, "SPARSE_BELOW", {"cpu": 0.01})
    assert sae.train()(torch.randn(TOKENS, D_IN).double(), return_feature_acts=False).active is None


def test_without_training_the_feature_activations_are_returned() -> None:
    sae = make_sae(activation="topk", k=2)
    x = torch.randn(3, 4, D_IN).double()
    assert sae.train()(x).feature_acts.shape == (3, 4, D_SAE)
    assert sae.eval()(x, return_feature_acts=False).feature_acts.shape == (3, 4, D_SAE)
