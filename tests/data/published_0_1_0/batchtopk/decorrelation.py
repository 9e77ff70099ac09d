"""Correlated feature pairs of a batch: which they are, and the penalty that decorrelates them. Pure functions.

`h` is the matrix of feature activations of a batch, shape `(B, n)`: B tokens, n features, as a tensor or as its
non-zero entries ([`ActiveFeatures`]). The correlation of two features is eq. 4 of the paper, `c_ij = <h_i, h_j> /
(|h_i| |h_j|)` over the batch, or its centred form (Pearson).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .batch_group import BatchGroup
from .errors import NonFiniteError, SelOrthoError
from .pair_scores import SCORES, FeatureNorms, co_firing, pattern
from .pair_selection import Columns, Pairs, best_pairs, pair_count, source_of
from .pair_sums import pair_sums
from .penalty_operator import DensePenalty, Operator, SparsePenalty
from .sparse_ops import ActiveFeatures, active_features, as_float

__all__ = [
    "ActiveFeatures", "BatchGroup", "FeatureNorms", "Pairs", "decorrelation_penalty", "feature_norms", "full_penalty",
    "pair_count", "select_pairs", "selective_penalty",
]  # fmt: skip

logger = logging.getLogger(__name__)

SPARSE_BELOW = 0.1  # activations of a lower density are handled through their non-zero entries
CHUNK_ELEMENTS = 1 << 22  # of a dense matrix that are widened to float32 at once


def feature_norms(
    h: Tensor | ActiveFeatures, correlation: str = "cosine", group: BatchGroup | None = None
) -> FeatureNorms:
    """Norm, support and mean of every feature over the batch `h` (B, n), summed over the processes of `group`.

    Raises:
        NonFiniteError: the activations hold NaN or infinity.
    """
    sums = _sums(h)  # (3, n): support, squares, total
    tokens = sums.new_tensor([float(_tokens(h))])
    if group is not None:
        sums, tokens = group.sum(sums), group.sum(tokens)
    support, squares, total = sums
    if not bool(torch.isfinite(squares).all()):
        raise NonFiniteError(_non_finite(squares))
    if correlation == "cosine":
        return FeatureNorms(squares, support, None, int(tokens))
    mean = total / tokens
    centred = _squares_about(h, mean)  # two passes: sum(h^2) - B mean^2 would cancel
    if group is not None:
        centred = group.sum(centred)
    centred[centred <= 1e-12 * squares] = 0  # a constant feature: what is left is rounding
    return FeatureNorms(centred, support, mean, int(tokens))


@torch.no_grad()
def select_pairs(
    h: Tensor | ActiveFeatures,
    pair_fraction: float = 1e-3,
    min_support: int = 1,
    correlation: str = "cosine",
    method: str = "auto",
    group: BatchGroup | None = None,
    correlation_threshold: float = 0.0,
) -> Pairs:
    """The exact set `T` of eq. 5: the most correlated eligible pairs of features of a batch.

    A pair is eligible if both features fired on at least `min_support` tokens. `ceil(pair_fraction * P)` pairs of
    largest `|c_ij|` are taken (all eligible ones if they are fewer), ties broken by (i, j). Memory is that of the
    pairs, of the active entries and of one tile, never `(n, n)`.

    Args:
        h: feature activations, (B, n), any floating dtype; the arithmetic is float32 (float64 for float64).
        pair_fraction: share of the `P = n (n - 1) / 2` pairs, in (0, 1].
        min_support: tokens on which each feature of a pair must have fired.
        correlation: "cosine" (eq. 4) or "pearson".
        method: "tiles" (blocks of the correlation matrix, memory of one of them), "coactivation" (sums over the
            features that fire together, cost independent of n), or "auto", the cheaper one. The set is the same.
        group: processes whose rows together are the batch; each returns the same pairs.
        correlation_threshold: pairs of a lower `|c_ij|` are left out.

    Raises:
        SelOrthoError: an argument is not allowed, or the activations hold NaN or infinity.
    """
    return select_by_score(
        "activation", h, None, pair_fraction, min_support, correlation, method, group, correlation_threshold
    )


@torch.no_grad()
def select_by_score(
    score: str,
    h: Tensor | ActiveFeatures,
    W_dec: Tensor | None,
    pair_fraction: float = 1e-3,
    min_support: int = 1,
    correlation: str = "cosine",
    method: str = "auto",
    group: BatchGroup | None = None,
    correlation_threshold: float = 0.0,
) -> Pairs:
    """[`select_pairs`] by any of the scores: "activation", "decoder" (cosine of the rows of `W_dec`), "redundancy".

    `W_dec` (n, d_in) is looked at by the last two only. Every feature with a direction is eligible for "decoder".
    """
    _check_arguments(h, pair_fraction, correlation, method)
    kind = SCORES[score]
    with torch.autocast(_values(h).device.type, enabled=False):
        matrix: Tensor | ActiveFeatures = h
        if kind.of == "decoder":
            assert W_dec is not None
            matrix, correlation, min_support, group, method = W_dec.T, "cosine", 1, None, "tiles"
        norms = feature_norms(matrix, correlation, group)
        source = source_of(matrix, norms, correlation) if kind.of == "activations" else None
        if kind.of == "pattern":
            matrix, norms = pattern(h), FeatureNorms(norms.support, norms.support, None, norms.tokens)
        directions = _directions(W_dec) if kind.compares_directions else None
        columns = _columns(matrix, norms, min_support, method, group)
        asked = pair_count(columns.n, pair_fraction)
        pairs = best_pairs(columns, kind, directions, asked, method, group, correlation_threshold)
    if len(pairs) < asked and correlation_threshold == 0:
        _log_fewer_pairs(asked, len(pairs), columns.n, min_support)
    return Pairs(pairs.i, pairs.j, pairs.correlation, source)


def selective_penalty(
    h: Tensor | ActiveFeatures,
    pair_fraction: float = 1e-3,
    min_support: int = 1,
    coefficient: float = 0.1,
    reduction: str = "mean",
    correlation: str = "cosine",
    group: BatchGroup | None = None,
) -> tuple[Tensor, Pairs]:
    """[`select_pairs`] and [`decorrelation_penalty`] on the same batch."""
    pairs = select_pairs(h, pair_fraction, min_support, correlation, "auto", group)
    return penalty_of_selection(h, pairs, coefficient, reduction, group), pairs


def penalty_of_selection(
    h: Tensor | ActiveFeatures, pairs: Pairs, coefficient: float, reduction: str, group: BatchGroup | None
) -> Tensor:
    """[`decorrelation_penalty`] on the pairs that [`select_pairs`] has just found in this very `h`, unchanged since."""
    assert pairs.source is not None
    scale = _scale(coefficient, reduction, len(pairs))
    return _penalty(h, pairs, pairs.correlation, pairs.correlation, pairs.source.norms, scale, group)


def decorrelation_penalty(
    h: Tensor | ActiveFeatures,
    pairs: Pairs,
    coefficient: float = 0.1,
    reduction: str = "mean",
    correlation: str = "cosine",
    group: BatchGroup | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Penalty `coefficient * R * sum_T c_ij^2` on given pairs, with its closed-form gradient to `h`.

    `R` is 1 for "sum" (the paper) and `1 / |T|` for "mean". Correlations are those of this batch: taken over from the
    selection if the pairs were selected on it, computed for these pairs alone if not. With `group`, they are those of
    the global batch and the gradient is scaled by the number of processes, because data parallel training averages
    gradients.

    Args:
        h: feature activations, (B, n); as [`ActiveFeatures`], the gradient goes to its values and is computed there
            alone. pairs: the set `T`, e.g. from [`select_pairs`].
        weights: a factor of each pair's square (T,), default 1.

    Returns:
        A scalar, float32 (float64 for a float64 `h`); 0 with a zero gradient if there are no pairs.
    """
    scale = _scale(coefficient, reduction, len(pairs))
    with torch.autocast(_values(h).device.type, enabled=False), torch.no_grad():
        norms = feature_norms(h, correlation, group)
        known = pairs.source is not None and pairs.source.is_of(h, norms, correlation)
        c = pairs.correlation if known else _correlations_of(h, norms, pairs, group)
        weighted = c if weights is None else c * weights.to(c.dtype)
    return _penalty(h, pairs, c, weighted, norms, scale, group)


