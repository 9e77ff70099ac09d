"""What a pass over a text gathers of pairs of features: how often both fire, how alike, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.pair_history import PairSnapshot
from ..modeling_selortho import SelOrthoSAE
from .neighbours import cosines, nearest_directions
from .records import JOINT_KINDS
from .top_contexts import Batch, TopContexts

JOINT_CONTEXTS = 4  # shown of each kind
DUPLICATE_CO_FIRING, DUPLICATE_COSINE = 0.5, 0.5
NESTED_CO_FIRING = 0.8
_CHUNK = 1 << 17  # activations multiplied at once: they stay in a CPU's cache


@dataclass(frozen=True)
class PairList:
    """Pairs of features, by rising (a, b), and where they come from."""

    a: Tensor  # (m,) int64
    b: Tensor  # (m,) int64, larger than a
    source: str  # "training", "held_out" or "none"
    selected: int  # pairs that were selected, of which these are the strongest
    # Of a training only:
    step: int | None = None
    scores: Sequence[float | None] | None = None  # of each, at that step
    history_steps: Sequence[int] = ()
    history: Sequence[Sequence[float | None]] | None = None  # of each, at these steps

    def __len__(self) -> int:
        return len(self.a)


def pairs_of_training(snapshots: Sequence[PairSnapshot], d_sae: int, limit: int) -> PairList:
    """Return the strongest pairs of the last selection of a training, and how they came to be."""
    last = snapshots[-1]
    i, j = last.i[:limit].long(), last.j[:limit].long()  # they come by falling correlation
    keys, order = (i * d_sae + j).sort()
    history = torch.full((len(keys), len(snapshots)), torch.nan)
    for n, snapshot in enumerate(snapshots):
        if len(snapshot.i):
            known, places = (snapshot.i.long() * d_sae + snapshot.j.long()).sort()
            at = torch.searchsorted(known, keys).clamp_max(len(known) - 1)
            history[:, n] = snapshot.correlation[places[at]].where(known[at] == keys, torch.nan)
    return PairList(
        a=i[order],
        b=j[order],
        source="training",
        selected=last.selected,
        step=last.step,
        scores=last.correlation[:limit][order].tolist(),
        history_steps=[snapshot.step for snapshot in snapshots],
        history=[[None if value != value else value for value in row] for row in history.tolist()],
    )


def rule_of_classes(min_support: int) -> str:
    """Say in words how a pair's class follows from its numbers."""
    return (
        f"unmeasured: either feature fires on fewer than {min_support} tokens of this text; "
        f"duplicate: P(a|b) and P(b|a) are both at least {DUPLICATE_CO_FIRING:g} and the decoder cosine is at least "
        f"{DUPLICATE_COSINE:g}; "
        f"nested: the larger of P(a|b) and P(b|a) is at least {NESTED_CO_FIRING:g} and the smaller below "
        f"{DUPLICATE_CO_FIRING:g}; co-occurring: any other"
    )


def class_of(fires_a: int, fires_b: int, support: int, decoder_cosine: float, min_support: int) -> str:
    """Return the class of a pair by [`rule_of_classes`]; both fire on `support` of the tokens that each fires on."""
    if min(fires_a, fires_b) < max(min_support, 1):
        return "unmeasured"
    least, most = support / max(fires_a, fires_b), support / min(fires_a, fires_b)
    if least >= DUPLICATE_CO_FIRING and decoder_cosine >= DUPLICATE_COSINE:
        return "duplicate"
    if most >= NESTED_CO_FIRING and least < DUPLICATE_CO_FIRING:
        return "nested"
    return "co-occurring"


