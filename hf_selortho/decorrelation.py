"""Correlated feature pairs of a batch: which they are, and the penalty that decorrelates them. Pure functions.

`h` is the matrix of feature activations of a batch, shape `(B, n)`: B tokens, n features. The correlation of two
features is eq. 4 of the paper, `c_ij = <h_i, h_j> / (|h_i| |h_j|)` over the batch, or its centred form (Pearson).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import SelOrthoError

TILE_ROWS, TILE_COLUMNS = 512, 4096  # a float32 tile of the correlation matrix takes 8 MB
PAIR_CHUNK_ELEMENTS = 1 << 22  # elements gathered at once when the correlations of given pairs are computed


@dataclass(frozen=True)
class Pairs:
    """Unordered feature pairs, sorted by falling absolute correlation, then by (i, j)."""

    i: Tensor  # (T,) int64, the smaller index
    j: Tensor  # (T,) int64, the larger index
    correlation: Tensor  # (T,) float32 (float64 if the activations are)

    def __len__(self) -> int:
        return len(self.i)

    def keys(self, n: int) -> Tensor:
        """Pairs as single numbers `i * n + j`, shape (T,), for set operations."""
        return self.i * n + self.j


@dataclass(frozen=True)
class BatchGroup:
    """The processes whose tokens together form one batch (data parallel training)."""

    process_group: Any = None  # None: the default group

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.process_group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over the processes, the same on each of them."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.process_group)
        return tensor


@dataclass(frozen=True)
class FeatureNorms:
    """Per-feature sums over the (global) batch."""

    squares: Tensor  # (n,) squared L2 norm of the feature's column, centred for Pearson
    support: Tensor  # (n,) tokens on which the feature fired
    mean: Tensor | None  # (n,) mean activation, for Pearson only

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


def pair_count(n: int, pair_fraction: float) -> int:
    """Number of pairs asked for: `ceil(pair_fraction * n (n - 1) / 2)`."""
    return math.ceil(pair_fraction * (n * (n - 1) // 2))


def feature_norms(h: Tensor, correlation: str = "cosine", group: BatchGroup | None = None) -> FeatureNorms:
    """Norm, support and mean of every feature over the batch `h` (B, n), summed over the processes of `group`."""
    values = _as_float(h)
    sums = torch.stack([(values != 0).sum(0).to(values.dtype), values.square().sum(0)])  # (2, n)
    support, squares = sums if group is None else group.sum(sums)
    if correlation == "cosine":
        return FeatureNorms(squares, support, None)
    total = torch.cat([values.sum(0), values.new_tensor([len(values)])])  # (n + 1,), the tokens last
    if group is not None:
        total = group.sum(total)
    mean = total[:-1] / total[-1]
    centred = (values - mean).square().sum(0)  # two passes: sum(h^2) - B mean^2 would cancel
    if group is not None:
        centred = group.sum(centred)
    centred[centred <= 1e-12 * squares] = 0  # a constant feature: what is left is rounding
    return FeatureNorms(centred, support, mean)


@torch.no_grad()
def select_pairs(
    h: Tensor,
    pair_fraction: float = 1e-3,
    min_support: int = 1,
    correlation: str = "cosine",
    method: str = "auto",
    group: BatchGroup | None = None,
) -> Pairs:
    """The exact set `T` of eq. 5: the most correlated eligible pairs of features of a batch.

    A pair is eligible if both features fired on at least `min_support` tokens. `ceil(pair_fraction * P)` pairs of
    largest `|c_ij|` are taken (all eligible ones if they are fewer), ties broken by (i, j). The correlation matrix is
    visited in tiles under a running threshold: memory is that of the pairs and of one tile, never `(n, n)`.

    Args:
        h: feature activations, (B, n), any floating dtype; the arithmetic is float32 (float64 for float64).
        pair_fraction: share of the `P = n (n - 1) / 2` pairs, in (0, 1].
        min_support: tokens on which each feature of a pair must have fired.
        correlation: "cosine" (eq. 4) or "pearson".
        method: "auto" or "tiles".
        group: processes whose rows together are the batch; each returns the same pairs.

    Raises:
        SelOrthoError: an argument is not allowed.
    """
    _check_arguments(h, pair_fraction, correlation, method)
    with torch.autocast(h.device.type, enabled=False):
        return _select(h, feature_norms(h, correlation, group), pair_fraction, min_support, group)


def selective_penalty(
    h: Tensor,
    pair_fraction: float = 1e-3,
    min_support: int = 1,
    coefficient: float = 0.1,
    reduction: str = "mean",
    correlation: str = "cosine",
    group: BatchGroup | None = None,
) -> tuple[Tensor, Pairs]:
    """[`select_pairs`] and [`decorrelation_penalty`] on the same batch: norms and correlations are computed once."""
    _check_arguments(h, pair_fraction, correlation, "auto")
    with torch.autocast(h.device.type, enabled=False), torch.no_grad():
        norms = feature_norms(h, correlation, group)
        pairs = _select(h, norms, pair_fraction, min_support, group)
    weight = _weight(coefficient, reduction, len(pairs))
    return _SquaredCorrelations.apply(h, pairs, weight, norms, group), pairs


def decorrelation_penalty(
    h: Tensor,
    pairs: Pairs,
    coefficient: float = 0.1,
    reduction: str = "mean",
    correlation: str = "cosine",
    group: BatchGroup | None = None,
) -> Tensor:
    """Penalty `coefficient * R * sum_T c_ij^2` on given pairs, with its closed-form gradient to `h`.

    `R` is 1 for "sum" (the paper) and `1 / |T|` for "mean". With `group`, correlations are those of the global batch
    and the gradient is scaled by the number of processes, because data parallel training averages gradients.

    Args:
        h: feature activations, (B, n). pairs: the set `T`, e.g. from [`select_pairs`].

    Returns:
        A scalar, float32 (float64 for a float64 `h`); 0 with a zero gradient if there are no pairs.
    """
    with torch.autocast(h.device.type, enabled=False), torch.no_grad():
        norms = feature_norms(h, correlation, group)
        pairs = _correlated(_centred(h, norms), norms, pairs, group)  # they may come from another batch
    return _SquaredCorrelations.apply(h, pairs, _weight(coefficient, reduction, len(pairs)), norms, group)


def full_penalty(
    h: Tensor,
    coefficient: float = 0.1,
    reduction: str = "mean",
    min_support: int = 1,
    correlation: str = "cosine",
    group: BatchGroup | None = None,
) -> Tensor:
    """The same penalty on *every* eligible pair (the paper's "full orthogonality"); needs `(n, n)` matrices."""
    with torch.autocast(h.device.type, enabled=False), torch.no_grad():
        norms = feature_norms(h, correlation, group)
        supported = norms.support >= min_support
        c = _correlation_matrix(_centred(h, norms), norms, supported, group)
    m = int(supported.sum())
    return _SquaredCorrelations.apply(h, c, _weight(coefficient, reduction, m * (m - 1) // 2), norms, group)


class _SquaredCorrelations(torch.autograd.Function):
    """`weight * sum c_ij^2` over given pairs, or over all pairs of a correlation matrix with an empty diagonal.

    With `u_i = h_i / |h_i|` the gradient is `2 weight (sum_j c_ij u_j - u_i sum_j c_ij^2) / |h_i|`, that is
    `2 weight h S` with the symmetric matrix `S_ij = c_ij / (|h_i| |h_j|)`, `S_ii = -sum_j c_ij^2 / |h_i|^2`.
    It holds for centred activations too: the gradient then sums to zero over the batch.
    """

    @staticmethod
    def forward(ctx, h, correlations, weight, norms, group):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(h)
        ctx.correlations, ctx.norms = correlations, norms
        ctx.scale = 2 * weight * (1 if group is None else group.size)
        if isinstance(correlations, Pairs):
            return weight * correlations.correlation.square().sum()
        return weight * correlations.square().sum() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        (h,) = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            columns = _centred(h, ctx.norms).T.contiguous()  # (n, B)
            build = _sparse_operator if isinstance(ctx.correlations, Pairs) else _dense_operator
            gradient = build(ctx.correlations, ctx.norms) @ columns  # (n, B); the operator is symmetric
        return (gradient.T * (ctx.scale * grad_output)).to(h.dtype), None, None, None, None


def _weight(coefficient: float, reduction: str, pairs: int) -> float:
    if reduction not in ("mean", "sum"):
        raise SelOrthoError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    return coefficient if reduction == "sum" else coefficient / max(pairs, 1)


def _sparse_operator(pairs: Pairs, norms: FeatureNorms) -> Tensor:
    """The matrix `S` (n, n) of the given pairs, sparse."""
    i, j, c = pairs.i, pairs.j, pairs.correlation.to(norms.squares.dtype)
    n, inverse = len(norms.squares), norms.inverse
    scaled = c * inverse[i] * inverse[j]
    diagonal = torch.zeros_like(norms.squares).index_add_(0, i, c.square()).index_add_(0, j, c.square())
    features = torch.arange(n, device=i.device)
    indices = torch.stack([torch.cat([i, j, features]), torch.cat([j, i, features])])
    entries = torch.cat([scaled, scaled, -diagonal * inverse.square()])
    operator = torch.sparse_coo_tensor(indices, entries, (n, n), check_invariants=False).coalesce()
    with warnings.catch_warnings():  # CSR tensors may lack features; the one product used here is covered by our tests
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return operator.to_sparse_csr()


def _dense_operator(c: Tensor, norms: FeatureNorms) -> Tensor:
    """The matrix `S` (n, n) of all pairs."""
    inverse = norms.inverse
    operator = c * inverse * inverse[:, None]
    operator.diagonal().copy_(-c.square().sum(1) * inverse.square())
    return operator


def _correlation_matrix(values: Tensor, norms: FeatureNorms, eligible: Tensor, group: BatchGroup | None) -> Tensor:
    """Correlations (n, n) of all eligible features, 0 elsewhere and on the diagonal."""
    c = values.T @ values
    if group is not None:
        c = group.sum(c)
    inverse = norms.inverse * eligible
    c *= inverse
    c *= inverse[:, None]
    return c.fill_diagonal_(0)


def _correlated(values: Tensor, norms: FeatureNorms, pairs: Pairs, group: BatchGroup | None) -> Pairs:
    """The same pairs with their correlations in this batch."""
    dots = _pair_dots(values, pairs.i, pairs.j)
    if group is not None:
        dots = group.sum(dots)
    inverse = norms.inverse
    return Pairs(pairs.i, pairs.j, dots * inverse[pairs.i] * inverse[pairs.j])


def _pair_dots(values: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """`<h_i, h_j>` of each pair, (T,), gathered in chunks of bounded memory."""
    step = max(1, PAIR_CHUNK_ELEMENTS // max(1, len(values)))
    rows = values.T.contiguous()  # (n, B)
    dots = [(rows[i[a : a + step]] * rows[j[a : a + step]]).sum(1) for a in range(0, len(i), step)]
    return torch.cat(dots) if dots else values.new_zeros(0)


def _select(h: Tensor, norms: FeatureNorms, pair_fraction: float, min_support: int, group: BatchGroup | None) -> Pairs:
    n = h.shape[1]
    columns = norms.eligible(min_support).nonzero()[:, 0]
    m = len(columns)
    best = _BestPairs(min(pair_count(n, pair_fraction), m * (m - 1) // 2), h.device, norms.squares.dtype)
    if best.limit > 0:
        for tile, rows, cols in _correlation_tiles(h, columns, norms, group):
            best.offer(tile, rows, cols, n)
    squares, keys = best.sorted()
    correlation = squares.sign() * squares.abs().sqrt().clamp_max(1)
    return Pairs(keys // n, keys % n, correlation)


def _correlation_tiles(
    h: Tensor, columns: Tensor, norms: FeatureNorms, group: BatchGroup | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Signed squared correlations `c |c|` of the features `columns`, on and above the diagonal: tile, rows, columns.

    They are computed as `<h_i, h_j>^2 / (|h_i|^2 |h_j|^2)`, which on activations without rounding errors gives equal
    numbers to equal correlations: ties are ties in every tile and on every number of processes.
    """
    m = len(columns)
    everything = m == h.shape[1]
    # a power of two per feature keeps the squares in the range of floats without rounding anything
    scale = torch.exp2(-torch.log2(norms.norm[columns]).round())  # (m,)
    squares = norms.squares[columns] * scale.square()  # (m,), within a factor of 2 of 1

    def block(start: int, stop: int) -> Tensor:
        part = _as_float(h[:, start:stop] if everything else h[:, columns[start:stop]])
        part = part if norms.mean is None else part - norms.mean[columns[start:stop]]
        return part * scale[start:stop]

    for top in range(0, m, TILE_ROWS):
        bottom = min(top + TILE_ROWS, m)
        left_block = block(top, bottom).T.contiguous()
        for left in range(top, m, TILE_COLUMNS):
            right = min(left + TILE_COLUMNS, m)
            tile = left_block @ block(left, right)  # (rows, columns)
            if group is not None:
                tile = group.sum(tile)
            tile *= tile.abs()
            tile /= squares[top:bottom, None] * squares[left:right]
            yield tile, columns[top:bottom], columns[left:right]


class _BestPairs:
    """The `limit` pairs of largest `|c|` offered so far, as signed squares `c |c|`; ties go to the smaller key."""

    def __init__(self, limit: int, device: torch.device, dtype: torch.dtype) -> None:
        self.limit = limit
        self.threshold = -1.0
        self.squares = torch.empty(0, dtype=dtype, device=device)
        self.keys = torch.empty(0, dtype=torch.int64, device=device)

    def offer(self, tile: Tensor, rows: Tensor, cols: Tensor, n: int) -> None:
        good = tile.abs() >= self.threshold  # pairs equal to the threshold may still win by their key
        if cols[0] <= rows[-1]:
            good &= cols > rows[:, None]
        r, c = good.nonzero(as_tuple=True)
        self.squares = torch.cat([self.squares, tile[r, c]])
        self.keys = torch.cat([self.keys, rows[r] * n + cols[c]])
        if len(self.keys) > self.limit:
            self._prune()

    def _prune(self) -> None:
        strength = self.squares.abs()
        self.threshold = float(torch.topk(strength, self.limit, sorted=False).values.min())
        above = (strength > self.threshold).nonzero()[:, 0]
        ties = (strength == self.threshold).nonzero()[:, 0]
        ties = ties[self.keys[ties].argsort()[: self.limit - len(above)]]
        kept = torch.cat([above, ties])
        self.squares, self.keys = self.squares[kept], self.keys[kept]

    def sorted(self) -> tuple[Tensor, Tensor]:
        by_key = self.keys.argsort()
        squares, keys = self.squares[by_key], self.keys[by_key]
        order = squares.abs().argsort(descending=True, stable=True)
        return squares[order], keys[order]


def _as_float(h: Tensor) -> Tensor:
    return h if h.dtype == torch.float64 else h.float()


def _centred(h: Tensor, norms: FeatureNorms) -> Tensor:
    values = _as_float(h)
    return values if norms.mean is None else values - norms.mean


def _check_arguments(h: Tensor, pair_fraction: float, correlation: str, method: str) -> None:
    if h.ndim != 2:
        raise SelOrthoError(
            f"h has shape {tuple(h.shape)}: expected (tokens, features); flatten the leading axes first"
        )
    if not 0 < pair_fraction <= 1:
        raise SelOrthoError(f"pair_fraction={pair_fraction!r}: expected a share in (0, 1]")
    if correlation not in ("cosine", "pearson"):
        raise SelOrthoError(f"correlation={correlation!r}: expected 'cosine' or 'pearson'")
    if method not in ("auto", "tiles"):
        raise SelOrthoError(f"method={method!r}: expected 'auto' or 'tiles'")
