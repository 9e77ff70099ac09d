from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.data.buffer import ActivationBatch
from hf_selortho.language_models.capture import TokenOrigins
from hf_selortho.training.arguments import RunArguments
from hf_selortho.training.optimizer import SAEOptimizer
from hf_selortho.training.resampling import resample_dead
from hf_selortho.training.sae_trainer import SAETrainer

D_IN, D_SAE, TOKENS = 8, 20, 200


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 4},
    "batchtopk": {"activation": "batchtopk", "k": 4},
    "matryoshka": {"activation": "batchtopk", "k": 4, "matryoshka_prefixes": [6, D_SAE]},
    "jumprelu": {"activation": "jumprelu", "jumprelu_threshold": 0.3, "l0_coefficient": 0.1},
}


def trained(kind: str = "relu") -> tuple[SelOrthoSAE, SAEOptimizer, Tensor]:
    """An SAE after two steps of Adam, and a batch."""
    torch.manual_seed(0)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=D_IN, d_sae=D_SAE, penalty="none", **ACTIVATIONS[kind])).train()
    sae.set_input_statistics(torch.randn(D_IN), 2.0)
    optimizer = SAEOptimizer(sae, RunArguments(), torch.device("cpu"))
    x = torch.randn(TOKENS, D_IN)
    for _ in range(2):
        output = sae(x)
        output.loss.backward()
        if output.threshold is not None:
            sae.update_threshold(output.threshold)
        optimizer.take_gradients()
        optimizer.adam.step()
        optimizer.zero_grad()
    return sae, optimizer, x


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_dead_features_point_at_badly_reconstructed_tokens() -> None:
    sae, optimizer, x = trained()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 7]] = True
    errors = torch.full((TOKENS,), 1e-6)
    errors[[10, 20]] = 5.0
    assert resample_dead(sae, optimizer.moments(), dead, x, errors, generator()) == 2

    directions = torch.nn.functional.normalize(sae.normalize_input(x[[10, 20]]) - sae.b_dec, dim=1)
    order = [0, 1] if torch.allclose(sae.W_dec[3], directions[0]) else [1, 0]
    torch.testing.assert_close(sae.W_dec[[3, 7]], directions[order])
    usual = before["W_enc"][:, ~dead].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc[:, [3, 7]], 0.2 * usual * directions[order].T)
    torch.testing.assert_close(sae.b_enc[[3, 7]], -0.2 * usual * directions[order] @ sae.b_dec)
    for name, alive in (("W_dec", sae.W_dec[~dead]), ("W_enc", sae.W_enc[:, ~dead].T), ("b_enc", sae.b_enc[~dead])):
        old = before[name].T if name == "W_enc" else before[name]
        assert torch.equal(alive, old[~dead])
    assert torch.equal(sae.b_dec, before["b_dec"])


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_adam_forgets_exactly_the_dead_features(kind: str) -> None:
    sae, optimizer, x = trained(kind)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    saved = {name: value.clone() for name, value in optimizer.tensors().items()}
    fired = int(saved["b_enc.exp_avg"].abs().argmax())
    dead[fired] = True
    resample_dead(sae, optimizer.moments(), dead, x, torch.ones(TOKENS), generator())
    for name, old in saved.items():
        new = optimizer.tensors()[name]
        if name.startswith("b_dec") or name.endswith("step"):
            assert torch.equal(new, old)
            continue
        new, old = (new.T, old.T) if name.startswith("W_enc") else (new, old)
        assert not new[fired].any() and (old[fired].any() or name.startswith("log_threshold"))
        assert torch.equal(new[~dead], old[~dead])


def test_more_dead_features_than_tokens() -> None:
    sae, optimizer, x = trained()
    dead = torch.ones(D_SAE, dtype=torch.bool)
    assert resample_dead(sae, optimizer.moments(), dead, x[:4], torch.zeros(4), generator()) == D_SAE
    assert all(value.isfinite().all() for value in sae.state_dict().values())


def test_tokens_are_drawn_by_the_square_of_their_error() -> None:
    sae, optimizer, _ = trained()
    x, errors = torch.eye(D_IN)[:2] * 100, torch.tensor([1.0, 3.0])
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[0] = True
    wanted = torch.nn.functional.normalize(sae.normalize_input(x) - sae.b_dec, dim=1)[1]
    source, hits = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        resample_dead(sae, optimizer.moments(), dead, x, errors, source)
        hits += torch.allclose(sae.W_dec[0], wanted)
    assert 0.85 < hits / 400 < 0.95  # 9 / (1 + 9)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("opposed", [False, True])
