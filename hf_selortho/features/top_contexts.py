"""Streaming top-k: the best contexts of each of many features or pairs, and the text around their peaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

BEFORE, AFTER = 31, 16  # tokens shown before and after the one that a window is shown for
WINDOW = BEFORE + 1 + AFTER
_NO_ORDER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Batch:
    """Feature activations of some contexts, feature by feature, and what was read."""

    h: Tensor  # (d_sae, b, t); 0 where the SAE was not trained: BOS, other special tokens, sinks, padding
    read: Tensor  # (b, t) bool, the other tokens
    activations: Tensor  # (tokens, d_in) of the language model on these, in their order
    input_ids: Tensor  # (b, t)
    lengths: Tensor  # (b,) tokens of each context, BOS included
    documents: Tensor  # (b,) int64
    numbers: Tensor  # (b,) of each context in the whole text

    @property
    def flat(self) -> Tensor:
        """`h` as (d_sae, b * t)."""
        return self.h.flatten(1)

    @cached_property
    def peaks(self) -> Tensor:
        """The largest activation in each context, (d_sae, b)."""
        return self.h.amax(2)


class Window(NamedTuple):
    """A piece of a context."""

    document_id: int
    start: int
    peak: int
    token_ids: list[int]
    activations: list[list[float]]  # a list for each of the features of the owner


class TopContexts:
    """The contexts with the largest keys of each of `n` owners, at most one of them from any group of contexts.

    What is kept depends on the contexts alone and not on how they come in: of equal keys, the first context of the
    text is kept. Memory is `n * slots` windows whatever is added.

    Args:
        n: owners: features, or pairs.
        slots: contexts kept of each.
        features: whose activations are kept, 1 (a feature's own) or 2 (of a pair).
        device: where they are kept.
    """

    def __init__(self, n: int, slots: int, features: int, device: torch.device) -> None:
        self._slots = slots
        self._keys = torch.zeros((n, slots), dtype=torch.float64, device=device)
        self._groups = (-1 - torch.arange(slots, device=device)).repeat(n, 1)  # an empty slot is a group of its own
        self._orders = torch.full((n, slots), _NO_ORDER, dtype=torch.int64, device=device)
        self._ids = torch.zeros((n, slots, WINDOW), dtype=torch.int32, device=device)
        self._acts = torch.zeros((n, slots, features, WINDOW), dtype=torch.float32, device=device)
        # document, start, peak, length
        self._places = torch.zeros((n, slots, 4), dtype=torch.int64, device=device)
        self.worst = self._keys.amin(1)  # (n,) smaller keys cannot enter

    def add(
        self,
        batch: Batch,
        keys: Tensor,
        groups: Tensor,
        features: Tensor,
        peaks: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Keep those contexts of a batch that are among the best.

        Args:
            batch: b contexts of t tokens.
            keys: (n, b) of each context; those that are not positive are left out.
            groups: (b,) int64, not negative, of each context.
            features: (n, features) of each owner.
            peaks: takes owners and contexts (m,) each and gives the positions (m,) of the tokens that windows are
                shown for.
        """
        owners, contexts = ((keys > 0) & (keys >= self.worst[:, None])).nonzero(as_tuple=True)
        if len(owners) == 0:
            return
        keys = keys[owners, contexts].double()
        accepted, slots = self._enter(owners, keys, groups[contexts], batch.numbers[contexts])
        owners, contexts = owners[accepted], contexts[accepted]
        self._store(owners, slots, batch, features[owners], contexts, peaks(owners, contexts))

    def cpu(self) -> None:
        """Move everything to ordinary memory, for [`of`] to be fast."""
        for name, held in vars(self).items():
            if isinstance(held, Tensor):
                setattr(self, name, held.cpu())

    def of(self, owner: int) -> list[Window]:
        """Return the windows of an owner, the largest key first."""
        keys, orders = self._keys[owner].tolist(), self._orders[owner].tolist()
        filled = [slot for slot in range(self._slots) if orders[slot] < _NO_ORDER]
        if not filled:
            return []
        places, ids, acts = (held[owner].tolist() for held in (self._places, self._ids, self._acts))
        windows = []
        for slot in sorted(filled, key=lambda slot: (-keys[slot], orders[slot])):
            document, start, peak, length = places[slot]
            windows.append(Window(document, start, peak, ids[slot][:length], [row[:length] for row in acts[slot]]))
        return windows

    def _enter(self, owners: Tensor, keys: Tensor, groups: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
        """Let the best of some candidates (m,) take the place of others: their numbers, and the slots they take."""
        touched, own = owners.unique(return_inverse=True)
        rows = torch.arange(len(touched), device=own.device).repeat_interleave(self._slots)
        kept = len(rows)
        rows = torch.cat([rows, own])
        winners = _best(
            rows,
            torch.cat([self._keys[touched].flatten(), keys]),
            torch.cat([self._groups[touched].flatten(), groups]),
            torch.cat([self._orders[touched].flatten(), orders]),
            self._slots,
        )
        new = winners[winners >= kept]
        stays = torch.zeros(kept, dtype=torch.bool, device=own.device)
        stays[winners[winners < kept]] = True
        free = (~stays).nonzero()[:, 0]  # as many of each owner as it has new ones, and both sorted by owner
        entered, slots = touched[rows[new]], free % self._slots
        accepted = new - kept
        for held, given in ((self._keys, keys), (self._groups, groups), (self._orders, orders)):
            held[entered, slots] = given[accepted]
        self.worst[touched] = self._keys[touched].amin(1)
        return accepted, slots

    def _store(
        self, owners: Tensor, slots: Tensor, batch: Batch, features: Tensor, contexts: Tensor, peaks: Tensor
    ) -> None:
        start = (peaks - BEFORE).clamp_min(0)
        end = torch.minimum(peaks + AFTER + 1, batch.lengths[contexts])
        positions = start[:, None] + torch.arange(WINDOW, device=start.device)  # (m, WINDOW)
        inside = positions < end[:, None]
        positions = positions.where(inside, 0)
        self._ids[owners, slots] = batch.input_ids[contexts[:, None], positions].where(inside, 0).int()
        acts = batch.h[features[:, :, None], contexts[:, None, None], positions[:, None]]  # (m, features, WINDOW)
        self._acts[owners, slots] = acts.where(inside[:, None], 0).float()
        self._places[owners, slots] = torch.stack([batch.documents[contexts], start, peaks - start, end - start], 1)


def _best(rows: Tensor, keys: Tensor, groups: Tensor, orders: Tensor, slots: int) -> Tensor:
    """Return the numbers of the best `slots` of each row with different groups, sorted by row."""
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
