from __future__ import annotations

import torch
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.training.arguments import RunArguments
from hf_selortho.training.optimizer import SAEOptimizer
from hf_selortho.training.resampling import resample_dead

D_IN, D_SAE, TOKENS = 8, 20, 200


def trained() -> tuple[SelOrthoSAE, SAEOptimizer, Tensor]:
    """An SAE after two steps of Adam, and a batch."""
    torch.manual_seed(0)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=D_IN, d_sae=D_SAE, penalty="none")).train()
    sae.set_input_statistics(torch.randn(D_IN), 2.0)
    optimizer = SAEOptimizer(sae, RunArguments(), torch.device("cpu"))
    x = torch.randn(TOKENS, D_IN)
    for _ in range(2):
        sae(x).loss.backward()
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
    assert not sae.b_enc[[3, 7]].any()
    for name, alive in (("W_dec", sae.W_dec[~dead]), ("W_enc", sae.W_enc[:, ~dead].T), ("b_enc", sae.b_enc[~dead])):
        old = before[name].T if name == "W_enc" else before[name]
        assert torch.equal(alive, old[~dead])
    assert torch.equal(sae.b_dec, before["b_dec"])


def test_adam_forgets_exactly_the_dead_features() -> None:
    sae, optimizer, x = trained()
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
        assert not new[fired].any() and old[fired].any()
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