def _penalty(
    h: Tensor | ActiveFeatures,
    pairs: Pairs,
    c: Tensor,
    weighted: Tensor,
    norms: FeatureNorms,
    scale: float,
    group: BatchGroup | None,
) -> Tensor:
    """`scale * sum_T weighted c` with `weighted_ij = w_ij c_ij`, and the gradient of `Operator`."""
    with torch.autocast(_values(h).device.type, enabled=False), torch.no_grad():
        value = scale * (weighted * c).sum()
        operator = Operator.of_pairs(pairs.i, pairs.j, c, weighted, norms)
    gradient_scale = 2 * scale * (1 if group is None else group.size)
    if isinstance(h, ActiveFeatures):
        return SparsePenalty.apply(h.values, h.detach(), value, operator, gradient_scale)
    return DensePenalty.apply(h, value, operator, gradient_scale)


def penalty_by_space(
    space: str,
    h: Tensor | ActiveFeatures,
    W_dec: Tensor,
    pairs: Pairs,
    coefficient: float = 0.1,
    reduction: str = "mean",
    correlation: str = "cosine",
    group: BatchGroup | None = None,
) -> Tensor:
    """[`decorrelation_penalty`] on the squares of any of the scores.

    "activation": `sum_T c_ij^2`, the paper's, with its gradient to `h`. "decoder": `sum_T cos(W_i, W_j)^2`, gradient to
    `W_dec` (n, d_in). The other two weight the latter by how the pair fires in this batch, held fixed: "redundancy" by
    the square of `min(P(i|j), P(j|i))`, so that nested features are spared; "exclusion" by that of
    `1 - max(P(i|j), P(j|i))`, so that features are which point alike and stand in for one another, as one that has
    absorbed another's direction does. A feature that does not fire takes no part in these two.
    """
    if space == "activation":
        return decorrelation_penalty(h, pairs, coefficient, reduction, correlation, group)
    weights = None
    if space in ("redundancy", "exclusion"):
        with torch.no_grad():
            fired = pattern(h)
            joint = pair_sums(fired, pairs.i, pairs.j)
            joint = joint if group is None else group.sum(joint)
            norms = feature_norms(h, "cosine", group)
            share = co_firing(joint, pairs.i, pairs.j, norms)
            if space == "exclusion":
                share = 1 - joint / torch.minimum(norms.support[pairs.i], norms.support[pairs.j])
            weights = share.nan_to_num(0).square()
    # the same on every process: no group, and the mean over processes is right as it is
    return decorrelation_penalty(W_dec.T, pairs, coefficient, reduction, weights=weights)


