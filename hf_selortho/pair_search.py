"""The exact search for the best-scored pairs of columns of a matrix, in memory of the pairs and one tile.

Three roads to the same set. All of them visit the sums `<m_i, m_j>` in blocks and pass on those that may still be among
the best; a bound that needs one comparison an entry leaves few to be scored.

- dense tiles: matrix products, `n^2 B / 2` multiplications at full speed;
- sparse tiles: sparse rows times dense columns, `n / 2` multiplications for each active entry;
- co-activations: sparse times sparse, one multiplication for every two features that fire on the same token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .pairs import TINY, BestPairs, FeatureNorms, Pairs, pair_sums, power_of_two_scale, signed_root
from .process_group import SINGLE_PROCESS, ProcessGroup
from .sparse_ops import ActiveFeatures, FeatureActivations, csr, row_offsets, times_dense

# The score (m,) of pairs from their correlations (m,) and features i < j (m,) each, with `|score| <= |correlation|`.
Score = Callable[[Tensor, Tensor, Tensor], Tensor]

GROUP = 32  # neighbours of a tile's row that are compared with the threshold at once
# Nanoseconds on 2 CPU cores, measured by scripts/benchmark.py; only their ratios matter. CUDA: from data sheets.
COSTS = {
    "cpu": {"dense": 0.0075, "sparse": 0.063, "co-activation": 8.0, "tile entry": 0.7},
    "cuda": {"dense": 0.0001, "sparse": 0.005, "co-activation": 0.5, "tile entry": 0.02},
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
    sums: Tensor  # (m,) `<m_i, m_j>` of the scaled columns

    def where(self, mask: Tensor) -> Candidates:
        """Keep the marked ones (m,) bool."""
        kept = mask.nonzero()[:, 0]
        return Candidates(self.i[kept], self.j[kept], self.sums[kept])

    def upper(self) -> Candidates:
        """Keep those above the diagonal."""
        return self.where(self.i < self.j)


class Columns:
    """The eligible columns of a matrix, scaled by powers of two to norms between 0.7 and 1.5.

    The scale rounds nothing and keeps squares of sums in the range of floats.
    """

    def __init__(self, h: FeatureActivations, norms: FeatureNorms, min_support: int) -> None:
        self.n = h.n
        self.index = norms.eligible(min_support).nonzero()[:, 0]  # (m,)
        if isinstance(h, ActiveFeatures):  # in every tile the scaled norms are then alike, and the bound is tight
            norm = norms.norm[self.index]
            self.index = self.index[(norm * power_of_two_scale(norm)).argsort()]
        self.scale = power_of_two_scale(norms.norm[self.index])  # (m,)
        self.tokens = norms.tokens
        squares, support = norms.squares[self.index] * self.scale.square(), norms.support[self.index]
        mean = None if norms.mean is None else norms.mean[self.index] * self.scale
        self.norms = FeatureNorms(squares, support, mean, norms.tokens)
        self.active = self._compact(h) if isinstance(h, ActiveFeatures) else None
        self._dense = h.values  # looked at where `active` is None

    def __len__(self) -> int:
        return len(self.index)

    def keys(self, i: Tensor, j: Tensor) -> Tensor:
        """Return pairs of columns as single numbers, the smaller feature times n plus the larger."""
        first, second = self.index[i], self.index[j]
        return torch.minimum(first, second) * self.n + torch.maximum(first, second)

    def signed_squares(self, sums: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return `c |c|` with `c_ij = <m_i, m_j> / (|m_i| |m_j|)`, eq. 4; equal correlations are equal numbers."""
        squares = self.norms.squares
        return sums * sums.abs() / (squares[i] * squares[j])

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
        block = self._raw(start, stop)
        if self.active is None:
            block = block * self.scale[start:stop]
        return block if self.norms.mean is None else block - self.norms.mean[start:stop]

    def times(self, start: int, stop: int, block: Tensor) -> Tensor:
        """Sum products of the columns start to stop with those of a [`block`], (stop - start, width).

        Under Pearson it is enough that one side is centred; the scale is cheaper on the result.
        """
        if self.active is not None:
            return times_dense(self.active.feature_rows(start, stop), block)
        return (self._raw(start, stop).T @ block).mul_(self.scale[start:stop, None])

    def _raw(self, start: int, stop: int) -> Tensor:
        """Return dense columns, neither centred nor, where they come from a dense matrix, scaled: (B, width)."""
        if self.active is not None:
            return self.active.feature_columns(start, stop)
        whole = len(self) == self.n  # then a view does
        return self._dense[:, slice(start, stop) if whole else self.index[start:stop]].to(self.scale.dtype)


