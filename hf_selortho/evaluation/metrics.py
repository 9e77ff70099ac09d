"""Figures of merit of a sparse autoencoder as pure functions of tensors, and sums of them that add up over batches.

Shapes: `B` tokens, `d_in` width of the language model, `n = d_sae` features, `V` vocabulary. Activations are raw
activations of the language model (not normalised) unless said otherwise. Sums over tokens are accumulated in float64.

Reconstruction, sparsity and the cross-entropies are sums: `total += Sparsity.of(h)` for every batch, from
`total = Sparsity()` on, then `total.figures()`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from ..checks import floats_of
from ..errors import SelOrthoError
from ..pair_selection import feature_norms, select_pairs

Figures = dict[str, float | int]

ACTIVE_THRESHOLD = 1e-6  # a feature is active if its mean activation is above this (the paper)
# The float32 copy of a chunk of logits has to stay in the cache: above 16 MiB the log-softmax gets 5 times slower.
_CHUNK_BYTES_CPU = 8 * 2**20
_CHUNK_BYTES_GPU = 256 * 2**20
_GRAM_BLOCK = 512


_S = TypeVar("_S", bound="_Sums")


@dataclass(frozen=True)
class _Sums:
    """Sums over tokens; without arguments, over none."""

    tokens: int = 0

    def __add__(self: _S, other: _S) -> _S:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Reconstruction(_Sums):
    """Reconstruction error.

    `mse` is the mean over tokens of the squared L2 norm of the error (first term of the paper's eq. 7); `fvu`, the
    fraction of variance unexplained, is sum |x - x_hat|^2 / sum |x - mean|^2 with the mean of all tokens: 0 is perfect,
    1 no better than the mean, NaN where the tokens do not vary. Sums of squares are merged around running means (Chan
    et al. 1983), so that a mean much larger than the spread, as in Gemma, costs no digits.
    """

    squared_error: float = 0.0
    scatter: float = 0.0  # sum |x - mean|^2
    mean: Tensor | float = 0.0  # (d_in,) float64

    @classmethod
    def of(cls, x: Tensor, x_hat: Tensor) -> Reconstruction:
        """Measure raw activations and their reconstructions, both (..., d_in)."""
        x, x_hat = floats_of(x, "activations"), floats_of(x_hat, "reconstructions")
        if x.shape != x_hat.shape:
            raise SelOrthoError(
                f"reconstructions of shape {tuple(x_hat.shape)} of activations of shape {tuple(x.shape)}: expected "
                "equal shapes"
            )
        x, x_hat = x.double().flatten(0, -2), x_hat.double().flatten(0, -2)  # (B, d_in)
        mean = x.mean(0)
        return cls(len(x), (x_hat - x).square().sum().item(), (x - mean).square().sum().item(), mean)

    def __add__(self, other: Reconstruction) -> Reconstruction:
        tokens = self.tokens + other.tokens
        share = other.tokens / tokens
        shift = torch.as_tensor(other.mean - self.mean)
        return Reconstruction(
            tokens,
            self.squared_error + other.squared_error,
            self.scatter + other.scatter + shift.square().sum().item() * self.tokens * share,
            self.mean + shift * share,
        )

    def figures(self) -> Figures:
        """Return mse, fvu and explained_variance."""
        fvu = self.squared_error / self.scatter if self.scatter > 0 else math.nan
        return {"mse": self.squared_error / self.tokens, "fvu": fvu, "explained_variance": 1 - fvu}


@dataclass(frozen=True)
class Sparsity(_Sums):
    """Sparsity and use of the dictionary.

    `l0`: features that fire (h > 0) per token. `l1`: L1 norm per token. `active_features`: features of mean activation
    above 1e-6; `dead_features`: features that never fired; both also as fractions of d_sae.
    """

    fired: Tensor | int = 0  # (n,) int64, tokens on which each feature fired
    total: Tensor | float = 0.0  # (n,) float64, sum of its activations

    @classmethod
    def of(cls, h: Tensor) -> Sparsity:
        """Measure feature activations (..., n)."""
        h = floats_of(h, "feature activations").flatten(0, -2)
        return cls(len(h), (h > 0).sum(0), h.abs().sum(0, dtype=torch.float64))

    @property
    def density(self) -> Tensor:
        """Share of the tokens on which each feature fired: (n,) float64."""
        return torch.as_tensor(self.fired).double() / self.tokens

    def figures(self) -> Figures:
        """Return l0, l1, active_features, active_fraction, dead_features and dead_fraction."""
        fired, total = torch.as_tensor(self.fired), torch.as_tensor(self.total)
        active, dead = int((total / self.tokens > ACTIVE_THRESHOLD).sum()), int((fired == 0).sum())
        return {
            "l0": fired.sum().item() / self.tokens,
            "l1": total.sum().item() / self.tokens,
            "active_features": active,
            "active_fraction": active / len(fired),
            "dead_features": dead,
            "dead_fraction": dead / len(fired),
        }


@dataclass(frozen=True)
class CrossEntropy(_Sums):
    """Cross-entropy of a language model in nats a token, and perplexity."""

    nll: float = 0.0

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> CrossEntropy:
        """Measure next-token logits (B, V) and the true next ids (B,)."""
        vocabulary = logits.shape[-1]
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
            span = f"from {int(targets.min())} to {int(targets.max())}"
            raise SelOrthoError(f"references {span}: expected token ids from 0 to {vocabulary - 1}")
        return cls(len(targets), cross_entropy(logits, targets).sum(dtype=torch.float64).item())

    def figures(self) -> Figures:
        """Return cross_entropy, perplexity and tokens."""
        mean = self.nll / self.tokens
        return {"cross_entropy": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "tokens": self.tokens}


@dataclass(frozen=True)
class LossRecovered(_Sums):
    """How much of the language model's cross-entropy the reconstruction preserves.

    `loss_recovered` is (ablation - reconstruction) / (ablation - clean) of the means: 1 means that the language model
    predicts as well with the reconstruction as with the true activations, 0 as badly as with the layer's output set to
    zero; it may leave [0, 1]. NaN where ablation does not change the loss at all.
    """

    clean: float = 0.0
    reconstruction: float = 0.0
    ablation: float = 0.0

    @classmethod
    def of(cls, clean: Tensor, reconstruction: Tensor, ablation: Tensor) -> LossRecovered:
        """Measure negative log-likelihoods of the same tokens, (B,) each: of the untouched model, and of the model
        with the reconstruction or zeros in place of the activations."""
        return cls(len(clean), *(nll.sum(dtype=torch.float64).item() for nll in (clean, reconstruction, ablation)))

    def figures(self) -> Figures:
        """Return ce_clean, ce_reconstruction, ce_zero_ablation, loss_recovered and ce_tokens."""
        clean, spliced, ablated = (nll / self.tokens for nll in (self.clean, self.reconstruction, self.ablation))
        damage = ablated - clean
        return {
            "ce_clean": clean,
            "ce_reconstruction": spliced,
            "ce_zero_ablation": ablated,
            "loss_recovered": math.nan if damage == 0 else (ablated - spliced) / damage,
            "ce_tokens": self.tokens,
        }


@dataclass(frozen=True)
class Prediction:
    """What the untouched language model says of the next tokens at some positions."""

    index: Tensor  # (B,), rows of its logits
    p: Tensor  # (B, V) float32, probabilities
    negative_entropy: Tensor  # (B,), in nats
    top: Tensor  # (B,), the likeliest token

    @classmethod
    def of(cls, logits: Tensor, index: Tensor) -> Prediction:
        """Take rows `index` (B,) of logits (N, V)."""
        log_p = logits[index].float().log_softmax(-1)
        p = log_p.exp()
        return cls(index, p, torch.special.entr(p).sum(-1).neg(), log_p.argmax(-1))


@dataclass(frozen=True)
class Divergence(_Sums):
    """How far the language model's predictions move when something takes the place of activations."""

    kl: float = 0.0
    same_top: int = 0

    @classmethod
    def of(cls, clean: Prediction, logits: Tensor) -> Divergence:
        """Compare the untouched model's predictions with the logits (N, V) of the one with a replacement."""
        kl, same = 0.0, 0
        for rows in torch.arange(len(clean.index), device=logits.device).split(_rows_at_once(logits)):
            q = logits[clean.index[rows]].float().clamp_min(torch.finfo(torch.float32).min)  # a logit may be -inf
            kl += float((clean.negative_entropy[rows] - (clean.p[rows] * q).sum(-1) + q.logsumexp(-1)).sum())
            same += int((q.argmax(-1) == clean.top[rows]).sum())
        return cls(len(clean.index), kl, same)

    def figures(self) -> Figures:
        """Return kl, the mean KL divergence in nats of the replaced from the clean predictions, and top1_agreement."""
        return {"kl": self.kl / self.tokens, "top1_agreement": self.same_top / self.tokens}


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


def correlation_summary(
    h: Tensor, pair_fraction: float = 1e-3, min_support: int = 1, correlation: str = "cosine"
) -> CorrelationSummary:
    """Correlations (eq. 4) between the features of one batch `h` (B, n), over its eligible pairs.

    Pairs are unordered, i < j, and eligible if both features fired on at least `min_support` tokens. The selected pairs
    are exactly those that the penalty would pick.
    """
    h = floats_of(h, "feature activations h", axes=2)
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


class Correlations:
    """Correlations between features, over batches.

    They are a property of a batch: each batch of exactly `batch_size` tokens is measured by itself, whatever the sizes
    that tokens arrive in, and the figures of the batches are averaged with equal weight, over those that define them. A
    last, shorter batch counts only if there is no other. Holds at most one batch of activations at a time.
    """

    def __init__(
        self, batch_size: int = 4096, pair_fraction: float = 1e-3, min_support: int = 4, correlation: str = "cosine"
    ) -> None:
        self.tokens = 0
        self.summaries: list[CorrelationSummary] = []  # one a batch
        self._batch_size = batch_size
        self._summary = partial(
            correlation_summary, pair_fraction=pair_fraction, min_support=min_support, correlation=correlation
        )
        self._waiting: list[Tensor] = []

    def __iadd__(self, h: Tensor) -> Correlations:
        self.tokens += len(h)
        self._waiting.append(h)
        if sum(map(len, self._waiting)) >= self._batch_size:
            batches = torch.cat(self._waiting).split(self._batch_size)
            self.summaries += [self._summary(batch) for batch in batches if len(batch) == self._batch_size]
            self._waiting = [batch for batch in batches if len(batch) < self._batch_size]
        return self

    def figures(self) -> Figures:
        """Return peak_correlation, mean_correlation, top_correlation, selected_pairs and unique_features."""
        if not self.summaries:
            self.summaries = [self._summary(torch.cat(self._waiting))]

        def mean(name: str) -> float:
            known = [value for summary in self.summaries if not math.isnan(value := getattr(summary, name))]
            return sum(known) / len(known) if known else math.nan

        return {
            "peak_correlation": mean("peak"),
            "mean_correlation": mean("mean"),
            "top_correlation": mean("top"),
            "selected_pairs": mean("selected_pairs"),
            "unique_features": mean("unique_features"),
        }


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
    h = floats_of(h, "feature activations h", axes=2)
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
    n = len(W_dec := floats_of(W_dec, "W_dec", axes=2))
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


def _rows_at_once(logits: Tensor) -> int:
    """Return how many rows of logits are widened to float32 at once."""
    chunk_bytes = _CHUNK_BYTES_CPU if logits.device.type == "cpu" else _CHUNK_BYTES_GPU
    return max(1, chunk_bytes // (4 * logits.shape[-1]))


def cross_entropy(
    logits: Tensor, targets: Tensor, index: Tensor | None = None, chunk_bytes: int | None = None
) -> Tensor:
    """Negative log-likelihood in nats of each target: logits (N, V) of any float type, targets (B,) -> (B,) float32.

    `index` (B,) names the row of `logits` that predicts each target; by default they are the rows in order. Rows are
    widened to float32 a chunk at a time: with Gemma's 262,144 entries a token takes 1 MiB, a batch of 4096 4 GiB.
    """
    if index is None:
        index = torch.arange(logits.shape[0], device=logits.device)
    rows = _rows_at_once(logits) if chunk_bytes is None else max(1, chunk_bytes // (4 * logits.shape[-1]))
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


class Interval(NamedTuple):
    """A mean of measurements with its 95% interval; None where there are too few of them."""

    mean: float | None
    low: float | None
    high: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """Take the mean, and the interval by Student's t."""
        if len(values) < 2:
            return Interval(values[0] if values else None, None, None)
        mean, n = statistics.fmean(values), len(values)
        half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
        return Interval(mean, mean - half, mean + half)
