"""What a pass over a text gathers of every feature: how often and how strongly it fires, and where."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .keepers import Batch, Keeper, Windows
from .records import BINS, BINS_PER_DOUBLING, FIRST_DOUBLING, bin_edges

SAMPLES = 25  # firing tokens of a feature drawn from the text
BANDS, PER_BAND = 5, 4  # of these, so many are shown from each fifth of its activations
_LOW_32 = 0xFFFFFFFF
_LARGEST = 2**62 - 1  # priority


def _signed(number: int) -> int:
    """The lowest 64 bits of a number, as the int64 that has them."""
    return (number + 2**63) % 2**64 - 2**63


# Odd constants of splitmix64 (Steele et al. 2014).
_TOKEN, _FEATURE, _MIX, _REMIX = map(
    _signed, (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_MANTISSA_BITS = 23  # of a float32
_EDGES_IN_DOUBLING = [
    int(torch.tensor(2 ** (n / BINS_PER_DOUBLING)).view(torch.int32)) & ((1 << _MANTISSA_BITS) - 1)
    for n in range(1, BINS_PER_DOUBLING)
]


class FeatureStatistics:
    """Streaming statistics of all features.

    Args:
        d_sae: features. context_length: of the SAE, to number the tokens. top_contexts: kept of each feature.
        seed: of the drawn tokens. device: where the activations are.
    """

    def __init__(self, d_sae: int, context_length: int, top_contexts: int, seed: int, device: torch.device) -> None:
        self.context_length = context_length
        self._seeded = _signed((seed + 1) * _REMIX)
        self.histogram = torch.zeros(d_sae * BINS, dtype=torch.int64, device=device)
        self.sums = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.squares = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.maxima = torch.zeros(d_sae, device=device)
        self.top = Keeper(d_sae, top_contexts, torch.float32, device)
        self.top_windows = Windows(d_sae, top_contexts, 1, device)
        self.sample = Keeper(d_sae, SAMPLES, torch.int64, device)
        self.sample_windows = Windows(d_sae, SAMPLES, 1, device)
        self._of_feature = torch.arange(d_sae, device=device) * _FEATURE

    @property
    def fires(self) -> Tensor:
        """Tokens on which each feature fires, (d_sae,) int64."""
        return self.histogram.view(-1, BINS).sum(1)

    def add(self, batch: Batch, peaks: Tensor) -> None:
        """Take a batch, whose largest activations by context are `peaks` (d_sae, b)."""
        h = batch.flat
        self.sums += h.sum(1)
        self.squares += torch.linalg.vecdot(h, h)
        self.maxima = torch.maximum(self.maxima, peaks.amax(1))
        entries = _places_where(h.flatten() > 0)
        features = entries // h.shape[1]
        bins = bins_of(h.flatten().index_select(0, entries))
        self.histogram.index_add_(0, features * BINS + bins, torch.ones_like(entries))
        self._offer_peaks(batch, peaks)
        self._offer_samples(batch, features, entries - features * h.shape[1])

    def _offer_peaks(self, batch: Batch, peaks: Tensor) -> None:
        features, contexts = ((peaks > 0) & (peaks >= self.top.worst[:, None])).nonzero(as_tuple=True)
        accepted = self.top.offer(
            features, peaks[features, contexts], batch.documents[contexts], batch.numbers[contexts]
        )
        features, contexts = features[accepted.candidates], contexts[accepted.candidates]
        positions = batch.h[features, contexts].argmax(1)
        self.top_windows.store(accepted, batch, features[:, None], contexts, positions)

    def _offer_samples(self, batch: Batch, features: Tensor, places: Tensor) -> None:
        width = batch.h.shape[2]
        positions = torch.arange(width, device=places.device)
        tokens = (batch.numbers[:, None] * self.context_length + positions).flatten()  # (b * t,) in the whole text
        keys = -self.priorities(tokens, features, places)
        able = _places_where(keys >= self.sample.worst.index_select(0, features))
        features, places, keys = features[able], places[able], keys[able]
        contexts = places // width
        cells = features * len(batch.numbers) + contexts
        best = keys.new_full((batch.h.shape[0] * len(batch.numbers),), -_LARGEST)
        first = (keys == best.scatter_reduce_(0, cells, keys, "amax")[cells]).nonzero()[:, 0]  # of each context
        features, places, contexts = features[first], places[first], contexts[first]
        accepted = self.sample.offer(features, keys[first], batch.numbers[contexts], tokens[places])
        features, places = features[accepted.candidates], places[accepted.candidates]
        self.sample_windows.store(accepted, batch, features[:, None], places // width, places % width)

    def priorities(self, tokens: Tensor, features: Tensor, places: Tensor) -> Tensor:
        """A number for each firing feature of each token, as good as drawn at random: (nnz,) from 0 to 2^62.

        Args:
            tokens: (n,) numbers in the whole text. features: (nnz,). places: (nnz,) of each among `tokens`.
        """
        # index_select takes a third of the time of [...] here
        x = (tokens * _TOKEN + self._seeded).index_select(0, places)
        x += self._of_feature.index_select(0, features)
        x ^= (x >> 32) & _LOW_32
        x *= _MIX
        x ^= (x >> 29) & (_LOW_32 << 3 | 7)
        x *= _REMIX
        return (x ^ ((x >> 32) & _LOW_32)) & _LARGEST


def _places_where(mask: Tensor) -> Tensor:
    """Places of the entries (n,) that are true, (m,)."""
    if mask.device.type == "cpu":  # half the time
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero()[:, 0]


def bins_of(activations: Tensor) -> Tensor:
    """The bin of the histogram that each positive activation (m,) float32 is in, (m,) int64.

    Read off the bits of the number, exactly as a search among [`records.bin_edges`] would find it.
    """
    bits = activations.view(torch.int32)
    bins = ((bits >> _MANTISSA_BITS) - 127 - FIRST_DOUBLING) * BINS_PER_DOUBLING
    mantissa = bits & ((1 << _MANTISSA_BITS) - 1)
    for edge in _EDGES_IN_DOUBLING:
        bins += mantissa >= edge
    return bins.clamp_(0, BINS - 1).long()


def quantiles(activations: Tensor, histogram: Tensor, largest: float) -> list[float]:
    """Share of the tokens on which a feature fires at most as strongly as on some of them.

    From the counts of its histogram, evenly spread within each bin; 1 for the largest activation.

    Args:
        activations: (m,), positive. histogram: (BINS,) of the feature. largest: of its activations.
    """
    edges = torch.tensor(bin_edges(), dtype=torch.float64)
    x, counts = activations.double(), histogram.double()
    bins = bins_of(activations)
    within = ((x - edges[bins]) / (edges[bins + 1] - edges[bins])).clamp(0, 1)
    below = counts.cumsum(0) - counts
    share = (below[bins] + within * counts[bins]) / counts.sum()
    share = share.clamp(1 / float(counts.sum()), 1)
    return share.where(x < largest, 1.0).tolist()