def cheapest_method(columns: Columns) -> str:
    """Return "dense" or "sparse" (tiles), or "coactivation", by the measured cost of their arithmetic."""
    cost = COSTS["cuda" if columns.index.device.type == "cuda" else "cpu"]
    m, active = len(columns), columns.active
    entries = m * m / 2 * cost["tile entry"]
    expected = {"dense": m * m / 2 * columns.tokens * cost["dense"] + entries}
    if active is not None:
        together = float((active.crow[1:] - active.crow[:-1]).double().square().sum()) / 2
        # under Pearson, pairs that never fire together are negatively correlated, and there are many of them
        apart = 0 if columns.norms.mean is None else entries / 4
        expected["coactivation"] = together * cost["co-activation"] + apart
        if columns.norms.mean is None:
            expected["sparse"] = len(active.cols) * m / 2 * cost["sparse"] + entries
    return min(expected, key=lambda name: expected[name])


@dataclass(frozen=True)
class PairSearch:
    """A search for the best pairs among columns; those of the global batch, the same on every process of `group`."""

    columns: Columns
    score: Score | None = None  # None: the correlation itself
    group: ProcessGroup = SINGLE_PROCESS
    blocks: Blocks = BLOCKS

    def best(self, limit: int, method: str = "auto", at_least: float = 0.0) -> Pairs:
        """Find the `limit` pairs of best score (fewer if there are fewer), exactly.

        Args:
            method: "tiles" (dense or sparse), "coactivation" (needs active entries), or "auto", the cheapest.
            at_least: pairs of a lower |score| are not taken.
        """
        columns = self.columns
        limit = min(limit, len(columns) * (len(columns) - 1) // 2)
        best = BestPairs(limit, columns.index.device, columns.scale.dtype, at_least, self.blocks.slack)
        if limit == 0:
            return best.pairs(columns.n)
        method = cheapest_method(columns) if method == "auto" else method
        floor, guess = best.threshold, self._guess(limit)
        while True:  # search above a guess of the least score; one that was too high costs another try
            best.threshold = max(floor, guess)
            best = self._search(best, method)
            if len(best) >= best.limit or best.threshold <= floor:
                return best.pairs(columns.n)
            guess, best = guess / 4 if guess > 1e-3 else 0.0, best.emptied()

    def co_activations(self, best: BestPairs) -> Iterator[Candidates]:
        """Yield the pairs that fire together and may still be among the best, in blocks of features."""
        active = self.columns.active
        assert active is not None  # the callers see to it
        offsets, rows = active.by_feature.offsets, active.by_feature.rows
        per_token = active.crow[1:] - active.crow[:-1]
        work = row_offsets(per_token[rows])[offsets]  # (m + 1,) multiplications of the features before
        size = self.blocks.co_activations
        ends = torch.arange(0, int(work[-1]) + size, size, device=work.device)
        bounds = torch.searchsorted(work, ends).clamp_max(len(self.columns)).unique().tolist()
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if number % self.group.size != self.group.rank:
                continue
            product = active.feature_rows(start, stop) @ _columns_from(active, start)
            bound = self._bound(best, slice(start, stop), slice(start, None))
            bound = bound if self.columns.norms.mean is None else 0.0  # the means are not taken off yet
            near = (product.values().abs() >= max(bound, TINY)).nonzero()[:, 0]
            i = torch.searchsorted(product.crow_indices(), near, right=True) - 1
            yield Candidates(i + start, product.col_indices()[near] + start, product.values()[near]).upper()

    def _search(self, best: BestPairs, method: str) -> BestPairs:
        if method == "coactivation":
            if self._by_co_activations(best):
                return best
            method, best = "tiles", best.emptied()
        if method == "tiles":
            method = "sparse" if self.columns.active is not None and self.columns.norms.mean is None else "dense"
        for found in self._tiles(best, sparse=method == "sparse"):
            self._offer(best, found)
        self._merge(best)
        best.fill_with_zeros(self.columns.index.sort().values, self.columns.n)
        return best

    def _by_co_activations(self, best: BestPairs) -> bool:
        """Offer the pairs that fire together, then those that do not; False if the latter are too many to look at."""
        mean, tokens = self.columns.norms.mean, self.columns.tokens
        for found in self.co_activations(best):
            if mean is not None:
                found = found._replace(sums=found.sums - tokens * mean[found.i] * mean[found.j])
            self._offer(best, found)
        self._merge(best)
        if mean is None:
            best.fill_with_zeros(self.columns.index.sort().values, self.columns.n)
            return True
        best.prune()
        return best.threshold > 0 and self._offer_apart(best)

    def _offer_apart(self, best: BestPairs) -> bool:
        """Offer, for Pearson, the pairs that never fire together: `c = -B mean_i mean_j / (|m_i| |m_j|)`."""
        columns, norms = self.columns, self.columns.norms
        assert norms.mean is not None and columns.active is not None
        strength, order = (math.sqrt(columns.tokens) * norms.mean * norms.inverse).sort(descending=True)  # (m,)
        bound = math.sqrt(best.threshold) * (1 - 1e-5)
        # the partners of each feature are those before it whose product with it reaches the bound
        reach = torch.searchsorted(
            -strength, -(bound / strength).clamp_max(torch.finfo(strength.dtype).max), right=True
        )
        partners = torch.minimum(reach, torch.arange(len(columns), device=reach.device))
        if int(partners.sum()) > 4 * best.limit + self.blocks.slack:
            return False
        second = torch.repeat_interleave(torch.arange(len(columns), device=reach.device), partners)
        first = torch.arange(len(second), device=reach.device) - row_offsets(partners)[second]
        i, j = torch.minimum(order[first], order[second]), torch.maximum(order[first], order[second])
        joint = pair_sums(columns.active.with_values(columns.active.values.abs()), i, j)
        sums = -columns.tokens * norms.mean[i] * norms.mean[j]
        self._offer(best, Candidates(i, j, sums).where(joint == 0))
        return True

    def _signed_squares(self, found: Candidates) -> Tensor:
        """Score candidates, as `s |s|`."""
        squares = self.columns.signed_squares(found.sums, found.i, found.j)
        if self.score is None:
            return squares
        first, second = self.columns.index[found.i], self.columns.index[found.j]
        i, j = torch.minimum(first, second), torch.maximum(first, second)
        score = self.score(signed_root(squares), i, j)
        return score * score.abs()

    def _offer(self, best: BestPairs, found: Candidates) -> None:
        best.offer(self._signed_squares(found), self.columns.keys(found.i, found.j))

    def _merge(self, best: BestPairs) -> None:
        """Put the lists of all processes together, each of which has visited its share of the blocks."""
        if self.group.size > 1:
            best.prune()
            best.replace(self.group.gather(best.squares), self.group.gather(best.keys))

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

    def _bound(self, best: BestPairs, rows: slice, cols: slice) -> float:
        """Return the least |sum| of scaled columns whose score may reach the threshold, less rounding errors.

        `|score| <= |sum| / (|m_i| |m_j|)`, with norms of these rows and columns.
        """
        squares = self.columns.norms.squares
        return math.sqrt(best.threshold * float(squares[rows].min() * squares[cols].min())) * (1 - 1e-5)

    def _tiles(self, best: BestPairs, sparse: bool) -> Iterator[Candidates]:
        """Yield the candidates of every tile on and above the diagonal."""
        columns, m, height, width = self.columns, len(self.columns), self.blocks.tile_rows, self.blocks.tile_columns
        active = columns.active if sparse else None
        bands = [(top, min(top + height, m)) for top in range(0, m, height)]
        rows = [] if active is None else [active.feature_rows(*band) for band in bands]  # CSR, (rows, B)
        non_negative = active is not None and bool((active.values >= 0).all())  # then so are the sums
        for number, left in enumerate(range(0, m, width)):
            if number % self.group.size != self.group.rank:
                continue
            right = min(left + width, m)
            block = columns.block(left, right)  # (B, width)
            for band, (top, bottom) in enumerate(bands):
                if top >= right:
                    break
                # on the diagonal some rows lie below it: they are sorted out afterwards
                tile = times_dense(rows[band], block) if rows else columns.times(top, bottom, block)  # (rows, width)
                bound = self._bound(best, slice(top, bottom), slice(left, right))
                i, j, sums = _near_the_best(tile, bound, non_negative)
                found = Candidates(i + top, j + left, sums)
                yield found.upper() if bottom > left else found


def _columns_from(active: ActiveFeatures, start: int) -> Tensor:
    """Return features start to n as a CSR tensor, (B, n - start): the sums below the diagonal are not wanted."""
    if start == 0:
        return active.matrix()
    kept = (active.cols >= start).nonzero()[:, 0]
    crow = row_offsets(torch.bincount(active.rows[kept], minlength=active.tokens))
    return csr(crow, active.cols[kept] - start, active.values[kept], (active.tokens, active.n - start))


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