class PairStatistics:
    """Streaming sums and joint contexts of pairs.

    Args:
        pairs: which. device: where the activations are.
    """

    def __init__(self, pairs: PairList, device: torch.device) -> None:
        self._a, self._b = pairs.a.to(device), pairs.b.to(device)
        self.products = torch.zeros(len(pairs), dtype=torch.float64, device=device)  # sum of h_a h_b
        self.support = torch.zeros(len(pairs), dtype=torch.int64, device=device)
        self.contexts = {kind: TopContexts(len(pairs), JOINT_CONTEXTS, 2, device) for kind in JOINT_KINDS}

    def add(self, batch: Batch) -> None:
        """Take a batch."""
        if len(self._a) == 0:
            return

        def a(pairs: Tensor, contexts: Tensor) -> Tensor:  # (m, t)
            return batch.h[self._a[pairs], contexts]

        def b(pairs: Tensor, contexts: Tensor) -> Tensor:
            return batch.h[self._b[pairs], contexts]

        peaks_a, peaks_b = batch.peaks[self._a], batch.peaks[self._b]  # (pairs, b)
        kinds = {
            "both": (self._sum(batch), lambda *at: (a(*at) * b(*at)).argmax(1)),
            "a": (peaks_a.where(peaks_b == 0, 0), lambda *at: a(*at).argmax(1)),
            "b": (peaks_b.where(peaks_a == 0, 0), lambda *at: b(*at).argmax(1)),
        }
        features = torch.stack([self._a, self._b], dim=1)
        for kind, (keys, peaks) in kinds.items():
            self.contexts[kind].add(batch, keys, batch.documents, features, peaks)

    def _sum(self, batch: Batch) -> Tensor:
        """Add up products and supports; return the largest product in each context, (pairs, b)."""
        h, shape = batch.flat, batch.h.shape[1:]
        peaks = h.new_empty(len(self._a), shape[0])
        for chunk in _chunks(len(self._a), h.shape[1]):
            product = h[self._a[chunk]] * h[self._b[chunk]]  # (pairs, b * t)
            self.products[chunk] += product.sum(1)
            torch.amax(product.unflatten(1, shape), dim=2, out=peaks[chunk])
            self.support[chunk] += product.sign_().sum(1).long()
        return peaks


class TwinStatistics:
    """Streaming correlations of pairs of the twin's features, those nearest by decoder cosine to the SAE's pairs.

    The twin baseline is the same run without the penalty.

    Args:
        sae: the SAE. twin: its twin. pairs: of the SAE, at least one.
    """

    def __init__(self, sae: SelOrthoSAE, twin: SelOrthoSAE, pairs: PairList) -> None:
        self._twin = twin
        W_dec = twin.W_dec.cpu()
        features, rows = torch.cat([pairs.a, pairs.b]).unique(return_inverse=True)
        nearest, match = nearest_directions(sae.W_dec.cpu()[features], W_dec)
        self.a, self.b = nearest[rows].view(2, -1)  # (pairs,) features of the twin
        self.match_a, self.match_b = match[rows].view(2, -1)
        self.decoder_cosine = cosines(W_dec[self.a], W_dec[self.b])
        features, rows = torch.cat([self.a, self.b]).unique(return_inverse=True)
        self._features = features.to(sae.device)  # of which something is summed
        self._a, self._b = rows.view(2, -1).to(sae.device)  # among these
        self._products = torch.zeros(len(pairs), dtype=torch.float64, device=sae.device)
        self._squares = torch.zeros(len(features), dtype=torch.float64, device=sae.device)

    def add(self, batch: Batch) -> None:
        """Take a batch."""
        h = self._twin.encode(batch.activations)[:, self._features].float().T.contiguous()  # (features, tokens)
        self._squares += torch.linalg.vecdot(h, h)
        for chunk in _chunks(len(self._a), h.shape[1]):
            self._products[chunk] += torch.linalg.vecdot(h[self._a[chunk]], h[self._b[chunk]])

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns of the pair table that are about the twin, one entry a pair.

        Where both features of a pair correspond to the same one of the twin, their correlation is 1.
        """
        found = correlations(self._products, self._squares[self._a], self._squares[self._b])
        same = (self.a == self.b).tolist()
        return {
            "twin_a": self.a.tolist(),
            "twin_b": self.b.tolist(),
            "twin_match_a": self.match_a.tolist(),
            "twin_match_b": self.match_b.tolist(),
            "twin_correlation": [1.0 if one else value for one, value in zip(same, found, strict=True)],
            "twin_decoder_cosine": self.decoder_cosine.tolist(),
        }


def correlations(products: Tensor, squares_a: Tensor, squares_b: Tensor) -> list[float | None]:
    """Compute eq. 4 from sums over tokens: `sum h_a h_b / sqrt(sum h_a^2 sum h_b^2)`; None where it is not defined."""
    defined = (squares_a > 0) & (squares_b > 0)
    values = (products / (squares_a.sqrt() * squares_b.sqrt())).clamp(-1, 1)
    return [value if known else None for value, known in zip(values.tolist(), defined.tolist(), strict=True)]


def _chunks(pairs: int, tokens: int) -> Iterator[slice]:
    step = max(1, _CHUNK // tokens)
    return (slice(start, start + step) for start in range(0, pairs, step))
