"""What harvested activations look like: mean, scale, norms, sinks; gathered in passing, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..language_models.capture import TokenOrigins

BINS_PER_OCTAVE = 64  # of the histogram of norms: quantiles are right to half a percent
_LOWEST = -24  # binary logarithm of the smallest norm that has a bin of its own
_BINS = 64 * BINS_PER_OCTAVE
_LARGEST = 16  # tokens of the largest norms that are remembered
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


class LayerStatistics:
    """Sums over the activations of one layer. Those of several shards are added up with [`merge`].

    Norms are those of all tokens but special ones, sinks included; mean and scale those of the tokens kept.

    Args:
        d_in: width of the activations. context_length: longest context in tokens.
    """

    def __init__(self, d_in: int, context_length: int) -> None:
        self.total = torch.zeros(d_in, dtype=torch.float64)  # sum of the kept activations
        self.scalars = torch.tensor([0.0, 0.0, math.inf, 0.0], dtype=torch.float64)  # see below
        self.histogram = torch.zeros(_BINS, dtype=torch.int64)  # of all norms
        self.sinks = torch.zeros(context_length, dtype=torch.int64)  # norms above the limit, by position
        self.largest_norms = torch.zeros(0, dtype=torch.float32)
        self.largest_origins = torch.zeros(0, 3, dtype=torch.int64)  # document, position, token

    @property
    def rows(self) -> int:
        """Tokens kept."""
        return int(self.scalars[0])

    @property
    def tokens(self) -> int:
        """Tokens seen, sinks included."""
        return int(self.histogram.sum())

    def see(self, norms: Tensor, origins: TokenOrigins, max_norm: float | None) -> None:
        """Count the norms (tokens,) of all tokens, whether they are kept or not."""
        if len(norms) == 0:
            return
        bins = ((norms.clamp_min(2.0**_LOWEST).log2() - _LOWEST) * BINS_PER_OCTAVE).long().clamp_max(_BINS - 1)
        self.histogram += torch.bincount(bins, minlength=_BINS)
        self.scalars[2] = min(self.scalars[2], norms.min())
        self.scalars[3] = max(self.scalars[3], norms.max())
        if max_norm is not None:
            self.sinks += torch.bincount(origins.positions[norms > max_norm], minlength=len(self.sinks))
        top = norms.topk(min(_LARGEST, len(norms))).indices
        columns = (origins.document_ids, origins.positions, origins.token_ids)
        self._remember(norms[top], torch.stack([column[top] for column in columns], dim=1))

    def keep(self, activations: Tensor, norms: Tensor) -> None:
        """Add the kept activations (rows, d_in), and their norms (rows,)."""
        self.total += activations.sum(0, dtype=torch.float32).double().cpu()
        self.scalars[0] += len(activations)
        self.scalars[1] += norms.double().square().sum()

    def merge(self, other: LayerStatistics) -> None:
        """Add what another one has gathered."""
        self.total += other.total
        self.scalars[:2] += other.scalars[:2]
        self.scalars[2] = min(self.scalars[2], other.scalars[2])
        self.scalars[3] = max(self.scalars[3], other.scalars[3])
        self.histogram += other.histogram
        self.sinks += other.sinks
        self._remember(other.largest_norms, other.largest_origins)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        return dict(vars(self))

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take what another one's [`state_dict`] gave."""
        for name in vars(self):
            setattr(self, name, tensors[name])

    def mean(self) -> Tensor:
        """Mean activation (d_in,) float64."""
        return self.total / max(1, self.rows)

    def scale(self) -> float:
        """Root mean squared norm of the activations about their mean."""
        return math.sqrt(max(0.0, float(self.scalars[1]) / max(1, self.rows) - float(self.mean().square().sum())))

    def quantile(self, q: float) -> float:
        """Quantile of the norms: exact at 0 and 1, else from the histogram."""
        low, high = float(self.scalars[2]), float(self.scalars[3])
        if q <= 0 or q >= 1 or self.tokens == 0:
            return low if q <= 0 else high
        wanted = q * self.tokens
        below = self.histogram.cumsum(0).double()  # a float32 would not count beyond 16 million
        bin_ = int((below >= wanted).nonzero()[0])
        share = (wanted - float(below[bin_] - self.histogram[bin_])) / float(self.histogram[bin_])
        return min(high, max(low, _edge(bin_ + min(1.0, max(0.0, share)))))

    def summary(self, max_norm: float | None, decode: Callable[[int], str]) -> dict[str, Any]:
        """The layer's entry of a manifest. decode: text of a token id."""
        occupied = self.histogram.nonzero()[:, 0]
        first, last = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, 0)
        largest = zip(self.largest_norms.tolist(), self.largest_origins.tolist(), strict=True)
        return {
            "mean": self.mean().float().tolist(),
            "scale": self.scale(),
            "dropped_sinks": int(self.sinks.sum()),
            "norm_quantiles": {f"{q:g}": self.quantile(q) for q in QUANTILES},
            "norm_histogram": {
                "edges": [_edge(number) for number in range(first, last + 1)],
                "counts": self.histogram[first:last].tolist(),
            },
            "sinks_by_position": {str(p): int(self.sinks[p]) for p in self.sinks.nonzero()[:, 0].tolist()},
            "largest_norms": [
                {
                    "norm": norm,
                    "position": position,
                    "token_id": token,
                    "token": decode(token),
                    "document_id": document,
                    "kept": max_norm is None or norm <= max_norm,
                }
                for norm, (document, position, token) in largest
            ],
        }

    def _remember(self, norms: Tensor, origins: Tensor) -> None:
        norms, origins = torch.cat([self.largest_norms, norms]), torch.cat([self.largest_origins, origins])
        order = norms.argsort(descending=True, stable=True)[:_LARGEST]
        self.largest_norms, self.largest_origins = norms[order], origins[order]


def _edge(number: float) -> float:
    return 2.0 ** (_LOWEST + number / BINS_PER_OCTAVE)
