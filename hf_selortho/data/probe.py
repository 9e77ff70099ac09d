"""Times a language model on a little text, more of it the faster it is, so that a forecast takes seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ..language_models.capture import ActivationCapture, CapturedActivations, TokenOrigins
from ..process_group import SINGLE_PROCESS, ProcessGroup
from .buffer import ActivationBatch, ActivationStatistics
from .contexts import ContextStream, count_tokens

_GROWTH = 4  # times as many tokens in each reading as in the one before


def probe_capture(
    capture: ActivationCapture,
    stream: ContextStream,
    seconds: float,
    group: ProcessGroup = SINGLE_PROCESS,
    most: float = math.inf,
) -> tuple[list[CapturedActivations], float]:
    """Read a context, which brings in the weights, then more and more until the time is up; sinks are kept.

    Args:
        capture: the layers to read. stream: of contexts, endless. seconds: that this may take, beyond two contexts.
        group: the processes that do so together. most: tokens in a reading.

    Returns:
        What was read, and the seconds that the last reading took for a token.
    """
    capture.max_norms = (None,) * len(capture.layers)
    parts, wanted, spent = list[CapturedActivations](), 1, 0.0
    while True:
        started, contexts = time.perf_counter(), stream.take_tokens(wanted)
        parts.append(capture.capture_all(contexts))
        took = group.mean(time.perf_counter() - started, capture.device) or 0.0
        spent += took
        wanted *= 1 if len(parts) == 1 else _GROWTH
        ended = spent + (_GROWTH * took if len(parts) > 2 else took) > seconds or wanted > min(
            _GROWTH * capture.batch_tokens, most
        )
        if ended and len(parts) > 1:
            return parts, took / count_tokens(contexts)


class SampleBatches:
    """Batches of whatever size, drawn with replacement from a few activations; only their speed means anything.

    Args:
        parts: the activations. batch_size: tokens of a batch.
    """

    def __init__(self, parts: Sequence[CapturedActivations], batch_size: int) -> None:
        self.by_layer: dict[int, Tensor]
        self.targets: dict[int, Tensor]
        self.by_layer, self.targets = (
            {layer: torch.cat([getattr(part, kind)[layer] for part in parts]) for layer in getattr(parts[0], kind)}
            for kind in ("by_layer", "targets")
        )
        self.origins = TokenOrigins(torch.cat([part.origins.table for part in parts]))
        self.batch_size = batch_size

    def statistics(self, progress: bool = False) -> dict[int, ActivationStatistics]:
        """Return mean and scale of each layer."""
        return {
            layer: ActivationStatistics(
                *_moments(rows), 1.0, None, *(_moments(self.targets[layer]) if self.targets else ())
            )
            for layer, rows in self.by_layer.items()
        }

    def next_batch(self) -> ActivationBatch:
        """Draw a batch."""
        rows = torch.randint(len(self.origins), (self.batch_size,))
        by_layer, targets = (
            {layer: held[rows.to(held.device)].float() for layer, held in kind.items()}
            for kind in (self.by_layer, self.targets)
        )
        return ActivationBatch(by_layer, self.origins[rows], targets)

    def memory_bytes(self) -> int:
        """Return the bytes of the activations."""
        return sum(held.nbytes for kind in (self.by_layer, self.targets) for held in kind.values())


def _moments(rows: Tensor) -> tuple[Tensor, float]:
    spread = math.sqrt(float(rows.float().var(0, correction=0).sum()))
    return rows.float().mean(0), spread or 1.0
