"""What a pass over a text gathers of pairs of features: how often both fire, how alike, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.pair_history import PairSnapshot
from .keepers import Accepted, Batch, Keeper, Windows
from .records import JOINT_KINDS

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
    selected: int = 0  # pairs that were selected, of which these are the strongest
    step: int | None = None
    scores: Sequence[float | None] = ()  # of each, at that step
    history_steps: Sequence[int] = ()
    history: Sequence[Sequence[float | None]] = ()  # of each, at these steps

    def __len__(self) -> int:
        return len(self.a)


def pairs_of_training(snapshots: Sequence[PairSnapshot], d_sae: int, limit: int) -> PairList:
    """The strongest pairs of the last selection of a training, and how they came to be."""
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
    """How a pair's class follows from its numbers, in words."""
    return (
        f"unmeasured: either feature fires on fewer than {min_support} tokens of this text; "
        f"duplicate: P(a|b) and P(b|a) are both at least {DUPLICATE_CO_FIRING:g} and the decoder cosine is at least "
        f"{DUPLICATE_COSINE:g}; "
        f"nested: the larger of P(a|b) and P(b|a) is at least {NESTED_CO_FIRING:g} and the smaller below "
        f"{DUPLICATE_CO_FIRING:g}; co-occurring: any other"
    )


def class_of(fires_a: int, fires_b: int, support: int, decoder_cosine: float, min_support: int) -> str:
    """Class of a pair by [`rule_of_classes`]; both fire on `support` of the tokens that each fires on."""
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
        self.a, self.b = pairs.a.to(device), pairs.b.to(device)
        self.products = torch.zeros(len(pairs), dtype=torch.float64, device=device)  # sum of h_a h_b
        self.support = torch.zeros(len(pairs), dtype=torch.int64, device=device)
        self.keepers = {kind: Keeper(len(pairs), JOINT_CONTEXTS, torch.float32, device) for kind in JOINT_KINDS}
        self.windows = {kind: Windows(len(pairs), JOINT_CONTEXTS, 2, device) for kind in JOINT_KINDS}

    def add(self, batch: Batch, peaks: Tensor) -> None:
        """Take a batch, whose largest activations by context are `peaks` (d_sae, b)."""
        if len(self.a) == 0:
            return
        joint = self._sum(batch)  # (pairs, b)
        of_a, of_b = peaks[self.a], peaks[self.b]
        self._offer("both", batch, joint)
        self._offer("a", batch, of_a.where(of_b == 0, 0))
        self._offer("b", batch, of_b.where(of_a == 0, 0))

    def _sum(self, batch: Batch) -> Tensor:
        """Add up products and supports; the largest product in each context, (pairs, b)."""
        h, shape = batch.flat, batch.h.shape[1:]
        peaks = h.new_empty(len(self.a), shape[0])
        rows = max(1, _CHUNK // h.shape[1])
        for start in range(0, len(self.a), rows):
            chunk = slice(start, start + rows)
            product = h[self.a[chunk]] * h[self.b[chunk]]  # (pairs, b * t)
            self.products[chunk] += product.sum(1)
            torch.amax(product.unflatten(1, shape), dim=2, out=peaks[chunk])
            self.support[chunk] += product.sign_().sum(1).long()
        return peaks

    def _offer(self, kind: str, batch: Batch, keys: Tensor) -> None:
        keeper = self.keepers[kind]
        pairs, contexts = ((keys > 0) & (keys >= keeper.worst[:, None])).nonzero(as_tuple=True)
        accepted = keeper.offer(pairs, keys[pairs, contexts], batch.documents[contexts], batch.numbers[contexts])
        contexts = contexts[accepted.candidates]
        self.windows[kind].store(
            accepted, batch, self._features(accepted), contexts, self._peaks(kind, batch, accepted, contexts)
        )

    def _features(self, accepted: Accepted) -> Tensor:
        return torch.stack([self.a[accepted.owners], self.b[accepted.owners]], dim=1)

    def _peaks(self, kind: str, batch: Batch, accepted: Accepted, contexts: Tensor) -> Tensor:
        """Positions of the tokens that the contexts were kept for."""
        a, b = (batch.h[features, contexts] for features in self._features(accepted).T)  # (m, t) each
        return {"both": a * b, "a": a, "b": b}[kind].argmax(1)


class ProductSums:
    """Streaming sums of products of pairs of the twin's features, without contexts.

    Args:
        a, b: (m,) rows of the twin's activations. features: rows that there are. device: where they are.
    """

    def __init__(self, a: Tensor, b: Tensor, features: int, device: torch.device) -> None:
        self.a, self.b = a.to(device), b.to(device)
        self.products = torch.zeros(len(a), dtype=torch.float64, device=device)
        self.squares = torch.zeros(features, dtype=torch.float64, device=device)

    def add(self, h: Tensor) -> None:
        """Take activations (features, tokens)."""
        self.squares += torch.linalg.vecdot(h, h)
        rows = max(1, _CHUNK // h.shape[1])
        for start in range(0, len(self.a), rows):
            chunk = slice(start, start + rows)
            self.products[chunk] += torch.linalg.vecdot(h[self.a[chunk]], h[self.b[chunk]])

    def correlations(self) -> list[float | None]:
        """Uncentred correlation of each pair; None where a feature never fires, 1 for a feature with itself."""
        found = correlations(self.products, self.squares[self.a], self.squares[self.b])
        return [1.0 if same else value for same, value in zip((self.a == self.b).tolist(), found, strict=True)]


def correlations(products: Tensor, squares_a: Tensor, squares_b: Tensor) -> list[float | None]:
    """Eq. 4 from sums over tokens: `sum h_a h_b / sqrt(sum h_a^2 sum h_b^2)`; None where it is not defined."""
    defined = (squares_a > 0) & (squares_b > 0)
    values = (products / (squares_a.sqrt() * squares_b.sqrt())).clamp(-1, 1)
    return [value if known else None for value, known in zip(values.tolist(), defined.tolist(), strict=True)]
