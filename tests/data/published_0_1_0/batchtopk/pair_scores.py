"""What makes a pair of features worth decorrelating: scores between -1 and 1, one small pure function each.

A score is computed from `sums_ij = <m_i, m_j>`, where `m` is one of three matrices with a column a feature: the
activations of the batch, the pattern of where they are not zero, or the decoder directions. To add a score, write a
function `(sums, i, j, features) -> signed squares` with `|score| <= |sums_ij| / (|m_i| |m_j|)`, and a line in `SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .sparse_ops import ActiveFeatures

COSINE_CHUNK = 1 << 20  # decoder cosines computed at once
BLOCKWISE_FROM = 64  # a product of whole blocks costs as much as so many times fewer single pairs


@dataclass(frozen=True)
class FeatureNorms:
    """Per-feature sums over the (global) batch."""

    squares: Tensor  # (n,) squared L2 norm of the feature's column, centred for Pearson
    support: Tensor  # (n,) tokens on which the feature fired
    mean: Tensor | None  # (n,) mean activation, for Pearson only
    tokens: int  # B, of the global batch

    @property
    def norm(self) -> Tensor:
        """L2 norm of each column, (n,)."""
        return self.squares.sqrt()

    @property
    def inverse(self) -> Tensor:
        """`1 / norm`, and 0 for a column of zeros, (n,)."""
        return torch.where(self.squares > 0, self.squares.rsqrt(), 0)

    def eligible(self, min_support: int) -> Tensor:
        """Which features may take part in a selected pair, (n,): enough support, and a correlation that is defined."""
        return (self.support >= min_support) & (self.squares > 0)


@dataclass(frozen=True)
class Features:
    """What a score may look at beside the sums of a pair."""

    norms: FeatureNorms
    directions: Tensor | None = None  # (n, d_in) unit decoder rows, for scores that compare them
    scale: Tensor | None = None  # (n,) factors of the columns whose sums are scored

    def cosine(self, i: Tensor, j: Tensor) -> Tensor:
        """Cosine of the decoder directions of each pair (m,); for many pairs, out of products of whole blocks."""
        assert self.directions is not None  # the score says that it needs them
        if len(i) == 0:
            return self.directions.new_zeros(0)
        left, right = int(j.min()), int(j.max()) + 1
        rows = max(1, COSINE_CHUNK // (right - left))
        parts = []
        for start in range(int(i[0]), int(i[-1]) + 1, rows):  # the roads list pairs by rising i
            first, last = torch.searchsorted(i, torch.tensor([start, start + rows], device=i.device)).tolist()
            a, b = i[first:last], j[first:last]
            if (last - first) * BLOCKWISE_FROM > rows * (right - left):
                block = self.directions[start : start + rows] @ self.directions[left:right].T
                parts.append(block[a - start, b - left])
            else:
                parts.append((self.directions[a] * self.directions[b]).sum(1))
        return torch.cat(parts)


def correlation(sums: Tensor, i: Tensor, j: Tensor, features: Features) -> Tensor:
    """`c |c|` with `c_ij = <m_i, m_j> / (|m_i| |m_j|)`: eq. 4 on activations, the decoder cosine on directions.

    Ranked as `<m_i, m_j>^2 / (|m_i|^2 |m_j|^2)`: without rounding errors, equal correlations are equal numbers.
    """
    squares = features.norms.squares
    return sums * sums.abs() / (squares[i] * squares[j])


def redundancy(sums: Tensor, i: Tensor, j: Tensor, features: Features) -> Tensor:
    """`r |r|` with `r_ij = min(P(i | j), P(j | i)) cos(W_dec_i, W_dec_j)`: firing together both ways, and alike.

    A feature nested in another fires rarely where its parent does, `P(child | parent)` is small, and it is spared.
    """
    joint = sums if features.scale is None else sums / (features.scale[i] * features.scale[j])
    score = co_firing(joint, i, j, features.norms) * features.cosine(i, j)
    return score * score.abs()


def co_firing(joint: Tensor, i: Tensor, j: Tensor, norms: FeatureNorms) -> Tensor:
    """`min(P(i | j), P(j | i))` of each pair from the tokens on which both fired (m,)."""
    return joint / torch.maximum(norms.support[i], norms.support[j])


def co_firing_square(sums: Tensor, i: Tensor, j: Tensor, features: Features) -> Tensor:
    """What the square of the redundancy cannot exceed: the square of the co-firing."""
    joint = sums if features.scale is None else sums / (features.scale[i] * features.scale[j])
    return co_firing(joint, i, j, features.norms).square()


@dataclass(frozen=True)
class Score:
    """How pairs are ranked."""

    signed_squares: Callable[[Tensor, Tensor, Tensor, Features], Tensor]
    of: Literal["activations", "pattern", "decoder"]  # the matrix whose sums it takes
    compares_directions: bool = False
    # an upper bound of the square that costs less, if there is one
    bound: Callable[[Tensor, Tensor, Tensor, Features], Tensor] | None = None


SCORES: dict[str, Score] = {
    "activation": Score(correlation, of="activations"),
    "decoder": Score(correlation, of="decoder"),
    "redundancy": Score(redundancy, of="pattern", compares_directions=True, bound=co_firing_square),
}


def pattern(h: Tensor | ActiveFeatures) -> Tensor | ActiveFeatures:
    """1 where a feature fired, else 0."""
    if isinstance(h, ActiveFeatures):
        return h.with_values((h.values != 0).to(h.values.dtype))
    return (h != 0).to(h.dtype)
