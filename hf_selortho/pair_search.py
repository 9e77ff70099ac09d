"""The exact search for the best-scored pairs of columns of a matrix, in memory of the pairs and one tile.

Two ways to the same set visit the sums `<m_i, m_j>` in blocks and pass on those that may still be among the best; a
bound that needs one comparison an entry leaves few to be scored.

- tiles: matrix products, `n^2 B / 2` multiplications at full speed, or `n / 2` for each active entry of sparse rows;
- co-activations: sparse times sparse, one multiplication for every two features that fire on the same token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .pairs import TINY, BestPairs, FeatureNorms, Pairs, power_of_two_scale, signed_root
from .process_group import SINGLE_PROCESS, ProcessGroup
from .sparse_ops import ActiveFeatures, FeatureActivations, csr, row_offsets, times_dense

# The score (m,) of pairs from their correlations (m,) and features i < j (m,) each, with `|score| <= |correlation|`.
Score = Callable[[Tensor, Tensor, Tensor], Tensor]

GROUP = 32  # neighbours of a tile's row that are compared with the threshold at once
# Nanoseconds on 2 CPU cores, measured by benchmarks/benchmark.py; only their ratios matter. CUDA: from data sheets.
COSTS = {
    "cpu": {"multiplication": 0.063, "co-activation": 8.0, "tile entry": 0.7},
    "cuda": {"multiplication": 0.005, "co-activation": 0.5, "tile entry": 0.02},
}


@dataclass(frozen=True)
class Blocks:
    """Sizes of what a search holds at once."""

    tile_rows: int = 2048
    tile_columns: int = 512  # a float32 tile takes 4 MB
    co_activations: int = 1 << 22  # multiplications of one sparse product; bounds the memory of its result
    sample: int = 128  # features whose pairs give a first guess of the threshold
    slack: int = 1 << 16  # pairs kept beyond those asked for, so that the list is cut rarely


BLOCKS = Blocks()


class Candidates(NamedTuple):
    """Pairs of columns that may be among the best, each once."""

    i: Tensor  # (m,) the smaller index
    j: Tensor  # (m,)
    sums: Tensor  # (m,) `<m_i, m_j>`

    def where(self, mask: Tensor) -> Candidates:
        """Keep the marked ones (m,) bool."""
        kept = mask.nonzero()[:, 0]
        return Candidates(self.i[kept], self.j[kept], self.sums[kept])


class Columns:
    """The eligible columns of the global batch, scaled by powers of two to norms between 0.7 and 1.5.

    The scale rounds nothing and keeps squares of sums in the range of floats.
    """

    def __init__(self, h: FeatureActivations, norms: FeatureNorms, min_support: int, group: ProcessGroup) -> None:
        self.n = h.n
        self.index = norms.eligible(min_support).nonzero()[:, 0]  # (m,)
        if isinstance(h, ActiveFeatures):  # in every tile the scaled norms are then alike, and the bound is tight
            norm = norms.squares.sqrt()[self.index]
            self.index = self.index[(norm * power_of_two_scale(norm)).argsort()]
        self.scale = power_of_two_scale(norms.squares.sqrt()[self.index])  # (m,)
        squares, support = norms.squares[self.index] * self.scale.square(), norms.support[self.index]
        mean = None if norms.mean is None else norms.mean[self.index] * self.scale
        self.norms = FeatureNorms(squares, support, mean, norms.tokens)
        self.active = group.gather_active(self._compact(h)) if isinstance(h, ActiveFeatures) else None
        self._dense = h.values  # looked at where `active` is None

    def __len__(self) -> int:
        return len(self.index)

    def features(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of pairs of columns, the smaller first, (m,) each."""
        first, second = self.index[i], self.index[j]
        return torch.minimum(first, second), torch.maximum(first, second)

    def _compact(self, h: ActiveFeatures) -> ActiveFeatures:
        """Renumber the entries of the eligible features."""
        scale = self.scale.new_zeros(self.n).index_copy_(0, self.index, self.scale)
        values = h.values.to(self.scale.dtype) * scale[h.cols]
        number = torch.full((self.n,), -1, device=self.index.device)
        number[self.index] = torch.arange(len(self), device=self.index.device)
        cols = number[h.cols]
        kept = (cols >= 0).nonzero()[:, 0]
        counts = torch.bincount(h.rows[kept], minlength=h.tokens)
        return ActiveFeatures(row_offsets(counts), cols[kept], values[kept], len(self))

    def block(self, start: int, stop: int) -> Tensor:
        """Return the dense columns start to stop, (B, width), centred for Pearson."""
        if self.active is not None:
            block = self.active.feature_columns(start, stop)
        else:
            block = self._raw(start, stop) * self.scale[start:stop]
        return block if self.norms.mean is None else block - self.norms.mean[start:stop]

    def times(self, start: int, stop: int, block: Tensor) -> Tensor:
        """Sum products of the columns start to stop with those of a [`block`], (stop - start, width).

        Under Pearson it is enough that one side is centred; the scale is cheaper on the result.
        """
        if self.active is not None:
            return times_dense(self.active.feature_rows(start, stop), block)
        return (self._raw(start, stop).T @ block).mul_(self.scale[start:stop, None])

    def _raw(self, start: int, stop: int) -> Tensor:
        whole = len(self) == self.n  # then a view does
        return self._dense[:, slice(start, stop) if whole else self.index[start:stop]].to(self.scale.dtype)


