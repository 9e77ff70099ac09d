"""The best contexts of many owners, offered in pieces, against sorting them all."""

from __future__ import annotations

import pytest
import torch

from hf_selortho.features.top_contexts import AFTER, BEFORE, WINDOW, Batch, TopContexts

T = 70  # tokens of the longest context


def make_batch(numbers: torch.Tensor, lengths: torch.Tensor) -> Batch:
    """Contexts whose activations and tokens are all different."""
    b = len(numbers)
    tokens = numbers[:, None] * T + torch.arange(T)
    return Batch(
        h=torch.rand(3, b, T),
        read=torch.ones(b, T, dtype=torch.bool),
        activations=torch.zeros(b * T, 2),
        input_ids=tokens,
        lengths=lengths,
        documents=numbers // 3,
        numbers=numbers,
    )


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_keeps_what_sorting_everything_would(pieces: int) -> None:
    owners, slots, contexts = 7, 4, 120
    generator = torch.Generator().manual_seed(pieces)
    keys = torch.randint(-3, 12, (owners, contexts), generator=generator).float()  # few, so that there are many ties
    keys[6] = 0  # nothing is offered to this owner
    kept = TopContexts(owners, slots, 1, torch.device("cpu"))
    sizes = sum(held.numel() for held in vars(kept).values() if isinstance(held, torch.Tensor))
    for piece in torch.randperm(contexts, generator=generator).chunk(pieces):
        batch = make_batch(piece, torch.full((len(piece),), T))
        features = torch.zeros(owners, 1, dtype=torch.int64)
        kept.add(batch, keys[:, piece], batch.documents, features, lambda o, c: batch.h[0, c].argmax(1))  # noqa: B023
    for owner in range(owners):
        best, documents = [], set()
        for key, number in sorted((-keys[owner, n].item(), n) for n in range(contexts)):
            if key < 0 and number // 3 not in documents and len(best) < slots:
                best.append(number)
                documents.add(number // 3)
        windows = kept.of(owner)
        assert [window.token_ids[0] // T for window in windows] == best
        assert [window.document_id for window in windows] == [number // 3 for number in best]
    assert sizes == sum(held.numel() for held in vars(kept).values() if isinstance(held, torch.Tensor))


def test_windows_are_cut_at_the_ends_of_the_context() -> None:
    lengths = torch.tensor([70, 20])
    batch = make_batch(torch.tensor([7, 8]), lengths)
    kept = TopContexts(4, 3, 2, torch.device("cpu"))
    contexts, peaks = torch.tensor([0, 0, 1, 0]), torch.tensor([40, 3, 18, 69])
    features = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 0]])
    keys = torch.nn.functional.one_hot(contexts, 2)  # each owner has one context
    kept.add(batch, keys, batch.documents, features, lambda o, c: peaks[o])
    for owner, (c, peak) in enumerate(zip(contexts.tolist(), peaks.tolist(), strict=True)):
        (window,) = kept.of(owner)
        start, end = max(0, peak - BEFORE), min(int(lengths[c]), peak + AFTER + 1)
        assert window.start == start and window.start + window.peak == peak
        assert window.token_ids == batch.input_ids[c, start:end].tolist() and len(window.token_ids) <= WINDOW
        assert window.activations == batch.h[features[owner], c, start:end].tolist()
