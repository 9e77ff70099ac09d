"""The best-scored pairs of columns of a matrix, exactly, in memory of the pairs and one tile.

Three ways to the same set. All of them visit the sums `<m_i, m_j>` in blocks and pass on those that may still be among
the best; a bound that needs one comparison an entry leaves few to be scored.

- dense tiles: matrix products, `n^2 B / 2` multiplications at full speed;
- sparse tiles: sparse rows times dense columns, `n / 2` multiplications for each active entry;
- co-activations: sparse times sparse, one multiplication for every two features that fire on the same token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .batch_group import BatchGroup
from .pair_scores import SCORES, FeatureNorms, Features, Score
from .pair_sums import pair_sums
from .sparse_ops import ActiveFeatures, csr, row_offsets, times_dense

TILE_ROWS, TILE_COLUMNS = 2048, 512  # a float32 tile takes 4 MB
GROUP = 32  # neighbours of a tile's row that are compared with the threshold at once
CO_ACTIVATIONS = 1 << 22  # multiplications of one sparse product; bounds the memory of its result
SAMPLE = 128  # features whose pairs give a first guess of the threshold
TINY = torch.finfo(torch.float32).tiny
SLACK = 1 << 16  # pairs kept beyond those asked for, so that the list is cut rarely

# Nanoseconds on 2 CPU cores, measured by scripts/benchmark.py; only their ratios matter. CUDA: from data sheets.
COSTS = {
    "cpu": {"dense": 0.0075, "sparse": 0.063, "co-activation": 8.0, "tile entry": 0.7},
    "cuda": {"dense": 0.0001, "sparse": 0.005, "co-activation": 0.5, "tile entry": 0.02},
}


@dataclass(frozen=True)
class Pairs:
    """Unordered feature pairs, sorted by falling absolute correlation (or other score), then by (i, j)."""

    i: Tensor  # (T,) int64, the smaller index
    j: Tensor  # (T,) int64, the larger index
    correlation: Tensor  # (T,) float32 (float64 if the activations are)
    # the activations that the correlations were computed from, for the penalty on the same batch
    source: Source | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.i)

    def keys(self, n: int) -> Tensor:
        """Pairs as single numbers `i * n + j`, shape (T,), for set operations."""
        return self.i * n + self.j

    def detached(self) -> Pairs:
        """The same pairs without the batch that they came from, which may be large."""
        return Pairs(self.i, self.j, self.correlation)


class Source(NamedTuple):
    """A batch and what was computed from it."""

    h: Tensor | ActiveFeatures
    version: int  # of the tensor at that time: it may have been changed in place since
    norms: FeatureNorms
    correlation: str

    def is_of(self, h: Tensor | ActiveFeatures, norms: FeatureNorms, correlation: str) -> bool:
        """Whether `h`, whose norms are `norms`, is this very batch; the norms tell changes behind autograd's back."""
        mine, other = _values(self.h), _values(h)
        return (
            type(self.h) is type(h)
            and not other.is_inference()  # nothing tells whether it has been changed
            and (mine.data_ptr(), mine.shape, mine.stride()) == (other.data_ptr(), other.shape, other.stride())
            and (self.version, self.correlation) == (other._version, correlation)
            and torch.equal(self.norms.squares, norms.squares)
        )


def source_of(h: Tensor | ActiveFeatures, norms: FeatureNorms, correlation: str) -> Source:
    """Remember a batch."""
    values = _values(h)
    return Source(h.detach(), -1 if values.is_inference() else values._version, norms, correlation)


def _values(h: Tensor | ActiveFeatures) -> Tensor:
    return h.values if isinstance(h, ActiveFeatures) else h


