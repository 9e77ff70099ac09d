from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoError, decorrelation_penalty, penalties, select_pairs
from hf_selortho.pair_search import Blocks
from hf_selortho.pair_selection import Pairs, Selection, select
from hf_selortho.pairs import pair_sums
from hf_selortho.penalties import PenaltyPlan, full_penalty, penalty, select_directions, selective_penalty
from hf_selortho.sparse_ops import DenseFeatures, active_features, feature_activations


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
def test_selection_equals_brute_force(correlation, min_support) -> None:
    h = sparse_activations(40, 37)
    h[:, 5] = 0
    h[:38, 20] = 0
    for fraction in (0.01, 0.2, 1.0):
        pairs = select(DenseFeatures(h), fraction, min_support, correlation, blocks=Blocks(7, 11)).pairs
        assert_same(pairs, brute_force(h, fraction, min_support, correlation))


def test_a_coincidence_of_rare_features_is_not_eligible() -> None:
    h = sparse_activations(64, 20)
    h[:, 2:4] = 0
    h[7, 2:4] = 1  # both fire once, on the same token: c = 1 and means nothing
    assert select_pairs(h, 1e-3, min_support=1).i.tolist() == [2]
    assert select_pairs(h, 1e-3, min_support=2).i.tolist() != [2]


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
    with pytest.raises(SelOrthoError, match="expected two axes, such as .tokens, features."):
        select_pairs(torch.rand(2, 4, 4))


def test_directions_are_selected_by_their_cosine() -> None:
    torch.manual_seed(0)
    W_dec = torch.randn(200, 12)
    cosine = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec, dim=2).triu(1)
    for fraction in (0.001, 0.02, 0.3):
        pairs = select_directions(W_dec, fraction)
        best = cosine.abs().flatten().sort(descending=True).values[: len(pairs)]
        assert len(pairs) == math.ceil(fraction * 19900) == len(pairs.keys(200).unique())
        torch.testing.assert_close(pairs.correlation.abs(), best)
        torch.testing.assert_close(pairs.correlation, cosine[pairs.i, pairs.j])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("method", ["auto", "tiles", "coactivation"])
def test_a_score_of_ones_own_equals_brute_force(method, sparse) -> None:
    torch.manual_seed(0)
    h, W_dec = sparse_activations(80, 200) * (torch.rand(200) < 0.9), torch.randn(200, 12)
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    blocks = Blocks(tile_rows=50, tile_columns=64, sample=16, co_activations=2000)

    def redundancy(c: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return c * (unit[i] * unit[j]).sum(1)

    expected = (naive_correlations(h).nan_to_num(0) * (unit @ unit.T)).triu(1)
    for fraction in (0.001, 0.02, 0.3):
        form = active_features(h) if sparse else h
        pairs = select(feature_activations(form), fraction, 1, method=method, score=redundancy, blocks=blocks).pairs
        best = expected.abs().flatten().sort(descending=True).values[: len(pairs)]
        assert len(pairs) == math.ceil(fraction * 19900) == len(pairs.keys(200).unique())
        torch.testing.assert_close(pairs.correlation.abs(), best, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(pairs.correlation, expected[pairs.i, pairs.j], atol=1e-6, rtol=1e-5)


def config_of(space: str, **settings) -> SelOrthoConfig:
    return SelOrthoConfig(d_in=12, d_sae=30, penalty_space=space, **{"pair_fraction": 0.1, **settings})


@pytest.mark.parametrize("space", ["decoder", "exclusion"])
def test_penalties_on_directions_are_their_weighted_squared_cosines(space) -> None:
    torch.manual_seed(0)
    h, W_dec = sparse_activations(80, 30).double(), torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    loss, pairs = penalty(config_of(space, ortho_coefficient=0.7), DenseFeatures(h), W_dec)
    assert pairs is not None and torch.equal(pairs.keys(30), select_directions(W_dec, 0.1).keys(30))
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    support, joint = (h != 0).double().sum(0), (h != 0).double().T @ (h != 0).double()
    apart = 1 - torch.maximum(joint / support[:, None], joint / support)
    weight = (apart if space == "exclusion" else torch.ones_like(joint)).nan_to_num(0)[pairs.i, pairs.j]
    expected = 0.7 * (weight * (unit @ unit.T)[pairs.i, pairs.j]).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, W_dec), torch.autograd.grad(expected, W_dec))


def test_exclusion_spares_features_that_fire_together_and_those_that_do_not_fire() -> None:
    parent, child, other, dead = torch.zeros(4, 400)
    parent[:100] = child[:50] = 1
    other[200:300] = 1
    h, W_dec = torch.stack([parent, child, other, dead], 1), torch.eye(4) + 0.5
    config = SelOrthoConfig(
        d_in=4, d_sae=4, penalty_space="exclusion", pair_fraction=1.0, ortho_coefficient=1.0, reduction="sum"
    )
    cosine = float(torch.nn.functional.cosine_similarity(W_dec[0], W_dec[1], dim=0))
    loss, _ = penalty(config, DenseFeatures(h), W_dec)
    torch.testing.assert_close(loss, torch.tensor(2 * cosine**2))  # (parent, other) and (child, other)


