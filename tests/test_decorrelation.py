from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_selortho import SelOrthoError, decorrelation_penalty, pair_selection, select_pairs
from hf_selortho.decorrelation import Pairs, full_penalty


def naive_correlations(h: Tensor, correlation: str = "cosine") -> Tensor:
    """Eq. 4 as it is printed, differentiable, (n, n)."""
    if correlation == "pearson":
        h = h - h.mean(0)
    return h.T @ h / (h.norm(dim=0)[:, None] * h.norm(dim=0))


def brute_force(h: Tensor, pair_fraction: float, min_support: int, correlation: str) -> list[tuple[int, int, float]]:
    """Every pair one by one, sorted by (-|c|, i, j), the first ceil(fraction * P)."""
    h = h.float()
    n = h.shape[1]
    support = (h != 0).sum(0)
    columns = h - h.mean(0) if correlation == "pearson" else h
    norms = columns.norm(dim=0)
    found = []
    for i in range(n):
        for j in range(i + 1, n):
            if min(support[i], support[j]) >= min_support and norms[i] > 0 and norms[j] > 0:
                dot, squares = (
                    columns[:, i] @ columns[:, j],
                    columns[:, i].square().sum() * columns[:, j].square().sum(),
                )
                # on small integers this quotient is exact up to one rounding: equal correlations are equal numbers
                found.append((i, j, float(dot.sign() * (dot.square() / squares).sqrt())))
    found.sort(key=lambda pair: (-abs(pair[2]), pair[0], pair[1]))
    return found[: math.ceil(pair_fraction * (n * (n - 1) // 2))]


def assert_same(pairs: Pairs, expected: list[tuple[int, int, float]]) -> None:
    assert list(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True)) == [(i, j) for i, j, _ in expected]
    torch.testing.assert_close(pairs.correlation, torch.tensor([c for *_, c in expected], dtype=torch.float32))
    assert pairs.i.dtype == pairs.j.dtype == torch.int64


def sparse_activations(tokens: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(tokens, features, generator=generator) - 0.5)


@pytest.mark.parametrize("correlation", ["cosine", "pearson"])
@pytest.mark.parametrize("min_support", [1, 9])
def test_selection_equals_brute_force(correlation, min_support, monkeypatch) -> None:
    monkeypatch.setattr(pair_selection, "TILE_ROWS", 7)
    monkeypatch.setattr(pair_selection, "TILE_COLUMNS", 11)
    h = sparse_activations(40, 37)
    h[:, 5] = 0
    h[:38, 20] = 0
    for fraction in (0.01, 0.2, 1.0):
        pairs = select_pairs(h, fraction, min_support, correlation)
        assert_same(pairs, brute_force(h, fraction, min_support, correlation))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 14),
    st.floats(0.001, 1.0),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.sampled_from(["random", "all equal", "all zero", "duplicates"]),
)
def test_selection_on_small_integers_is_exact_to_the_tie(tokens, features, fraction, min_support, seed, kind) -> None:
    # products and sums of small integers are exact in float32, so ties are real ties
    generator = torch.Generator().manual_seed(seed)
    h = torch.randint(0, 3, (tokens, features), generator=generator).float()
    if kind == "all equal":
        h[:] = 1
    elif kind == "all zero":
        h[:] = 0
    elif kind == "duplicates":
        h = h[:, torch.randint(0, features, (features,), generator=generator)]
    assert_same(select_pairs(h, fraction, min_support), brute_force(h, fraction, min_support, "cosine"))


def test_identical_features_are_the_first_pair() -> None:
    h = sparse_activations(64, 20)
    h[:, 13] = 3 * h[:, 4]
    pairs = select_pairs(h, 1e-3)
    assert (pairs.i.tolist(), pairs.j.tolist()) == ([4], [13])
    assert pairs.correlation.item() == pytest.approx(1)


def test_a_coincidence_of_rare_features_is_not_eligible() -> None:
    h = sparse_activations(64, 20)
    h[:, 2:4] = 0
    h[7, 2:4] = 1  # both fire once, on the same token: c = 1 and means nothing
    assert select_pairs(h, 1e-3, min_support=1).i.tolist() == [2]
    assert select_pairs(h, 1e-3, min_support=2).i.tolist() != [2]


def test_bfloat16_activations_give_float32_correlations() -> None:
    h = sparse_activations(64, 20).bfloat16()
    assert_same(select_pairs(h, 0.1), brute_force(h, 0.1, 1, "cosine"))


