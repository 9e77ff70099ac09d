from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE, select_pairs


def make_sae(**settings) -> SelOrthoSAE:
    sae = SelOrthoSAE(SelOrthoConfig(**{"d_in": 12, "d_sae": 30, "pair_fraction": 0.05, **settings}))
    sae.set_input_statistics(torch.linspace(-3, 3, 12) * 1000, 250.0)
    with torch.no_grad():
        sae.b_enc.uniform_(-0.2, 0.2)
        sae.b_dec.normal_()
    return sae


def raw_activations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 12) * 250 + torch.linspace(-3, 3, 12) * 1000


@pytest.mark.parametrize(("activation", "norm"), [("relu", 0.3), ("topk", 1.0), ("batchtopk", 1.0), ("jumprelu", 1.0)])
def test_fresh_decoder_rows_have_norm_one_and_the_encoder_is_a_multiple_of_them(activation, norm) -> None:
    k = {"k": 4} if "topk" in activation else {}
    sae = SelOrthoSAE(SelOrthoConfig(d_in=12, d_sae=30, activation=activation, **k))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30))
    assert torch.equal(sae.W_enc, norm * sae.W_dec.T)


def test_encode_and_decode_are_equations_2_and_3_around_the_input_statistics() -> None:
    sae = make_sae()
    x = raw_activations(7)
    h = torch.relu((x - sae.input_mean) / sae.input_scale @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(sae.encode(x), h)
    torch.testing.assert_close(sae.decode(h), (h @ sae.W_dec + sae.b_dec) * sae.input_scale + sae.input_mean)


def test_loss_is_equation_7_and_its_terms_add_up() -> None:
    sae = make_sae(l1_coefficient=0.03, ortho_coefficient=0.2, reduction="sum", min_support=2)
    x = raw_activations(64)
    out = sae(x)
    normal = (x - sae.input_mean) / sae.input_scale
    h = torch.relu(normal @ sae.W_enc + sae.b_enc)
    pairs = select_pairs(h.detach(), 0.05, 2)
    columns = h / h.norm(dim=0)
    expected = {
        "reconstruction": (h @ sae.W_dec + sae.b_dec - normal).square().sum(1).mean(),
        "l1": 0.03 * h.abs().sum(1).mean(),
        "ortho": 0.2 * (columns[:, pairs.i] * columns[:, pairs.j]).sum(0).square().sum(),
    }
    assert list(out.losses) == ["reconstruction", "l1", "ortho"]
    for name, value in expected.items():
        torch.testing.assert_close(out.losses[name], value)
    torch.testing.assert_close(out.loss, sum(expected.values()))
    torch.testing.assert_close(out.reconstruction, sae.decode(out.feature_acts))
    assert torch.equal(out.pairs.i, pairs.i)


@pytest.mark.parametrize(("penalty", "coefficient"), [("none", 0.1), ("selective", 0.0), ("full", 0.0)])
def test_no_penalty(penalty, coefficient) -> None:
    out = make_sae(penalty=penalty, ortho_coefficient=coefficient)(raw_activations(16))
    assert out.losses["ortho"].item() == 0 and out.pairs is None


def test_full_penalty_counts_every_pair() -> None:
    out = make_sae(penalty="full", reduction="sum", ortho_coefficient=0.5, min_support=1)(raw_activations(64))
    columns = out.feature_acts / out.feature_acts.norm(dim=0)
    squares = (columns.T @ columns).square().triu(1).sum()
    torch.testing.assert_close(out.losses["ortho"], 0.5 * squares)


@pytest.mark.parametrize("activation", [{}, {"activation": "topk", "k": 5}], ids=["relu", "topk"])
@pytest.mark.parametrize("sparse", [False, True])
def test_decoder_ratio_adds_the_penalty_of_the_decoder_space(activation, sparse) -> None:
    both = make_sae(ortho_coefficient=0.3, decoder_ratio=2.0, min_support=1, **activation).train()
    alone = make_sae(ortho_coefficient=0.3, min_support=1, **activation).train()
    decoder = make_sae(ortho_coefficient=0.6, penalty_space="decoder", min_support=1, **activation).train()
    x = raw_activations(40)
    found = []
    for sae in (both, alone, decoder):
        sae.load_state_dict(both.state_dict())
        out = sae(x, return_feature_acts=not sparse)
        out.losses["ortho"].backward()
        found.append((out.losses["ortho"].detach(), sae.W_dec.grad, sae.W_enc.grad))
    (value, to_decoder, to_encoder), (of_activations, none, its), (of_decoder, expected, nothing) = found
    torch.testing.assert_close(value, of_activations + of_decoder)
    assert none is None and nothing is None, "one acts on the activations, the other on the decoder"
    torch.testing.assert_close(to_decoder, expected)
    torch.testing.assert_close(to_encoder, its)
    assert of_activations > 0 and of_decoder > 0


def test_decoder_pairs_may_be_each_feature_and_its_nearest() -> None:
    both = make_sae(ortho_coefficient=0.3, decoder_ratio=2.0, decoder_pairs="nearest", min_support=1).train()
    alone = make_sae(ortho_coefficient=0.3, min_support=1).train()
    alone.load_state_dict(both.state_dict())
    x = raw_activations(40)
    cosine = torch.nn.functional.normalize(both.W_dec.detach(), dim=1)
    cosine = (cosine @ cosine.T).fill_diagonal_(-1).amax(1)
    expected = alone(x).losses["ortho"] + 0.6 * cosine.square().mean()
    torch.testing.assert_close(both(x).losses["ortho"], expected)


def test_any_leading_shape() -> None:
    sae = make_sae()
    x = raw_activations(3, 5)
    out = sae(x)
    assert out.reconstruction.shape == x.shape and out.feature_acts.shape == (3, 5, 30)
    torch.testing.assert_close(out.loss, sae(x.reshape(15, 12)).loss)
    assert sae.encode(x[0, 0]).shape == (30,)


def test_topk_keeps_k_features_and_has_no_l1() -> None:
    sae = make_sae(activation="topk", k=3)
    out = sae(raw_activations(40))
    assert (out.feature_acts > 0).sum(1).max() == 3
    assert out.losses["l1"].item() == 0
    out.loss.backward()
    assert sae.W_enc.grad.abs().sum() > 0


def test_constrained_step() -> None:
    sae = make_sae()
    sae(raw_activations(40)).loss.backward()
    before = sae.W_dec.grad.clone()
    sae.project_decoder_gradient()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(before - sae.W_dec.grad, (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)
    with torch.no_grad():
        sae.W_dec *= 3
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30))


