"""The metrics of the `evaluate` library: same figures in one call and streamed, in bounded memory, without network."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch

from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation import functional
from hf_selortho.evaluation.metrics import (
    CorrelationMetric,
    CrossEntropyMetric,
    LossRecoveredMetric,
    ReconstructionMetric,
    SparsityMetric,
)


def activations(tokens: int, features: int) -> torch.Tensor:
    return torch.relu(torch.randn(tokens, features) - 0.5)


def test_reconstruction_in_one_call_is_the_pure_functions():
    x = torch.randn(300, 6) + 5
    x_hat = x + 0.3 * torch.randn_like(x)
    result = ReconstructionMetric().compute(predictions=x_hat, references=x)
    assert result["mse"] == pytest.approx(functional.mse(x, x_hat).item(), rel=1e-12)
    assert result["fvu"] == pytest.approx(functional.fvu(x, x_hat).item(), rel=1e-12)
    assert result["explained_variance"] == pytest.approx(1 - result["fvu"])


@pytest.mark.parametrize("sizes", [[300], [1] * 10 + [290], [100, 150, 50], [299, 1]])
def test_reconstruction_streamed_does_not_depend_on_the_batches(sizes):
    x = torch.randn(300, 6) + 1000 * torch.arange(6)  # a mean much larger than the spread, as in Gemma
    x_hat = x + 0.3 * torch.randn_like(x)
    metric = ReconstructionMetric()
    for a, b in zip(x_hat.split(sizes), x.split(sizes), strict=True):
        metric.add_batch(predictions=a, references=b)
    assert len(metric) == 300
    assert metric.compute()["fvu"] == pytest.approx(functional.fvu(x, x_hat).item(), rel=1e-9)


def test_mean_drifting_between_batches_counts_as_variance():
    metric = ReconstructionMetric()
    for level in (0.0, 10.0):
        metric.add_batch(predictions=torch.full((5, 2), 5.0), references=torch.full((5, 2), level))
    assert metric.compute()["fvu"] == pytest.approx(1)  # the prediction is the mean over both batches


def test_zero_variance_has_no_fvu():
    result = ReconstructionMetric().compute(predictions=torch.ones(4, 2), references=torch.ones(4, 2))
    assert result["mse"] == 0 and math.isnan(result["fvu"])


def test_sparsity_counts_active_and_dead_features():
    h = torch.zeros(100, 5)
    h[:, 0] = 1.0
    h[3, 1] = 2.0
    h[7, 2] = 5e-5  # fires, but its mean is 5e-7: neither dead nor active
    metric = SparsityMetric()
    metric.add_batch(predictions=h[:50])
    metric.add_batch(predictions=h[50:])
    assert metric.density().tolist() == pytest.approx([1, 0.01, 0.01, 0, 0])
    result = metric.compute()
    assert result == {
        "l0": pytest.approx(1.02),
        "l1": pytest.approx(1.0200005),
        "active_features": 2,
        "active_fraction": 0.4,
        "dead_features": 2,
        "dead_fraction": 0.4,
    }


def test_correlation_averages_batches_of_exactly_batch_size():
    h = activations(250, 20)
    metric = CorrelationMetric(batch_size=100, pair_fraction=0.05, min_support=2)
    for part in h.split([30, 130, 7, 83]):  # arrive in other sizes; the last 50 tokens make no batch
        metric.add_batch(predictions=part)
    result = metric.compute()
    summaries = [functional.batch_correlation_summary(h[a : a + 100], 0.05, 2) for a in (0, 100)]
    assert result["peak_correlation"] == pytest.approx(np.mean([s.peak for s in summaries]))
    assert result["mean_correlation"] == pytest.approx(np.mean([s.mean for s in summaries]))
    assert result["top_correlation"] == pytest.approx(np.mean([s.top for s in summaries]))
    assert result["unique_features"] == pytest.approx(np.mean([s.unique_features for s in summaries]))
    assert result["selected_pairs"] == 10  # ceil(0.05 * 190)


def test_correlation_of_less_than_a_batch_is_measured_all_the_same():
    h = activations(40, 20)
    result = CorrelationMetric(batch_size=100, pair_fraction=0.05, min_support=2).compute(predictions=h)
    assert result["peak_correlation"] == pytest.approx(functional.batch_correlation_summary(h, 0.05, 2).peak)


def test_batches_without_an_eligible_pair_are_left_out_of_the_mean():
    h = activations(60, 10)
    result = CorrelationMetric(batch_size=60, pair_fraction=0.1).compute(
        predictions=torch.cat([h, torch.zeros(60, 10)])
    )
    assert result["peak_correlation"] == pytest.approx(functional.batch_correlation_summary(h, 0.1, 4).peak)


def test_memory_does_not_grow_with_the_tokens():
    metrics = [SparsityMetric(), CorrelationMetric(batch_size=64)]
    for _ in range(20):
        for metric in metrics:
            metric.add_batch(predictions=activations(50, 30))
    for metric in metrics:
        held = [v for v in vars(metric).values() if isinstance(v, torch.Tensor)] + getattr(metric, "_waiting", [])
        assert sum(t.numel() for t in held) <= 64 * 30
        assert len(metric) == 1000


def test_cross_entropy_and_perplexity():
    logits, targets = torch.randn(50, 30), torch.randint(0, 30, (50,))
    metric = CrossEntropyMetric()
    metric.add_batch(predictions=logits[:20], references=targets[:20])
    metric.add_batch(predictions=logits[20:], references=targets[20:])
    result = metric.compute()
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert result["cross_entropy"] == pytest.approx(expected, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert result["tokens"] == 50


def test_loss_recovered_is_of_the_means():
    metric = LossRecoveredMetric()
    metric.add_batch(references=[1.0, 3.0], predictions=[2.0, 3.0], ablations=[10.0, 14.0])
    metric.add_batch(references=[2.0], predictions=[4.0], ablations=[6.0])
    assert metric.compute() == {
        "ce_clean": 2.0,
        "ce_reconstruction": 3.0,
        "ce_zero_ablation": 10.0,
        "loss_recovered": 0.875,
        "ce_tokens": 3,
    }


def test_numpy_lists_and_single_tokens_are_taken_like_tensors():
    x, x_hat = torch.randn(8, 3), torch.randn(8, 3)
    expected = ReconstructionMetric().compute(predictions=x_hat, references=x)
    for convert in (torch.Tensor.numpy, torch.Tensor.tolist, list):
        result = ReconstructionMetric().compute(predictions=convert(x_hat), references=convert(x))
        assert result == pytest.approx(expected)
    metric = ReconstructionMetric()
    for a, b in zip(x_hat, x, strict=True):
        metric.add(prediction=a, reference=b)
    assert metric.compute() == pytest.approx(expected)


def test_compute_starts_anew():
    metric = SparsityMetric()
    first = metric.compute(predictions=torch.ones(4, 3))
    assert metric.compute(predictions=torch.zeros(4, 3))["dead_features"] == 3
    assert first["dead_features"] == 0


def test_evaluate_combine_takes_them():
    x = torch.randn(20, 4)
    result = evaluate.combine([ReconstructionMetric(), SparsityMetric()]).compute(predictions=x, references=x)
    assert result["fvu"] == 0 and result["l1"] == pytest.approx(x.abs().sum(-1).mean().item())


def test_errors_say_what_was_expected():
    with pytest.raises(SelOrthoError, match="needs references"):
        ReconstructionMetric().add_batch(predictions=torch.ones(2, 3))
    with pytest.raises(SelOrthoError, match="must be equal"):
        ReconstructionMetric().add_batch(predictions=torch.ones(2, 3), references=torch.ones(2, 4))
    with pytest.raises(SelOrthoError, match="one row for each token"):
        ReconstructionMetric().add_batch(predictions=torch.ones(2, 3), references=torch.ones(3, 3))
    with pytest.raises(SelOrthoError, match=r"expected \(tokens, width\)"):
        SparsityMetric().add_batch(predictions=torch.ones(3))
    with pytest.raises(SelOrthoError, match="no tokens"):
        SparsityMetric().compute()
    with pytest.raises(SelOrthoError, match="one process"):
        SparsityMetric(num_process=2, process_id=0)


def test_a_refused_batch_changes_nothing():
    metric = ReconstructionMetric()
    metric.add_batch(predictions=torch.zeros(2, 3), references=torch.ones(2, 3))
    with pytest.raises(SelOrthoError):
        metric.add_batch(predictions=torch.zeros(2, 3), references=torch.ones(2, 4))
    assert len(metric) == 2 and metric.compute()["mse"] == 3


def test_nothing_is_downloaded_or_written(tmp_path):
    """In a fresh process with the Hub switched off and an empty cache that may not be written to."""
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import torch\n"
        "from hf_selortho.evaluation.metrics import SparsityMetric\n"
        "print(SparsityMetric().compute(predictions=torch.ones(3, 2))['l0'])\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_METRICS_CACHE": str(home / "metrics")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2.0"
    assert not (home / "metrics").exists()