def pair_count(n: int, pair_fraction: float) -> int:
    """Number of pairs asked for: `ceil(pair_fraction * n (n - 1) / 2)`."""
    return math.ceil(pair_fraction * (n * (n - 1) // 2))


class BestPairs:
    """The `limit` pairs of largest `|score|` offered so far, as signed squares; ties go to the smaller (i, j)."""

    def __init__(self, limit: int, device: torch.device, dtype: torch.dtype, at_least: float = 0.0) -> None:
        self.limit = limit
        self.threshold = at_least**2  # of the squares; pairs equal to it may still win by their key
        # in pieces, put together only where they are looked at: there may be millions of pairs and hundreds of tiles
        self._squares = [torch.empty(0, dtype=dtype, device=device)]
        self._keys = [torch.empty(0, dtype=torch.int64, device=device)]

    def __len__(self) -> int:
        return sum(map(len, self._keys))

    @property
    def squares(self) -> Tensor:
        """Signed squares of the pairs, (m,)."""
        self._squares = [torch.cat(self._squares)] if len(self._squares) > 1 else self._squares
        return self._squares[0]

    @property
    def keys(self) -> Tensor:
        """The pairs as single numbers `i * n + j`, (m,)."""
        self._keys = [torch.cat(self._keys)] if len(self._keys) > 1 else self._keys
        return self._keys[0]

    def replace(self, squares: Tensor, keys: Tensor) -> None:
        """Take these pairs in place of all others."""
        self._squares, self._keys = [squares], [keys]

    def offer(self, squares: Tensor, keys: Tensor) -> None:
        """Consider new pairs (m,)."""
        good = squares.abs() >= self.threshold
        self._squares.append(squares[good])
        self._keys.append(keys[good])
        if len(self) > self.limit + max(SLACK, self.limit // 4):
            self.prune()

    def prune(self) -> None:
        """Keep the `limit` best and raise the threshold to the worst of them."""
        if len(self) < self.limit or self.limit == 0:
            return
        strength = self.squares.abs()
        kept = strongest(strength, self.keys, self.limit)
        self.threshold = float(strength[kept].min())
        self.replace(self.squares[kept], self.keys[kept])

    def drop_zeros(self) -> None:
        """Forget pairs of score 0."""
        kept = self.squares != 0
        self.replace(self.squares[kept], self.keys[kept])

    def pairs(self, n: int) -> Pairs:
        """The best pairs of n features, best first."""
        self.prune()
        by_key = self.keys.argsort()
        squares, keys = self.squares[by_key], self.keys[by_key]
        order = squares.abs().argsort(descending=True, stable=True)
        squares, keys = squares[order], keys[order]
        return Pairs(keys // n, keys % n, squares.sign() * squares.abs().sqrt().clamp_max(1))


def strongest(strength: Tensor, keys: Tensor, limit: int) -> Tensor:
    """Which of at least `limit` pairs (m,) are the strongest, ties going to the smaller key: (limit,)."""
    least = strength.topk(limit, sorted=False).values.min()  # cheaper than to sort them all
    above = (strength > least).nonzero()[:, 0]
    ties = (strength == least).nonzero()[:, 0]
    ties = ties[keys[ties].argsort()[: limit - len(above)]]
    return torch.cat([above, ties])


def first_pairs(features: Tensor, n: int, taken: Tensor, limit: int) -> Tensor:
    """Keys of the first pairs of rising features (m,) that are not `taken`, to make `limit` with these."""
    m = len(features)
    partners = torch.arange(m - 1, -1, -1, device=features.device)  # (m,) of each feature, with a larger index
    offsets = row_offsets(partners)
    number = torch.arange(min(limit, m * (m - 1) // 2), device=features.device)  # enough: some may be taken
    i = torch.searchsorted(offsets, number, right=True) - 1
    keys = features[i] * n + features[number - offsets[i] + i + 1]
    return keys[~torch.isin(keys, taken)][: limit - len(taken)]


class Candidates(NamedTuple):
    """Pairs of columns that may be among the best, each once."""

    i: Tensor  # (m,) the smaller index
    j: Tensor  # (m,)
    sums: Tensor  # (m,) `<m_i, m_j>` of the scaled columns


class Columns:
    """The eligible columns of a matrix, scaled by powers of two to norms between 0.7 and 1.5.

    The scale rounds nothing and keeps squares of sums in the range of floats. `|score| <= |sum_ij| / (|m_i| |m_j|)`
    holds for every score, which is what the roads compare with the threshold.
    """

    def __init__(self, h: Tensor | ActiveFeatures, norms: FeatureNorms, min_support: int) -> None:
        self.n = h.n if isinstance(h, ActiveFeatures) else h.shape[1]
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
        self.dense = None if isinstance(h, ActiveFeatures) else h

    def __len__(self) -> int:
        return len(self.index)

    def keys(self, i: Tensor, j: Tensor) -> Tensor:
        """Pairs of columns as single numbers, the smaller feature times n plus the larger."""
        first, second = self.index[i], self.index[j]
        return torch.minimum(first, second) * self.n + torch.maximum(first, second)

    def _compact(self, h: ActiveFeatures) -> ActiveFeatures:
        """The entries of the eligible features, renumbered."""
        scale = self.scale.new_zeros(self.n).index_copy_(0, self.index, self.scale)
        values = h.values.to(self.scale.dtype) * scale[h.cols]
        number = torch.full((self.n,), -1, device=self.index.device)
        number[self.index] = torch.arange(len(self), device=self.index.device)
        cols = number[h.cols]
        kept = (cols >= 0).nonzero()[:, 0]
        counts = torch.bincount(h.rows[kept], minlength=h.tokens)
        return ActiveFeatures(row_offsets(counts), cols[kept], values[kept], len(self))

    def block(self, start: int, stop: int) -> Tensor:
        """Dense columns start to stop, (B, width); centred for Pearson."""
        block = self.raw(start, stop)
        if self.active is None:
            block = block * self.scale[start:stop]
        return block if self.norms.mean is None else block - self.norms.mean[start:stop]

    def raw(self, start: int, stop: int) -> Tensor:
        """Dense columns, neither centred nor, where they come from a dense matrix, scaled: (B, width)."""
        if self.active is not None:
            return self.active.feature_columns(start, stop)
        assert self.dense is not None
        whole = len(self) == self.n  # then a view does
        return self.dense[:, slice(start, stop) if whole else self.index[start:stop]].to(self.scale.dtype)

    def times(self, start: int, stop: int, block: Tensor) -> Tensor:
        """Sums of the columns start to stop with those of a [`block`], (stop - start, width).

        Under Pearson it is enough that one side is centred; the scale is cheaper on the result.
        """
        if self.active is not None:
            return times_dense(self.active.feature_rows(start, stop), block)
        return (self.raw(start, stop).T @ block).mul_(self.scale[start:stop, None])


def power_of_two_scale(norm: Tensor) -> Tensor:
    """The powers of two that bring norms closest to 1."""
    return torch.exp2(-torch.log2(norm).round())


def best_pairs(
    columns: Columns,
    score: Score,
    directions: Tensor | None,
    limit: int,
    method: str = "auto",
    group: BatchGroup | None = None,
    at_least: float = 0.0,
) -> Pairs:
    """The `limit` eligible pairs of best score (fewer if there are fewer), exactly.

    Args:
        columns: the matrix whose sums the score takes; the global batch, the same on every process of `group`.
        directions: unit decoder rows (n, d_in) for a score that compares them.
        method: "tiles" (dense or sparse), "coactivation" (needs active entries), or "auto", the cheapest.
        at_least: pairs of a lower |score| are not taken.
    """
    limit = min(limit, len(columns) * (len(columns) - 1) // 2)
    best = BestPairs(limit, columns.index.device, columns.scale.dtype, at_least)
    if limit > 0:
        directions = None if directions is None else directions[columns.index]
        features = Features(columns.norms, directions, columns.scale)
        search = _Search(columns, score, features, group, at_least)
        best = search.run(best, cheapest_method(columns) if method == "auto" else method)
    return best.pairs(columns.n)


def cheapest_method(columns: Columns) -> str:
    """ "dense" or "sparse" (tiles), or "coactivation", by the measured cost of their arithmetic."""
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
class _Search:
    """One search for the best pairs."""

    columns: Columns
    score: Score
    features: Features  # of the eligible columns
    group: BatchGroup | None
    at_least: float

    def run(self, best: BestPairs, method: str) -> BestPairs:
        """Search above a guess of the least score; a guess that was too high costs another try."""
        floor = best.threshold
        guess = self.guess(best.limit)
        while True:
            best.threshold = max(floor, guess)
            found = self.search(best, method)
            if len(found) >= found.limit or found.threshold <= floor:
                return found
            guess, best = guess / 4 if guess > 1e-3 else 0.0, self.fresh(best)

    def fresh(self, best: BestPairs) -> BestPairs:
        return BestPairs(best.limit, best.keys.device, best.squares.dtype, self.at_least)

    def search(self, best: BestPairs, method: str) -> BestPairs:
        if method == "coactivation":
            found = self.by_co_activations(best)
            if found is not None:
                return found
            method, best = "tiles", self.fresh(best)
        if method == "tiles":
            method = "sparse" if self.columns.active is not None and self.columns.norms.mean is None else "dense"
        for candidates in self.tiles(best, sparse=method == "sparse"):
            self.offer(best, candidates)
        self.merge(best)
        return self.offer_zeros(best)

    def guess(self, limit: int) -> float:
        """The squared score that a little more than `limit` pairs reach, going by the pairs of a few features."""
        columns, m, rows = self.columns, len(self.columns), []
        if m < 4 * SAMPLE:
            return 0.0
        for start in torch.linspace(0, m - SAMPLE // 8, 8).long().tolist():
            stop = start + SAMPLE // 8
            if columns.active is not None and columns.norms.mean is None:
                sums = (columns.active.feature_rows(start, stop) @ columns.active.matrix()).to_dense()
            else:
                sums = columns.times(0, m, columns.block(start, stop)).T
            i, j = (sums != 0).nonzero(as_tuple=True)
            squares = self.score.signed_squares(sums[i, j], i + start, j, self.features).abs()
            rows.append(squares[i + start != j])
        sample = torch.cat(rows)
        wanted = math.ceil(2 * limit / (m * (m - 1) / 2) * SAMPLE * (m - 1)) + 8
        return float(sample.topk(wanted, sorted=False).values.min()) if wanted <= len(sample) else 0.0

    def offer(self, best: BestPairs, found: Candidates) -> None:
        if self.score.bound is not None:
            reach = self.score.bound(found.sums, found.i, found.j, self.features)
            found = _kept(found, reach >= best.threshold * (1 - 1e-5))
        squares = self.score.signed_squares(found.sums, found.i, found.j, self.features)
        best.offer(squares, self.columns.keys(found.i, found.j))

    def merge(self, best: BestPairs) -> None:
        """Each process has visited its share of the blocks: put their lists together."""
        if self.group is not None:
            best.prune()
            best.replace(torch.cat(self.group.gather(best.squares)), torch.cat(self.group.gather(best.keys)))

    def is_mine(self, block: int) -> bool:
        return self.group is None or block % self.group.size == self.group.rank

    def bound(self, threshold: float, rows: slice, cols: slice) -> float:
        """The least |sum| of scaled columns whose score may reach the threshold (a square), less rounding errors.

        `|score| <= |sum| / (|m_i| |m_j|)`, with norms of these rows and columns.
        """
        squares = self.columns.norms.squares
        return math.sqrt(threshold * float(squares[rows].min() * squares[cols].min())) * (1 - 1e-5)

    def tiles(self, best: BestPairs, sparse: bool) -> Iterator[Candidates]:
        """Candidates of every tile on and above the diagonal."""
        columns, m = self.columns, len(self.columns)
        active = columns.active if sparse else None
        bands = [(top, min(top + TILE_ROWS, m)) for top in range(0, m, TILE_ROWS)]
        rows = [] if active is None else [active.feature_rows(*band) for band in bands]  # CSR, (rows, B)
        non_negative = active is not None and bool((active.values >= 0).all())  # then so are the sums
        for number, left in enumerate(range(0, m, TILE_COLUMNS)):
            if not self.is_mine(number):
                continue
            right = min(left + TILE_COLUMNS, m)
            block = columns.block(left, right)  # (B, width)
            for band, (top, bottom) in enumerate(bands):
                if top >= right:
                    break
                # on the diagonal some rows lie below it: they are sorted out afterwards
                tile = times_dense(rows[band], block) if rows else columns.times(top, bottom, block)  # (rows, width)
                bound = self.bound(best.threshold, slice(top, bottom), slice(left, right))
                i, j, sums = _near_the_best(tile, bound, non_negative)
                found = Candidates(i + top, j + left, sums)
                yield _upper(found) if bottom > left else found

    def by_co_activations(self, best: BestPairs) -> BestPairs | None:
        """The pairs that fire together, then those that do not; None if the latter are too many to look at."""
        mean, tokens = self.columns.norms.mean, self.columns.tokens
        for found in self.co_activations(best):
            if mean is not None:
                found = found._replace(sums=found.sums - tokens * mean[found.i] * mean[found.j])
            self.offer(best, found)
        self.merge(best)
        if mean is None:
            return self.offer_zeros(best)
        best.prune()
        return self.offer_apart(best) if best.threshold > 0 else None

    def co_activations(self, best: BestPairs) -> Iterator[Candidates]:
        """Candidates among the pairs that fire together, in blocks of features."""
        active = self.columns.active
        assert active is not None  # the callers see to it
        offsets, rows = active.by_feature.offsets, active.by_feature.rows
        per_token = active.crow[1:] - active.crow[:-1]
        work = row_offsets(per_token[rows])[offsets]  # (m + 1,) multiplications of the features before
        ends = torch.arange(0, int(work[-1]) + CO_ACTIVATIONS, CO_ACTIVATIONS, device=work.device)
        bounds = torch.searchsorted(work, ends).clamp_max(len(self.columns)).unique().tolist()
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if not self.is_mine(number):
                continue
            product = active.feature_rows(start, stop) @ _columns_from(active, start)
            bound = self.bound(best.threshold, slice(start, stop), slice(start, None))
            bound = bound if self.columns.norms.mean is None else 0.0  # the means are not taken off yet
            near = (product.values().abs() >= max(bound, TINY)).nonzero()[:, 0]
            i = torch.searchsorted(product.crow_indices(), near, right=True) - 1
            yield _upper(Candidates(i + start, product.col_indices()[near] + start, product.values()[near]))

    def offer_apart(self, best: BestPairs) -> BestPairs | None:
        """Pearson: the pairs that never fire together, with `c = -B mean_i mean_j / (|m_i| |m_j|)`."""
        columns, norms = self.columns, self.columns.norms
        assert norms.mean is not None and columns.active is not None
        strength, order = (math.sqrt(columns.tokens) * norms.mean * norms.inverse).sort(descending=True)  # (m,)
        bound = math.sqrt(best.threshold) * (1 - 1e-5)
        # the partners of each feature are those before it whose product with it reaches the bound
        reach = torch.searchsorted(
            -strength, -(bound / strength).clamp_max(torch.finfo(strength.dtype).max), right=True
        )
        partners = torch.minimum(reach, torch.arange(len(columns), device=reach.device))
        if int(partners.sum()) > 4 * best.limit + SLACK:
            return None
        second = torch.repeat_interleave(torch.arange(len(columns), device=reach.device), partners)
        first = torch.arange(len(second), device=reach.device) - row_offsets(partners)[second]
        i, j = torch.minimum(order[first], order[second]), torch.maximum(order[first], order[second])
        joint = pair_sums(columns.active.with_values(columns.active.values.abs()), i, j)
        sums = -columns.tokens * norms.mean[i] * norms.mean[j]
        self.offer(best, _kept(Candidates(i, j, sums), joint == 0))
        return best

    def offer_zeros(self, best: BestPairs) -> BestPairs:
        """Fill up with pairs of score 0, the smallest (i, j) first."""
        best.drop_zeros()
        if best.threshold > 0 or len(best) >= best.limit:
            return best
        keys = first_pairs(self.columns.index.sort().values, self.columns.n, best.keys, best.limit)
        best.offer(best.squares.new_zeros(len(keys)), keys)
        return best


def all_pair_sums(columns: Columns) -> Iterator[Candidates]:
    """The sums of all pairs that fire together, in blocks of bounded memory."""
    nothing = BestPairs(0, columns.index.device, columns.scale.dtype)
    features = Features(columns.norms)
    yield from _Search(columns, SCORES["activation"], features, None, 0.0).co_activations(nothing)


def _kept(found: Candidates, which: Tensor) -> Candidates:
    kept = which.nonzero()[:, 0]
    return Candidates(found.i[kept], found.j[kept], found.sums[kept])


def _upper(found: Candidates) -> Candidates:
    return _kept(found, found.i < found.j)


def _columns_from(active: ActiveFeatures, start: int) -> Tensor:
    """Features start to n as a CSR tensor, (B, n - start): the sums below the diagonal are not wanted."""
    if start == 0:
        return active.matrix()
    kept = (active.cols >= start).nonzero()[:, 0]
    crow = row_offsets(torch.bincount(active.rows[kept], minlength=active.tokens))
    return csr(crow, active.cols[kept] - start, active.values[kept], (active.tokens, active.n - start))


def _near_the_best(tile: Tensor, bound: float, non_negative: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of the entries of a tile that reach the bound."""
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
