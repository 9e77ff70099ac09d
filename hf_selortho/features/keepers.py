"""The best candidates of each of many owners (features, or pairs), found in one pass, and the text around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BEFORE, AFTER = 31, 16  # tokens shown before and after the one that a window is shown for
WINDOW = BEFORE + 1 + AFTER
_NO_ORDER = torch.iinfo(torch.int64).max


class Accepted(NamedTuple):
    """Candidates that were kept, each (m,) int64."""

    candidates: Tensor  # their numbers among those offered
    owners: Tensor
    slots: Tensor  # where they are kept, in place of what was there


class Keeper:
    """The `slots` candidates with the largest keys of each of `n` owners, at most one of them from any group.

    What is kept depends on the candidates alone and not on how they come in: of equal keys, the one of the smaller
    `order` is kept. Memory is `n * slots` whatever is offered.

    Args:
        n: owners. slots: candidates kept of each. dtype: of the keys. device: where they are kept.
    """

    def __init__(self, n: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = slots
        info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        self._lowest = info.min
        self.keys = torch.full((n, slots), info.min, dtype=dtype, device=device)
        # an empty slot is a group of its own
        self.groups = (-1 - torch.arange(slots, device=device)).repeat(n, 1)
        self.orders = torch.full((n, slots), _NO_ORDER, dtype=torch.int64, device=device)
        self.worst = self.keys.amin(1)  # (n,) smaller keys cannot enter

    @property
    def filled(self) -> Tensor:
        """Which slots hold a candidate, (n, slots) bool."""
        return self.orders < _NO_ORDER

    def offer(self, owners: Tensor, keys: Tensor, groups: Tensor, orders: Tensor) -> Accepted:
        """Keep those of some candidates that are among the best.

        Args:
            owners: (m,) int64. keys: (m,), above the smallest number of their dtype.
            groups: (m,) int64, not negative. orders: (m,) int64; among equals the smallest is kept.
        """
        able = (keys >= self.worst[owners]).nonzero()[:, 0]
        if len(able) == 0:
            return Accepted(able, able, able)
        owners, keys, groups, orders = owners[able], keys[able], groups[able], orders[able]
        touched, own = owners.unique(return_inverse=True)
        kept = len(touched) * self.slots
        rows = torch.arange(len(touched), device=own.device).repeat_interleave(self.slots)
        rows = torch.cat([rows, own])
        winners = _winners(
            rows,
            torch.cat([self.keys[touched].flatten(), keys]),
            torch.cat([self.groups[touched].flatten(), groups]),
            torch.cat([self.orders[touched].flatten(), orders]),
            self.slots,
        )
        new = winners[winners >= kept]
        stays = torch.zeros(kept, dtype=torch.bool, device=own.device)
        stays[winners[winners < kept]] = True
        free = (~stays).nonzero()[:, 0]  # as many of each owner as it has new ones, and both sorted by owner
        entered, slots = touched[rows[new]], free % self.slots
        for held, given in ((self.keys, keys), (self.groups, groups), (self.orders, orders)):
            held[entered, slots] = given[new - kept]
        self.worst[touched] = self.keys[touched].amin(1)
        return Accepted(able[new - kept], entered, slots)

    def cpu(self) -> Keeper:
        """The same in ordinary memory, for [`ranked`] to be fast."""
        for name in ("keys", "groups", "orders", "worst"):
            setattr(self, name, getattr(self, name).cpu())
        return self

    def ranked(self, owner: int) -> list[int]:
        """Slots of an owner that are filled, the largest key first."""
        keys, orders = self.keys[owner].tolist(), self.orders[owner].tolist()
        filled = [slot for slot in range(self.slots) if orders[slot] < _NO_ORDER]
        return sorted(filled, key=lambda slot: (-keys[slot], orders[slot]))


def _winners(rows: Tensor, keys: Tensor, groups: Tensor, orders: Tensor, slots: int) -> Tensor:
    """Numbers of the best `slots` of each row with different groups, sorted by row."""
    rank = orders.argsort(stable=True)
    rank = rank[keys[rank].argsort(descending=True, stable=True)]
    rank = rank[rows[rank].argsort(stable=True)]
    numbered = groups.unique(return_inverse=True)[1]
    code = (rows * len(groups) + numbered)[rank]
    order = code.argsort(stable=True)
    first = torch.ones_like(code, dtype=torch.bool)
    first[order[1:]] = code[order[1:]] != code[order[:-1]]  # the best of its row and group
    rank = rank[first]
    sorted_rows = rows[rank]
    counts = torch.bincount(sorted_rows)
    place = torch.arange(len(rank), device=rank.device) - (counts.cumsum(0) - counts)[sorted_rows]
    return rank[place < slots]


@dataclass(frozen=True)
class Batch:
    """Feature activations of some contexts, feature by feature, and what was read."""

    h: Tensor  # (d_sae, b, t); 0 where the SAE was not trained: BOS, other special tokens, sinks, padding
    read: Tensor  # (b, t) bool, the other tokens
    input_ids: Tensor  # (b, t)
    lengths: Tensor  # (b,) tokens of each context, BOS included
    documents: Tensor  # (b,) int64
    numbers: Tensor  # (b,) of each context in the whole text

    @property
    def flat(self) -> Tensor:
        """`h` as (d_sae, b * t)."""
        return self.h.flatten(1)


class Window(NamedTuple):
    """A piece of a context."""

    document_id: int
    start: int
    peak: int
    token_ids: list[int]
    activations: list[list[float]]  # a list for each of the features of the owner


class Windows:
    """Pieces of contexts around a token, in the slots of a [`Keeper`].

    Args:
        n: owners. slots: of each. features: whose activations are kept, 1 (a feature's own) or 2 (of a pair).
        device: where they are kept.
    """

    def __init__(self, n: int, slots: int, features: int, device: torch.device) -> None:
        self._ids = torch.zeros((n, slots, WINDOW), dtype=torch.int32, device=device)
        self._acts = torch.zeros((n, slots, features, WINDOW), dtype=torch.float32, device=device)
        # start, peak, length
        self._place = torch.zeros((n, slots, 3), dtype=torch.int32, device=device)
        self._documents = torch.zeros((n, slots), dtype=torch.int64, device=device)

    def store(self, accepted: Accepted, batch: Batch, features: Tensor, contexts: Tensor, peaks: Tensor) -> None:
        """Keep windows of a batch.

        Args:
            accepted: m candidates. features: (m, features). contexts: (m,) rows of the batch. peaks: (m,) positions.
        """
        start = (peaks - BEFORE).clamp_min(0)
        end = torch.minimum(peaks + AFTER + 1, batch.lengths[contexts])
        positions = start[:, None] + torch.arange(WINDOW, device=start.device)  # (m, WINDOW)
        inside = positions < end[:, None]
        positions = positions.where(inside, 0)
        into = (accepted.owners, accepted.slots)
        self._ids[into] = batch.input_ids[contexts[:, None], positions].where(inside, 0).int()
        acts = batch.h[features[:, :, None], contexts[:, None, None], positions[:, None]]  # (m, features, WINDOW)
        self._acts[into] = acts.where(inside[:, None], 0).float()
        self._place[into] = torch.stack([start, peaks - start, end - start], dim=1).int()
        self._documents[into] = batch.documents[contexts]

    def of(self, owner: int, slots: Sequence[int]) -> list[Window]:
        """What is kept in some slots of an owner."""
        if not slots:
            return []
        held = (self._documents, self._place, self._ids, self._acts)
        documents, places, ids, acts = (tensor[owner].tolist() for tensor in held)
        return [_window(documents[slot], places[slot], ids[slot], acts[slot]) for slot in slots]

    def cpu(self) -> Windows:
        """The same in ordinary memory, for [`of`] to be fast."""
        self._ids, self._acts = self._ids.cpu(), self._acts.cpu()
        self._place, self._documents = self._place.cpu(), self._documents.cpu()
        return self


def _window(document_id: int, place: list[int], ids: list[int], acts: list[list[float]]) -> Window:
    start, peak, length = place
    return Window(document_id, start, peak, ids[:length], [row[:length] for row in acts])
