"""Contexts: documents cut into the token sequences that a language model reads."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..errors import SelOrthoError
from .texts import Documents

logger = logging.getLogger(__name__)

_CHUNK_DOCUMENTS = 64  # tokenised at once: enough for the tokenizer's threads, little to repeat after a resume


class Context(NamedTuple):
    """One input of the language model; never tokens of two documents."""

    document_id: int
    input_ids: list[int]  # BOS first if asked for, at most context_length long


class Cutter:
    """Tokenises documents and cuts each into consecutive contexts, every one with a BOS of its own.

    Args:
        tokenizer: of the language model. Text that spells a special token stays text.
        context_length: longest context in tokens, BOS included.
        prepend_bos: whether contexts start with the tokenizer's BOS.
        min_tokens: shorter ends of documents, without BOS, are dropped and counted.

    Attributes:
        counts: documents and contexts made so far, ends dropped as too short, and the tokens in them.

    Raises:
        SelOrthoError: the tokenizer has no BOS, or no context can be long enough.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, context_length: int, prepend_bos: bool, min_tokens: int
    ) -> None:
        if prepend_bos and tokenizer.bos_token_id is None:
            raise SelOrthoError(
                f"the tokenizer {type(tokenizer).__name__} has no beginning-of-sequence token: use --prepend_bos false"
            )
        self._tokenizer = tokenizer
        self._prefix: list[int] = [tokenizer.bos_token_id] if prepend_bos else []
        self._width = context_length - len(self._prefix)  # tokens of the document in a full context
        self.min_tokens = min_tokens
        if not 1 <= min_tokens <= self._width:
            raise SelOrthoError(
                f"context_length {context_length} holds {max(self._width, 0)} tokens of text, and min_tokens is "
                f"{min_tokens}: min_tokens must be at least 1 and must fit"
            )
        self.counts = {"documents": 0, "contexts": 0, "dropped_tails": 0, "dropped_tail_tokens": 0}

    def cut(self, documents: Sequence[tuple[int, str]]) -> list[Context]:
        """Make the contexts of the documents, in their order."""
        if not documents:
            return []
        encoded = self._tokenizer(
            [text for _, text in documents],
            add_special_tokens=False,
            split_special_tokens=True,  # a text may say "<eos>" without ending anything
            return_attention_mask=False,
            verbose=False,  # longer than the model's window is fine: it is cut here
        )
        contexts = []
        for (document_id, _), ids in zip(documents, encoded["input_ids"], strict=True):
            pieces = [ids[start : start + self._width] for start in range(0, len(ids), self._width)]
            kept = [piece for piece in pieces if len(piece) >= self.min_tokens]
            contexts += [Context(document_id, self._prefix + piece) for piece in kept]
            self.counts["dropped_tails"] += len(pieces) - len(kept)
            self.counts["dropped_tail_tokens"] += len(ids) - sum(map(len, kept))
        self.counts["documents"] += len(documents)
        self.counts["contexts"] += len(contexts)
        return contexts