@pytest.mark.parametrize("correlation", ["cosine", "pearson"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_penalty_and_gradient_equal_autograd_of_the_formula(correlation, reduction) -> None:
    h = sparse_activations(50, 24).double().requires_grad_()
    pairs = select_pairs(h.detach(), 0.1, 2, correlation)
    penalty = decorrelation_penalty(h, pairs, 0.3, reduction, correlation)
    (gradient,) = torch.autograd.grad(penalty, h)
    squares = naive_correlations(h, correlation)[pairs.i, pairs.j].square()
    expected = 0.3 * (squares.sum() if reduction == "sum" else squares.mean())
    (expected_gradient,) = torch.autograd.grad(expected, h)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("correlation", ["cosine", "pearson"])
def test_gradcheck(correlation) -> None:
    h = torch.rand(9, 6, dtype=torch.float64, requires_grad=True)
    pairs = select_pairs(h.detach(), 0.4, 1, correlation)
    assert torch.autograd.gradcheck(lambda x: decorrelation_penalty(x, pairs, 0.5, "sum", correlation), h)
    assert torch.autograd.gradcheck(lambda x: full_penalty(x, 0.5, "mean", 1, correlation), h)


@pytest.mark.parametrize("correlation", ["cosine", "pearson"])
def test_full_penalty_is_the_selective_one_on_every_pair(correlation) -> None:
    h = sparse_activations(50, 24).double()
    h[:, 3] = 0  # not eligible
    everything = select_pairs(h, 1.0, 2, correlation)
    one, other = h.clone().requires_grad_(), h.clone().requires_grad_()
    full = full_penalty(one, 0.7, "mean", 2, correlation)
    selective = decorrelation_penalty(other, everything, 0.7, "mean", correlation)
    torch.testing.assert_close(full, selective)
    torch.testing.assert_close(torch.autograd.grad(full, one), torch.autograd.grad(selective, other))


def test_closed_forms() -> None:
    identical = torch.rand(8, 1).expand(8, 3).contiguous().requires_grad_()
    pairs = select_pairs(identical.detach(), 1.0)
    assert decorrelation_penalty(identical, pairs, 0.1, "sum").item() == pytest.approx(0.3)
    assert decorrelation_penalty(identical, pairs, 0.1, "mean").item() == pytest.approx(0.1)
    orthogonal = torch.eye(4, requires_grad=True)
    penalty = decorrelation_penalty(orthogonal, select_pairs(orthogonal.detach(), 1.0), 0.1)
    assert penalty.item() == 0
    assert torch.equal(torch.autograd.grad(penalty, orthogonal)[0], torch.zeros(4, 4))


def test_a_step_against_the_gradient_lowers_the_correlation() -> None:
    h = sparse_activations(64, 20)
    h[:, 13] = h[:, 4] + 0.1 * h[:, 5]
    h.requires_grad_()
    pairs = select_pairs(h.detach(), 1e-3)
    (gradient,) = torch.autograd.grad(decorrelation_penalty(h, pairs, 1.0), h)
    assert (gradient[:, [4, 13]] != 0).any() and not gradient[:, :4].any()  # only features of the pair are moved
    after = decorrelation_penalty(h.detach() - 0.1 * gradient, pairs, 1.0)
    assert after < decorrelation_penalty(h, pairs, 1.0)


@pytest.mark.parametrize("h", [torch.zeros(8, 5), torch.rand(8, 1), torch.zeros(0, 5)])
def test_nothing_to_decorrelate_is_no_penalty_and_no_nan(h) -> None:
    h = h.requires_grad_()
    pairs = select_pairs(h.detach())
    penalty = decorrelation_penalty(h, pairs)
    assert len(pairs) == 0 and penalty.item() == 0
    assert torch.equal(torch.autograd.grad(penalty, h)[0], torch.zeros_like(h))


def test_a_constant_feature_has_no_pearson_correlation() -> None:
    h = torch.rand(100, 3)
    h[:, 1] = 0.1
    assert select_pairs(h, 1.0, 1, "pearson").i.tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pair_fraction": 0.0}, "pair_fraction=0.0"),
        ({"pair_fraction": 1.1}, "pair_fraction=1.1"),
        ({"correlation": "rank"}, "correlation='rank'"),
        ({"method": "sampling"}, "method='sampling'"),
    ],
)
def test_bad_arguments_are_named(arguments, message) -> None:
    with pytest.raises(SelOrthoError, match=message):
        select_pairs(torch.rand(4, 4), **arguments)


def test_other_shapes_than_tokens_by_features_are_refused() -> None:
    with pytest.raises(SelOrthoError, match="expected .tokens, features."):
        select_pairs(torch.rand(2, 4, 4))
