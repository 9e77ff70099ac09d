"""The features nearest to each one: by decoder direction, and by how they fire together on a sample of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..sparse_ops import ActiveFeatures, active_features, row_offsets, times_dense
from .records import Neighbour
from .top_contexts import Batch

ENTRIES = 8_000_000  # 100 MB while they are gathered, five times as much while correlations are computed
_BLOCK_BYTES = 1 << 26  # of each of a block's matrices


class CorrelationSample:
    """Active entries of every s-th token of a pass, in its order; s doubles when there are too many.

    Correlations of all pairs are computed from them.

    Args:
        d_sae: features. limit: entries held at most, but for one batch or one token.
    """

    def __init__(self, d_sae: int, limit: int = ENTRIES) -> None:
        self._d_sae, self._limit, self._stride = d_sae, limit, 1
        self._seen = 0  # tokens of the pass
        self._parts: list[tuple[Tensor, ...]] = []  # token (by its number in the pass), feature and value of entries

    @property
    def tokens(self) -> int:
        """Tokens in the sample."""
        return -(-self._seen // self._stride)

    def add(self, batch: Batch) -> None:
        """Take a batch's share."""
        places = batch.read.flatten().nonzero()[:, 0]
        first = -self._seen % self._stride
        active = active_features(batch.flat[:, places[first :: self._stride]].T.contiguous())
        rows = active.rows * self._stride + first + self._seen
        self._parts.append((rows.int().cpu(), active.cols.int().cpu(), active.values.cpu()))
        self._seen += len(places)
        while sum(len(rows) for rows, _, _ in self._parts) > self._limit and self.tokens > 1:
            self._stride *= 2
            self._parts = [
                tuple(part[rows % self._stride == 0] for part in (rows, *more)) for rows, *more in self._parts
            ]

    def active(self) -> ActiveFeatures:
        """Return the sample as one batch."""
        nothing = torch.zeros(0, dtype=torch.int32)
        parts = zip((nothing, nothing, nothing.float()), *self._parts, strict=True)
        rows, cols, values = map(torch.cat, parts)
        counts = torch.bincount(rows // self._stride, minlength=self.tokens)
        return ActiveFeatures(row_offsets(counts), cols.long(), values, self._d_sae)


def nearest_features(
    W_dec: Tensor, active: ActiveFeatures, min_support: int, k: int = 10
) -> Iterator[tuple[list[Neighbour], list[Neighbour]]]:
    """Yield of each feature in turn the `k` nearest by decoder cosine and by uncentred correlation (eq. 4).

    Both by the signed value, the largest first. Correlations count where both fire on at least `min_support` of the
    tokens and need not be found `k` times. Memory is that of a block of features.

    Args:
        W_dec: (d_sae, d_out). active: a sample of tokens. min_support: tokens. k: neighbours of each kind.
    """
    directions = normalize(W_dec.float(), dim=1)
    norms = active.sum_by_feature(active.values.double().square()).sqrt().float()  # (d_sae,)
    fired: ActiveFeatures = active.pattern()
    by_feature, fired_by_feature = active.transposed(), fired.transposed()
    width = max(1, _BLOCK_BYTES // (4 * max(active.n, active.tokens)))
    for start in range(0, active.n, width):
        stop = min(start + width, active.n)
        cosine = directions[start:stop] @ directions.T  # (w, d_sae)
        joint = times_dense(fired_by_feature, fired.feature_columns(start, stop)).T  # (w, d_sae) tokens
        sums = times_dense(by_feature, active.feature_columns(start, stop)).T
        scale = norms[start:stop, None] * norms
        correlation = torch.where(scale > 0, sums / scale, 0).clamp(-1, 1)
        itself = torch.arange(start, stop)[:, None] == torch.arange(active.n)
        values = cosine, correlation, joint
        yield from zip(
            _neighbours(cosine.masked_fill(itself, -torch.inf), values, k),
            _neighbours(correlation.masked_fill(itself | (joint < min_support), -torch.inf), values, k),
            strict=True,
        )


def _neighbours(ranks: Tensor, values: tuple[Tensor, Tensor, Tensor], k: int) -> Iterator[list[Neighbour]]:
    """Yield of each row of `ranks` the k largest entries that are not minus infinity."""
    best, cols = ranks.topk(min(k, ranks.shape[1]), dim=1)
    columns = [part.tolist() for part in (best, cols, *(matrix.gather(1, cols) for matrix in values))]
    for row in zip(*columns, strict=True):
        yield [
            Neighbour(col, cosine, correlation, int(joint))
            for rank, col, cosine, correlation, joint in zip(*row, strict=True)
            if rank > -torch.inf
        ]


def nearest_directions(W_dec: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each direction (m, d_in) the row of `others` (n, d_in) with the largest cosine, and that: (m,) each."""
    directions, others = normalize(W_dec.float(), dim=1), normalize(others.float(), dim=1)
    parts = [(part @ others.T).max(1) for part in directions.split(max(1, _BLOCK_BYTES // (4 * len(others))))]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Return the cosine of each pair of rows, (m, d_in) each."""
    return torch.linalg.vecdot(normalize(left.float(), dim=1), normalize(right.float(), dim=1))
