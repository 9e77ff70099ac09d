"""Pairs of features, the sums that their correlations are made of, and the list of the best pairs so far.

The correlation of two features over the B tokens of a batch is eq. 4, `c_ij = <h_i, h_j> / (|h_i| |h_j|)`, or its
centred form (Pearson).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NonFiniteError
from .process_group import SINGLE_PROCESS, ProcessGroup
from .sparse_ops import FeatureActivations, as_float, csr, feature_activations, row_offsets

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Pairs:
    """Unordered feature pairs, sorted by falling absolute correlation (or other score), then by (i, j)."""

    i: Tensor  # (T,) int64, the smaller index
    j: Tensor  # (T,) int64, the larger index
    correlation: Tensor  # (T,) float32 (float64 if the activations are)

    def __len__(self) -> int:
        return len(self.i)

    def keys(self, n: int) -> Tensor:
        """Return the pairs as single numbers `i * n + j`, (T,), for set operations."""
        return self.i * n + self.j


@dataclass(frozen=True)
class FeatureNorms:
    """Per-feature sums over the (global) batch."""

    squares: Tensor  # (n,) squared L2 norm of the feature's column, centred for Pearson
    support: Tensor  # (n,) tokens on which the feature fired
    mean: Tensor | None  # (n,) mean activation, for Pearson only
    tokens: int  # B, of the global batch

    @property
    def inverse(self) -> Tensor:
        """`1 / norm`, and 0 for a column of zeros, (n,)."""
        return torch.where(self.squares > 0, self.squares.rsqrt(), 0)

    def eligible(self, min_support: int) -> Tensor:
        """Tell which features may take part in a selected pair, (n,): enough support, and a correlation that exists."""
        return (self.support >= min_support) & (self.squares > 0)


def feature_norms(
    h: Tensor | FeatureActivations, correlation: str = "cosine", group: ProcessGroup = SINGLE_PROCESS
) -> FeatureNorms:
    """Sum norm, support and mean of every feature over the batch `h` (B, n) of all processes of `group`.

    Raises:
        NonFiniteError: the activations hold NaN or infinity.
    """
    features = feature_activations(h)
    sums = features.moments()  # (3, n)
    tokens = int(group.sum(sums.new_tensor([float(features.tokens)])))
    support, squares, total = group.sum(sums)
    bad = (~torch.isfinite(squares)).nonzero()[:, 0]
    if len(bad):
        named = ", ".join(map(str, bad[:5].tolist())) + (", ..." if len(bad) > 5 else "")
        raise NonFiniteError(
            f"feature activations h hold NaN or infinity, or values too large to square, in {len(bad)} of "
            f"{len(squares)} features ({named}): expected finite numbers; look for the batch or the weight they came "
            "from"
        )
    if correlation == "cosine":
        return FeatureNorms(squares, support, None, tokens)
    mean = total / tokens
    centred = group.sum(features.squares_about(mean))  # two passes: sum(h^2) - B mean^2 would cancel
    centred[centred <= 1e-12 * squares] = 0  # a constant feature: what is left is rounding
    return FeatureNorms(centred, support, mean, tokens)


def pair_sums(h: Tensor | FeatureActivations, i: Tensor, j: Tensor) -> Tensor:
    """Sum `h_ti h_tj` over the tokens for given pairs (T,), with a dense copy of a few tokens of their features."""
    features = feature_activations(h)
    sums = as_float(features.values).new_zeros(len(i))
    if len(i) == 0:
        return sums
    occurring, number = occurring_features(i, j, features.n)
    rows, order = number[i].int().sort(stable=True)
    shape = (len(occurring), len(occurring))
    pattern = csr(row_offsets(torch.bincount(rows, minlength=shape[0])), number[j][order], sums, shape)
    for chunk, _ in features.chunks(occurring):
        pattern = torch.sparse.sampled_addmm(pattern, chunk, chunk.T)
    sums[order] = pattern.values()
    return sums


def occurring_features(i: Tensor, j: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the features in pairs (U,), rising, and the number of each feature among them (n,), -1 for the others."""
    occurs = torch.zeros(n, dtype=torch.bool, device=i.device)
    occurs[i] = occurs[j] = True
    features = occurs.nonzero()[:, 0]
    number = features.new_full((n,), -1)
    number[features] = torch.arange(len(features), device=i.device)
    return features, number


