"""Shuffled batches of activations out of a stream of contexts: the paper's activation buffer."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import SelOrthoError
from ..language_models.capture import (
    ORIGIN_NAMES,
    ActivationCapture,
    Harvest,
    TokenOrigins,
    max_norm_from_ratio,
    only,
    within_norms,
)
from ..process_group import ProcessGroup
from .contexts import ContextStream

CHUNK = 16384  # rows that are held in float64 at once


@dataclass(frozen=True)
class ActivationStatistics:
    """Of one layer, estimated once over all processes: on the first fill of the buffer, or on harvested shards."""

    mean: Tensor  # (d_in,) float32
    scale: float  # root mean squared norm of the centred activations
    median_norm: float  # median L2 norm of the activations, sinks included
    max_norm: float | None  # activations of a larger norm are left out


@dataclass(frozen=True)
class ActivationBatch:
    """Tokens drawn at random from the buffer."""

    by_layer: dict[int, Tensor]  # (B, d_in) float32 each, raw
    origins: TokenOrigins  # of the B tokens

    @property
    def activations(self) -> Tensor:
        """(B, d_in), where a single layer is read."""
        return only(self.by_layer)


class BatchSource(Protocol):
    """Where a training's batches come from: a buffer over a language model, or shards on disk."""

    def next_batch(self) -> ActivationBatch:
        """The next batch of this process."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on exactly here: tensors (some change later, see [`hold`]), and JSON-able rest."""

    def hold(self, reader: Future[None]) -> None:
        """Change nothing that [`state_dict`] gave until its reader is done."""

    def load_state_dict(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Go on exactly where the saved source stopped."""

    def totals(self) -> dict[str, int]:
        """What all processes have harvested; each of them has to call this."""

    def memory_bytes(self) -> int:
        """What the activations that are held take, once all of them are there."""

    def release(self) -> None:
        """Let go of them: the training is over."""


@dataclass
class StreamCounts:
    """What has gone through a buffer so far, on this process."""

    contexts: int = 0
    tokens_kept: int = 0
    dropped_special: int = 0
    dropped_sinks: int = 0
    dropped_non_finite: int = 0

    def add(self, contexts: int, harvest: Harvest) -> None:
        self.contexts += contexts
        self.tokens_kept += len(harvest)
        self.dropped_special += harvest.dropped_special
        self.dropped_sinks += harvest.dropped_sinks
        self.dropped_non_finite += harvest.dropped_non_finite


class ActivationBuffer:
    """Holds the activations of many contexts and hands them out token by token in random order.

    The buffer has room for `contexts` contexts of `context_length` tokens. It serves `refresh_every` batches of a
    random permutation of its rows, then replaces the rows that were used most by fresh ones. With `reuse` = 1 every
    activation is used exactly once; with `reuse` = r, r times on average, for r times fewer forward passes of the
    language model.

    Args:
        capture: reads the activations, of one or several layers. Its `max_norms` are set by [`fill`] from
            `max_norm_ratio`.
        stream: where the contexts come from; each process has its own.
        contexts, context_length: capacity of this process's buffer.
        batch_size: tokens of a batch on this process.
        refresh_every: batches between two refreshes.
        reuse: how often an activation is used on average.
        max_norm_ratio: tokens whose norm exceeds this multiple of the median are left out; None keeps all.
        seed: of the order in which rows are drawn.

    Raises:
        SelOrthoError: `refresh_every` batches do not fit in the buffer.
    """

    def __init__(
        self,
        capture: ActivationCapture,
        stream: ContextStream,
        *,
        contexts: int = 2048,
        context_length: int = 128,
        batch_size: int = 4096,
        refresh_every: int = 24,
        reuse: float = 1.0,
        max_norm_ratio: float | None = 4.0,
        seed: int = 0,
    ) -> None:
        self.capture, self.stream = capture, stream
        self.capacity = contexts * context_length
        self.batch_size, self.refresh_every, self.reuse = batch_size, refresh_every, reuse
        self.max_norm_ratio = max_norm_ratio
        self.context_length = context_length
        self.counts = StreamCounts()
        self._generator = torch.Generator().manual_seed(seed)
        self._served = 0  # batches since the last refresh
        self._reader: Future[None] | None = None  # of what is held
        self._check(contexts)

    def _check(self, contexts: int) -> None:
        served = self.batch_size * self.refresh_every
        if served > self.capacity:
            raise SelOrthoError(
                f"the buffer holds {contexts} x {self.context_length} = {self.capacity} tokens on each process, fewer "
                f"than the {self.refresh_every} batches of {self.batch_size} drawn between refreshes ({served}); raise "
                "--buffer_contexts or lower --refresh_every or --batch_size"
            )
        if self.reuse < 1:
            raise SelOrthoError(f"buffer_reuse={self.reuse}: expected at least 1 (every activation used once)")

    def fill(self, progress: bool = False) -> dict[int, ActivationStatistics]:
        """Fill the empty buffer and estimate mean, scale and sink threshold of each layer on it (on all processes).

        `progress` shows a bar.
        """
        capture = self.capture
        capture.max_norms = (None,) * len(capture.layers)
        with tqdm(total=self.capacity, desc="filling the buffer", unit="token", disable=not progress) as bar:
            self._allocate()
            norms = self._harvest_into(torch.arange(self.capacity), bar)
        medians = [ProcessGroup.of_run().mean(float(column.median()), capture.device) or 0.0 for column in norms.T]
        capture.max_norms = tuple(max_norm_from_ratio(median, self.max_norm_ratio) for median in medians)
        sinks = (~within_norms(norms, capture.max_norms)).nonzero()[:, 0]
        self.counts.tokens_kept -= len(sinks)
        self.counts.dropped_sinks += len(sinks)
        self._harvest_into(sinks)
        self._uses = torch.zeros(self.capacity, dtype=torch.int32)
        self._shuffle()
        statistics = {}
        for layer, median, max_norm in zip(capture.layers, medians, capture.max_norms, strict=True):
            mean, scale = _mean_and_scale(self._activations[layer])
            statistics[layer] = ActivationStatistics(mean, scale, median, max_norm)
        return statistics

    def next_batch(self) -> ActivationBatch:
        """The next batch; refreshes the buffer first when its turn has come."""
        if self._served == self.refresh_every:
            self._refresh()
        rows = self._order[self._served * self.batch_size : (self._served + 1) * self.batch_size]
        self._served += 1
        self._uses[rows] += 1
        by_layer = {layer: held[rows.to(held.device)].float() for layer, held in self._activations.items()}
        return ActivationBatch(by_layer, self._origins[rows])

    def totals(self) -> dict[str, int]:
        """What all processes have harvested; each of them has to call this."""
        stream = self.stream.counts
        counts = {
            **asdict(self.counts),
            "documents": stream["documents"],
            "dropped_tails": stream["dropped_tails"],
            "processes": 1,
        }
        sums = ProcessGroup.of_run().sum(torch.tensor(list(counts.values()), device=self.capture.device))
        return {**dict(zip(counts, sums.tolist(), strict=True)), "epoch": self.stream.epoch}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on exactly here: tensors, which change at the next refresh, and JSON-able rest."""
        tensors = {
            **{f"activations.{layer}": held.cpu() for layer, held in self._activations.items()},
            **{name: getattr(self._origins, name) for name in ORIGIN_NAMES},
            "uses": self._uses.clone(),
            "order": self._order,
            "generator": self._generator.get_state(),
        }
        rest = {
            "served": self._served,
            "max_norms": list(self.capture.max_norms),
            "counts": asdict(self.counts),
            "stream": self.stream.state_dict(),
        }
        return tensors, rest

    def hold(self, reader: Future[None]) -> None:
        """Let the next refresh wait until the reader of what [`state_dict`] gave is done."""
        self._reader = reader

    def load_state_dict(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Go on exactly where the saved buffer stopped.

        Raises:
            KeyError, ValueError: something is missing or of another size.
        """
        for name in ("uses", "order", *ORIGIN_NAMES):
            if tensors[name].shape != (self.capacity,):
                raise ValueError(f"{name} of shape {tuple(tensors[name].shape)}, expected {(self.capacity,)}")
        for layer in self.capture.layers:
            if (found := tuple(tensors[f"activations.{layer}"].shape)) != (self.capacity, self.capture.lm.d_model):
                raise ValueError(f"activations of layer {layer} of shape {found}, expected {self.capacity} rows")
        device = self.capture.device
        self._activations = {layer: tensors[f"activations.{layer}"].to(device) for layer in self.capture.layers}
        self._origins = TokenOrigins(*(tensors[name] for name in ORIGIN_NAMES))
        self._uses, self._order = tensors["uses"], tensors["order"]
        self._generator.set_state(tensors["generator"])
        self._served = rest["served"]
        self.capture.max_norms = tuple(rest["max_norms"])
        self.counts = StreamCounts(**rest["counts"])
        self.stream.load_state_dict(rest["stream"])

    def memory_bytes(self) -> int:
        """What the activations that are held take, once all of them are there."""
        capture = self.capture
        row = len(capture.layers) * capture.lm.d_model * capture.lm.model.dtype.itemsize
        return self.capacity * (row + 8 * len(ORIGIN_NAMES) + 12)  # 12: uses and order

    def release(self) -> None:
        """Let go of the activations: the training is over."""
        self._activations = {}
        self._origins = TokenOrigins.empty(0)

    def _shuffle(self) -> None:
        self._order = torch.randperm(len(self._uses), generator=self._generator)
        self._served = 0

    def _refresh(self) -> None:
        if self._reader is not None:
            self._reader.exception()  # waits
            self._reader = None
        served = self._order[: self._served * self.batch_size]
        wanted = math.ceil(len(served) / self.reuse)
        # the most used rows leave; among equals the order of the permutation decides, which is random
        leaving = served[self._uses[served].argsort(descending=True, stable=True)[:wanted]]
        self._harvest_into(leaving)
        self._uses[leaving] = 0
        self._shuffle()

    def _allocate(self) -> None:
        capture = self.capture
        shape, dtype = (self.capacity, capture.lm.d_model), capture.lm.model.dtype
        self._activations = {layer: torch.empty(shape, dtype=dtype, device=capture.device) for layer in capture.layers}
        self._origins = TokenOrigins.empty(self.capacity)

    def _harvest_into(self, rows: Tensor, progress: tqdm | None = None) -> Tensor:
        """Put fresh activations into these rows of the buffer; returns their norms (rows, layers).

        A few more are harvested than there are rows; these are thrown away.
        """
        norms = torch.empty(len(rows), len(self.capture.layers))
        done = 0
        while done < len(rows):
            contexts = self.stream.take_tokens(len(rows) - done, beside_bos=True)
            for number, part in enumerate(self.capture.harvest_batches(contexts)):
                self.counts.add(len(contexts) if number == 0 else 0, part)
                end = min(done + len(part), len(rows))
                self._put(rows[done:end], part)
                norms[done:end] = part.norms[: end - done]
                done = end
                if progress is not None:
                    progress.update(len(part))
        return norms

    def _put(self, rows: Tensor, part: Harvest) -> None:
        for layer, activations in part.by_layer.items():
            self._activations[layer][rows.to(activations.device)] = activations[: len(rows)]
        for name in ORIGIN_NAMES:
            getattr(self._origins, name)[rows] = getattr(part.origins, name)[: len(rows)]


def _mean_and_scale(activations: Tensor) -> tuple[Tensor, float]:
    """Mean (d_in,) and root mean squared norm about it of the rows of all processes, summed in float64."""
    group = ProcessGroup.of_run()
    rows = group.sum(torch.tensor(float(len(activations)), dtype=torch.float64, device=activations.device))
    total = torch.stack([chunk.double().sum(0) for chunk in activations.split(CHUNK)]).sum(0)
    mean = group.sum(total) / rows
    squares = torch.stack([(chunk.double() - mean).square().sum() for chunk in activations.split(CHUNK)]).sum()
    return mean.float(), math.sqrt(float(group.sum(squares) / rows))
