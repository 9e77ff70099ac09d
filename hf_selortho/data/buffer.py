"""Shuffled batches of activations out of a stream of contexts: the paper's activation buffer."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SelOrthoError
from ..language_models.capture import ORIGIN_NAMES, ActivationCapture, TokenOrigins, within_norms
from ..process_group import ProcessGroup
from ..utils.progress import Bar
from .contexts import ContextStream

_CHUNK = 16384  # rows that are held in float64 at once
_DROPPED = ("dropped_special", "dropped_sinks", "dropped_non_finite")


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of one layer over all processes, estimated once: on the first fill of the buffer, or on shards."""

    mean: Tensor  # (d_in,) float32
    scale: float  # root mean squared norm of the centred activations
    median_norm: float  # median L2 norm of the activations, sinks included
    max_norm: float | None  # activations of a larger norm are left out
    target_mean: Tensor | None = None  # (d_out,) of the target, where there is one
    target_scale: float = 1.0


@dataclass(frozen=True)
class ActivationBatch:
    """Tokens drawn at random from the buffer."""

    by_layer: dict[int, Tensor]  # (B, d_in) float32 each, raw
    origins: TokenOrigins  # of the B tokens
    targets: dict[int, Tensor] = field(default_factory=dict)  # (B, d_out) float32 each, where there are targets


