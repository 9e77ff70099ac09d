"""Contexts: documents cut into the token sequences that a language model reads."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import SelOrthoError
from ..language_models.contexts import Context
from .chats import Chat, ChatTokenizer, Text
from .texts import Documents

logger = logging.getLogger(__name__)

_CHUNK_DOCUMENTS = 64  # tokenised at once: enough for the tokenizer's threads, little to repeat after a resume


class Cutter:
    """Tokenises documents and cuts each into consecutive contexts, every one with a BOS of its own.

    Those of a chat hold what its template writes, but for the BOS of the template; those without a token that is
    trained on are left out.

    Args:
        tokenizer: of the language model. Text that spells a special token stays text.
        context_length: longest context in tokens, BOS included.
        prepend_bos: whether contexts start with the tokenizer's BOS.
        min_tokens: shorter ends of documents, without BOS, are dropped.

    Raises:
        SelOrthoError: the tokenizer has no BOS, or no context can be long enough.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int = 128,
        prepend_bos: bool = True,
        min_tokens: int = 8,
    ) -> None:
        if prepend_bos and tokenizer.bos_token_id is None:
            raise SelOrthoError(
                f"the tokenizer {type(tokenizer).__name__} has no beginning-of-sequence token: train and cache with "
                "--prepend_bos false, or choose another --model"
            )
        self._tokenizer = tokenizer
        self._prefix: list[int] = [tokenizer.bos_token_id] if prepend_bos else []
        self._width = context_length - len(self._prefix)  # tokens of the document in a full context
        self.min_tokens = min_tokens
        if not 1 <= min_tokens <= self._width:
            raise SelOrthoError(
                f"--min_tokens {min_tokens}: expected at least 1, and at most the {max(self._width, 0)} tokens of text "
                f"of a context of {context_length}"
            )

    def cut(self, documents: Sequence[tuple[int, Text]], counts: Counter[str] | None = None) -> list[Context]:
        """Make the contexts of the documents, in their order.

        `counts` is increased by these documents and contexts, and the ends dropped as too short.
        """
        if not documents:
            return []
        pieces = [
            Context(
                document_id,
                self._prefix + ids[start : start + self._width],
                trained and [False] * len(self._prefix) + trained[start : start + self._width],
            )
            for (document_id, _), (ids, trained) in zip(documents, self._tokenised(documents), strict=True)
            for start in range(0, len(ids), self._width)
        ]
        long = [piece for piece in pieces if len(piece.input_ids) >= len(self._prefix) + self.min_tokens]
        contexts = [context for context in long if context.trained is None or any(context.trained)]
        if counts is not None:
            dropped = len(pieces) - len(long)
            counts.update(documents=len(documents), contexts=len(contexts), dropped_tails=dropped)
        return contexts

    def _tokenised(self, documents: Sequence[tuple[int, Text]]) -> Sequence[tuple[list[int], list[bool] | None]]:
        """Return the tokens of each document, and which of them are trained on, None for all."""
        chats = [(document_id, text) for document_id, text in documents if isinstance(text, Chat)]
        if chats:  # all of them are
            return [self._chats.encode(*chat) for chat in chats]
        encoded = self._tokenizer(
            [text for _, text in documents],
            add_special_tokens=False,
            split_special_tokens=True,  # a text may say "<eos>" without ending anything
            return_attention_mask=False,
            verbose=False,  # longer than the model's window is fine: it is cut here
        )
        return [(ids, None) for ids in encoded["input_ids"]]

    @functools.cached_property
    def _chats(self) -> ChatTokenizer:
        return ChatTokenizer(self._tokenizer)


