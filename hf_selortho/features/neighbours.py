"""The features nearest to each one: by decoder direction, and by how they fire together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..sparse_ops import ActiveFeatures, times_dense
from .records import Neighbour

_BLOCK_BYTES = 1 << 26  # of each of a block's matrices


def nearest_features(
    W_dec: Tensor, active: ActiveFeatures, min_support: int, k: int = 10
) -> Iterator[tuple[list[Neighbour], list[Neighbour]]]:
    """Of each feature in turn, the `k` nearest by decoder cosine and by uncentred correlation (eq. 4).

    Both by the signed value, the largest first, and of equals the first feature. Correlations count where both fire on
    at least `min_support` of the tokens and need not be found `k` times. Memory is that of a block of features.

    Args:
        W_dec: (d_sae, d_in). active: a sample of tokens. min_support: tokens. k: neighbours of each kind.
    """
    directions = normalize(W_dec.float(), dim=1)
    norms = active.sum_by_feature(active.values.double().square()).sqrt().float()  # (d_sae,)
    fired: ActiveFeatures = active.pattern()
    by_feature = active.transposed(), fired.transposed()
    width = max(1, _BLOCK_BYTES // (4 * max(active.n, active.tokens)))
    for start in range(0, active.n, width):
        stop = min(start + width, active.n)
        cosine = directions[start:stop] @ directions.T  # (w, d_sae)
        joint = times_dense(by_feature[1], fired.feature_columns(start, stop)).T  # (w, d_sae) tokens
        sums = times_dense(by_feature[0], active.feature_columns(start, stop)).T
        scale = norms[start:stop, None] * norms
        correlation = torch.where(scale > 0, sums / scale, 0).clamp(-1, 1)
        own = torch.arange(stop - start)
        for ranked in (ranks := cosine.clone(), eligible := correlation.where(joint >= min_support, -torch.inf)):
            ranked[own, own + start] = -torch.inf
        values = cosine, correlation, joint
        yield from zip(_neighbours(ranks, values, k), _neighbours(eligible, values, k), strict=True)


def _neighbours(ranks: Tensor, values: tuple[Tensor, Tensor, Tensor], k: int) -> list[list[Neighbour]]:
    """The k largest entries of each row of `ranks` that are not minus infinity."""
    rows, cols = largest(ranks, k)
    cosine, correlation, joint = (matrix[rows, cols].tolist() for matrix in values)
    found: list[list[Neighbour]] = [[] for _ in ranks]
    for n, (row, col) in enumerate(zip(rows.tolist(), cols.tolist(), strict=True)):
        found[row].append(Neighbour(col, cosine[n], correlation[n], int(joint[n])))
    return found


def largest(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the k largest entries of each row, by row and falling value, then by column.

    Minus infinity is never among them, so that a row may have fewer.
    """
    least = matrix.topk(min(k, matrix.shape[1]), dim=1).values[:, -1:]
    rows, cols = ((matrix >= least) & (matrix > -torch.inf)).nonzero(as_tuple=True)
    order = matrix[rows, cols].argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    rows, cols = rows[order], cols[order]
    counts = torch.bincount(rows, minlength=len(matrix))
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    return rows[place < k], cols[place < k]


def nearest_directions(W_dec: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Of each direction (m, d_in) the row of `others` (n, d_in) with the largest cosine, and that cosine: (m,) each."""
    directions, others = normalize(W_dec.float(), dim=1), normalize(others.float(), dim=1)
    rows = max(1, _BLOCK_BYTES // (4 * len(others)))
    parts = [(part @ others.T).max(1) for part in directions.split(rows)]
    if not parts:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of each pair of rows, (m, d_in) each."""
    return torch.linalg.vecdot(normalize(left.float(), dim=1), normalize(right.float(), dim=1))
