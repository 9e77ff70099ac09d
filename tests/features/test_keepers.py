"""The best candidates of many owners, offered in pieces, against sorting them all."""

from __future__ import annotations

import random

import pytest
import torch

from hf_selortho.features.keepers import AFTER, BEFORE, WINDOW, Batch, Keeper, Windows


def best(candidates, slots):
    """[(key, group, order)] by the definition: the best of each group, then the best of these."""
    kept, groups = [], set()
    for key, group, order in sorted(candidates, key=lambda c: (-c[0], c[2])):
        if group not in groups and len(kept) < slots:
            groups.add(group)
            kept.append((key, group, order))
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_keeps_what_sorting_everything_would(dtype, pieces) -> None:
    rng = random.Random(pieces)
    owners, slots = 7, 4
    # few different keys, so that there are many ties
    everything = [(rng.randrange(owners), rng.randrange(1, 12), rng.randrange(9), order) for order in range(400)]
    rng.shuffle(everything)
    keeper = Keeper(owners + 1, slots, dtype, torch.device("cpu"))
    held: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    for start in range(0, 400, 400 // pieces):
        piece = everything[start : start + 400 // pieces]
        owner, key, group, order = (torch.tensor(column) for column in zip(*piece, strict=True))
        accepted = keeper.offer(owner, key.to(dtype), group, order)
        for number, to, slot in zip(*(part.tolist() for part in accepted), strict=True):
            assert piece[number][0] == to
            held[to, slot] = piece[number]
    for owner in range(owners):
        expected = best([c[1:] for c in everything if c[0] == owner], slots)
        ranked = keeper.ranked(owner)
        assert [held[owner, slot][1:] for slot in ranked] == expected
        assert [keeper.keys[owner, slot].item() for slot in ranked] == [key for key, _, _ in expected]
        assert keeper.worst[owner] == expected[-1][0]
    assert keeper.ranked(owners) == []  # nothing was offered to it


def test_memory_does_not_grow() -> None:
    keeper = Keeper(3, 5, torch.float32, torch.device("cpu"))

    def held():
        return sum(t.numel() for t in vars(keeper).values() if isinstance(t, torch.Tensor))

    before = held()
    for order in range(100):
        keys = torch.rand(300)
        keeper.offer(torch.arange(300) % 3, keys, torch.arange(300) + 300 * order, torch.arange(300) + 300 * order)
    assert held() == before == 3 * 5 * 3 + 3
    assert len(keeper.ranked(0)) == 5


def test_what_cannot_enter_is_dropped_at_once() -> None:
    keeper = Keeper(1, 2, torch.float32, torch.device("cpu"))
    numbers = torch.arange(2)
    assert keeper.offer(torch.zeros(2).long(), torch.tensor([1.0, 2.0]), numbers, numbers).slots.tolist() != []
    accepted = keeper.offer(torch.zeros(2).long(), torch.tensor([0.5, 0.9]), numbers + 2, numbers + 2)
    assert [len(part) for part in accepted] == [0, 0, 0]


def test_windows_are_cut_at_the_ends_of_the_context() -> None:
    lengths, t = torch.tensor([70, 20]), 70
    batch = Batch(
        h=torch.rand(3, 2, t),
        read=torch.ones(2, t, dtype=torch.bool),
        input_ids=torch.arange(2 * t).view(2, t),
        lengths=lengths,
        documents=torch.tensor([40, 41]),
        numbers=torch.tensor([7, 8]),
    )
    keeper, windows = Keeper(4, 3, torch.float32, torch.device("cpu")), Windows(4, 3, 2, torch.device("cpu"))
    contexts, peaks = torch.tensor([0, 0, 1, 0]), torch.tensor([40, 3, 18, 69])
    features = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 0]])
    accepted = keeper.offer(torch.arange(4), torch.ones(4), torch.arange(4), torch.arange(4))
    windows.store(accepted, batch, features, contexts, peaks)
    for owner, (c, peak) in enumerate(zip(contexts.tolist(), peaks.tolist(), strict=True)):
        (window,) = windows.of(owner, keeper.ranked(owner))
        start, end = max(0, peak - BEFORE), min(int(lengths[c]), peak + AFTER + 1)
        assert window.start == start and window.start + window.peak == peak
        assert window.document_id == 40 + c
        assert window.token_ids == batch.input_ids[c, start:end].tolist() and len(window.token_ids) <= WINDOW
        assert window.activations == batch.h[features[owner], c, start:end].tolist()