class BestPairs:
    """The `limit` pairs of largest `|score|` offered so far, as signed squares; ties go to the smaller (i, j).

    Args:
        limit: pairs kept, beside a `slack` so that the list is cut rarely.
        like: of the dtype and on the device of the squares.
        threshold: pairs of a smaller square are left out; those equal to it may still win by their key.
    """

    def __init__(self, limit: int, like: Tensor, threshold: float, slack: int) -> None:
        self.limit, self.threshold, self.slack = limit, threshold, slack
        # in pieces, put together only where they are looked at: there may be millions of pairs and hundreds of tiles
        self._squares, self._keys = [like.new_empty(0)], [like.new_empty(0, dtype=torch.int64)]

    def __len__(self) -> int:
        return sum(map(len, self._keys))

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return signed squares and keys `i * n + j` of the pairs, (m,) each."""
        self._squares = [torch.cat(self._squares)]
        self._keys = [torch.cat(self._keys)]
        return self._squares[0], self._keys[0]

    def replace(self, squares: Tensor, keys: Tensor) -> None:
        """Take these pairs in place of all others."""
        self._squares, self._keys = [squares], [keys]

    def offer(self, squares: Tensor, keys: Tensor) -> None:
        """Consider new pairs (m,)."""
        good = squares.abs() >= self.threshold
        self._squares.append(squares[good])
        self._keys.append(keys[good])
        if len(self) > self.limit + max(self.slack, self.limit // 4):
            self.prune()

    def prune(self) -> None:
        """Keep the `limit` best and raise the threshold to the worst of them."""
        if len(self) < max(1, self.limit):
            return
        squares, keys = self.whole()
        if len(keys) > self.limit:
            kept = strongest(squares.abs(), keys, self.limit)
            self.replace(squares[kept], keys[kept])
        self.threshold = float(self._squares[0].abs().min())

    def pairs(self, features: Tensor, n: int) -> Pairs:
        """Return the best pairs of n features, best first.

        With a threshold of 0 they are filled up with pairs of score 0 among rising features (m,), first (i, j) first.
        """
        self.prune()
        squares, keys = self.whole()
        if self.threshold == 0:
            kept = squares != 0
            squares, keys = squares[kept], keys[kept]
        by_key = keys.argsort()
        # the bits of floats that are not negative are ordered as the floats are, and whole numbers are sorted by radix
        bits = squares[by_key].abs().view(torch.int64 if squares.dtype == torch.float64 else torch.int32)
        order = by_key[(-bits).argsort(stable=True)]
        if self.threshold == 0 and len(keys) < self.limit:
            zeros = self._unrelated(features, n, keys[by_key])
            squares = torch.cat([squares[order], squares.new_zeros(len(zeros))])
            keys = torch.cat([keys[order], zeros])
        else:
            squares, keys = squares[order], keys[order]
        return Pairs(keys // n, keys % n, signed_root(squares))

    def _unrelated(self, features: Tensor, n: int, taken: Tensor) -> Tensor:
        """Return the first keys (m,) of pairs of these features that are not among the rising keys `taken`."""
        m = len(features)
        partners = torch.arange(m - 1, -1, -1, device=features.device)  # of each feature, with a larger index
        offsets, count = row_offsets(partners), min(self.limit, m * (m - 1) // 2)  # enough: some may be taken
        i = torch.repeat_interleave(partners[: int((offsets < count).sum())])[:count]
        keys = features[i] * n + features[torch.arange(count, device=i.device) - offsets[i] + i + 1]
        free = torch.ones_like(keys, dtype=torch.bool)
        free[torch.searchsorted(keys, taken[taken <= keys[-1]])] = False
        return keys[free][: self.limit - len(taken)]


def strongest(strength: Tensor, keys: Tensor, limit: int) -> Tensor:
    """Return which of at least `limit` pairs (m,) are the strongest, ties going to the smaller key: (limit,)."""
    least = strength.topk(limit, sorted=False).values.min()  # cheaper than to sort them all
    above = (strength > least).nonzero()[:, 0]
    ties = (strength == least).nonzero()[:, 0]
    ties = ties[keys[ties].argsort()[: limit - len(above)]]
    return torch.cat([above, ties])


def signed_root(squares: Tensor) -> Tensor:
    """Turn signed squares `c |c|` into `c`, at most 1 in absolute value."""
    return squares.sign() * squares.abs().sqrt().clamp_max(1)


def power_of_two_scale(norm: Tensor) -> Tensor:
    """Return the powers of two that bring norms closest to 1."""
    return torch.exp2(-torch.log2(norm).round())
