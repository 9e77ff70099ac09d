"""What a pass over a text gathers of every feature: how often and how strongly it fires, and where."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .firings import FiringSample
from .records import BINS, bin_edges
from .top_contexts import Batch, TopContexts

SAMPLES = 25  # firing tokens of a feature drawn from the text
BANDS, PER_BAND = 5, 4  # of these, so many are shown from each fifth of its activations
EDGES = torch.tensor(bin_edges(), dtype=torch.float64)
_LOW_32 = 0xFFFFFFFF


def _signed(number: int) -> int:
    """Return the lowest 64 bits of a number, as the int64 that has them."""
    return (number + 2**63) % 2**64 - 2**63


# Odd constants of splitmix64 (Steele et al. 2014).
_TOKEN, _FEATURE, _MIX, _REMIX = map(
    _signed, (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class FeatureStatistics:
    """Streaming statistics of all features.

    Args:
        d_sae: features.
        context_length: of the SAE, to number the tokens.
        top_contexts: kept of each feature.
        seed: of the drawn tokens.
        device: where the activations are.
    """

    def __init__(self, d_sae: int, context_length: int, top_contexts: int, seed: int, device: torch.device) -> None:
        self._context_length, self._seed = context_length, seed
        self.histogram = torch.zeros((d_sae, BINS), dtype=torch.int64, device=device)
        self.sums = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.squares = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.maxima = torch.zeros(d_sae, device=device)
        self.top = TopContexts(d_sae, top_contexts, 1, device)
        self.sample = TopContexts(d_sae, SAMPLES, 1, device)
        self.firings = FiringSample(d_sae)
        self._features = torch.arange(d_sae, device=device)

    @property
    def fires(self) -> Tensor:
        """Tokens on which each feature fires, (d_sae,) int64."""
        return self.histogram.sum(1)

    def add(self, batch: Batch) -> None:
        """Take a batch."""
        h = batch.flat
        self.sums += h.sum(1)
        self.squares += torch.linalg.vecdot(h, h)
        self.maxima = torch.maximum(self.maxima, batch.peaks.amax(1))
        entries = _true_places(h.flatten() > 0)
        features, places = entries // h.shape[1], entries % h.shape[1]
        activations = h.flatten().index_select(0, entries)
        bins = bins_of(activations)
        self.histogram.view(-1).index_add_(0, features * BINS + bins, torch.ones_like(bins))
        owners = self._features[:, None]
        self.top.add(
            batch, batch.peaks, batch.documents, owners, lambda owners, contexts: batch.h[owners, contexts].argmax(1)
        )
        _, _, width = batch.h.shape
        tokens = batch.numbers[:, None] * self._context_length + torch.arange(width, device=h.device)  # of the text
        draws = uniform_draws(tokens.flatten()[places], features, self._seed)
        self._draw(batch, features, places, draws)
        self.firings.add(batch, features, places, activations, draws)

    def _draw(self, batch: Batch, features: Tensor, places: Tensor, draws: Tensor) -> None:
        """Offer the firing token (nnz,) of each feature in each context with the largest draw for the sample."""
        _, contexts, width = batch.h.shape
        cells = features * contexts + places // width
        best = draws.new_zeros(len(self._features) * contexts).scatter_reduce_(0, cells, draws, "amax")
        drawn = draws == best[cells]
        at = torch.zeros_like(best, dtype=torch.int64).index_put_((cells[drawn],), places[drawn] % width)
        keys, at = best.view(-1, contexts), at.view(-1, contexts)
        self.sample.add(batch, keys, batch.numbers, self._features[:, None], lambda *cell: at[cell])


def _true_places(mask: Tensor) -> Tensor:
    """Return the places of the entries (n,) that are true, (m,)."""
    if mask.device.type == "cpu":  # half the time
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero()[:, 0]


def uniform_draws(tokens: Tensor, features: Tensor, seed: int) -> Tensor:
    """Return numbers in (0, 1] for features on tokens, as good as drawn at random, whatever the batches of the pass.

    Args:
        tokens: their numbers in the whole text. features: of a shape that goes with it. seed: another one gives others.
    """
    x = tokens * _TOKEN + _signed((seed + 1) * _REMIX) + features * _FEATURE
    x ^= (x >> 32) & _LOW_32
    x *= _MIX
    x ^= (x >> 29) & (_LOW_32 << 3 | 7)
    x *= _REMIX
    x ^= (x >> 32) & _LOW_32
    return 1 - (x & (2**62 - 1)).double() / 2**62


def bins_of(activations: Tensor) -> Tensor:
    """Return the bin of the histogram that each positive activation is in, int64."""
    return torch.bucketize(activations, EDGES[1:-1].to(activations), right=True)


def quantiles(activations: Tensor, histogram: Tensor, largest: float) -> list[float]:
    """Return the share of the tokens on which a feature fires at most as strongly as on some of them.

    From the counts of its histogram, evenly spread within each bin; 1 for the largest activation.

    Args:
        activations: (m,), positive. histogram: (BINS,) of the feature. largest: of its activations.
    """
    x, counts = activations.double(), histogram.double()
    bins = bins_of(activations)
    within = ((x - EDGES[bins]) / (EDGES[bins + 1] - EDGES[bins])).clamp(0, 1)
    below = counts.cumsum(0) - counts
    share = (below[bins] + within * counts[bins]) / counts.sum()
    share = share.clamp(1 / float(counts.sum()), 1)
    return share.where(x < largest, 1.0).tolist()
