"""Active entries of every s-th token of a pass, as many as memory allows: correlations of all pairs come from them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparse_ops import ActiveFeatures, active_features, row_offsets
from .keepers import Batch

ENTRIES = 8_000_000  # 100 MB while they are gathered, five times as much while correlations are computed


class CorrelationSample:
    """Every s-th token that the SAE reads, in the order of the pass; s doubles when there are too many entries.

    Args:
        d_sae: features. limit: entries held at most, but for one batch.
    """

    def __init__(self, d_sae: int, limit: int = ENTRIES) -> None:
        self.d_sae, self.limit = d_sae, limit
        self.stride, self.entries = 1, 0
        self._seen = 0  # tokens
        self._tokens: list[Tensor] = []  # their numbers in the pass
        self._counts: list[Tensor] = []  # entries of each
        self._cols: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """Tokens in the sample."""
        return sum(map(len, self._tokens))

    def add(self, batch: Batch) -> None:
        """Take a batch's share."""
        places = batch.read.flatten().nonzero()[:, 0]
        first = -self._seen % self.stride
        numbers = torch.arange(first, len(places), self.stride, device=places.device)
        found = active_features(batch.flat[:, places[first :: self.stride]].T.contiguous())
        self._tokens.append((numbers + self._seen).cpu())
        self._counts.append(found.crow.diff().cpu())
        self._cols.append(found.cols.int().cpu())
        self._values.append(found.values.cpu())
        self._seen += len(places)
        self.entries += len(found.cols)
        while self.entries > self.limit:
            self._thin_out()

    def active(self) -> ActiveFeatures:
        """The sample as one batch."""
        if not self._tokens:
            nothing = torch.zeros(0)
            return ActiveFeatures(torch.zeros(1, dtype=torch.int64), nothing.long(), nothing, self.d_sae)
        crow = row_offsets(torch.cat(self._counts))
        return ActiveFeatures(crow, torch.cat(self._cols).long(), torch.cat(self._values), self.d_sae)

    def _thin_out(self) -> None:
        self.stride *= 2
        self.entries = 0
        for n, (tokens, counts) in enumerate(zip(self._tokens, self._counts, strict=True)):
            kept = tokens % self.stride == 0
            of_entries = kept.repeat_interleave(counts)
            self._tokens[n], self._counts[n] = tokens[kept], counts[kept]
            self._cols[n], self._values[n] = self._cols[n][of_entries], self._values[n][of_entries]
            self.entries += len(self._cols[n])
        if self.stride > self._seen:  # a single token is left
            self.limit = max(self.limit, self.entries)
