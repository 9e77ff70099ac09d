"""Figures of merit of a sparse autoencoder as pure functions of tensors.

Shapes: `B` tokens, `d_in` width of the language model, `n = d_sae` features, `V` vocabulary. Activations are raw
activations of the language model (not normalised) unless said otherwise. Sums over tokens are accumulated in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SelOrthoError
from ..pair_selection import feature_norms, select_pairs

# The float32 copy of a chunk of logits has to stay in the cache: above 16 MiB the log-softmax gets 5 times slower.
_CHUNK_BYTES_CPU = 8 * 2**20
_CHUNK_BYTES_GPU = 256 * 2**20
_GRAM_BLOCK = 512


@dataclass(frozen=True)
class CorrelationSummary:
    """Correlations of the features of one batch. A figure that the batch does not define (no eligible pair) is NaN."""

    peak: float  # largest |c| over the eligible pairs
    mean: float  # mean |c| over the eligible pairs
    top: float  # mean |c| over the selected pairs, the top `pair_fraction` of all pairs
    threshold: float  # smallest |c| among the selected pairs
    selected_pairs: int
    unique_features: int  # features that occur in at least one selected pair
    eligible_features: int  # features that fired on at least `min_support` tokens of the batch


@dataclass(frozen=True)
class CorrelationHistogram:
    """How the correlations of the eligible pairs of one batch are distributed."""

    counts: Tensor  # (bins,) int64, pairs in each bin
    edges: Tensor  # (bins + 1,) float64
    features: int  # eligible features that were looked at
    eligible_features: int  # eligible features in the batch; larger than `features` when they were sampled


def mse(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean over tokens of the squared L2 norm of the error (first term of the paper's eq. 7): (..., d_in) -> ()."""
    return (x_hat.double() - x.double()).square().sum(-1).mean()


def fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    """Fraction of variance unexplained, sum |x - x_hat|^2 / sum |x - mean(x)|^2: (..., d_in) -> ().

    0 is perfect, 1 is no better than predicting the mean of these tokens. NaN or infinite where all tokens are equal.
    """
    x, x_hat = x.double().flatten(0, -2), x_hat.double().flatten(0, -2)  # (B, d_in)
    return (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()


def l0(h: Tensor) -> Tensor:
    """Mean number of features that fire (h > 0) per token: (..., n) -> ()."""
    return (h > 0).sum(-1).double().mean()


def l1(h: Tensor) -> Tensor:
    """Mean L1 norm of the feature activations per token: (..., n) -> ()."""
    return h.double().abs().sum(-1).mean()


def loss_recovered(ce_clean: float, ce_reconstruction: float, ce_ablation: float) -> float:
    """Share of the damage of ablating the layer that the reconstruction undoes, from three mean cross-entropies.

    (ablation - reconstruction) / (ablation - clean): 1 means that the language model predicts as well with the
    reconstruction as with the true activations, 0 as badly as with the layer's output set to zero; it may leave [0, 1].
    NaN where ablation does not change the loss at all.
    """
    damage = ce_ablation - ce_clean
    return math.nan if damage == 0 else (ce_ablation - ce_reconstruction) / damage


def batch_correlation_summary(
    h: Tensor, pair_fraction: float = 1e-3, min_support: int = 1, correlation: str = "cosine"
) -> CorrelationSummary:
    """Correlations (eq. 4) between the features of one batch `h` (B, n), over its eligible pairs.

    Pairs are unordered, i < j, and eligible if both features fired on at least `min_support` tokens. The selected pairs
    are exactly those that the penalty would pick.
    """
    pairs = select_pairs(h, pair_fraction=pair_fraction, min_support=min_support, correlation=correlation)
    unit = _unit_columns(h, min_support, correlation)
    magnitude = pairs.correlation.double().abs()  # falling
    defined = magnitude.numel() > 0
    return CorrelationSummary(
        peak=magnitude[0].item() if defined else math.nan,
        mean=_mean_magnitude(unit),
        top=magnitude.mean().item() if defined else math.nan,
        threshold=magnitude[-1].item() if defined else math.nan,
        selected_pairs=magnitude.numel(),
        unique_features=torch.cat([pairs.i, pairs.j]).unique().numel(),
        eligible_features=unit.shape[1],
    )


def mean_correlation(h: Tensor, min_support: int = 1, correlation: str = "cosine") -> float:
    """Mean of |c_ij| over the eligible pairs of the batch `h` (B, n); NaN with fewer than two eligible features."""
    return _mean_magnitude(_unit_columns(h, min_support, correlation))


def correlation_histogram(
    h: Tensor,
    bins: int = 100,
    min_support: int = 1,
    correlation: str = "cosine",
    max_features: int = 8192,
    seed: int = 0,
) -> CorrelationHistogram:
    """Counts of the eligible pairs of the batch `h` (B, n) by correlation.

    The range is [0, 1] for cosines of non-negative activations, else [-1, 1]. The Gram matrix is walked in blocks of
    rows. Above `max_features` eligible features a random sample of them is used (n^2 / 2 pairs would take minutes),
    which the result tells.
    """
    unit = _unit_columns(h, min_support, correlation)
    eligible = unit.shape[1]
    if eligible > max_features:
        order = torch.randperm(eligible, generator=torch.Generator().manual_seed(seed))[:max_features]
        unit = unit[:, order.sort().values.to(unit.device)]
    low = 0.0 if _non_negative(unit) else -1.0
    counts = torch.zeros(bins, dtype=torch.int64)
    for block in _upper_gram_blocks(unit):
        # The bins are filled by index: rounding in float32 may push a correlation of 1 just above it.
        index = ((block.double() - low) / (1.0 - low) * bins).long().clamp_(0, bins - 1)
        counts += torch.bincount(index.flatten(), minlength=bins).cpu()
    edges = torch.linspace(low, 1.0, bins + 1, dtype=torch.float64)
    return CorrelationHistogram(counts, edges, features=unit.shape[1], eligible_features=eligible)


def max_decoder_cosine(W_dec: Tensor, block: int = 1024) -> Tensor:
    """Largest cosine of each feature's decoder direction with any other's: (n, d_in) -> (n,) float32.

    The signed maximum: opposite directions are no duplicates, since activations are not negative. A zero row has
    cosine 0. Computed in blocks of rows, never (n, n).
    """
    n = W_dec.shape[0]
    if n < 2:
        raise SelOrthoError(f"a decoder of {n} feature has no pairs to compare, at least 2 are needed")
    rows = nn.functional.normalize(W_dec.float(), dim=-1)
    maxima = []
    for start in range(0, n, block):
        cosine = rows[start : start + block] @ rows.T  # (block, n)
        own = torch.arange(cosine.shape[0], device=cosine.device)
        cosine[own, start + own] = -torch.inf
        maxima.append(cosine.amax(-1))
    return torch.cat(maxima)


def cross_entropy(
    logits: Tensor, targets: Tensor, index: Tensor | None = None, chunk_bytes: int | None = None
) -> Tensor:
    """Negative log-likelihood in nats of each target: logits (N, V) of any float type, targets (B,) -> (B,) float32.

    `index` (B,) names the row of `logits` that predicts each target; by default they are the rows in order. Rows are
    widened to float32 a chunk at a time: with Gemma's 262,144 entries a token takes 1 MiB, a batch of 4096 4 GiB.
    """
    if index is None:
        index = torch.arange(logits.shape[0], device=logits.device)
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES_CPU if logits.device.type == "cpu" else _CHUNK_BYTES_GPU
    rows = max(1, chunk_bytes // (4 * logits.shape[-1]))
    chunks = zip(index.split(rows), targets.split(rows), strict=True)
    return torch.cat([nn.functional.cross_entropy(logits[i].float(), y, reduction="none") for i, y in chunks])


def _unit_columns(h: Tensor, min_support: int, correlation: str) -> Tensor:
    """The eligible columns of `h` (B, n) at L2 norm 1, centred first for "pearson": (B, eligible) float32."""
    norms = feature_norms(h, correlation)
    eligible = norms.eligible(min_support)
    columns = h[:, eligible].float()
    if norms.mean is not None:
        columns = columns - norms.mean[eligible]
    return columns / norms.squares[eligible].sqrt()


def _non_negative(unit: Tensor) -> bool:
    return bool((unit >= 0).all())


def _mean_magnitude(unit: Tensor) -> float:
    n = unit.shape[1]
    if n < 2:
        return math.nan
    if _non_negative(unit):
        # No Gram matrix needed: with no negative term, the sum over all i, j of <u_i, u_j> is |sum_i u_i|^2.
        total = unit.double().sum(1).square().sum() - unit.double().square().sum()
        return max(total.item(), 0.0) / (n * (n - 1))
    return sum(block.abs().sum(dtype=torch.float64).item() for block in _upper_gram_blocks(unit)) / (n * (n - 1) / 2)


def _upper_gram_blocks(unit: Tensor) -> Iterator[Tensor]:
    """The strictly upper triangle of `unit.T @ unit`, one flat tensor for each block of rows."""
    n = unit.shape[1]
    for start in range(0, n, _GRAM_BLOCK):
        gram = unit[:, start : start + _GRAM_BLOCK].T @ unit[:, start:]  # (block, n - start)
        upper = torch.ones_like(gram, dtype=torch.bool).triu(1)
        yield gram[upper]
