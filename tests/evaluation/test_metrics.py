"""Every figure in closed form and against the formula written out as loops; the same over batches as at once."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation import metrics
from hf_selortho.evaluation.metrics import (
    Correlations,
    CrossEntropy,
    Divergence,
    LossRecovered,
    Prediction,
    Reconstruction,
    Sparsity,
    correlation_histogram,
    correlation_summary,
    cross_entropy,
    max_decoder_cosine,
)
from hf_selortho.pair_selection import select_pairs


def brute_force_correlations(h: torch.Tensor, min_support: int, correlation: str) -> dict[tuple[int, int], float]:
    """Eq. 4 pair by pair in numpy float64; pairs that are not eligible are absent."""
    columns = h.double().numpy()
    found = {}
    for i in range(columns.shape[1]):
        for j in range(i + 1, columns.shape[1]):
            a, b = columns[:, i], columns[:, j]
            if min((a != 0).sum(), (b != 0).sum()) < min_support:
                continue
            if correlation == "pearson":
                a, b = a - a.mean(), b - b.mean()
            norm = np.linalg.norm(a) * np.linalg.norm(b)
            if norm > 1e-9:
                found[i, j] = float(a @ b / norm)
    return found


def sparse_activations(tokens: int, features: int, seed: int = 0, density: float = 0.3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, features, generator=g) * (torch.rand(tokens, features, generator=g) < density)


def test_mse_is_the_squared_norm_per_token_not_per_element():
    x_hat = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert Reconstruction.of(torch.zeros(2, 3), x_hat).figures()["mse"] == pytest.approx(4.5)  # (9 + 0) / 2


def test_fvu_of_perfect_of_mean_and_of_no_variance():
    x = torch.randn(5, 10, 4) + 3  # leading axes are tokens
    assert Reconstruction.of(x, x).figures()["fvu"] == 0
    of_mean = Reconstruction.of(x, x.mean((0, 1)).expand_as(x)).figures()
    assert of_mean["fvu"] == pytest.approx(1, abs=1e-6) and of_mean["explained_variance"] == 1 - of_mean["fvu"]
    constant = Reconstruction.of(torch.ones(4, 2), torch.ones(4, 2)).figures()
    assert constant["mse"] == 0 and math.isnan(constant["fvu"])
    with pytest.raises(SelOrthoError, match=r"shape \(2, 4\) of activations of shape \(2, 3\): expected equal"):
        Reconstruction.of(torch.ones(2, 3), torch.ones(2, 4))


@pytest.mark.parametrize("sizes", [[300], [1] * 10 + [290], [100, 150, 50]])
def test_reconstruction_over_batches_keeps_its_digits_where_the_mean_exceeds_the_spread(sizes):
    spread = torch.randn(300, 6).double()
    x = spread + 3000.0 * torch.arange(6)
    x_hat = x + 0.5 * spread
    total = Reconstruction()
    for a, b in zip(x.split(sizes), x_hat.split(sizes), strict=True):
        total += Reconstruction.of(a, b)
    scatter = (spread - spread.mean(0)).square().sum().item()
    assert total.tokens == 300 and torch.allclose(torch.as_tensor(total.mean), x.mean(0), rtol=1e-12)
    assert total.figures()["fvu"] == pytest.approx(0.25 * spread.square().sum().item() / scatter, rel=1e-9)
    assert total.figures()["mse"] == pytest.approx((x_hat - x).square().sum(1).mean().item(), rel=1e-12)


def test_mean_drifting_between_batches_counts_as_variance():
    levels = [Reconstruction.of(torch.full((5, 2), level), torch.full((5, 2), 5.0)) for level in (0.0, 10.0)]
    assert (levels[0] + levels[1]).figures()["fvu"] == pytest.approx(1)  # the prediction is the mean over both


def test_sparsity_counts_active_and_dead_features():
    h = torch.zeros(100, 5)
    h[:, 0] = 1.0
    h[3, 1] = 2.0
    h[7, 2] = 5e-5  # fires, but its mean is 5e-7: neither dead nor active
    total = Sparsity() + Sparsity.of(h[:50]) + Sparsity.of(h[50:])
    assert total.density.tolist() == pytest.approx([1, 0.01, 0.01, 0, 0])
    assert total.figures() == {
        "l0": pytest.approx(1.02), "l1": pytest.approx(1.0200005), "active_features": 2, "active_fraction": 0.4,
        "dead_features": 2, "dead_fraction": 0.4,
    }  # fmt: skip
    assert total.figures() == Sparsity.of(h).figures()


@pytest.mark.parametrize(
    ("clean", "spliced", "ablated", "recovered"),
    [(2, 2, 10, 1), (2, 10, 10, 0), (2, 4, 10, 0.75), (2, 12, 10, -0.25), (2, 2, 2, math.nan)],
)
def test_loss_recovered(clean, spliced, ablated, recovered):
    tokens = [torch.tensor([mean - 1.0, mean + 1.0]) for mean in (clean, spliced, ablated)]
    total = LossRecovered.of(*(nll[:1] for nll in tokens)) + LossRecovered.of(*(nll[1:] for nll in tokens))
    assert total.figures() == pytest.approx(
        {
            "ce_clean": clean, "ce_reconstruction": spliced, "ce_zero_ablation": ablated, "loss_recovered": recovered,
            "ce_tokens": 2,
        }, nan_ok=True,
    )  # fmt: skip


def test_identical_features_have_correlation_one_and_disjoint_ones_zero():
    h = torch.zeros(8, 4)
    h[:4, 0] = h[:4, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    h[4:, 2], h[6:, 3] = 1.0, 1.0
    summary = correlation_summary(h, pair_fraction=1 / 6)  # one of the six pairs
    assert summary.peak == summary.top == summary.threshold == pytest.approx(1)
    assert (summary.selected_pairs, summary.unique_features, summary.eligible_features) == (1, 2, 4)
    assert summary.mean == pytest.approx((1 + math.sqrt(0.5)) / 6)  # the pairs (0, 1) and (2, 3), of six


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(2, 40),
    features=st.integers(2, 15),
    min_support=st.integers(1, 6),
    pair_fraction=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    correlation=st.sampled_from(["cosine", "pearson"]),
)
def test_correlations_against_brute_force(seed, tokens, features, min_support, pair_fraction, correlation):
    h = sparse_activations(tokens, features, seed)
    expected = brute_force_correlations(h, min_support, correlation)
    summary = correlation_summary(h, pair_fraction, min_support, correlation)
    if not expected:
        assert math.isnan(summary.peak) and math.isnan(summary.mean) and summary.selected_pairs == 0
        return
    magnitudes = sorted((abs(c) for c in expected.values()), reverse=True)
    wanted = magnitudes[: math.ceil(pair_fraction * (features * (features - 1) // 2))]
    assert summary.selected_pairs == len(wanted)
    assert summary.peak == pytest.approx(magnitudes[0], abs=1e-5)
    assert summary.mean == pytest.approx(np.mean(magnitudes), abs=1e-5)
    assert summary.top == pytest.approx(np.mean(wanted), abs=1e-5)
    assert summary.threshold == pytest.approx(wanted[-1], abs=1e-5)
    histogram = correlation_histogram(h, bins=7, min_support=min_support, correlation=correlation)
    assert histogram.counts.sum() == len(expected)


@pytest.mark.parametrize("correlation", ["cosine", "pearson"])
def test_mean_and_histogram_over_blocks_of_the_gram_matrix(correlation, monkeypatch):
    monkeypatch.setattr(metrics, "_GRAM_BLOCK", 7)  # several blocks, the last one shorter
    h = sparse_activations(60, 30)
    signed = h * torch.where(torch.arange(30) % 2 == 0, 1.0, -1.0)  # negative values: no closed form of the mean
    for activations in (h, signed):
        values = list(brute_force_correlations(activations, 1, correlation).values())
        summary = correlation_summary(activations, correlation=correlation)
        assert summary.mean == pytest.approx(np.mean(np.abs(values)), abs=1e-6)
        histogram = correlation_histogram(activations, bins=10, correlation=correlation)
        low = 0 if correlation == "cosine" and activations is h else -1
        counts, edges = np.histogram(values, bins=10, range=(low, 1))
        assert histogram.counts.tolist() == counts.tolist() and np.allclose(histogram.edges.numpy(), edges)
        assert histogram.features == histogram.eligible_features == 30


def test_histogram_counts_identical_features_in_the_last_bin():
    h = torch.rand(50, 1).expand(50, 6).clone()
    assert correlation_histogram(h, bins=10).counts.tolist() == [0] * 9 + [15]


def test_histogram_of_many_features_samples_them_and_says_so():
    h = sparse_activations(40, 50)
    histogram, again = (correlation_histogram(h, max_features=20) for _ in range(2))
    assert (histogram.features, histogram.eligible_features) == (20, 50)
    assert histogram.counts.sum() == 190 and torch.equal(histogram.counts, again.counts)


def test_summary_is_that_of_the_pairs_the_penalty_picks():
    h = sparse_activations(300, 60)
    pairs = select_pairs(h, pair_fraction=0.01, min_support=4)
    summary = correlation_summary(h, pair_fraction=0.01, min_support=4)
    assert summary.top == pytest.approx(pairs.correlation.abs().mean().item())
    assert summary.unique_features == len(set(pairs.i.tolist()) | set(pairs.j.tolist()))


def test_correlations_average_batches_of_exactly_batch_size_in_bounded_memory():
    h = sparse_activations(250, 20)
    h[100:200] = 0  # a batch without an eligible pair defines no mean
    total = Correlations(batch_size=50, pair_fraction=0.05, min_support=2)
    for part in h.split([30, 130, 7, 63, 20]):  # arrive in other sizes
        total += part
        assert sum(map(len, total._waiting)) < 50
    summaries = [correlation_summary(batch, 0.05, 2) for batch in h.split(50)]
    assert total.tokens == 250 and np.allclose([astuple(s) for s in total.summaries], [astuple(s) for s in summaries],
                                               equal_nan=True)  # fmt: skip
    found, defined = total.figures(), [summaries[n] for n in (0, 1, 4)]
    assert found["peak_correlation"] == pytest.approx(np.mean([s.peak for s in defined]))
    assert found["mean_correlation"] == pytest.approx(np.mean([s.mean for s in defined]))
    assert found["top_correlation"] == pytest.approx(np.mean([s.top for s in defined]))
    assert found["selected_pairs"] == 6  # ceil(0.05 * 190) in three of five batches


@pytest.mark.parametrize(("tokens", "batches"), [(40, 1), (130, 1), (200, 2)])
def test_a_last_shorter_batch_counts_only_if_there_is_no_other(tokens, batches):
    h, total = sparse_activations(tokens, 20), Correlations(batch_size=100, pair_fraction=0.05)
    total += h
    peaks = [correlation_summary(batch, 0.05, 4).peak for batch in h.split(100)[:batches]]
    assert total.figures()["peak_correlation"] == pytest.approx(np.mean(peaks))


def test_max_decoder_cosine_in_closed_form():
    q, _ = torch.linalg.qr(torch.randn(16, 16))
    assert max_decoder_cosine(q).abs().max() < 1e-5
    s = math.sqrt(0.5)
    W_dec = torch.tensor([[2.0, 0.0], [s, s], [0.0, 1.0], [-1.0, 0.0]])
    assert torch.allclose(max_decoder_cosine(W_dec), torch.tensor([s, s, s, 0.0]), atol=1e-6)
    with pytest.raises(SelOrthoError, match="at least 2"):
        max_decoder_cosine(torch.ones(1, 4))


def test_max_decoder_cosine_blocks_do_not_matter():
    W_dec = torch.randn(37, 8)
    cosine = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1).fill_diagonal_(-2)
    for block in (1, 5, 37, 100):
        assert torch.allclose(max_decoder_cosine(W_dec, block), cosine.max(1).values, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 11 * 3, None])
def test_cross_entropy_in_chunks_is_the_log_softmax(chunk_bytes):
    logits, targets = torch.randn(10, 11) * 5, torch.randint(0, 11, (10,))
    expected = -logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(cross_entropy(logits, targets, chunk_bytes=chunk_bytes), expected, atol=1e-5)
    index = torch.tensor([4, 0, 5])
    assert torch.allclose(cross_entropy(logits, targets[index], index, chunk_bytes), expected[index], atol=1e-5)
    figures = (CrossEntropy.of(logits[:4], targets[:4]) + CrossEntropy.of(logits[4:], targets[4:])).figures()
    mean = expected.mean().item()
    assert figures == pytest.approx({"cross_entropy": mean, "perplexity": math.exp(mean), "tokens": 10}, rel=1e-5)


def test_cross_entropy_of_uniform_logits_is_the_log_of_the_vocabulary():
    loss = cross_entropy(torch.zeros(3, 262_144, dtype=torch.bfloat16), torch.tensor([0, 5, 262_143]))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.full((3,), math.log(262_144)))


def test_cross_entropy_never_widens_all_rows_at_once():
    """8 MiB of float32 at a time, however many rows there are: every float32 tensor that any operation makes."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                seen.append(out.numel() * 4)
            return out

    logits = torch.zeros(256, 50_000, dtype=torch.bfloat16)  # 51 MB of float32 if widened as a whole
    with Spy():
        cross_entropy(logits, torch.zeros(256, dtype=torch.int64))
    assert max(seen) <= 8 * 2**20


def test_divergence_is_that_of_the_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, replaced = (5 * torch.randn(6, 11, generator=generator) for _ in range(2))
    replaced[2, 3] = -torch.inf  # as where an architecture masks tokens
    clean[2, 3] = -torch.inf
    index = torch.tensor([4, 2, 2, 0])
    p, q = clean.softmax(-1)[index].double(), replaced.softmax(-1)[index].double()
    expected = torch.where(p > 0, p * (p / q).log(), 0).sum(-1).mean()
    figures = (Divergence() + Divergence.of(Prediction.of(clean, index), replaced)).figures()
    assert figures["kl"] == pytest.approx(float(expected), rel=1e-5)
    assert figures["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert Divergence.of(Prediction.of(clean, index), clean).figures()["kl"] == pytest.approx(0, abs=1e-6)
