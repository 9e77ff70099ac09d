"""What a language model reads at once: token sequences, padded to a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence


class Context(NamedTuple):
    """One input of the language model; never tokens of two documents."""

    document_id: int
    input_ids: list[int]  # BOS first if asked for, at most context_length long
    trained: list[bool] | None = None  # which of these are trained on, special ones aside; None: all


def pad_batch(contexts: Iterable[Context], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one batch of contexts, padded on the right: input_ids and attention_mask (1 on tokens), (b, t) int64."""
    rows = [torch.tensor(context.input_ids, dtype=torch.int64) for context in contexts]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)  # (b, t)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # (b, t)
    return input_ids, attention_mask


def trained_mask(contexts: Iterable[Context]) -> torch.Tensor:
    """Mark the tokens of a batch that may be trained on, (b, t) int64: those of the attention mask, or some of them."""
    rows = [torch.tensor(c.trained or [True] * len(c.input_ids)).long() for c in contexts]
    return pad_sequence(rows, batch_first=True)
