"""How alike SAEs are that differ in nothing but their seed, by the directions of their decoders.

Cosines are signed: opposite directions are not the same feature, since activations are not negative. Directions of
length zero are none and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..errors import NonFiniteError, SelOrthoError

_TILE = 2048  # directions compared with as many others at once: 16 MB of cosines


def stability(
    W_a: Tensor,
    W_b: Tensor,
    threshold: float = 0.7,
    *,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
) -> dict[str, float]:
    """How alike the decoder directions of two SAEs are; the same with the two exchanged.

    Args:
        W_a, W_b: decoder directions (n_a, d_in) and (n_b, d_in), of any length.
        threshold: cosine above which two features count as the same; 0.7 in Paulo & Belrose 2025 (arXiv:2501.16615).
        mask_a, mask_b: (n_a,) and (n_b,) bool, which features to compare; None: all. Leave out dead ones with it.

    Returns:
        `max_cosine`: mean over the features of one SAE of the largest cosine with any of the other, averaged over both
        ways; `matched_cosine`: mean cosine of the pairs under the one-to-one assignment with the largest sum, so that
        no feature serves twice; `shared_features`: the share of these pairs whose cosine exceeds the threshold. There
        are min(n_a, n_b) pairs.

    The cosines are computed in tiles. The assignment needs them all, in float64 on the CPU: 8 n_a n_b bytes (2 GB for
    16,384 features), and a time that grows with the third power of n.

    Raises:
        SelOrthoError: other shapes, directions that are not finite, none to compare, or a threshold outside [-1, 1].
    """
    _check_threshold(threshold)
    a, b = _directions(W_a, mask_a, "W_a"), _directions(W_b, mask_b, "W_b")
    _check_width(a, b)
    if len(a) > len(b):
        a, b = b, a  # the assignment copies a matrix of more rows than columns
    b = b.to(a.device)
    cost = np.empty((len(a), len(b)))  # negative cosines: maximising would copy them, too
    best_a, best_b = (torch.full((len(x),), -torch.inf, device=a.device) for x in (a, b))
    for rows, columns, cosines in _tiles(a, b):
        cost[rows, columns] = -cosines.double().cpu().numpy()
        best_a[rows] = torch.maximum(best_a[rows], cosines.amax(1))
        best_b[columns] = torch.maximum(best_b[columns], cosines.amax(0))
    matched = -cost[linear_sum_assignment(cost)]
    return {
        "max_cosine": (best_a.double().mean().item() + best_b.double().mean().item()) / 2,
        "matched_cosine": float(matched.mean()),
        "shared_features": float((matched > threshold).mean()),
    }


def unique_features(
    W_list: Sequence[Tensor], threshold: float = 0.7, masks: Sequence[Tensor | None] | None = None
) -> dict[str, float]:
    """How many different decoder directions several SAEs have together.

    Directions are looked at in their order, those of the first SAE first. One counts if its cosine with every direction
    that was counted before is below the threshold; so duplicates within an SAE count once, too.

    Args:
        W_list: decoder directions of each SAE, (n, d_in), of any length.
        threshold: cosine from which on two directions are the same.
        masks: for each SAE, which features to look at, (n,) bool, or None for all; None: all of all SAEs.

    Returns:
        `distinct_directions`: their number; `distinct_directions_per_feature`: that per feature of one SAE (the mean
        number of features looked at): 1 where further seeds find nothing new, the number of SAEs where nothing is
        found twice.

    Raises:
        SelOrthoError: as [`stability`], or as many masks as SAEs are expected.
    """
    _check_threshold(threshold)
    if not W_list:
        raise SelOrthoError("no SAE to count the features of: expected at least one")
    if masks is None:
        masks = [None] * len(W_list)
    if len(masks) != len(W_list):
        raise SelOrthoError(f"{len(masks)} masks for {len(W_list)} SAEs: expected one for each, or None")
    looked_at = 0
    counted: list[Tensor] = []  # blocks of at most _TILE directions
    for number, (W, mask) in enumerate(zip(W_list, masks, strict=True)):
        directions = _directions(W, mask, f"SAE {number}").to(W_list[0].device)
        _check_width(counted[0] if counted else directions, directions)
        looked_at += len(directions)
        for block in directions.split(_TILE):
            for before in counted:
                block = block[((block @ before.T) < threshold).all(1)]
            if len(fresh := _distinct(block, threshold)):
                counted.append(fresh)
    distinct = sum(map(len, counted))
    return {
        "distinct_directions": distinct,
        "distinct_directions_per_feature": distinct * len(W_list) / looked_at,
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


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cosines of the unit vectors (n_a, d_in) with (n_b, d_in): rows, columns and the tile (<= _TILE, <= _TILE)."""
    for row in range(0, len(a), _TILE):
        for column in range(0, len(b), _TILE):
            rows, columns = slice(row, row + _TILE), slice(column, column + _TILE)
            yield rows, columns, a[rows] @ b[columns].T


def _directions(W: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """The features to compare at length 1: (n, d_in) float32."""
    if W.ndim != 2:
        raise SelOrthoError(f"{name} has the shape {tuple(W.shape)}: expected decoder directions (n, d_in)")
    if mask is not None and (mask.shape != W.shape[:1] or mask.dtype != torch.bool):
        raise SelOrthoError(
            f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}: expected torch.bool of shape "
            f"({len(W)},), one for each feature"
        )
    rows = W.detach().float()
    rows = rows if mask is None else rows[mask.to(rows.device)]
    if not rows.isfinite().all():
        raise NonFiniteError(f"{name} holds NaN or infinity: expected finite directions; leave such features out")
    rows = nn.functional.normalize(rows[(rows != 0).any(1)], dim=1)
    if not len(rows):
        raise SelOrthoError(f"{name} has no feature to compare: all are masked or zero; leave this SAE out")
    return rows


def _check_width(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise SelOrthoError(
            f"directions of width {a.shape[1]} and {b.shape[1]}: expected SAEs of one layer of one language model"
        )


def _check_threshold(threshold: float) -> None:
    if not -1 <= threshold <= 1:
        raise SelOrthoError(f"threshold {threshold}: expected a cosine, from -1 to 1, such as 0.7")
