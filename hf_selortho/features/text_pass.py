"""One pass of an SAE over held-out text: batches of feature activations, laid out feature by feature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..language_models.capture import ActivationCapture, CapturedActivations
from ..language_models.contexts import Context, pad_batch
from ..modeling_selortho import SelOrthoSAE
from .top_contexts import Batch

_POOL_BATCHES = 16  # forward passes whose contexts are sorted by length together
_LARGEST_BATCH = {"cpu": 1 << 24, "cuda": 1 << 28}  # feature activations held at once


@dataclass
class TextCounts:
    """What has been read of a text."""

    documents: int = 0
    contexts: int = 0
    tokens: int = 0  # that the SAE reads: no BOS, no other special token, no sink
    dropped_special: int = 0
    dropped_sinks: int = 0


class TextPass:
    """Reads contexts with a language model and encodes them with an SAE.

    `counts` says what has been read so far.

    Args:
        sae: the SAE.
        capture: the language model at its layer.
        largest_batch: feature activations held at once; by default by the device.
    """

    def __init__(self, sae: SelOrthoSAE, capture: ActivationCapture, largest_batch: int | None = None) -> None:
        self.counts = TextCounts()
        self._sae, self._capture = sae, capture
        largest_batch = largest_batch or _LARGEST_BATCH.get(sae.device.type, _LARGEST_BATCH["cpu"])
        self._most_tokens = max(1, largest_batch // len(sae.b_enc))

    @torch.inference_mode()
    def read(self, contexts: Iterable[Context], tokens: int) -> Iterator[Batch]:
        """Yield batches of contexts from the first on, until they hold so many tokens (BOS not counted)."""
        last_document = None
        for pool in self._pools(contexts, tokens):
            first = self.counts.contexts
            self.counts.contexts += len(pool)
            for context in pool:  # those of a document come one after another
                self.counts.documents += context.document_id != last_document
                last_document = context.document_id
            for captured in self._capture.capture_batches(pool):
                self.counts.tokens += len(captured)
                self.counts.dropped_special += captured.dropped_special
                self.counts.dropped_sinks += captured.dropped_sinks
                for part in self._parts(captured):
                    yield self._encoded(part, pool, first)

    def _pools(self, contexts: Iterable[Context], tokens: int) -> Iterator[list[Context]]:
        limit, pool, held = _POOL_BATCHES * self._capture.batch_tokens, list[Context](), 0
        for context in contexts:
            pool.append(context)
            held += len(context.input_ids)
            tokens -= len(context.input_ids) - self._sae.config.prepend_bos
            if tokens <= 0:
                break
            if held >= limit:
                yield pool
                pool, held = [], 0
        if pool:
            yield pool

    def _parts(self, captured: CapturedActivations) -> Iterator[CapturedActivations]:
        """Yield whole contexts of a forward pass, as many as memory holds at once."""
        if len(captured) == 0:
            return
        if len(captured) <= self._most_tokens:
            yield captured
            return
        rows, counts = captured.origins.context_ids.unique_consecutive(return_inverse=True, return_counts=True)[1:]
        group = (counts.cumsum(0) - counts) // self._most_tokens  # of each context, by its first token
        for number in group.unique().tolist():
            yield captured[group[rows] == number]

    def _encoded(self, captured: CapturedActivations, pool: list[Context], first: int) -> Batch:
        origins, device = captured.origins, self._sae.device
        numbers, rows = origins.context_ids.unique_consecutive(return_inverse=True)
        contexts = [pool[number] for number in numbers.tolist()]
        input_ids, _ = pad_batch(contexts, self._capture.lm.pad_id)
        places = (rows * input_ids.shape[1] + origins.positions).to(device)
        activations = captured.by_layer[self._capture.layer].to(device)
        read = torch.zeros(input_ids.shape, dtype=torch.bool, device=device)
        read.view(-1)[places] = True
        return Batch(
            h=_by_feature(self._sae.encode(activations).float(), places, input_ids.shape),
            read=read,
            activations=activations,
            input_ids=input_ids.to(device),
            lengths=torch.tensor([len(context.input_ids) for context in contexts], device=device),
            documents=torch.tensor([context.document_id for context in contexts], device=device),
            numbers=numbers.to(device) + first,
        )


def _by_feature(feature_acts: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Return activations (tokens, n) as (n, b, t), contiguous, with 0 where there is no token.

    Args:
        feature_acts: (tokens, n). places: (tokens,) of each among the `b * t`. shape: (b, t).
    """
    if len(places) < shape.numel():
        whole = feature_acts.new_zeros(shape.numel(), feature_acts.shape[1])
        feature_acts = whole.index_copy_(0, places, feature_acts)
    return feature_acts.T.contiguous().unflatten(1, shape)