class ContextStream:
    """Contexts of the training documents; its state resumes at the very next context.

    Args:
        documents: where the texts come from; every epoch has an order of its own.
        cutter: makes the contexts.
        seed: of the order of the documents.
        rank: this process's number; the processes read different documents.
        world_size: number of processes.
        endless: begin another epoch at the end of one; else the stream ends there.

    Attributes:
        epoch: which one is being read, from 0.
        counts: of all epochs so far, see [`Cutter.cut`].
    """

    def __init__(
        self,
        documents: Documents,
        cutter: Cutter,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        endless: bool = True,
    ) -> None:
        self._documents, self._cutter, self._endless = documents, cutter, endless
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self.counts: Counter[str] = Counter()
        self.epoch = self._chunk = self._handed_out = 0  # contexts handed out of that chunk of that epoch
        self._contexts = self._read()

    def __iter__(self) -> Iterator[Context]:
        return self._contexts

    def take(self, n: int) -> list[Context]:
        """Take the next n contexts, fewer only where the stream ends.

        Raises:
            SelOrthoError: no context in a whole epoch of an endless stream.
        """
        return list(itertools.islice(self._contexts, n))

    def take_tokens(self, n: int, beside_bos: bool = False) -> list[Context]:
        """Take as many contexts as hold n tokens (not counting BOS if `beside_bos`); ends and errors as [`take`]."""
        return take_tokens(self._contexts, n, beside_bos)

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands; JSON-able and small."""
        place = {"epoch": self.epoch, "chunk": self._chunk, "handed_out": self._handed_out}
        return {**place, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream that gave `state` stood; it had the same arguments."""
        self.epoch, self._chunk, self._handed_out = state["epoch"], state["chunk"], state["handed_out"]
        self.counts = Counter(state["counts"])
        self._contexts = self._read()

    def _read(self) -> Iterator[Context]:
        """Go on after the contexts that were handed out."""
        while True:
            documents = self._documents.train(self.epoch, self._seed, rank=self._rank, world_size=self._world_size)
            for chunk in _chunks(itertools.islice(documents, self._chunk * _CHUNK_DOCUMENTS, None)):
                counts = None if self._handed_out else self.counts  # they have a chunk that was begun before
                for context in self._cutter.cut(chunk, counts)[self._handed_out :]:
                    self._handed_out += 1
                    yield context
                self._chunk, self._handed_out = self._chunk + 1, 0
            if not self._endless:
                return
            if not self.counts["contexts"]:
                share = f" for process {self._rank + 1} of {self._world_size}" if self._world_size > 1 else ""
                raise SelOrthoError(
                    f'"{self._documents.name}" gives no training context{share}: {self.counts["documents"]} documents, '
                    f"none with {self._cutter.min_tokens} tokens or more{self._documents.of_roles}; use other texts or "
                    "a lower --min_tokens"
                )
            self.epoch, self._chunk = self.epoch + 1, 0


def _chunks(documents: Iterator[tuple[int, Text]]) -> Iterator[list[tuple[int, Text]]]:
    return iter(lambda: list(itertools.islice(documents, _CHUNK_DOCUMENTS)), [])


def held_out_contexts(documents: Documents, cutter: Cutter, limit: int | None = None) -> Iterator[Context]:
    """Read the first `limit` contexts of the documents that training never sees, or all; always the same ones.

    Raises:
        SelOrthoError: there is none.
    """
    counts: Counter[str] = Counter()
    given = 0
    contexts = (context for chunk in _chunks(documents.held_out()) for context in cutter.cut(chunk, counts))
    for context in itertools.islice(contexts, limit):
        given += 1
        yield context
    if not given:
        raise SelOrthoError(
            f'"{documents.name}" gives no held-out context: {counts["documents"]} documents are held out, none '
            f"with {cutter.min_tokens} tokens or more{documents.of_roles}; give more texts or a larger held-out "
            "fraction"
        )
    if limit is not None and given < limit:
        logger.warning('"%s" gives %d held-out contexts, %d were asked for', documents.name, given, limit)


def take_tokens(contexts: Iterator[Context], n: int, beside_bos: bool = False) -> list[Context]:
    """Take as many contexts as hold n tokens (not counting BOS if `beside_bos`), fewer only at the end."""
    taken: list[Context] = []
    while n > 0 and (context := next(contexts, None)) is not None:
        taken.append(context)
        n -= len(context.input_ids) - beside_bos
    return taken


def count_tokens(contexts: Iterable[Context]) -> int:
    """Count the tokens of contexts, BOS included."""
    return sum(len(context.input_ids) for context in contexts)


def estimate_tokens(documents: Documents, cutter: Cutter, sample: int = 1000) -> float | None:
    """Estimate the tokens of one epoch of the training documents, BOS included, from `sample` of them.

    Exact where there are no more documents than that; None for a stream, whose length nobody knows.
    """
    if documents.count is None:
        return None
    texts = list(itertools.islice(documents.train(0, 0), sample + 1))
    tokens = count_tokens(cutter.cut(texts[:sample]))
    if len(texts) <= sample:
        return float(tokens)
    return tokens / sample * documents.count * (1 - documents.held_out_fraction)