class ContextStream:
    """Contexts of the training documents; its state resumes at the very next context.

    Args:
        documents: where the texts come from; every epoch has an order of its own.
        tokenizer, context_length, prepend_bos, min_tokens: as in [`Cutter`].
        seed: of the order of the documents.
        rank: this process's number; the processes read different documents.
        world_size: number of processes.
        endless: begin another epoch at the end of one; else the stream ends there.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int = 128,
        prepend_bos: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        min_tokens: int = 8,
        endless: bool = True,
    ) -> None:
        self._documents, self._endless = documents, endless
        self._cutter = Cutter(tokenizer, context_length=context_length, prepend_bos=prepend_bos, min_tokens=min_tokens)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._start(epoch=0)

    @property
    def counts(self) -> dict[str, int]:
        """Documents and contexts made so far over all epochs, ends dropped as too short, and the tokens in them."""
        return dict(self._cutter.counts)

    def __iter__(self) -> Iterator[Context]:
        return self

    def __next__(self) -> Context:
        """Give the next context.

        Raises:
            SelOrthoError: no context in a whole epoch of an endless stream.
        """
        while self._handed_out == len(self._chunk):
            self._next_chunk()
        self._handed_out += 1
        return self._chunk[self._handed_out - 1]

    def take(self, n: int) -> list[Context]:
        """Take the next n contexts, fewer only where the stream ends."""
        return list(itertools.islice(self, n))

    def take_tokens(self, n: int, beside_bos: bool = False) -> list[Context]:
        """Take as many contexts as hold n tokens (not counting BOS if `beside_bos`); fewer only at the end."""
        taken: list[Context] = []
        while n > 0 and (fresh := self.take(1)):
            taken += fresh
            n -= len(fresh[0].input_ids) - beside_bos
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands; JSON-able and small."""
        return {
            "epoch": self.epoch,
            "documents": self._consumed,
            "handed_out": self._handed_out,
            "counts": dict(self._counts_before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream that gave `state` stood; it had the same arguments."""
        self._cutter.counts = dict(state["counts"])
        self._start(epoch=state["epoch"], skip=state["documents"])
        if state["handed_out"]:
            self._next_chunk()
            self._handed_out = state["handed_out"]

    def _start(self, epoch: int, skip: int = 0) -> None:
        self.epoch = epoch
        stream = self._documents.train(epoch, self._seed, rank=self._rank, world_size=self._world_size)
        self._stream: Iterator[tuple[int, str]] = itertools.islice(stream, skip, None)
        self._consumed = skip  # documents of the epoch before the current chunk
        self._counts_before = self.counts  # before the current chunk
        self._chunk: list[Context] = []
        self._chunk_documents = self._handed_out = 0

    def _next_chunk(self) -> None:
        """Replace the current chunk, all handed out, by the contexts of the next documents, maybe of a new epoch."""
        documents = list(itertools.islice(self._stream, _CHUNK_DOCUMENTS))
        if not documents and self._endless:
            if not self.counts["contexts"]:
                share = f" for process {self._rank + 1} of {self._world_size}" if self._world_size > 1 else ""
                raise SelOrthoError(
                    f'"{self._documents.name}" gives no training context{share}: {self.counts["documents"]} documents, '
                    f"none with {self._cutter.min_tokens} tokens or more; use other texts or a lower --min_tokens"
                )
            return self._start(self.epoch + 1)
        self._consumed += self._chunk_documents
        self._counts_before = self.counts
        self._chunk, self._chunk_documents, self._handed_out = self._cutter.cut(documents), len(documents), 0
        if not documents:
            raise StopIteration


def held_out_contexts(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    context_length: int = 128,
    prepend_bos: bool = True,
    min_tokens: int = 8,
) -> Iterator[Context]:
    """Read the first `limit` contexts of the documents that training never sees, or all; always the same ones.

    Raises:
        SelOrthoError: there is none.
    """
    cutter = Cutter(tokenizer, context_length=context_length, prepend_bos=prepend_bos, min_tokens=min_tokens)
    stream, given = documents.held_out(), 0
    while (limit is None or given < limit) and (batch := list(itertools.islice(stream, _CHUNK_DOCUMENTS))):
        contexts = cutter.cut(batch)[: None if limit is None else limit - given]
        given += len(contexts)
        yield from contexts
    if not given:
        raise SelOrthoError(
            f'"{documents.name}" gives no held-out context: {cutter.counts["documents"]} documents are held out, none '
            f"with {min_tokens} tokens or more; give more texts or a larger held-out fraction"
        )
    if limit is not None and given < limit:
        logger.warning('"%s" gives %d held-out contexts, %d were asked for', documents.name, given, limit)


def count_tokens(contexts: Iterable[Context]) -> int:
    """Count the tokens of contexts, BOS included."""
    return sum(len(context.input_ids) for context in contexts)


def estimate_tokens(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int = 128,
    prepend_bos: bool = True,
    min_tokens: int = 8,
    sample: int = 1000,
) -> float | None:
    """Estimate the tokens of one epoch of the training documents, BOS included, from `sample` of them.

    Exact where there are no more documents than that; None for a stream, whose length nobody knows.
    """
    if documents.count is None:
        return None
    cutter = Cutter(tokenizer, context_length=context_length, prepend_bos=prepend_bos, min_tokens=min_tokens)
    texts = list(itertools.islice(documents.train(0, 0), sample + 1))
    tokens = count_tokens(cutter.cut(texts[:sample]))
    if len(texts) <= sample:
        return float(tokens)
    return tokens / sample * documents.count * (1 - documents.held_out_fraction)


def pad_batch(contexts: Iterable[Context], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one batch of contexts, padded on the right: input_ids and attention_mask (1 on tokens), (b, t) int64."""
    rows = [torch.tensor(context.input_ids, dtype=torch.int64) for context in contexts]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)  # (b, t)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # (b, t)
    return input_ids, attention_mask


def spelling(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Write a token as text; one that is a piece of a character, as the tokenizer's vocabulary writes it."""
    decoded = str(tokenizer.decode([token_id]))
    if decoded and "\ufffd" not in decoded:
        return decoded
    return str(tokenizer.convert_ids_to_tokens(token_id))
