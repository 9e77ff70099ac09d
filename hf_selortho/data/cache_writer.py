"""Caches the activations of a language model over texts: tokenising, computing and writing shards side by side."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture, CapturedActivations, TokenOrigins, within_norms
from ..language_models.contexts import Context
from ..language_models.sites import HookSite
from ..process_group import SINGLE_PROCESS, ProcessGroup
from ..utils.memory import available_memory, check_fits, gigabytes, peak_memory
from .cache_folder import CacheFolder
from .cache_manifest import (
    HELD_OUT,
    NORM_BINS,
    STORED_DTYPES,
    TRAIN,
    CacheSettings,
    Counts,
    LayerSummary,
    Manifest,
    ShardEntry,
    from_json,
    shard_path,
)
from .contexts import ContextStream, count_tokens, take_tokens
from .probe import probe_capture

PROBE_SECONDS = 10.0  # of a dry run
_OF_STREAM = ("documents", "dropped_tails")


class ShardPlan(NamedTuple):
    """The contexts of a shard."""

    part: str
    number: int
    contexts: list[Context]
    stream: dict[str, Any] | None  # state of the text stream behind them


class CacheWriter:
    """Cache the activations of one process's share of the text.

    A shard holds the activations of a fixed run of contexts, so that its content depends on nothing but the text, the
    language model and the settings. A token is a sink if its norm exceeds a multiple of the median norm over the first
    shard of every process; that limit is on the disk before any shard is.

    Args:
        capture: the layers to read.
        stream: this process's training contexts, not endless.
        held_out: this process's part of the held-out contexts.
        folder: where the shards go; [`CacheFolder.begin`] has been called.
        settings: of the cache.
        group: the processes that share the work.
    """

    def __init__(
        self,
        capture: ActivationCapture,
        stream: ContextStream,
        held_out: Sequence[Context],
        folder: CacheFolder,
        settings: CacheSettings,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.capture, self.stream, self.held_out = capture, stream, held_out
        self.folder, self.settings, self.group = folder, settings, group
        self.tokens = 0  # read so far, BOS included, those of earlier runs not
        self._norms: list[tuple[float, float | None]] = folder.read_record("norms").get("norms", [])  # (median, limit)

    def run(self, progress: tqdm) -> None:
        """Cache what is not on the disk yet, and wait for the other processes."""
        self.capture.max_norms = (None,) * len(self.capture.layers)  # sinks are told apart afterwards
        plans = self._plans(progress)
        writing: Future[None] | None = None
        with ThreadPoolExecutor(2) as pool:  # the next shard is tokenised, and the last one written, meanwhile
            coming = pool.submit(next, plans, None)
            while (plan := coming.result()) is not None:
                coming = pool.submit(next, plans, None)
                computed = self._compute(plan.contexts, progress)
                if not self._norms:
                    self._calibrate(computed.norms if plan.part == TRAIN else None)
                if writing is not None:
                    writing.result()  # one at a time: what waits is held in memory
                writing = pool.submit(self._write, plan, computed)
            if writing is not None:
                writing.result()
        if not self._norms:  # no context came to this process; the others wait for its word
            self._calibrate(None)
        self.folder.write_record(f"end-{self.group.rank}", {name: self.stream.counts[name] for name in _OF_STREAM})
        self._wait()

    def manifest(self, versions: dict[str, str]) -> Manifest:
        """Put together what all processes have cached, once they are done.

        Raises:
            SelOrthoError: there is no activation, as no text was long enough.
        """
        counts, sums = Counter[str](), dict[str, dict[str, Any]]()
        shards: dict[str, list[ShardEntry]] = {TRAIN: [], HELD_OUT: []}
        for part, entries in shards.items():
            for record in self.folder.shard_records(part):
                entries.append(from_json(ShardEntry, record))
                if part == TRAIN:
                    counts.update(record["counts"])
                    for layer, added in record["layers"].items():
                        sums[layer] = _add_sums(sums[layer], added) if layer in sums else added
        for rank in range(self.group.size):
            counts.update(self.folder.read_record(f"end-{rank}"))
        if not counts["rows"]:
            raise SelOrthoError("the text gives no activation to train on: use other texts or a lower --min_tokens")
        sites, rows = self.capture.sites, counts["rows"]
        summaries = {
            str(layer): _summary(sums[str(layer)], rows, sites[layer], *norms)
            for layer, norms in zip(self.capture.layers, self._norms, strict=True)
        }
        targets = {
            str(layer): _summary(sums[f"target_{layer}"], rows, site)
            for layer, site in self.capture.target_sites.items()
        }
        return Manifest(
            **vars(self.settings),
            counts=Counts(**counts),
            versions=versions,
            statistics=summaries,
            target_statistics=targets,
            shards=tuple(shards[TRAIN]),
            held_out=tuple(shards[HELD_OUT]),
        )

    def _plans(self, progress: tqdm) -> Iterator[ShardPlan]:
        """Yield the contexts of each shard that is not there yet."""
        settings, rank, processes = self.settings, self.group.rank, self.group.size
        number, stream, left = rank, None, math.inf
        if settings.max_tokens is not None:
            left = -(-settings.max_tokens // processes)
        while record := self.folder.read_record(f"{TRAIN}{number:05d}"):  # of an interrupted run
            number, stream, tokens = number + processes, record["stream"], record["counts"]["tokens"]
            left -= tokens
            progress.update(tokens)
        if stream is not None:
            self.stream.load_state_dict(stream)
        while contexts := self.stream.take_tokens(int(min(settings.shard_tokens, left))):
            yield ShardPlan(TRAIN, number, contexts, self.stream.state_dict())
            number, left = number + processes, left - count_tokens(contexts)
        held_out, number = iter(self.held_out), rank
        while contexts := take_tokens(held_out, settings.shard_tokens):
            if self.folder.read_record(f"{HELD_OUT}{number:05d}"):
                progress.update(count_tokens(contexts))
            else:
                yield ShardPlan(HELD_OUT, number, contexts, None)
            number += processes

    def _compute(self, contexts: list[Context], progress: tqdm) -> CapturedActivations:
        """Read the activations of contexts, sinks included, into tensors of the stored dtype."""
        capture, dtype = self.capture, STORED_DTYPES[self.settings.stored_dtype]
        tokens = count_tokens(contexts)
        by_layer, targets = (
            {layer: torch.empty(tokens, width, dtype=dtype) for layer, width in widths.items()}
            for widths in (capture.widths, capture.target_widths)
        )
        norms, origins = [], []
        rows = 0
        for batch in capture.capture_batches(contexts):
            for kind, fresh in ((by_layer, batch.by_layer), (targets, batch.targets)):
                for layer, activations in fresh.items():
                    kind[layer][rows : rows + len(batch)] = activations
            rows += len(batch)
            norms.append(batch.norms)
            origins.append(batch.origins.table)
            progress.update(len(batch) + batch.dropped_special)
        self.tokens += tokens
        by_layer, targets = ({layer: held[:rows] for layer, held in kind.items()} for kind in (by_layer, targets))
        origin = TokenOrigins(torch.cat(origins))
        return CapturedActivations(by_layer, torch.cat(norms), origin, tokens - rows, targets=targets)

    def _calibrate(self, norms: Tensor | None) -> None:
        """Agree with the other processes on what a sink is."""
        columns = [torch.empty(0)] * len(self.capture.layers) if norms is None else norms.T
        ratio = self.settings.max_norm_ratio
        for column in columns:
            median = self.group.mean(float(column.median()) if len(column) else None, self.capture.device) or 0.0
            self._norms.append((median, ratio * median or None if ratio else None))
        if self.group.rank == 0:
            self.folder.write_record("norms", {"norms": self._norms})
        self._wait()

    def _write(self, plan: ShardPlan, computed: CapturedActivations) -> None:
        """Leave out sinks, and write the files of a shard and its record."""
        limits = [limit for _, limit in self._norms]
        kept = within_norms(computed.norms, limits)
        origins = computed.origins[kept]
        files, layers = {}, {}

        def write(folder: str, tensors: dict[str, Tensor]) -> None:
            path, data = shard_path(plan.part, folder, plan.number), save(tensors)
            self.folder.write(path, data)
            files[path] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

        write("tokens", _token_tensors(origins, plan.contexts if plan.part == HELD_OUT else None))
        for layer, norms, limit in zip(self.capture.layers, computed.norms.T, limits, strict=True):
            activations = computed.by_layer.pop(layer)  # one layer after the other: half the memory
            activations = activations if kept.all() else activations[kept]
            sinks = computed.origins.positions[norms > (limit or math.inf)]
            length = self.settings.context_length
            layers[str(layer)] = _sums(activations, norms, kept, sinks.bincount(minlength=length))
            write(f"layer_{layer}", {"activations": activations})
        for layer in self.capture.target_sites:
            activations = computed.targets.pop(layer)
            activations = activations if kept.all() else activations[kept]
            norms = activations.float().norm(dim=1)
            layers[f"target_{layer}"] = _sums(activations, norms, kept.new_ones(len(norms)), torch.zeros(0))
            write(f"target_{layer}", {"activations": activations})
        counts = {
            "rows": len(origins),
            "tokens": count_tokens(plan.contexts),
            "contexts": len(plan.contexts),
            "dropped_special": computed.dropped_special,
            "dropped_sinks": int((~kept).sum()),
        }
        entry = {"number": plan.number, "rows": len(origins), "files": files}
        record = {**entry, "counts": counts, "layers": layers, "stream": plan.stream}
        self.folder.write_record(f"{plan.part}{plan.number:05d}", record)

    def _wait(self) -> None:
        """Wait for the other processes."""
        self.group.sum(torch.zeros(1, device=self.capture.device))


def disk_bytes(capture: ActivationCapture, settings: CacheSettings, tokens: float) -> float:
    """Estimate the bytes of the activations of so many tokens, with their origins."""
    row = capture.row_width * STORED_DTYPES[settings.stored_dtype].itemsize + 20
    return row * tokens


def shard_memory(capture: ActivationCapture, settings: CacheSettings, tokens: float) -> float:
    """Return the bytes of memory that the shards of a process take, of its `tokens`.

    Raises:
        SelOrthoError: there is too little.
    """
    # one shard is computed while the one before it is written, of which one layer is being turned into bytes
    held = min(settings.shard_tokens, tokens)
    shards = (2 + 1 / len(capture.layers)) * disk_bytes(capture, settings, held)
    remedy = "lower --shard_tokens or read fewer --layers"
    check_fits("memory", {"shards of a process": shards}, available_memory(torch.device("cpu")), remedy)
    return shards


def forecast(capture: ActivationCapture, stream: ContextStream, settings: CacheSettings, tokens: float) -> str:
    """Read some text, and say what caching all `tokens` needs and takes.

    Args:
        capture, settings: of the cache in full. stream: contexts, endless.
    """
    most = min(settings.shard_tokens, 2 * capture.batch_tokens)  # what is read stays in memory
    speed = settings.processes / probe_capture(capture, stream, PROBE_SECONDS, most=most)[1]
    shards, peak = shard_memory(capture, settings, tokens / settings.processes), peak_memory(capture.device)
    return (
        f"{tokens:,.0f} tokens at {speed:,.0f} tokens/s: {timedelta(seconds=round(tokens / speed))}\n"
        f"peak memory of a process {gigabytes(peak)} and {gigabytes(shards)} of shards; "
        f"disk {gigabytes(disk_bytes(capture, settings, tokens))}\n"
    )


def _token_tensors(origins: TokenOrigins, contexts: list[Context] | None) -> dict[str, Tensor]:
    """Return what the file of a shard's tokens holds."""
    tensors = {
        "token_ids": origins.token_ids.int(),
        "positions": origins.positions.int(),
        "document_ids": origins.document_ids.contiguous(),
        "context_ids": origins.context_ids.int(),
    }
    if contexts is not None:
        ids = [token for context in contexts for token in context.input_ids]
        tensors |= {
            "context_token_ids": torch.tensor(ids, dtype=torch.int32),
            "context_lengths": torch.tensor([len(c.input_ids) for c in contexts], dtype=torch.int32),
            "context_document_ids": torch.tensor([c.document_id for c in contexts], dtype=torch.int64),
        }
        if any(context.trained for context in contexts):
            tensors["context_trained"] = torch.tensor([t for c in contexts for t in c.trained or ()])
    return tensors


