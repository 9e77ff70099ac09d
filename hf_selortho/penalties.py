"""The decorrelation penalties with their closed-form gradients: eq. 4 to 7 of the paper, and its baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from .checks import finite_number, floats_of, object_of
from .configuration_selortho import SelOrthoConfig
from .errors import ConfigError, SelOrthoError
from .pair_selection import Pairs, Selection, check_correlation, feature_norms, select
from .pairs import FeatureNorms, occurring_features, pair_sums
from .process_group import SINGLE_PROCESS, ProcessGroup
from .sparse_ops import FeatureActivations, as_float, csr, feature_activations, row_offsets, times_dense

NEAREST_ROWS = 1024  # features whose nearest neighbours are looked for at once


@dataclass(frozen=True)
class PenaltyPlan:
    """What the decorrelation penalty does at one step."""

    acts: bool = True
    pairs: Pairs | None = None  # the pairs to act on; None: select them on this batch
    weight: float = 1.0  # with penalty_schedule "on_selection", the number of steps that this one stands for
    coefficient: float | None = None  # in place of the config's ortho_coefficient, when it is steered
    seed: int = 0  # of the chunks of ortsae
    select: Callable[[FeatureActivations], Pairs] | None = None  # in place of the config's own selection


def penalty(
    config: SelOrthoConfig,
    features: FeatureActivations,
    W_dec: Tensor,
    group: ProcessGroup = SINGLE_PROCESS,
    plan: PenaltyPlan | None = None,
) -> tuple[Tensor, Pairs | None]:
    """Compute the penalty that a configuration asks for.

    Args:
        config: its fields `penalty`, `penalty_space`, `ortho_coefficient` and those of the selection count.
        features: of the batch, (B, n). W_dec: (n, d_in).
        group: processes whose tokens together are the batch.
        plan: what the penalty does at this step.

    Returns:
        A scalar, and the pairs that the selective penalty acted on (None for the others and at rest).

    Raises:
        ConfigError: the configuration names a penalty that this version no longer trains with.
    """
    plan = plan or PenaltyPlan()
    coefficient = (config.ortho_coefficient if plan.coefficient is None else plan.coefficient) * plan.weight
    if config.penalty == "none" or coefficient == 0 or not plan.acts:
        return W_dec.new_zeros((), dtype=torch.float32), None
    if config.penalty == "ortsae":
        return ortsae_penalty(W_dec, coefficient, config.ortsae_chunk, plan.seed), None
    if config.penalty == "full":
        return full_penalty(
            features, coefficient, config.reduction, config.min_support, config.correlation, group
        ), None
    _check_trainable(config)
    if plan.pairs is not None:
        selection = Selection(plan.pairs)
    elif plan.select is not None:
        selection = Selection(plan.select(features.detach()))
    else:
        selection = select_by_config(config, features, W_dec, group)
    return selective_penalty(config, features, W_dec, selection, coefficient, group, plan.seed), selection.pairs


def select_by_config(
    config: SelOrthoConfig, h: Tensor | FeatureActivations, W_dec: Tensor, group: ProcessGroup | None = None
) -> Selection:
    """Select the pairs that the configured penalty acts on, by the correlations of the batch or by decoder cosines."""
    _check_trainable(config)
    fraction, threshold = config.pair_fraction, config.correlation_threshold
    if config.selects_by == "decoder":
        return Selection(select_directions(W_dec, fraction, threshold))
    features, group = feature_activations(h), group or SINGLE_PROCESS
    return select(features, fraction, config.min_support, config.correlation, "auto", group, threshold)


def select_directions(W_dec: Tensor, pair_fraction: float, cosine_threshold: float = 0.0) -> Pairs:
    """Select the pairs of features whose decoder rows (n, d_in) have the largest absolute cosine."""
    columns = feature_activations(W_dec.detach().T)
    return select(columns, pair_fraction, method="tiles", correlation_threshold=cosine_threshold).pairs


def _check_trainable(config: SelOrthoConfig) -> None:
    if config.penalty == "selective" and "redundancy" in (config.penalty_space, config.selection_space):
        raise ConfigError(
            "penalty_space or selection_space 'redundancy': SAEs that were trained with it load, but it bought little "
            "and is no longer trained with (RESULTS.md); use penalty_space='exclusion' or 'decoder'"
        )


def selective_penalty(
    config: SelOrthoConfig,
    features: FeatureActivations,
    W_dec: Tensor,
    selection: Selection,
    coefficient: float,
    group: ProcessGroup = SINGLE_PROCESS,
    seed: int = 0,
) -> Tensor:
    """Compute eq. 7's last term on selected pairs, or its counterpart on the cosines of decoder rows.

    Decoder cosines are the same on every process, so that the mean over the processes is right as it is. "exclusion"
    weights each by `(1 - max(P(i|j), P(j|i)))^2`, held fixed: it acts on features that point alike and stand in for one
    another, as one that has absorbed another's direction does.
    """
    pairs, reduction = selection.pairs, config.reduction
    if config.penalty_space == "activation":
        loss = _squared_correlations(features, selection, coefficient, reduction, config.correlation, group)
    else:
        weights = _exclusion(features, pairs, group) if config.penalty_space == "exclusion" else None
        loss = _squared_cosines(W_dec, pairs, coefficient, reduction, weights)
    second = coefficient * config.decoder_ratio
    if second > 0 and config.decoder_pairs == "nearest":
        loss = loss + ortsae_penalty(W_dec, second, config.ortsae_chunk, seed)
    elif second > 0:
        alike = select_directions(W_dec, config.pair_fraction)
        loss = loss + _squared_cosines(W_dec, alike, second, reduction)
    return loss


def _squared_cosines(
    W_dec: Tensor, pairs: Pairs, coefficient: float, reduction: str, weights: Tensor | None = None
) -> Tensor:
    columns = feature_activations(W_dec.T)
    return _squared_correlations(columns, Selection(pairs), coefficient, reduction, "cosine", SINGLE_PROCESS, weights)


@torch.no_grad()
def _exclusion(features: FeatureActivations, pairs: Pairs, group: ProcessGroup) -> Tensor:
    """Weigh each pair by how rarely it fires together, (T,); 0 where one of the two does not fire."""
    joint = group.sum(pair_sums(features.pattern(), pairs.i, pairs.j))
    support = feature_norms(features, "cosine", group).support
    share = 1 - joint / torch.minimum(support[pairs.i], support[pairs.j])
    return share.nan_to_num(0).square()


def decorrelation_penalty(
    h: Tensor | FeatureActivations,
    pairs: Pairs,
    coefficient: float = 0.1,
    reduction: str = "mean",
    correlation: str = "cosine",
    group: ProcessGroup | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute `coefficient * R * sum_T c_ij^2` on given pairs, with its closed-form gradient to `h`.

    `R` is 1 for "sum" (the paper) and `1 / |T|` for "mean". Correlations are those of this batch, computed for these
    pairs alone. With `group`, they are those of the global batch and the gradient is scaled by the number of processes,
    because data parallel training averages gradients.

    Args:
        h: feature activations, (B, n); as `ActiveFeatures`, the gradient goes to its values and is computed there
            alone. pairs: the set `T`, e.g. from [`select_pairs`].
        weights: a factor of each pair's square (T,), default 1.

    Returns:
        A scalar, float32 (float64 for a float64 `h`); 0 with a zero gradient if there are no pairs.

    Raises:
        SelOrthoError: an argument is not allowed, or a pair names a feature that `h` does not have.
        NonFiniteError: the activations hold NaN or infinity.
    """
    features, group = feature_activations(h), group or SINGLE_PROCESS
    object_of(pairs, Pairs, "pairs", "select them with select_pairs")
    finite_number(coefficient, "coefficient")
    check_correlation(correlation)
    if len(pairs) and not 0 <= int(pairs.i.min()) <= int(pairs.j.max()) < features.n:
        raise SelOrthoError(f"pairs of features up to {int(pairs.j.max())}: h has {features.n} features, from 0 on")
    if weights is not None and len(weights := floats_of(weights, "weights", 1, features.values)) != len(pairs):
        raise SelOrthoError(f"{len(weights)} weights of {len(pairs)} pairs: expected one for each")
    return _squared_correlations(features, Selection(pairs), coefficient, reduction, correlation, group, weights)