@dataclass(frozen=True)
class PairSearch:
    """A search for the best pairs among columns, the same on every process of `group`."""

    columns: Columns
    score: Score | None = None  # None: the correlation itself
    group: ProcessGroup = SINGLE_PROCESS
    blocks: Blocks = BLOCKS

    def best(self, limit: int, method: str = "auto", at_least: float = 0.0) -> Pairs:
        """Find the `limit` pairs of best score (fewer if there are fewer), exactly.

        Args:
            method: "tiles", "coactivation" (needs active entries), or "auto", the cheaper one.
            at_least: pairs of a lower |score| are not taken.
        """
        columns = self.columns
        limit = min(limit, len(columns) * (len(columns) - 1) // 2)
        features = columns.index.sort().values
        if limit == 0:
            return BestPairs(0, columns.scale, 0.0, 0).pairs(features, columns.n)
        if method == "auto" or columns.norms.mean is not None:
            method = self._cheaper_method()
        floor, guess = at_least**2, self._guess(limit)
        while True:  # search above a guess of the least score; one that was too high costs another try
            best = BestPairs(limit, columns.scale, max(floor, guess), self.blocks.slack)
            self._search(best, method)
            if len(best) >= limit or best.threshold <= floor:
                return best.pairs(features, columns.n)
            guess = guess / 4 if guess > 1e-3 else 0.0

    def _cheaper_method(self) -> str:
        """Return "tiles" or "coactivation", by the measured cost of their arithmetic.

        Centred, pairs that never fire together are correlated too: only tiles visit them.
        """
        m, active = len(self.columns), self.columns.active
        if active is None or self.columns.norms.mean is not None:
            return "tiles"
        cost = COSTS["cuda" if active.cols.device.type == "cuda" else "cpu"]
        entries = m * m / 2 * cost["tile entry"]
        tiles = len(active.cols) * m / 2 * cost["multiplication"] + entries
        together = float(active.crow.diff().double().square().sum()) / 2
        return "tiles" if tiles < together * cost["co-activation"] else "coactivation"

    def _search(self, best: BestPairs, method: str) -> None:
        """Offer every pair that may be among the best."""
        active, bound = self.columns.active, partial(self._bound, best)
        if method == "coactivation" and active is not None:
            candidates = co_activations(active, self.blocks, self.group, bound)
        else:
            candidates = self._tiles(best)
        for found in candidates:
            i, j = self.columns.features(found.i, found.j)
            best.offer(self._signed_squares(found), i * self.columns.n + j)
        if self.group.size > 1:  # each process has visited its share of the blocks
            best.prune()
            squares, keys = best.whole()
            best.replace(self.group.gather(squares), self.group.gather(keys))

    def _signed_squares(self, found: Candidates) -> Tensor:
        """Score candidates, as `s |s|`; equal correlations are equal numbers."""
        norms = self.columns.norms.squares
        squares = found.sums * found.sums.abs() / (norms[found.i] * norms[found.j])  # eq. 4
        if self.score is None:
            return squares
        score = self.score(signed_root(squares), *self.columns.features(found.i, found.j))
        return score * score.abs()

    def _bound(self, best: BestPairs, rows: slice, cols: slice) -> float:
        """Return the least |sum| of scaled columns whose score may reach the threshold, less rounding errors.

        `|score| <= |sum| / (|m_i| |m_j|)`, with norms of these rows and columns.
        """
        squares = self.columns.norms.squares
        return math.sqrt(best.threshold * float(squares[rows].min() * squares[cols].min())) * (1 - 1e-5)

    def _guess(self, limit: int) -> float:
        """Guess the squared score that a little more than `limit` pairs reach, going by the pairs of a few features."""
        columns, m, sample, rows = self.columns, len(self.columns), self.blocks.sample, []
        if m < 4 * sample:
            return 0.0
        for start in torch.linspace(0, m - sample // 8, 8).long().tolist():
            stop = start + sample // 8
            if columns.active is not None and columns.norms.mean is None:
                sums = (columns.active.feature_rows(start, stop) @ columns.active.matrix()).to_dense()
            else:
                sums = columns.times(0, m, columns.block(start, stop)).T
            i, j = (sums != 0).nonzero(as_tuple=True)
            squares = self._signed_squares(Candidates(i + start, j, sums[i, j])).abs()
            rows.append(squares[i + start != j])
        found = torch.cat(rows)
        wanted = math.ceil(2 * limit / (m * (m - 1) / 2) * sample * (m - 1)) + 8
        return float(found.topk(wanted, sorted=False).values.min()) if wanted <= len(found) else 0.0

    def _tiles(self, best: BestPairs) -> Iterator[Candidates]:
        """Yield the candidates of every tile on and above the diagonal."""
        columns, m, height, width = self.columns, len(self.columns), self.blocks.tile_rows, self.blocks.tile_columns
        active = columns.active if columns.norms.mean is None else None
        non_negative = active is not None and bool((active.values >= 0).all())  # then so are the sums
        for left in range(self.group.rank * width, m, width * self.group.size):
            right = min(left + width, m)
            block = columns.block(left, right)  # (B, width)
            for top in range(0, right, height):
                bottom = min(top + height, m)
                tile = columns.times(top, bottom, block)  # (rows, width)
                bound = self._bound(best, slice(top, bottom), slice(left, right))
                i, j, sums = _near_the_best(tile, bound, non_negative)
                found = Candidates(i + top, j + left, sums)
                # on the diagonal some rows lie below it
                yield found.where(found.i < found.j) if bottom > left else found


def co_activations(
    active: ActiveFeatures,
    blocks: Blocks = BLOCKS,
    group: ProcessGroup = SINGLE_PROCESS,
    bound: Callable[[slice, slice], float] | None = None,
) -> Iterator[Candidates]:
    """Yield the pairs of features that fire together, in blocks of features, of which each process takes its share.

    Args:
        active: the entries of the global batch.
        bound: the least |sum| of interest between two ranges of features.
    """
    by_feature = active.by_feature
    work = row_offsets(active.crow.diff()[by_feature.rows])[by_feature.offsets]  # (n + 1,) multiplications before
    ends = torch.arange(0, int(work[-1]) + blocks.co_activations, blocks.co_activations, device=work.device)
    bounds = torch.searchsorted(work, ends).clamp_max(active.n).unique().tolist()
    for start, stop in list(zip(bounds, bounds[1:], strict=False))[group.rank :: group.size]:
        columns = active.matrix()
        if start > 0:  # the sums below the diagonal are not wanted
            kept = (active.cols >= start).nonzero()[:, 0]
            crow = row_offsets(torch.bincount(active.rows[kept], minlength=active.tokens))
            shape = (active.tokens, active.n - start)
            columns = csr(crow, active.cols[kept] - start, active.values[kept], shape)
        product = active.feature_rows(start, stop) @ columns
        least = max(TINY, bound(slice(start, stop), slice(start, None)) if bound else 0.0)
        near = (product.values().abs() >= least).nonzero()[:, 0]
        i = torch.searchsorted(product.crow_indices(), near, right=True) - 1
        found = Candidates(i + start, product.col_indices()[near] + start, product.values()[near])
        yield found.where(found.i < found.j)


def _near_the_best(tile: Tensor, bound: float, non_negative: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, column and value of the entries of a tile that reach the bound."""
    width = tile.shape[1]
    if bound == 0:
        i, j = (tile != 0).nonzero(as_tuple=True)  # most pairs never fire together; they follow at the end
        return i, j, tile[i, j]
    strength = tile if non_negative else tile.abs()
    if width % GROUP or not tile.is_contiguous():
        i, j = (strength >= bound).nonzero(as_tuple=True)
        return i, j, tile[i, j]
    near = (strength.view(-1, GROUP).amax(1) >= bound).nonzero()[:, 0]
    part = tile.view(-1, GROUP)[near]  # few of the groups
    inside = ((part if non_negative else part.abs()) >= bound).view(-1).nonzero()[:, 0]
    flat = near[inside // GROUP] * GROUP + inside % GROUP
    return flat // width, flat % width, part.view(-1)[inside]