class BatchSource(Protocol):
    """Where a training's batches come from: a buffer over a language model, or shards on disk."""

    def statistics(self, progress: bool = False) -> dict[int, ActivationStatistics]:
        """Return mean, scale and sink threshold of each layer, before the first batch; all processes have to ask."""

    def next_batch(self) -> ActivationBatch:
        """Draw the next batch of this process."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what is needed to go on exactly here: tensors (some change later, see [`hold`]) and JSON-able rest."""

    def hold(self, reader: Future[None]) -> None:
        """Change nothing that [`state_dict`] gave until its reader is done."""

    def load_state_dict(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Go on exactly where the saved source stopped; raises KeyError if something is missing."""

    def totals(self) -> dict[str, int]:
        """Count what all processes have read so far; each of them has to call this."""

    def memory_bytes(self) -> int:
        """Compute what the activations that are held take, once all of them are there."""

    def release(self) -> None:
        """Free the activations: the training is over."""


class ActivationBuffer:
    """Holds the activations of many contexts and hands them out token by token in random order.

    The buffer has room for `contexts` contexts of `context_length` tokens. It serves `refresh_every` batches of a
    random permutation of its rows, then replaces the rows that were used most by fresh ones. With `reuse` = 1 every
    activation is used exactly once; with `reuse` = r, r times on average, for r times fewer forward passes of the
    language model. Each method that has no description does what [`BatchSource`] says.

    Args:
        capture: reads the activations, of one or several layers. Its `max_norms` are set by [`statistics`] from
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
        self.counts = dict.fromkeys(("contexts", "tokens_kept", *_DROPPED), 0)  # on this process, so far
        self._generator = torch.Generator().manual_seed(seed)
        self._served = 0  # batches since the last refresh
        self._reader: Future[None] | None = None  # of what state_dict gave
        if batch_size * refresh_every > self.capacity:
            raise SelOrthoError(
                f"the buffer holds {contexts} x {context_length} = {self.capacity} tokens on each process, fewer than "
                f"the {refresh_every} batches of {batch_size} drawn between refreshes ({batch_size * refresh_every}); "
                "raise --buffer_contexts or lower --refresh_every or --batch_size"
            )
        if reuse < 1:
            raise SelOrthoError(f"buffer_reuse={reuse}: expected at least 1 (every activation used once)")

    def statistics(self, progress: bool = False) -> dict[int, ActivationStatistics]:
        """Fill the empty buffer, with a bar if `progress`, and estimate the statistics on what it holds."""
        capture, device, ratio = self.capture, self.capture.device, self.max_norm_ratio
        capture.max_norms = (None,) * len(capture.layers)
        self._activations, self._targets = (
            {
                layer: torch.empty(self.capacity, width, dtype=capture.lm.model.dtype, device=device)
                for layer, width in widths.items()
            }
            for widths in (capture.widths, capture.target_widths)
        )
        self._origins = torch.empty(self.capacity, len(ORIGIN_NAMES), dtype=torch.int64)
        with Bar("filling the buffer", total=self.capacity, unit="token", disable=not progress) as bar:
            norms = self._replace(torch.arange(self.capacity), bar)
        medians = [ProcessGroup.of_run().mean(float(column.median()), device) or 0.0 for column in norms.T]
        capture.max_norms = tuple(None if ratio is None else ratio * median for median in medians)
        sinks = (~within_norms(norms, capture.max_norms)).nonzero()[:, 0]
        self.counts["tokens_kept"] -= len(sinks)
        self.counts["dropped_sinks"] += len(sinks)
        self._replace(sinks)
        self._uses = torch.zeros(self.capacity, dtype=torch.int32)
        self._shuffle()
        of_targets = {layer: _mean_and_scale(held) for layer, held in self._targets.items()}
        return {
            layer: ActivationStatistics(
                *_mean_and_scale(self._activations[layer]), median, max_norm, *of_targets.get(layer, ())
            )
            for layer, median, max_norm in zip(capture.layers, medians, capture.max_norms, strict=True)
        }

    def next_batch(self) -> ActivationBatch:
        if self._served == self.refresh_every:
            self._refresh()
        rows = self._order[self._served * self.batch_size : (self._served + 1) * self.batch_size]
        self._served += 1
        self._uses[rows] += 1
        by_layer, targets = (
            {layer: held[rows.to(held.device)].float() for layer, held in kind.items()}
            for kind in (self._activations, self._targets)
        )
        return ActivationBatch(by_layer, TokenOrigins(self._origins[rows]), targets)

    def totals(self) -> dict[str, int]:
        stream = {name: self.stream.counts[name] for name in ("documents", "dropped_tails")}
        counts = {**self.counts, **stream, "processes": 1}
        sums = ProcessGroup.of_run().sum(torch.tensor(list(counts.values()), device=self.capture.device))
        return {**dict(zip(counts, sums.tolist(), strict=True)), "epoch": self.stream.epoch}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            **{f"activations.{layer}": held.cpu() for layer, held in self._activations.items()},
            **{f"targets.{layer}": held.cpu() for layer, held in self._targets.items()},
            "origins": self._origins,
            "uses": self._uses.clone(),
            "order": self._order,
            "generator": self._generator.get_state(),
        }
        rest = {
            "served": self._served,
            "max_norms": list(self.capture.max_norms),
            "counts": dict(self.counts),
            "stream": self.stream.state_dict(),
        }
        return tensors, rest

    def hold(self, reader: Future[None]) -> None:
        self._reader = reader  # the next refresh waits for it

    def load_state_dict(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        capture, device = self.capture, self.capture.device
        self._activations = {layer: tensors[f"activations.{layer}"].to(device) for layer in capture.layers}
        self._targets = {layer: tensors[f"targets.{layer}"].to(device) for layer in capture.target_sites}
        self._origins, self._uses, self._order = tensors["origins"], tensors["uses"], tensors["order"]
        self._generator.set_state(tensors["generator"])
        self._served = rest["served"]
        self.capture.max_norms = tuple(rest["max_norms"])
        self.counts = dict(rest["counts"])
        self.stream.load_state_dict(rest["stream"])

    def memory_bytes(self) -> int:
        capture = self.capture
        row = capture.row_width * capture.lm.model.dtype.itemsize
        return self.capacity * (row + 8 * len(ORIGIN_NAMES) + 12)  # 12: uses and order

    def release(self) -> None:
        self._activations, self._targets, self._origins = {}, {}, torch.empty(0)

    def _shuffle(self) -> None:
        self._order = torch.randperm(self.capacity, generator=self._generator)
        self._served = 0

    def _refresh(self) -> None:
        if self._reader is not None:
            self._reader.exception()  # waits
            self._reader = None
        served = self._order[: self._served * self.batch_size]
        wanted = math.ceil(len(served) / self.reuse)
        # the most used rows leave; among equals the order of the permutation decides, which is random
        leaving = served[self._uses[served].argsort(descending=True, stable=True)[:wanted]]
        self._replace(leaving)
        self._uses[leaving] = 0
        self._shuffle()

    def _replace(self, rows: Tensor, progress: Bar | None = None) -> Tensor:
        """Put fresh activations into these rows of the buffer; returns their norms (rows, layers).

        A few more are read than there are rows; these are thrown away.
        """
        norms = torch.empty(len(rows), len(self.capture.layers))
        done = 0
        while done < len(rows):
            contexts = self.stream.take_tokens(len(rows) - done, beside_bos=True)
            self.counts["contexts"] += len(contexts)
            for part in self.capture.capture_batches(contexts):
                self.counts["tokens_kept"] += len(part)
                for name in _DROPPED:
                    self.counts[name] += getattr(part, name)
                places = rows[done : done + len(part)]
                for kind, fresh in ((self._activations, part.by_layer), (self._targets, part.targets)):
                    for layer, held in kind.items():
                        held[places.to(held.device)] = fresh[layer][: len(places)]
                self._origins[places] = part.origins.table[: len(places)]
                norms[done : done + len(places)] = part.norms[: len(places)]
                done += len(places)
                if progress is not None:
                    progress.update(len(places))
        return norms


def _mean_and_scale(activations: Tensor) -> tuple[Tensor, float]:
    """Compute mean (d_in,) and root mean squared norm about it of the rows of all processes, summed in float64."""
    group = ProcessGroup.of_run()
    rows = group.sum(torch.tensor(float(len(activations)), dtype=torch.float64, device=activations.device))
    total = torch.stack([chunk.double().sum(0) for chunk in activations.split(_CHUNK)]).sum(0)
    mean = group.sum(total) / rows
    squares = torch.stack([(chunk.double() - mean).square().sum() for chunk in activations.split(_CHUNK)]).sum()
    return mean.float(), math.sqrt(float(group.sum(squares) / rows))
