"""How alike SAEs are that differ in nothing but their seed, by the directions of their decoders.

Cosines are signed: opposite directions are not the same feature, since activations are not negative. Directions of
length zero are none and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..checks import floats_of
from ..errors import NonFiniteError, SelOrthoError

ROWS = 2048  # directions compared with the others at once


def stability(W_a: Tensor, W_b: Tensor, threshold: float = 0.7, rows: int = ROWS) -> dict[str, float]:
    """Compare the decoder directions of two SAEs; the two may be exchanged.

    Args:
        W_a, W_b: decoder directions (n_a, d_in) and (n_b, d_in), of any length.
        threshold: cosine above which two features count as the same; 0.7 in Paulo & Belrose 2025 (arXiv:2501.16615).
        rows: directions compared with the others at once.

    Returns:
        `max_cosine`: mean over the features of one SAE of the largest cosine with any of the other, averaged over both
        ways; `matched_cosine`: mean cosine of the pairs under the one-to-one assignment with the largest sum, so that
        no feature serves twice; `shared_features`: the share of these pairs whose cosine exceeds the threshold. There
        are min(n_a, n_b) pairs.

    The assignment needs all cosines, in float64 on the CPU: 8 n_a n_b bytes (2 GB for 16,384 features), and a time that
    grows with the third power of n.

    Raises:
        SelOrthoError: directions of different widths, that are not finite or all zero.
    """
    a, b = _directions(W_a, "W_a"), _directions(W_b, "W_b")
    _check_width(a, b)
    if len(a) > len(b):
        a, b = b, a  # the assignment copies a matrix of more rows than columns
    b = b.to(a.device)
    cost = np.empty((len(a), len(b)))  # negative cosines: maximising would copy them, too
    for start in range(0, len(a), rows):
        cost[start : start + rows] = -(a[start : start + rows] @ b.T).cpu().numpy()
    matched = -cost[linear_sum_assignment(cost)]
    return {
        "max_cosine": -float(cost.min(1).mean() + cost.min(0).mean()) / 2,
        "matched_cosine": float(matched.mean()),
        "shared_features": float((matched > threshold).mean()),
    }


def unique_features(W_list: Sequence[Tensor], threshold: float = 0.7, rows: int = ROWS) -> dict[str, float]:
    """Count how many different decoder directions several SAEs have together.

    Directions are looked at in their order, those of the first SAE first. One counts if its cosine with every direction
    that was counted before is below the threshold; so duplicates within an SAE count once, too.

    Args:
        W_list: decoder directions of each SAE, (n, d_in), of any length; at least one SAE.
        threshold: cosine from which on two directions are the same.
        rows: directions compared with as many others at once.

    Returns:
        `distinct_directions`: their number; `distinct_directions_per_feature`: that per feature of one SAE (the mean
        number of features looked at): 1 where further seeds find nothing new, the number of SAEs where nothing is
        found twice.

    Raises:
        SelOrthoError: as [`stability`].
    """
    saes = [_directions(W, f"SAE {number}").to(W_list[0].device) for number, W in enumerate(W_list)]
    for directions in saes:
        _check_width(saes[0], directions)
    counted: list[Tensor] = []  # blocks of at most `rows` directions
    for block in (block for directions in saes for block in directions.split(rows)):
        for earlier in counted:
            block = block[((block @ earlier.T) < threshold).all(1)]
        counted.append(_distinct(block, threshold))
    distinct = sum(map(len, counted))
    return {
        "distinct_directions": distinct,
        "distinct_directions_per_feature": distinct * len(saes) / sum(map(len, saes)),
    }


def _distinct(block: Tensor, threshold: float) -> Tensor:
    """Those of the unit vectors (b, d_in) whose cosine with every chosen one before them is below the threshold."""
    alike = ((block @ block.T) >= threshold).cpu().numpy()
    taken = np.zeros(len(block), dtype=bool)  # like one that was chosen
    chosen = []
    for row in range(len(block)):
        if not taken[row]:
            chosen.append(row)
            taken |= alike[row]
    return block[torch.tensor(chosen, dtype=torch.int64, device=block.device)]


def _directions(W: Tensor, name: str) -> Tensor:
    """The features to compare at length 1: (n, d_in) float32."""
    W = floats_of(W, name, axes=2).detach().float()
    if not W.isfinite().all():
        raise NonFiniteError(f"{name} holds NaN or infinity: expected finite directions; leave such features out")
    directions = nn.functional.normalize(W[(W != 0).any(1)], dim=1)
    if not len(directions):
        raise SelOrthoError(f"{name} has no feature to compare: all are zero; leave this SAE out")
    return directions


def _check_width(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise SelOrthoError(
            f"directions of width {a.shape[1]} and {b.shape[1]}: expected SAEs of one layer of one language model"
        )