def full_penalty(
    h: Tensor | FeatureActivations,
    coefficient: float = 0.1,
    reduction: str = "mean",
    min_support: int = 1,
    correlation: str = "cosine",
    group: ProcessGroup = SINGLE_PROCESS,
) -> Tensor:
    """Compute [`decorrelation_penalty`] on *every* eligible pair (the paper's "full orthogonality").

    Its memory is that of [`full_penalty_bytes`]: the correlation matrix cannot be avoided.
    """
    features = feature_activations(feature_activations(h).to_dense())
    with torch.autocast(features.values.device.type, enabled=False), torch.no_grad():
        norms = feature_norms(features, correlation, group)
        supported = norms.support >= min_support
        values = as_float(features.values)
        values = values if norms.mean is None else values - norms.mean
        c = group.sum(values.T @ values)
        inverse = norms.inverse * supported
        c = c.mul_(inverse).mul_(inverse[:, None]).fill_diagonal_(0)  # (n, n)
        eligible = int(supported.sum())
        scale = _scale(coefficient, reduction, eligible * (eligible - 1) // 2)
        value = scale * c.square().sum() / 2
        diagonal = -torch.linalg.vecdot(c, c) * norms.inverse.square()
        matrix = c.mul_(norms.inverse).mul_(norms.inverse[:, None])
        matrix.diagonal().copy_(diagonal)
        everything = torch.arange(features.n, device=c.device)
    scale = 2 * scale * group.size
    return _Penalty.apply(features.values, value, features.detach(), matrix, everything, norms.mean, scale)


def full_penalty_bytes(n: int, batch: int) -> int:
    """Return the memory of the full penalty on n features and a batch of tokens, beside the activations themselves.

    At the backward pass there are the correlation matrix turned operator, its squares, and the activations and their
    gradient transposed, in float32.
    """
    return 4 * (2 * n * n + 2 * n * batch)


def ortsae_penalty(W_dec: Tensor, coefficient: float = 0.25, chunk: int = 8192, seed: int = 0) -> Tensor:
    """Compute OrtSAE's penalty (arXiv 2509.22033): `coefficient * mean_i (max_j cos(W_i, W_j))^2` within random chunks.

    Args:
        W_dec: decoder rows (n, d_in), of any norm.
        chunk: features compared with one another; the chunks are drawn anew for every `seed`.

    Returns:
        A scalar, with the gradient through the largest cosine of each feature.
    """
    order = torch.randperm(len(W_dec), generator=torch.Generator().manual_seed(seed)).to(W_dec.device)
    with torch.autocast(W_dec.device.type, enabled=False):
        unit = normalize(as_float(W_dec), dim=1)
        nearest = torch.cat([part[_nearest(unit.detach()[part])] for part in order.split(chunk) if len(part) > 1])
        compared = order[: len(nearest)]  # a last chunk of a single feature has no neighbour
        cosine = (unit[compared] * unit[nearest]).sum(1)
        return coefficient * cosine.square().sum() / len(W_dec)


def _nearest(unit: Tensor) -> Tensor:
    """Return, of each row (m, d_in), the other row of largest cosine, (m,)."""
    nearest = []
    for start in range(0, len(unit), NEAREST_ROWS):
        cosine = unit[start : start + NEAREST_ROWS] @ unit.T  # (rows, m)
        own = torch.arange(len(cosine), device=unit.device)
        cosine[own, start + own] = -torch.inf
        nearest.append(cosine.argmax(1))
    return torch.cat(nearest)


def _scale(coefficient: float, reduction: str, pairs: int) -> float:
    if reduction not in ("mean", "sum"):
        raise SelOrthoError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    return coefficient if reduction == "sum" else coefficient / max(pairs, 1)


def _squared_correlations(
    features: FeatureActivations,
    selection: Selection,
    coefficient: float,
    reduction: str,
    correlation: str,
    group: ProcessGroup,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute [`decorrelation_penalty`]; what the selection knows about these very features is not computed again."""
    pairs, norms, c = selection.pairs, selection.norms, selection.pairs.correlation
    scale = _scale(coefficient, reduction, len(pairs))
    with torch.autocast(features.values.device.type, enabled=False), torch.no_grad():
        if norms is None or selection.features is not features:
            norms = feature_norms(features, correlation, group)
            sums = group.sum(pair_sums(features, pairs.i, pairs.j))
            if norms.mean is not None:
                sums = sums - norms.tokens * norms.mean[pairs.i] * norms.mean[pairs.j]
            inverse = norms.inverse
            c = sums * inverse[pairs.i] * inverse[pairs.j]
        weighted = c if weights is None else c * weights.to(c.dtype)
        value = scale * (weighted * c).sum()
        matrix, occurring = _operator(pairs, c, weighted, norms)
    scale = 2 * scale * group.size
    return _Penalty.apply(features.values, value, features.detach(), matrix, occurring, norms.mean, scale)


def _operator(pairs: Pairs, c: Tensor, weighted: Tensor, norms: FeatureNorms) -> tuple[Tensor, Tensor]:
    """Return the matrix `S` of [`_Penalty`] (U, U), CSR, and the features (U,) that occur in pairs, rising."""
    features, number = occurring_features(pairs.i, pairs.j, len(norms.squares))
    inverse = norms.inverse[features]
    a, b = number[pairs.i], number[pairs.j]
    scaled = weighted * inverse[a] * inverse[b]
    diagonal = torch.zeros_like(inverse).index_add_(0, a, weighted * c).index_add_(0, b, weighted * c)
    own = torch.arange(len(features), device=a.device)
    rows, order = torch.cat([a, b, own]).int().sort(stable=True)  # a radix sort; within a row any order will do
    cols = torch.cat([b, a, own])[order]
    entries = torch.cat([scaled, scaled, -diagonal * inverse.square()])[order]
    crow = row_offsets(torch.bincount(rows, minlength=len(features)))
    return csr(crow, cols, entries, (len(features), len(features))), features


class _Penalty(torch.autograd.Function):
    """A penalty `sum_T w_ij c_ij^2` whose value is known, and whose gradient to the values of `h` is `2 h S`, scaled.

    With `u_i = h_i / |h_i|` the gradient is `2 (sum_j w_ij c_ij u_j - u_i sum_j w_ij c_ij^2) / |h_i|`, that is
    `S_ij = w_ij c_ij / (|h_i| |h_j|)`, `S_ii = -sum_j w_ij c_ij^2 / |h_i|^2`. It holds for activations centred by
    `mean` (n,) too: the gradient then sums to zero over the batch.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, value: Tensor, *parts: Any) -> Tensor:
        ctx.parts = parts  # h without gradient; S (U, U) among features (U,), dense or CSR; mean; scale
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, matrix, features, mean, scale = ctx.parts
        with torch.autocast(h.values.device.type, enabled=False):
            product = torch.zeros_like(as_float(h.values))
            shift = None if mean is None else matrix @ mean[features][:, None]  # (U, 1)
            for chunk, place in h.chunks(features):
                block = times_dense(matrix, chunk)  # (U, tokens); the matrix is symmetric
                h.put(product, place, block if shift is None else block.sub_(shift))
        return product.mul_(scale * grad).to(h.values.dtype), *[None] * 6
