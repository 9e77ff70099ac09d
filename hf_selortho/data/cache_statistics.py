"""Statistics of cached activations: mean, scale, norms and sinks of each layer, gathered in constant memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..language_models.capture import TokenOrigins
from .cache_manifest import BARS_PER_OCTAVE, LOWEST_OCTAVE, OCTAVES, LayerSummary

BINS_PER_OCTAVE = 64  # while gathering: quantiles are right to half a percent
QUANTILES = (0.01, 0.5, 0.99, 0.999, 1.0)
_BINS = OCTAVES * BINS_PER_OCTAVE


class CacheStatistics:
    """Sums over the activations of some layers, a row of each tensor for each layer.

    Args:
        layers: how many. d_in: width of the activations. context_length: longest context in tokens.
    """

    def __init__(self, layers: int, d_in: int, context_length: int) -> None:
        self.total = torch.zeros(layers, d_in, dtype=torch.float64)  # sum of the kept activations
        self.squares = torch.zeros(layers, dtype=torch.float64)  # sum of their squared norms
        self.histogram = torch.zeros(layers, _BINS, dtype=torch.int64)  # of the norms of all tokens
        self.largest = torch.zeros(layers, dtype=torch.float64)  # of these norms
        self.sinks = torch.zeros(layers, context_length, dtype=torch.int64)  # by position

    def add(
        self, row: int, activations: Tensor, norms: Tensor, kept: Tensor, origins: TokenOrigins, max_norm: float | None
    ) -> None:
        """Add a shard of a layer: activations (rows, d_in) of the tokens kept, norms and origins of all its tokens."""
        if len(norms) == 0:
            return
        self.total[row] += activations.sum(0, dtype=torch.float32).double().cpu()
        self.squares[row] += norms[kept].double().square().sum()
        bins = ((norms.clamp_min(2.0**LOWEST_OCTAVE).log2() - LOWEST_OCTAVE) * BINS_PER_OCTAVE).long()
        self.histogram[row] += torch.bincount(bins.clamp_max(_BINS - 1), minlength=_BINS)
        self.largest[row] = torch.maximum(self.largest[row], norms.max().double())
        if max_norm is not None:
            self.sinks[row] += torch.bincount(origins.positions[norms > max_norm], minlength=self.sinks.shape[1])

    def merge(self, other: CacheStatistics) -> None:
        """Add what another process has gathered."""
        largest = torch.maximum(self.largest, other.largest)
        for name, tensor in vars(other).items():
            getattr(self, name).add_(tensor)
        self.largest = largest

    def quantile(self, row: int, q: float) -> float:
        """Return a quantile of a layer's norms: exact at 1, else from the histogram."""
        largest, histogram = float(self.largest[row]), self.histogram[row]
        below = histogram.cumsum(0).double()  # a float32 would not count beyond 16 million
        if q >= 1 or below[-1] == 0:
            return largest
        bin = int((below >= q * below[-1]).nonzero()[0])
        share = float(q * below[-1] - (below[bin] - histogram[bin])) / float(histogram[bin])
        return min(largest, 2.0 ** (LOWEST_OCTAVE + (bin + share) / BINS_PER_OCTAVE))

    def summary(self, row: int, rows: int, hook_name: str, median_norm: float, max_norm: float | None) -> LayerSummary:
        """Return a layer's entry of a manifest, given how many tokens were kept."""
        mean = self.total[row] / max(1, rows)
        squares = float(self.squares[row]) / max(1, rows)
        return LayerSummary(
            hook_name=hook_name,
            mean=tuple(mean.float().tolist()),
            scale=math.sqrt(max(0.0, squares - float(mean.square().sum()))),
            median_norm=median_norm,
            max_norm=max_norm,
            norm_quantiles={f"{q:g}": self.quantile(row, q) for q in QUANTILES},
            norm_histogram=tuple(self.histogram[row].unflatten(0, (OCTAVES * BARS_PER_OCTAVE, -1)).sum(1).tolist()),
            sinks_by_position=tuple(self.sinks[row].tolist()),
        )
