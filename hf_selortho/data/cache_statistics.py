"""Statistics of cached activations: mean, scale, norms and sinks of a layer, gathered in constant memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..language_models.capture import TokenOrigins
from .cache_manifest import BARS_PER_OCTAVE, LOWEST_OCTAVE, OCTAVES, LayerSummary

BINS_PER_OCTAVE = 64  # while gathering: quantiles are right to half a percent
QUANTILES = (0.01, 0.5, 0.99, 0.999, 1.0)
_BINS = OCTAVES * BINS_PER_OCTAVE


class LayerStatistics:
    """Sums over the activations of one layer.

    Args:
        d_in: width of the activations. context_length: longest context in tokens.
    """

    def __init__(self, d_in: int, context_length: int) -> None:
        self.total = torch.zeros(d_in, dtype=torch.float64)  # sum of the kept activations
        self.rows_and_squares = torch.zeros(2, dtype=torch.float64)  # tokens kept, sum of their squared norms
        self.histogram = torch.zeros(_BINS, dtype=torch.int64)  # of the norms of all tokens
        self.largest = torch.zeros((), dtype=torch.float64)  # of these norms
        self.sinks = torch.zeros(context_length, dtype=torch.int64)  # by position

    def add(
        self, activations: Tensor, norms: Tensor, kept: Tensor, origins: TokenOrigins, max_norm: float | None
    ) -> None:
        """Add a shard: the activations (rows, d_in) of the tokens kept, and norms and origins of all its tokens."""
        if len(norms) == 0:
            return
        self.total += activations.sum(0, dtype=torch.float32).double().cpu()
        squares = float(norms[kept].double().square().sum())
        self.rows_and_squares += torch.tensor([len(activations), squares], dtype=torch.float64)
        bins = ((norms.clamp_min(2.0**LOWEST_OCTAVE).log2() - LOWEST_OCTAVE) * BINS_PER_OCTAVE).long()
        self.histogram += torch.bincount(bins.clamp_max(_BINS - 1), minlength=_BINS)
        self.largest = torch.maximum(self.largest, norms.max().double())
        if max_norm is not None:
            self.sinks += torch.bincount(origins.positions[norms > max_norm], minlength=len(self.sinks))

    def merge(self, other: LayerStatistics) -> None:
        """Add what another process has gathered."""
        largest = torch.maximum(self.largest, other.largest)
        for name, tensor in vars(other).items():
            getattr(self, name).add_(tensor)
        self.largest = largest

    def quantile(self, q: float) -> float:
        """Return a quantile of the norms: exact at 1, else from the histogram."""
        below = self.histogram.cumsum(0).double()  # a float32 would not count beyond 16 million
        if q >= 1 or below[-1] == 0:
            return float(self.largest)
        number = int((below >= q * below[-1]).nonzero()[0])
        share = float(q * below[-1] - (below[number] - self.histogram[number])) / float(self.histogram[number])
        return min(float(self.largest), 2.0 ** (LOWEST_OCTAVE + (number + share) / BINS_PER_OCTAVE))

    def summary(self, hook_name: str, median_norm: float, max_norm: float | None) -> LayerSummary:
        """Return the layer's entry of a manifest."""
        rows, squares = self.rows_and_squares.tolist()
        mean = self.total / max(1, rows)
        return LayerSummary(
            hook_name=hook_name,
            mean=tuple(mean.float().tolist()),
            scale=math.sqrt(max(0.0, squares / max(1, rows) - float(mean.square().sum()))),
            median_norm=median_norm,
            max_norm=max_norm,
            norm_quantiles={f"{q:g}": self.quantile(q) for q in QUANTILES},
            norm_histogram=tuple(self.histogram.unflatten(0, (OCTAVES * BARS_PER_OCTAVE, -1)).sum(1).tolist()),
            sinks_by_position=tuple(self.sinks.tolist()),
        )
