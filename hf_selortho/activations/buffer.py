"""Shuffled batches of activations out of a stream of contexts: the paper's activation buffer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import SelOrthoError
from .capture import ActivationCapture, Harvest, concatenate, max_norm_from_ratio
from .tokens import Context, ContextStream

CHUNK = 16384  # rows that are held in float64 at once


@dataclass(frozen=True)
class ActivationStatistics:
    """Estimated once, on the first fill of the buffer, over all processes."""

    mean: Tensor  # (d_in,) float32
    scale: float  # root mean squared norm of the centred activations
    median_norm: float  # median L2 norm of the activations, sinks included
    max_norm: float | None  # activations of a larger norm are left out


@dataclass(frozen=True)
class ActivationBatch:
    """Tokens drawn at random from the buffer."""

    activations: Tensor  # (B, d_in) float32, raw
    document_ids: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64


@dataclass
class StreamCounts:
    """What has gone through a buffer so far, on this process."""

    contexts: int = 0
    tokens_kept: int = 0
    dropped_special: int = 0
    dropped_sinks: int = 0

    def add(self, contexts: int, harvest: Harvest) -> None:
        self.contexts += contexts
        self.tokens_kept += len(harvest)
        self.dropped_special += harvest.dropped_special
        self.dropped_sinks += harvest.dropped_sinks


class ActivationBuffer:
    """Holds the activations of many contexts and hands them out token by token in random order.

    The buffer has room for `contexts` contexts of `context_length` tokens. It serves `refresh_every` batches of a
    random permutation of its rows, then replaces the rows that were used most by fresh ones. With `reuse` = 1 every
    activation is used exactly once; with `reuse` = r, r times on average, for r times fewer forward passes of the
    language model.

    Args:
        capture: reads the activations. Its `max_norm` is set by [`fill`] from `max_norm_ratio`.
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

    def fill(self, progress: bool = False) -> ActivationStatistics:
        """Fill the empty buffer and estimate mean, scale and sink threshold on what it holds (on all processes).

        `progress` shows a bar.
        """
        self.capture.max_norm = None
        with tqdm(total=self.capacity, desc="filling the buffer", unit="token", disable=not progress) as bar:
            harvest = self._harvest_rows(self.capacity, bar)
        norms = torch.cat([chunk.float().norm(dim=1) for chunk in harvest.activations.split(CHUNK)])
        median = _mean_over_processes(norms.median())
        self.capture.max_norm = max_norm = max_norm_from_ratio(median, self.max_norm_ratio)
        if max_norm is not None:
            harvest = self._without_sinks(harvest, norms <= max_norm)
        self._activations = harvest.activations  # (rows, d_in)
        self._document_ids, self._positions = harvest.document_ids, harvest.positions
        self._uses = torch.zeros(len(harvest), dtype=torch.int32)
        self._shuffle()
        mean, scale = _mean_and_scale(self._activations)
        return ActivationStatistics(mean, scale, float(median), max_norm)

    def next_batch(self) -> ActivationBatch:
        """The next batch; refreshes the buffer first when its turn has come."""
        if self._served == self.refresh_every:
            self._refresh()
        rows = self._order[self._served * self.batch_size : (self._served + 1) * self.batch_size]
        self._served += 1
        self._uses[rows] += 1
        activations = self._activations[rows.to(self._activations.device)].float()
        return ActivationBatch(activations, self._document_ids[rows], self._positions[rows])

    def totals(self) -> dict[str, int]:
        """What all processes have harvested; each of them has to call this."""
        stream = self.stream.counts
        counts = {
            **asdict(self.counts),
            "documents": stream["documents"],
            "dropped_tails": stream["dropped_tails"],
            "processes": 1,
        }
        sums = _sum_over_processes(torch.tensor(list(counts.values()), device=self.capture.device))
        return {**dict(zip(counts, sums.tolist(), strict=True)), "epoch": self.stream.epoch}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that decides the batches to come: tensors, and a JSON-able rest."""
        tensors = {
            "activations": self._activations.cpu(),
            "document_ids": self._document_ids,
            "positions": self._positions,
            "uses": self._uses,
            "order": self._order,
            "generator": self._generator.get_state(),
        }
        rest = {
            "served": self._served,
            "max_norm": self.capture.max_norm,
            "counts": asdict(self.counts),
            "stream": self.stream.state_dict(),
        }
        return tensors, rest

    def load_state_dict(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Go on exactly where the saved buffer stopped."""
        self._activations = tensors["activations"].to(self.capture.device)
        self._document_ids, self._positions = tensors["document_ids"], tensors["positions"]
        self._uses, self._order = tensors["uses"], tensors["order"]
        self._generator.set_state(tensors["generator"])
        self._served = rest["served"]
        self.capture.max_norm = rest["max_norm"]
        self.counts = StreamCounts(**rest["counts"])
        self.stream.load_state_dict(rest["stream"])

    def _shuffle(self) -> None:
        self._order = torch.randperm(len(self._uses), generator=self._generator)
        self._served = 0

    def _refresh(self) -> None:
        served = self._order[: self._served * self.batch_size]
        wanted = math.ceil(len(served) / self.reuse)
        # the most used rows leave; among equals the order of the permutation decides, which is random
        leaving = served[self._uses[served].argsort(descending=True, stable=True)[:wanted]]
        harvest = self._harvest_rows(wanted)
        self._activations[leaving.to(self._activations.device)] = harvest.activations[:wanted]
        self._document_ids[leaving] = harvest.document_ids[:wanted]
        self._positions[leaving] = harvest.positions[:wanted]
        self._uses[leaving] = 0
        self._shuffle()

    def _without_sinks(self, harvest: Harvest, kept: Tensor) -> Harvest:
        """The kept rows, and as many fresh ones as were dropped."""
        dropped = int((~kept).sum())
        if dropped == 0:
            return harvest
        self.counts.tokens_kept -= dropped
        self.counts.dropped_sinks += dropped
        rows = kept.cpu()
        regular = Harvest(
            harvest.activations[kept],
            harvest.document_ids[rows],
            harvest.positions[rows],
            harvest.dropped_special,
            harvest.dropped_sinks + dropped,
        )
        return concatenate([regular, self._harvest_rows(dropped)])

    def _contexts_for(self, rows: int) -> list[Context]:
        """Contexts of at least `rows` tokens beside BOS."""
        contexts: list[Context] = []
        while rows > 0:
            contexts += self.stream.take(1)
            rows -= len(contexts[-1].input_ids) - 1
        return contexts

    def _harvest_rows(self, rows: int, progress: tqdm | None = None) -> Harvest:
        """At least `rows` activations, from as many contexts as that takes."""
        parts: list[Harvest] = []
        missing = rows
        while missing > 0:
            contexts = self._contexts_for(missing)
            part = self.capture.harvest(contexts, progress)
            self.counts.add(len(contexts), part)
            parts.append(part)
            missing -= len(part)
        return concatenate(parts)


def _sum_over_processes(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _mean_over_processes(value: Tensor) -> Tensor:
    total = _sum_over_processes(torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)]))
    return total[0] / total[1]


def _mean_and_scale(activations: Tensor) -> tuple[Tensor, float]:
    """Mean (d_in,) and root mean squared norm about it of the rows of all processes, summed in float64."""
    rows = _sum_over_processes(torch.tensor(float(len(activations)), dtype=torch.float64, device=activations.device))
    total = torch.stack([chunk.double().sum(0) for chunk in activations.split(CHUNK)]).sum(0)
    mean = _sum_over_processes(total) / rows
    squares = torch.stack([(chunk.double() - mean).square().sum() for chunk in activations.split(CHUNK)]).sum()
    return mean.float(), math.sqrt(float(_sum_over_processes(squares) / rows))