def test_a_resampled_feature_fires_on_its_token_as_the_closed_form_says(kind: str, opposed: bool) -> None:
    sae, optimizer, x = trained(kind)
    chosen, feature = 11, 5
    normal = sae.normalize_input(x)
    if opposed:  # b_dec reaches beyond the token: a bias of 0 would leave the feature silent there
        sae.b_dec.data = 3 * normal[chosen]
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[feature] = True
    errors = torch.zeros(TOKENS)
    errors[chosen] = 1.0
    z = (normal[chosen] @ sae.W_enc + sae.b_enc).detach()
    living = torch.cat([z[:feature], z[feature + 1 :]])
    bar = 0.0
    if kind == "topk":
        bar = max(0.0, float(living.topk(4).values[-1]))
    elif sae.config.activation == "batchtopk":
        bar = float(sae.threshold)
    elif kind == "jumprelu":
        sae.log_threshold.data = torch.linspace(-2, 0, D_SAE)
        bar = float(torch.cat([sae.log_threshold[:feature], sae.log_threshold[feature + 1 :]]).median().exp())
    usual = float(sae.W_enc[:, ~dead].detach().norm(dim=0).mean())
    before = sae.inference_threshold()
    before = None if before is None else before.clone()

    resample_dead(sae, optimizer.moments(), dead, x, errors, generator())

    distance = float((normal[chosen] - sae.b_dec.detach()).norm())
    expected = max(0.2 * usual * distance, 1.5 * bar)
    assert expected > bar
    activation = float(sae.eval().encode(x[chosen])[feature])
    assert activation == pytest.approx(expected, rel=1e-4)
    thresholds = sae.inference_threshold()
    if kind == "jumprelu":
        assert float(thresholds[feature]) == pytest.approx(bar)
        assert torch.equal(thresholds[~dead], before[~dead])
    elif before is not None:
        assert torch.equal(thresholds, before)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_all_features_dead_leaves_finite_weights_and_thresholds(kind: str) -> None:
    sae, optimizer, x = trained(kind)
    resample_dead(sae, optimizer.moments(), torch.ones(D_SAE, dtype=torch.bool), x, torch.ones(TOKENS), generator())
    assert all(value.isfinite().all() for value in sae.state_dict().values())
    if kind == "jumprelu":
        torch.testing.assert_close(sae.inference_threshold(), torch.full((D_SAE,), 0.3))


class _Halves:
    """Stands for a second process, which holds the other half of the batch."""

    def __init__(self, *others: Tensor) -> None:
        self.others = list(others)

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, self.others.pop(0)])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_tokens_of_two_processes_are_candidates_as_those_of_one(kind: str) -> None:
    dead = torch.arange(D_SAE) % 5 == 0
    errors = torch.rand(TOKENS, generator=generator())
    weights = []
    for half in (TOKENS, TOKENS // 2):
        sae, optimizer, x = trained(kind)
        group: Any = _Halves(x[half:], errors[half:])
        resample_dead(sae, optimizer.moments(), dead, x[:half], errors[:half], generator(), group)
        weights.append(sae.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def trainer(kind: str) -> SAETrainer:
    torch.manual_seed(0)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=D_IN, d_sae=D_SAE, penalty="none", aux_coefficient=0, **ACTIVATIONS[kind]))
    with torch.no_grad():
        sae.b_enc[::4] = -100.0  # which nothing but resampling revives
    arguments = RunArguments(max_steps=24, resample_every=6, dead_after_tokens=400, learning_rate=1e-3, cpu=True)
    return SAETrainer(Accelerator(cpu=True), sae.train(), arguments, None)


def train(training: SAETrainer, steps: range) -> None:
    for step in steps:
        x = torch.randn(100, D_IN, generator=torch.Generator().manual_seed(step))
        training.train_step(ActivationBatch({0: x}, TokenOrigins(torch.zeros(100, 4, dtype=torch.int64))))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_training_revives_dead_features_and_resumes_to_the_same_bytes(kind: str) -> None:
    whole, parts = trainer(kind), trainer(kind)
    train(whole, range(24))
    assert not whole.state.dead(400, whole.group).any()
    assert (whole.sae.b_enc > -50).all()
    train(parts, range(9))
    resumed = trainer(kind)
    resumed.sae.load_state_dict(parts.sae.state_dict())
    resumed.optimizer.load_tensors({name: value.clone() for name, value in parts.optimizer.tensors().items()})
    tensors, content = parts.state_dict()
    resumed.load_state_dict({name: value.clone() for name, value in tensors.items()}, content)
    train(resumed, range(9, 24))
    expected = whole.sae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.sae.state_dict().items())
    if kind in ("batchtopk", "matryoshka"):  # the fixed threshold keeps k features a token on average
        x = torch.randn(2000, D_IN, generator=torch.Generator().manual_seed(99))
        assert float((whole.sae.eval().encode(x) > 0).sum(1).float().mean()) == pytest.approx(4, abs=1)
