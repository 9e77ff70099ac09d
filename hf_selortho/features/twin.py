"""The features of an SAE's twin that correspond to those of its pairs, and how they fire on the same text."""

from __future__ import annotations

import torch

from ..modeling_selortho import SelOrthoSAE
from .neighbours import cosines, nearest_directions
from .pair_statistics import PairList, ProductSums
from .text_pass import Read, some_features


class TwinStatistics:
    """Streaming correlations of pairs of the twin's features, those nearest by decoder cosine to the SAE's pairs.

    Of a ReLU or JumpReLU twin only these features are computed.

    Args:
        sae: the SAE. twin: the same trained without the penalty. pairs: of the SAE.
    """

    def __init__(self, sae: SelOrthoSAE, twin: SelOrthoSAE, pairs: PairList) -> None:
        own, places = torch.cat([pairs.a, pairs.b]).unique(return_inverse=True)
        nearest, match = nearest_directions(sae.W_dec.cpu()[own], twin.W_dec.cpu())
        self.a, self.b = nearest[places].view(2, -1)  # (pairs,) features of the twin
        self.match_a, self.match_b = match[places].view(2, -1)
        W_dec = twin.W_dec.cpu()
        self.decoder_cosine = cosines(W_dec[self.a], W_dec[self.b])
        features = nearest.unique()
        self._sae = twin
        if len(features):
            self._sae = some_features(twin, features)
        if self._sae is twin:
            features = torch.arange(len(twin.b_enc))
        rows_a, rows_b = (torch.searchsorted(features, part.contiguous()) for part in (self.a, self.b))
        self._sums = ProductSums(rows_a, rows_b, len(features), sae.device)

    def add(self, read: Read) -> None:
        """Take a batch."""
        if len(self.a):
            self._sums.add(self._sae.encode(read.activations).float().T.contiguous())

    def correlations(self) -> list[float | None]:
        """Of the twin's pairs, on all tokens; 1 where both features of a pair correspond to the same one."""
        return self._sums.correlations()
