from __future__ import annotations

import pytest
import torch

from hf_selortho import Pairs, SelOrthoConfig, SelOrthoSAE
from hf_selortho.process_group import SINGLE_PROCESS
from hf_selortho.sparse_ops import DenseFeatures, active_features
from hf_selortho.training.sae_trainer import TrainState
from hf_selortho.training.step_report import pair_churn, step_report


def test_firing_counters() -> None:
    state = TrainState(torch.zeros(3, dtype=torch.int64))
    state.count(DenseFeatures(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])), tokens=2)
    state.count(active_features(torch.tensor([[0.0, 0.0, 2.0]])), tokens=5)
    assert state.tokens == 7 and state.tokens_since_fired.tolist() == [7, 5, 0]


def test_pair_churn() -> None:
    def pairs(*both: tuple[int, int]) -> Pairs:
        i, j = torch.tensor(both).T
        return Pairs(i, j, torch.ones(len(both)))

    before, after = pairs((0, 1), (2, 3), (1, 4)), pairs((0, 1), (0, 4), (2, 3), (3, 4))
    assert pair_churn(after, before, 5) == pytest.approx(0.5)
    assert pair_churn(before, before, 5) == 0
    assert pair_churn(after, None, 5) is None


@pytest.mark.parametrize("penalty", ["selective", "none"])
def test_report_of_a_batch(penalty) -> None:
    sae = SelOrthoSAE(SelOrthoConfig(d_in=8, d_sae=20, penalty=penalty, pair_fraction=0.02, min_support=1))
    x = torch.randn(200, 8)
    out = sae(x)
    report = step_report(sae, x, out, out.pairs, SINGLE_PROCESS)
    reconstruction = out.reconstruction.detach()
    h = out.feature_acts
    unit = h / h.norm(dim=0)
    correlations = (unit.T @ unit).triu(1).flatten().sort(descending=True).values[:4].detach()  # ceil(0.02 * 190)
    assert report["fvu"] == pytest.approx(float((reconstruction - x).square().sum() / (x - x.mean(0)).square().sum()))
    assert report["l0"] == pytest.approx(float((h > 0).sum() / 200))
    assert report["peak_correlation"] == pytest.approx(float(correlations[0]), abs=1e-6)
    assert report["top_correlation"] == pytest.approx(float(correlations.mean()), abs=1e-6)
    assert report["selected_pairs"] == 4
    assert report["loss"] == pytest.approx(report["reconstruction"] + report["l1"] + report["ortho"], rel=1e-5)
