"""Likeness of decoders in cases with a known answer, and against searches through all possibilities."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_selortho.errors import NonFiniteError, SelOrthoError
from hf_selortho.evaluation.stability import stability, unique_features


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.double()[:, None], b.double()[None], dim=-1)


def at_angles(*degrees: float) -> Tensor:
    """Directions in the plane."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_a_permuted_and_rescaled_decoder_is_the_same():
    W = torch.randn(50, 16)
    other = W[torch.randperm(50)] * torch.rand(50, 1).add(0.1)
    assert stability(W, other) == pytest.approx({"max_cosine": 1, "matched_cosine": 1, "shared_features": 1}, abs=1e-6)


def test_orthogonal_and_opposite_decoders_share_nothing():
    W = torch.eye(8)
    nothing = {"max_cosine": 0, "matched_cosine": 0, "shared_features": 0}
    assert stability(W[:4], W[4:]) == pytest.approx(nothing, abs=1e-7)
    assert stability(W[:1], -W[:1]) == pytest.approx({"max_cosine": -1, "matched_cosine": -1, "shared_features": 0})


@pytest.mark.parametrize("tile", [1, 2, 4, 100])
@pytest.mark.parametrize("sizes", [(5, 5), (3, 6), (6, 4)])
def test_figures_are_those_of_a_search_through_all_assignments(sizes, tile):
    a, b = (torch.randn(n, 3) for n in sizes)
    c = cosines(a, b)
    small = c if c.shape[0] <= c.shape[1] else c.T
    rows = torch.arange(len(small))
    assignments = [small[rows, torch.tensor(p)] for p in itertools.permutations(range(small.shape[1]), len(small))]
    best = max(assignments, key=lambda matched: matched.sum().item())
    found = stability(a, b, threshold=0.5, rows=tile)
    assert found == pytest.approx(
        {
            "max_cosine": (c.amax(1).mean() + c.amax(0).mean()).item() / 2,
            "matched_cosine": best.mean().item(),
            "shared_features": (best > 0.5).double().mean().item(),
        },
        abs=1e-5,
    )
    assert stability(b, a, threshold=0.5) == pytest.approx(found, abs=1e-6)


def test_no_feature_is_matched_twice():
    """Both of a's features are b's first one; only one of them gets it."""
    a, b = at_angles(0, 0), at_angles(0, 90)
    found = stability(a, b)
    assert found == pytest.approx(
        {"max_cosine": (1 + 0.5) / 2, "matched_cosine": 0.5, "shared_features": 0.5}, abs=1e-6
    )
    # one after the other would take the pair of cosine 1 first, and end with cos 60 = 0.5 for the other
    a, b = at_angles(0, 30), at_angles(-30, 0)
    assert stability(a, b)["matched_cosine"] == pytest.approx(3**0.5 / 2, abs=1e-6)


def test_zero_directions_do_not_count():
    W = torch.randn(20, 8)
    other = torch.cat([W.flip(0), torch.zeros(2, 8)])
    assert stability(W, other) == pytest.approx({"max_cosine": 1, "matched_cosine": 1, "shared_features": 1}, abs=1e-6)
    assert unique_features([W, other], 0.999) == {
        "distinct_directions": 20, "distinct_directions_per_feature": 1,
    }  # fmt: skip


@pytest.mark.parametrize("tile", [1, 3, 7, 1000])
def test_distinct_directions_are_those_of_one_look_after_another(tile):
    saes = [torch.randn(30, 4) for _ in range(3)]
    counted: list[Tensor] = []
    for direction in torch.cat(saes):
        if all(cosines(direction[None], other[None]).item() < 0.7 for other in counted):
            counted.append(direction)
    found = unique_features(saes, rows=tile)
    assert 4 < len(counted) < 90
    assert found == {"distinct_directions": len(counted), "distinct_directions_per_feature": len(counted) / 30}


def test_distinct_directions_in_closed_form():
    W = torch.eye(12)[:4]
    assert unique_features([W, W.flip(0), 2 * W]) == {"distinct_directions": 4, "distinct_directions_per_feature": 1}
    new = unique_features([W, torch.eye(12)[4:8], torch.eye(12)[8:]])
    assert new == {"distinct_directions": 12, "distinct_directions_per_feature": 3}
    assert unique_features([at_angles(0, 180)])["distinct_directions"] == 2
    # each is like the one before (cos 40 = 0.77), not like the one before that: every other one counts
    assert unique_features([at_angles(0, 40, 80, 120, 160)])["distinct_directions"] == 3


def test_bfloat16_will_do():
    W = torch.randn(10, 8).bfloat16().requires_grad_()
    assert stability(W, W)["matched_cosine"] == pytest.approx(1, abs=1e-6)


def test_errors():
    W = torch.randn(4, 3)
    with pytest.raises(SelOrthoError, match="width 3 and 2"):
        stability(W, W[:, :2])
    with pytest.raises(SelOrthoError, match="width 3 and 2"):
        unique_features([W, W[:, :2]])
    with pytest.raises(SelOrthoError, match="W_a has no feature to compare"):
        stability(torch.zeros(4, 3), W)
    with pytest.raises(NonFiniteError, match="SAE 1 holds NaN"):
        unique_features([W, W / 0 * 0])
