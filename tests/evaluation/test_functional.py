"""Every figure in closed form and against the formula written out as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation import functional
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
    x = torch.zeros(2, 3)
    x_hat = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert functional.mse(x, x_hat).item() == pytest.approx(4.5)  # (9 + 0) / 2


def test_fvu_of_perfect_of_mean_and_of_zero_reconstruction():
    x = torch.randn(50, 4) + 3
    assert functional.fvu(x, x).item() == 0
    assert functional.fvu(x, x.mean(0).expand_as(x)).item() == pytest.approx(1, abs=1e-6)
    centred = (x - x.mean(0)).double()
    assert functional.fvu(centred, torch.zeros_like(centred)).item() == pytest.approx(1, abs=1e-9)


def test_fvu_takes_leading_axes():
    x, x_hat = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    assert functional.fvu(x, x_hat).item() == pytest.approx(
        functional.fvu(x.reshape(10, 4), x_hat.reshape(10, 4)).item()
    )


def test_fvu_keeps_its_digits_where_the_mean_is_much_larger_than_the_spread():
    spread = torch.randn(1000, 8).double()
    x = spread + 3000.0
    assert functional.fvu(x, x + 0.5 * spread).item() == pytest.approx(
        (0.25 * spread.square().sum() / (spread - spread.mean(0)).square().sum()).item(), rel=1e-9
    )


def test_l0_and_l1_count_and_sum_per_token():
    h = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.5]])
    assert functional.l0(h).item() == 1.5
    assert functional.l1(h).item() == 1.75


def test_loss_recovered():
    assert functional.loss_recovered(2.0, 2.0, 10.0) == 1
    assert functional.loss_recovered(2.0, 10.0, 10.0) == 0
    assert functional.loss_recovered(2.0, 4.0, 10.0) == 0.75
    assert functional.loss_recovered(2.0, 12.0, 10.0) == -0.25
    assert math.isnan(functional.loss_recovered(2.0, 2.0, 2.0))


def test_identical_features_have_correlation_one_and_disjoint_ones_zero():
    h = torch.zeros(8, 4)
    h[:4, 0] = h[:4, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    h[4:, 2], h[6:, 3] = 1.0, 1.0
    summary = functional.batch_correlation_summary(h, pair_fraction=1 / 6)  # one of the six pairs
    assert summary.peak == summary.top == summary.threshold == pytest.approx(1)
    assert (summary.selected_pairs, summary.unique_features, summary.eligible_features) == (1, 2, 4)
    assert summary.mean == pytest.approx((1 + math.sqrt(0.5)) / 6)  # the pairs (0, 1) and (2, 3), of six


def test_k_identical_features_fill_the_selection_among_themselves():
    h = sparse_activations(200, 20)
    h[:, :5] = h[:, :1]  # 10 identical pairs
    summary = functional.batch_correlation_summary(h, pair_fraction=10 / 190)
    assert summary.top == pytest.approx(1, abs=1e-6)
    assert (summary.selected_pairs, summary.unique_features) == (10, 5)


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
    summary = functional.batch_correlation_summary(h, pair_fraction, min_support, correlation)
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
    histogram = functional.correlation_histogram(h, bins=7, min_support=min_support, correlation=correlation)
    assert histogram.counts.sum() == len(expected)


@pytest.mark.parametrize("correlation", ["cosine", "pearson"])
def test_mean_correlation_closed_form_agrees_with_the_walk_over_blocks(correlation, monkeypatch):
    monkeypatch.setattr(functional, "_GRAM_BLOCK", 7)  # several blocks, the last one shorter
    h = sparse_activations(60, 30)
    expected = np.mean([abs(c) for c in brute_force_correlations(h, 1, correlation).values()])
    assert functional.mean_correlation(h, correlation=correlation) == pytest.approx(expected, abs=1e-6)
    signed = h * torch.where(torch.arange(30) % 2 == 0, 1.0, -1.0)  # negative values: no closed form
    expected = np.mean([abs(c) for c in brute_force_correlations(signed, 1, correlation).values()])
    assert functional.mean_correlation(signed, correlation=correlation) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("correlation", ["cosine", "pearson"])
def test_histogram_against_numpy(correlation, monkeypatch):
    monkeypatch.setattr(functional, "_GRAM_BLOCK", 7)
    h = sparse_activations(60, 30)
    histogram = functional.correlation_histogram(h, bins=10, correlation=correlation)
    values = list(brute_force_correlations(h, 1, correlation).values())
    low = 0 if correlation == "cosine" else -1
    counts, edges = np.histogram(values, bins=10, range=(low, 1))
    assert histogram.counts.tolist() == counts.tolist()
    assert np.allclose(histogram.edges.numpy(), edges)
    assert histogram.features == histogram.eligible_features == 30


def test_histogram_counts_identical_features_in_the_last_bin():
    h = torch.rand(50, 1).expand(50, 6).clone()
    histogram = functional.correlation_histogram(h, bins=10)
    assert histogram.counts.tolist() == [0] * 9 + [15]


def test_histogram_of_many_features_samples_them_and_says_so():
    h = sparse_activations(40, 50)
    histogram = functional.correlation_histogram(h, max_features=20)
    assert (histogram.features, histogram.eligible_features) == (20, 50)
    assert histogram.counts.sum() == 190
    again = functional.correlation_histogram(h, max_features=20)
    assert torch.equal(histogram.counts, again.counts)


def test_summary_is_that_of_the_pairs_the_penalty_picks():
    h = sparse_activations(300, 60)
    pairs = select_pairs(h, pair_fraction=0.01, min_support=4)
    summary = functional.batch_correlation_summary(h, pair_fraction=0.01, min_support=4)
    assert summary.top == pytest.approx(pairs.correlation.abs().mean().item())
    assert summary.unique_features == len(set(pairs.i.tolist()) | set(pairs.j.tolist()))


def test_max_decoder_cosine_of_an_orthonormal_decoder_is_zero():
    q, _ = torch.linalg.qr(torch.randn(16, 16))
    assert functional.max_decoder_cosine(q).abs().max() < 1e-5


def test_max_decoder_cosine_in_closed_form():
    s = math.sqrt(0.5)
    W_dec = torch.tensor([[2.0, 0.0], [s, s], [0.0, 1.0], [-1.0, 0.0]])
    assert torch.allclose(functional.max_decoder_cosine(W_dec), torch.tensor([s, s, s, 0.0]), atol=1e-6)


def test_max_decoder_cosine_blocks_do_not_matter():
    W_dec = torch.randn(37, 8)
    cosine = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1).fill_diagonal_(-2)
    for block in (1, 5, 37, 100):
        assert torch.allclose(functional.max_decoder_cosine(W_dec, block), cosine.max(1).values, atol=1e-5)


def test_max_decoder_cosine_needs_two_features():
    with pytest.raises(SelOrthoError, match="at least 2"):
        functional.max_decoder_cosine(torch.ones(1, 4))


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 11 * 3, None])
def test_cross_entropy_in_chunks_is_the_log_softmax(chunk_bytes):
    logits, targets = torch.randn(10, 11) * 5, torch.randint(0, 11, (10,))
    expected = -logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(functional.cross_entropy(logits, targets, chunk_bytes=chunk_bytes), expected, atol=1e-5)


def test_cross_entropy_of_uniform_logits_is_the_log_of_the_vocabulary():
    loss = functional.cross_entropy(torch.zeros(3, 262_144, dtype=torch.bfloat16), torch.tensor([0, 5, 262_143]))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.full((3,), math.log(262_144)))


def test_cross_entropy_reads_the_rows_of_the_index():
    logits, index = torch.randn(6, 9), torch.tensor([4, 0, 5])
    targets = torch.tensor([1, 2, 3])
    assert torch.allclose(
        functional.cross_entropy(logits, targets, index), functional.cross_entropy(logits[index], targets)
    )


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
        functional.cross_entropy(logits, torch.zeros(256, dtype=torch.int64))
    assert max(seen) <= 8 * 2**20