def test_a_penalty_that_is_no_longer_trained_with_says_so() -> None:
    with pytest.raises(SelOrthoError, match="no longer trained with"):
        penalty(config_of("redundancy"), DenseFeatures(sparse_activations(80, 30)), torch.randn(30, 12))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(1, 14),
    st.floats(0.001, 1.0),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.sampled_from(["random", "rare", "all equal", "all zero", "duplicates"]),
    st.sampled_from(["cosine", "pearson"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_all_roads_find_the_same_pairs_in_the_same_order(
    tokens, features, fraction, min_support, seed, kind, correlation, dtype
) -> None:
    # small integers on a power of two of tokens: means, sums and products are exact, so ties are real ties
    generator = torch.Generator().manual_seed(seed)
    h = torch.randint(-6 if kind == "rare" else 0, 3, (tokens, features), generator=generator).clamp_min(0).to(dtype)
    if kind == "all equal":
        h[:] = 1
    elif kind == "all zero":
        h[:] = 0
    elif kind == "duplicates":
        h = h[:, torch.randint(0, features, (features,), generator=generator)]
    expected = brute_force(h, fraction, min_support, correlation)
    for method in ("tiles", "coactivation", "auto"):
        for form in (h, active_features(h)):
            assert_same(select_pairs(form, fraction, min_support, correlation, method), expected)


@pytest.mark.parametrize("correlation", ["cosine", "pearson"])
@pytest.mark.parametrize("density", [0.03, 0.2, 0.6])
def test_roads_agree_over_many_blocks_and_guesses(correlation, density) -> None:
    blocks = Blocks(tile_rows=60, tile_columns=64, sample=16, co_activations=500, slack=8)
    torch.manual_seed(0)
    h = torch.rand(64, 300) * (torch.rand(64, 300) < density * 2 * torch.rand(300))
    c = naive_correlations(h.double(), correlation).nan_to_num(0)
    c[(h != 0).sum(0) < 2] = 0
    c[:, (h != 0).sum(0) < 2] = 0
    strength = c.triu(1).abs().flatten().sort(descending=True).values
    for fraction in (0.0001, 0.003, 0.1, 0.6):
        for method in ("tiles", "coactivation"):
            for form in (h, active_features(h)):
                pairs = select(feature_activations(form), fraction, 2, correlation, method, blocks=blocks).pairs
                torch.testing.assert_close(pairs.correlation.double(), c[pairs.i, pairs.j], atol=2e-6, rtol=1e-5)
                best = strength[: len(pairs)]
                torch.testing.assert_close(pairs.correlation.double().abs(), best, atol=2e-6, rtol=1e-5)
                assert len(pairs.keys(300).unique()) == len(pairs)
                assert len(pairs) == min(math.ceil(fraction * 44850), math.comb(int(((h != 0).sum(0) >= 2).sum()), 2))


@pytest.mark.parametrize("method", ["tiles", "coactivation"])
def test_a_threshold_leaves_weaker_pairs_alone(method) -> None:
    h = sparse_activations(40, 30)
    everything = select_pairs(h, 1.0)
    strong = select_pairs(h, 1.0, method=method, correlation_threshold=0.4)
    assert 0 < len(strong) < len(everything)
    assert torch.equal(strong.keys(30), everything.keys(30)[: len(strong)])
    assert strong.correlation.min() >= 0.4 > everything.correlation[len(strong)]


@pytest.mark.parametrize("correlation", ["cosine", "pearson"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_at_the_active_entries(correlation, weighted) -> None:
    torch.manual_seed(0)
    active = active_features(sparse_activations(12, 9).double())
    pairs = select_pairs(active, 0.5, 1, correlation)
    weights = torch.rand(len(pairs)).double() if weighted else None
    values = active.values.clone().requires_grad_()

    def penalty(v: Tensor) -> Tensor:
        return decorrelation_penalty(active.with_values(v), pairs, 0.5, "sum", correlation, weights=weights)

    assert torch.autograd.gradcheck(penalty, values)
    h = active.to_dense().requires_grad_()
    dense = decorrelation_penalty(h, pairs, 0.5, "sum", correlation, weights=weights)
    (gradient,) = torch.autograd.grad(dense, h)
    torch.testing.assert_close(torch.autograd.grad(penalty(values), values)[0], gradient[active.rows, active.cols])


@pytest.mark.parametrize("form", [DenseFeatures, active_features])
def test_correlations_of_a_selection_are_computed_again_for_another_batch_only(form, monkeypatch) -> None:
    features, W_dec, config = form(sparse_activations(80, 30)), torch.randn(30, 12), config_of("activation")
    selection = select(features, 0.1)
    again, _ = penalty(config, features, W_dec, plan=PenaltyPlan(pairs=selection.pairs))
    calls = []
    monkeypatch.setattr(penalties, "pair_sums", lambda *arguments: calls.append(1) or pair_sums(*arguments))
    for known in (select(features, 0.1), selection):
        torch.testing.assert_close(selective_penalty(config, features, W_dec, known, 0.03), again)
    assert calls == []
    for other in (Selection(selection.pairs), select(form(sparse_activations(80, 30)), 0.1)):
        torch.testing.assert_close(selective_penalty(config, features, W_dec, other, 0.03), again)
    assert len(calls) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_activations_are_named(value) -> None:
    h = sparse_activations(40, 20)
    h[3, 7] = value
    for form in (h, active_features(h)):
        with pytest.raises(SelOrthoError, match=r"feature activations h hold NaN or infinity.*1 of 20 features \(7\)"):
            select_pairs(form)


def test_fewer_eligible_pairs_than_asked_for_are_taken_and_said_once(caplog) -> None:
    h = sparse_activations(40, 21)
    h[:, 5:] = 0
    with caplog.at_level("INFO", logger="hf_selortho"):
        assert len(select_pairs(h, 1.0)) == len(select_pairs(h, 1.0)) == 10
    assert [record.message[:57] for record in caplog.records] == [
        "210 pairs were asked for, but only 10 are eligible (both f"[:57]
    ]