def test_forward_has_no_side_effects() -> None:
    sae = make_sae()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae(raw_activations(40))
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("load", [SelOrthoSAE.from_pretrained, AutoModel.from_pretrained])
def test_saved_and_loaded_it_is_the_same_bit_for_bit(load, tmp_path) -> None:
    sae = make_sae(lm_name="org/lm", layer=3)
    sae.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = load(tmp_path)
    assert isinstance(again, SelOrthoSAE) and not again.training
    x = raw_activations(40)
    ours, theirs = sae.eval()(x), again(x)
    assert torch.equal(ours.reconstruction, theirs.reconstruction) and torch.equal(ours.loss, theirs.loss)
    assert AutoConfig.from_pretrained(tmp_path).own_settings() == sae.config.own_settings()


def test_in_bfloat16_the_input_statistics_stay_float32(tmp_path) -> None:
    sae = make_sae()
    sae.save_pretrained(tmp_path)
    half = SelOrthoSAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.W_enc.dtype == torch.bfloat16 and half.input_mean.dtype == torch.float32
    assert torch.equal(half.input_mean, sae.input_mean) and torch.equal(half.input_scale, sae.input_scale)
    x = raw_activations(40)
    torch.testing.assert_close(half.encode(x).float(), sae.encode(x), atol=0.1, rtol=0.05)
    assert half.decode(half.encode(x)).dtype == torch.bfloat16


def test_activations_of_another_width() -> None:
    with pytest.raises(
        SelOrthoError, match=r"activations of shape \(4, 13\): this SAE reads activations of width d_in=12"
    ):
        make_sae(lm_name="org/lm", hook_name="model.layers.3")(torch.zeros(4, 13))


def test_input_that_does_not_vary() -> None:
    with pytest.raises(SelOrthoError, match="input scale 0"):
        make_sae().set_input_statistics(torch.zeros(12), 0.0)