def full_penalty(
    h: Tensor,
    coefficient: float = 0.1,
    reduction: str = "mean",
    min_support: int = 1,
    correlation: str = "cosine",
    group: BatchGroup | None = None,
) -> Tensor:
    """The same penalty on *every* eligible pair (the paper's "full orthogonality").

    Its memory is that of [`full_penalty_bytes`]: the correlation matrix cannot be avoided.
    """
    with torch.autocast(h.device.type, enabled=False), torch.no_grad():
        norms = feature_norms(h, correlation, group)
        supported = norms.support >= min_support
        c = _correlation_matrix(_centred(h, norms), norms, supported, group)
        m = int(supported.sum())
        scale = _scale(coefficient, reduction, m * (m - 1) // 2)
        value = scale * c.square().sum() / 2
        operator = Operator(_dense_operator(c, norms), norms)
    return DensePenalty.apply(h, value, operator, 2 * scale * (1 if group is None else group.size))


def full_penalty_bytes(n: int, batch: int) -> int:
    """Memory of the full penalty on n features and a batch of this many tokens, beside the activations themselves.

    At the backward pass there are the correlation matrix turned operator, its squares, and the activations and their
    gradient transposed, in float32.
    """
    return 4 * (2 * n * n + 2 * n * batch)


def _scale(coefficient: float, reduction: str, pairs: int) -> float:
    if reduction not in ("mean", "sum"):
        raise SelOrthoError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    return coefficient if reduction == "sum" else coefficient / max(pairs, 1)


def _dense_operator(c: Tensor, norms: FeatureNorms) -> Tensor:
    """The matrix `S` (n, n) of all pairs, in place of `c`."""
    inverse = norms.inverse
    diagonal = -torch.linalg.vecdot(c, c) * inverse.square()
    c.mul_(inverse).mul_(inverse[:, None])
    c.diagonal().copy_(diagonal)
    return c


def _correlation_matrix(values: Tensor, norms: FeatureNorms, eligible: Tensor, group: BatchGroup | None) -> Tensor:
    """Correlations (n, n) of all eligible features, 0 elsewhere and on the diagonal."""
    c = values.T @ values
    if group is not None:
        c = group.sum(c)
    inverse = norms.inverse * eligible
    c *= inverse
    c *= inverse[:, None]
    return c.fill_diagonal_(0)


def _correlations_of(h: Tensor | ActiveFeatures, norms: FeatureNorms, pairs: Pairs, group: BatchGroup | None) -> Tensor:
    """Correlations (T,) of given pairs in this batch."""
    sums = pair_sums(as_float(h) if isinstance(h, Tensor) else h, pairs.i, pairs.j)
    if group is not None:
        sums = group.sum(sums)
    if norms.mean is not None:
        sums = sums - norms.tokens * norms.mean[pairs.i] * norms.mean[pairs.j]
    inverse = norms.inverse
    return sums * inverse[pairs.i] * inverse[pairs.j]


def _columns(
    matrix: Tensor | ActiveFeatures, norms: FeatureNorms, min_support: int, method: str, group: BatchGroup | None
) -> Columns:
    """The eligible columns of the global batch, through the active entries where these are few or travel."""
    if isinstance(matrix, Tensor):
        density = float(norms.support.sum()) / max(1, norms.tokens * matrix.shape[1])
        if method == "coactivation" or group is not None or density < SPARSE_BELOW:
            matrix = active_features(matrix)
    columns = Columns(matrix, norms, min_support)
    if group is not None:
        assert columns.active is not None
        columns.active = group.gather_active(columns.active)
    return columns


def _sums(h: Tensor | ActiveFeatures) -> Tensor:
    """Support, squared norm and total of each feature on this process, (3, n)."""
    if isinstance(h, ActiveFeatures):
        values = as_float(h.values)
        return torch.stack([h.sum_by_feature(v) for v in ((values != 0).to(values.dtype), values.square(), values)])
    sums = torch.zeros(3, h.shape[1], dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    for chunk in h.split(max(1, CHUNK_ELEMENTS // max(1, h.shape[1]))):
        values = chunk.to(sums.dtype)
        sums[0] += values.sign().abs_().sum(0)
        sums[1] += torch.linalg.vecdot(values, values, dim=0)
        sums[2] += values.sum(0)
    return sums


def _squares_about(h: Tensor | ActiveFeatures, mean: Tensor) -> Tensor:
    """`sum_t (h_ti - mean_i)^2` on this process, (n,)."""
    if isinstance(h, ActiveFeatures):
        values = as_float(h.values)
        entries = h.sum_by_feature(torch.ones_like(values))
        return h.sum_by_feature((values - mean[h.cols]).square()) + (h.tokens - entries) * mean.square()
    squares = torch.zeros_like(mean)
    for chunk in h.split(max(1, CHUNK_ELEMENTS // max(1, h.shape[1]))):
        squares += (chunk.to(mean.dtype) - mean).square().sum(0)
    return squares


def _directions(W_dec: Tensor | None) -> Tensor:
    assert W_dec is not None
    return torch.nn.functional.normalize(as_float(W_dec), dim=1)


def _tokens(h: Tensor | ActiveFeatures) -> int:
    return h.tokens if isinstance(h, ActiveFeatures) else len(h)


def _values(h: Tensor | ActiveFeatures) -> Tensor:
    return h.values if isinstance(h, ActiveFeatures) else h


def _centred(h: Tensor, norms: FeatureNorms) -> Tensor:
    values = as_float(h)
    return values if norms.mean is None else values - norms.mean


def _non_finite(squares: Tensor) -> str:
    features = (~torch.isfinite(squares)).nonzero()[:, 0]
    named = ", ".join(map(str, features[:5].tolist())) + (", ..." if len(features) > 5 else "")
    return (
        f"feature activations h hold NaN or infinity, or values too large to square, in {len(features)} of "
        f"{len(squares)} features ({named}): expected finite numbers; look for the batch or the weight they came from"
    )


def _log_fewer_pairs(asked: int, found: int, n: int, min_support: int) -> None:
    if (asked, n) not in _logged:
        _logged.add((asked, n))
        logger.info(
            "%d pairs were asked for, but only %d are eligible (both features active on at least %d tokens of the "
            "batch, of %d features): taking these; said once",
            asked, found, min_support, n,
        )  # fmt: skip


_logged: set[tuple[int, int]] = set()


def _check_arguments(h: Tensor | ActiveFeatures, pair_fraction: float, correlation: str, method: str) -> None:
    if isinstance(h, Tensor) and h.ndim != 2:
        raise SelOrthoError(
            f"h has shape {tuple(h.shape)}: expected (tokens, features); flatten the leading axes first"
        )
    if not 0 < pair_fraction <= 1:
        raise SelOrthoError(f"pair_fraction={pair_fraction!r}: expected a share in (0, 1]")
    if correlation not in ("cosine", "pearson"):
        raise SelOrthoError(f"correlation={correlation!r}: expected 'cosine' or 'pearson'")
    if method not in ("auto", "tiles", "coactivation"):
        raise SelOrthoError(f"method={method!r}: expected 'auto', 'tiles' or 'coactivation'")