def _sums(activations: Tensor, norms: Tensor, kept: Tensor, sinks: Tensor) -> dict[str, Any]:
    """Sum over a layer of a shard: activations (rows, d_in) of the tokens kept, norms (tokens,) of all of them."""
    powers = norms.log2().clamp(NORM_BINS[0], NORM_BINS[-1])
    return {
        "total": activations.sum(0, dtype=torch.float32).tolist(),
        "squares": float(norms[kept].double().square().sum()),
        "histogram": powers.histc(len(NORM_BINS) - 1, NORM_BINS[0], NORM_BINS[-1]).int().tolist(),
        "largest": float(norms.max()) if len(norms) else 0.0,
        "sinks": sinks.tolist(),
    }


def _add_sums(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {name: (np.maximum if name == "largest" else np.add)(one[name], other[name]) for name in one}


def _summary(
    sums: Mapping[str, Any], rows: int, site: HookSite, median_norm: float | None = None, max_norm: float | None = None
) -> LayerSummary:
    mean = np.asarray(sums["total"]) / rows
    summary = LayerSummary(
        hook_name=site.module,
        hook_side=site.side,
        mean=tuple(mean.astype(np.float32).tolist()),
        scale=math.sqrt(max(0.0, float(sums["squares"]) / rows - float(mean @ mean))),
        median_norm=median_norm or 0.0,
        max_norm=max_norm,
        largest_norm=float(sums["largest"]),
        norm_histogram=tuple(np.asarray(sums["histogram"]).tolist()),
        sinks_by_position=tuple(np.asarray(sums["sinks"]).tolist()),
    )
    return summary if median_norm is not None else replace(summary, median_norm=summary.norm_quantile(0.5))
