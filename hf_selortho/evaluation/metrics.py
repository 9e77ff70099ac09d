"""The figures of `functional` as metrics of the `evaluate` library: defined here, so nothing is downloaded.

Each is used like any other metric, `metric.compute(predictions=..., references=...)`, or batch by batch with
`add_batch` and then `compute()`, alone or inside `evaluate.combine`. Inputs are tensors, arrays or lists; leading axes
are flattened to tokens. They keep running sums instead of tables (see `streaming`), so memory does not grow with the
number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from datasets import Sequence, Value
from torch import Tensor

from ..errors import SelOrthoError
from .functional import (
    CorrelationSummary,
    batch_correlation_summary,
    cross_entropy,
    loss_recovered,
)
from .streaming import StreamingMetric

ACTIVE_THRESHOLD = 1e-6  # a feature is active if its mean activation is above this (the paper)

_VECTORS = Sequence(Value("float32"))
_SCALARS = Value("float32")


class ReconstructionMetric(StreamingMetric):
    """Reconstruction error: predictions are reconstructions (tokens, d_in), references the raw activations.

    `mse`: mean squared L2 norm of the error. `fvu`: sum |x - x_hat|^2 / sum |x - mean|^2, the mean being that of all
    tokens added. `explained_variance`: 1 - fvu. Sums of squares are merged around running means (Chan et al. 1983), so
    that a mean activation much larger than the spread, as in Gemma, costs no digits.
    """

    inputs = {"predictions": _VECTORS, "references": _VECTORS}
    description_text = "Reconstruction error of a sparse autoencoder: mse, fvu, explained_variance."

    def reset(self) -> None:
        self._squared_error = 0.0
        self._scatter = 0.0  # sum |x - mean|^2
        self._mean: Tensor | None = None  # (d_in,) float64

    def _update(self, **batch: Tensor) -> None:
        x_hat, x = batch["predictions"].double(), batch["references"].double()
        if x_hat.shape != x.shape:
            raise SelOrthoError(
                f"predictions have shape {tuple(x_hat.shape)}, references {tuple(x.shape)}: they must be equal"
            )
        self._squared_error += (x_hat - x).square().sum().item()
        mean = x.mean(0)
        self._scatter += (x - mean).square().sum().item()
        if self._mean is None:
            self._mean = mean
            return
        share = len(x) / (self.tokens + len(x))
        shift = mean - self._mean
        self._scatter += shift.square().sum().item() * self.tokens * share
        self._mean = self._mean + shift * share

    def _result(self) -> dict[str, float | int]:
        fvu = self._squared_error / self._scatter if self._scatter > 0 else math.nan
        return {"mse": self._squared_error / self.tokens, "fvu": fvu, "explained_variance": 1 - fvu}


class SparsityMetric(StreamingMetric):
    """Sparsity and use of the dictionary: predictions are feature activations (tokens, d_sae).

    `l0`: features that fire per token. `l1`: L1 norm per token. `active_features`: features of mean activation above
    1e-6 (the paper); `dead_features`: features that never fired; both also as fractions of d_sae.
    """

    inputs = {"predictions": _VECTORS}
    description_text = "Sparsity of feature activations: l0, l1, active and dead features."

    def reset(self) -> None:
        self._fired: Tensor | None = None  # (d_sae,) int64
        self._total: Tensor | None = None  # (d_sae,) float64

    def _update(self, **batch: Tensor) -> None:
        h = batch["predictions"]
        fired, total = (h > 0).sum(0), h.abs().sum(0, dtype=torch.float64)
        self._fired = fired if self._fired is None else self._fired + fired
        self._total = total if self._total is None else self._total + total

    def density(self) -> Tensor:
        """Share of the tokens added so far on which each feature fired: (d_sae,) float64."""
        assert self._fired is not None
        return self._fired.double() / self.tokens

    def _result(self) -> dict[str, float | int]:
        assert self._fired is not None and self._total is not None
        n = len(self._fired)
        active = int((self._total / self.tokens > ACTIVE_THRESHOLD).sum())
        dead = int((self._fired == 0).sum())
        return {
            "l0": self._fired.sum().item() / self.tokens,
            "l1": self._total.sum().item() / self.tokens,
            "active_features": active,
            "active_fraction": active / n,
            "dead_features": dead,
            "dead_fraction": dead / n,
        }


class CorrelationMetric(StreamingMetric):
    """Correlations between features: predictions are feature activations (tokens, d_sae).

    Correlation is a property of a batch. Tokens are collected into batches of exactly `batch_size`, whatever the sizes
    they arrive in, each batch is measured by itself, and the figures of the batches are averaged with equal weight. A
    last, shorter batch counts only if there is no other. Holds at most one batch of activations at a time.

    `peak_correlation`, `mean_correlation`, `top_correlation` (mean over the selected pairs), `selected_pairs`,
    `unique_features`.
    """

    inputs = {"predictions": _VECTORS}
    description_text = "Correlations between the features of a sparse autoencoder, per batch of tokens."

    def __init__(
        self,
        batch_size: int = 4096,
        pair_fraction: float = 1e-3,
        min_support: int = 4,
        correlation: str = "cosine",
        **kwargs: Any,
    ) -> None:
        self.batch_size = batch_size
        self.settings = {"pair_fraction": pair_fraction, "min_support": min_support, "correlation": correlation}
        super().__init__(**kwargs)

    def reset(self) -> None:
        self._waiting: list[Tensor] = []
        self._summaries: list[CorrelationSummary] = []

    def _update(self, **batch: Tensor) -> None:
        self._waiting.append(batch["predictions"])
        while sum(map(len, self._waiting)) >= self.batch_size:
            tokens = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
            self._measure(tokens[: self.batch_size])
            rest = tokens[self.batch_size :]
            self._waiting = [rest] if len(rest) else []

    def _measure(self, h: Tensor) -> None:
        self._summaries.append(batch_correlation_summary(h, **self.settings))  # type: ignore[arg-type]

    def _result(self) -> dict[str, float | int]:
        if not self._summaries:
            self._measure(torch.cat(self._waiting))
        mean = {f.name: _mean([getattr(s, f.name) for s in self._summaries]) for f in fields(CorrelationSummary)}
        return {
            "peak_correlation": mean["peak"],
            "mean_correlation": mean["mean"],
            "top_correlation": mean["top"],
            "selected_pairs": mean["selected_pairs"],
            "unique_features": mean["unique_features"],
        }


class CrossEntropyMetric(StreamingMetric):
    """Cross-entropy in nats: predictions are next-token logits (tokens, vocabulary), references the true next ids."""

    inputs = {"predictions": _VECTORS, "references": Value("int64")}
    description_text = "Cross-entropy of a language model in nats a token, and perplexity."

    def reset(self) -> None:
        self._sum = 0.0

    def _update(self, **batch: Tensor) -> None:
        self._sum += cross_entropy(batch["predictions"], batch["references"].long()).sum(dtype=torch.float64).item()

    def _result(self) -> dict[str, float | int]:
        mean = self._sum / self.tokens
        return {"cross_entropy": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "tokens": self.tokens}


class LossRecoveredMetric(StreamingMetric):
    """How much of the language model's cross-entropy the reconstruction preserves.

    Inputs are negative log-likelihoods (tokens,) of the same tokens: `references` of the untouched model,
    `predictions` with the reconstruction spliced in, `ablations` with the layer's output set to zero. `loss_recovered`
    is (ablation - reconstruction) / (ablation - clean) of the means.
    """

    inputs = {"predictions": _SCALARS, "references": _SCALARS, "ablations": _SCALARS}
    description_text = "Share of the damage of zero ablation that the reconstruction undoes, in cross-entropy."

    def reset(self) -> None:
        self._sums = dict.fromkeys(self.inputs, 0.0)

    def _update(self, **batch: Tensor) -> None:
        for name, values in batch.items():
            self._sums[name] += values.sum(dtype=torch.float64).item()

    def _result(self) -> dict[str, float | int]:
        clean, spliced, ablated = (self._sums[k] / self.tokens for k in ("references", "predictions", "ablations"))
        return {
            "ce_clean": clean,
            "ce_reconstruction": spliced,
            "ce_zero_ablation": ablated,
            "loss_recovered": loss_recovered(clean, spliced, ablated),
            "ce_tokens": self.tokens,
        }


def _mean(values: list[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
