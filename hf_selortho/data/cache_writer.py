"""Caches the activations of a language model over texts: tokenising, computing and writing shards side by side."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import SelOrthoError
from ..language_models.capture import (
    ActivationCapture,
    CapturedActivations,
    TokenOrigins,
    within_norms,
)
from ..process_group import SINGLE_PROCESS, ProcessGroup
from ..utils.files import reason
from ..utils.memory import available_memory, existing_folder, free_disk, memory_now, peak_memory, start_peak
from .cache_folder import CacheFolder, Progress
from .cache_manifest import HELD_OUT, STORED_DTYPES, TRAIN, CacheSettings, Counts, Manifest, from_json
from .cache_statistics import CacheStatistics
from .contexts import Context, ContextStream, count_tokens

PROBE_SECONDS = 10.0  # of a dry run
_WARM_UP = 2048  # tokens before it
_OF_STREAM = ("documents", "dropped_tails", "dropped_tail_tokens")


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
        self._norms = folder.read_norms()
        self._progress = self._read_progress(group.rank)

    def run(self, progress: tqdm | None = None) -> None:
        """Cache what is not on the disk yet, and wait for the other processes."""
        self.capture.max_norms = (None,) * len(self.capture.layers)  # sinks are told apart afterwards
        if progress is not None:
            progress.update(sum(counts.get("tokens", 0) for counts in self._progress.counts.values()))
        groups, writing = self._groups(), None
        with ThreadPoolExecutor(2) as pool:  # the next shard is tokenised, and the last one written, meanwhile
            coming = pool.submit(next, groups, None)
            while (group := coming.result()) is not None:
                coming = pool.submit(next, groups, None)
                part, contexts, stream = group
                computed = self._compute(contexts, progress)
                if self._norms is None:
                    self._calibrate(computed.norms if part == TRAIN else None)
                if writing is not None:
                    writing.result()  # one at a time: what waits is held in memory
                writing = pool.submit(self._write, part, contexts, computed, stream)
            if writing is not None:
                writing.result()
        if self._norms is None:  # no context came to this process; the others wait for its word
            self._calibrate(None)
        self._progress.counts[TRAIN] |= {name: self.stream.counts[name] for name in _OF_STREAM}
        self.folder.write_progress(self.group.rank, self._progress)
        self._wait()

    def manifest(self, versions: dict[str, str]) -> Manifest:
        """Put together what all processes have cached, once they are done.

        Raises:
            SelOrthoError: there is no activation, as no text was long enough.
        """
        parts = [self._read_progress(rank) for rank in range(self.group.size)]
        statistics = parts[0].statistics
        for other in parts[1:]:
            statistics.merge(other.statistics)
        shards = {part: [entry for p in parts for entry in p.shards[part]] for part in (TRAIN, HELD_OUT)}
        counts = {
            part: {name: sum(p.counts[part].get(name, 0) for p in parts) for name in Counts.__dataclass_fields__}
            for part in shards
        }
        if not shards[TRAIN]:
            raise SelOrthoError("the text gives no activation to train on: use other texts or a lower --min_tokens")
        summaries = {}
        for row, (layer, norms) in enumerate(zip(self.capture.layers, self._norms or (), strict=True)):
            summary = statistics.summary(row, counts[TRAIN]["rows"], self.capture.sites[layer].module, *norms)
            summaries[str(layer)] = asdict(summary)
        content = {
            **asdict(self.settings),
            "counts": counts[TRAIN],
            "held_out_counts": counts[HELD_OUT],
            "versions": versions,
            "statistics": summaries,
            "shards": sorted(shards[TRAIN], key=lambda entry: entry["number"]),
            "held_out": sorted(shards[HELD_OUT], key=lambda entry: entry["number"]),
        }
        manifest: Manifest = from_json(Manifest, content)
        return manifest

    def _groups(self) -> Iterator[tuple[str, list[Context], dict[str, Any] | None]]:
        """Yield the part and the contexts of each shard that is not there yet, and the stream's state behind them."""
        settings, progress = self.settings, self._progress
        if (stream := progress.stream) is not None:
            self.stream.load_state_dict(stream)
        left: float = math.inf
        if settings.max_tokens is not None:
            left = -(-settings.max_tokens // self.group.size) - progress.counts[TRAIN].get("tokens", 0)
        while contexts := self.stream.take_tokens(int(min(settings.shard_tokens, left))):
            left -= count_tokens(contexts)
            stream = self.stream.state_dict()
            yield TRAIN, contexts, stream
        groups: list[list[Context]] = []
        for context in self.held_out:
            if not groups or count_tokens(groups[-1]) >= settings.shard_tokens:
                groups.append([])
            groups[-1].append(context)
        for contexts in groups[progress.written[HELD_OUT] :]:
            yield HELD_OUT, contexts, stream

    def _compute(self, contexts: list[Context], progress: tqdm | None) -> CapturedActivations:
        """Read the activations of contexts, sinks included, into tensors of the stored dtype."""
        capture, dtype = self.capture, STORED_DTYPES[self.settings.stored_dtype]
        tokens = count_tokens(contexts)
        by_layer = {layer: torch.empty(tokens, capture.lm.d_model, dtype=dtype) for layer in capture.layers}
        norms, origins = [], []
        rows = 0
        for batch in capture.capture_batches(contexts):
            for layer, activations in batch.by_layer.items():
                by_layer[layer][rows : rows + len(batch)] = activations
            rows += len(batch)
            norms.append(batch.norms)
            origins.append(batch.origins)
            if progress is not None:
                progress.update(len(batch) + batch.dropped_special)
        self.tokens += tokens
        by_layer = {layer: activations[:rows] for layer, activations in by_layer.items()}
        return CapturedActivations(by_layer, torch.cat(norms), TokenOrigins.concatenate(origins), tokens - rows)

    def _calibrate(self, norms: Tensor | None) -> None:
        """Agree with the other processes on what a sink is."""
        medians = []
        for column in range(len(self.capture.layers)):
            median = None if norms is None or len(norms) == 0 else float(norms[:, column].median())
            medians.append(self.group.mean(median, self.capture.device) or 0.0)
        ratio = self.settings.max_norm_ratio
        self._norms = [(median, ratio * median or None if ratio else None) for median in medians]
        if self.group.rank == 0:
            self.folder.write_norms(self._norms)
        self._wait()

    def _write(
        self, part: str, contexts: list[Context], computed: CapturedActivations, stream: dict[str, Any] | None
    ) -> None:
        """Leave out sinks, gather the statistics, and write a shard and the progress."""
        assert self._norms is not None
        progress, limits = self._progress, [limit for _, limit in self._norms]
        kept = within_norms(computed.norms, limits)
        everything = bool(kept.all())
        origins = computed.origins if everything else computed.origins[kept]
        folders = {"tokens": _token_tensors(contexts, origins, with_contexts=part == HELD_OUT)}
        for column, (layer, limit) in enumerate(zip(self.capture.layers, limits, strict=True)):
            activations = computed.by_layer.pop(layer)  # one layer after the other: half the memory
            activations = activations if everything else activations[kept]
            folders[f"layer_{layer}"] = {"activations": activations}
            if part == TRAIN:
                norms = computed.norms[:, column]
                progress.statistics.add(column, activations, norms, kept, computed.origins, limit)
        if len(origins):
            number = self.group.rank + self.group.size * progress.written[part]
            progress.shards[part].append(self.folder.write_shard(part, number, len(origins), folders))
        counts = {
            "rows": len(origins),
            "tokens": count_tokens(contexts),
            "contexts": len(contexts),
            "dropped_special": computed.dropped_special,
            "dropped_sinks": int((~kept).sum()),
        }
        progress.counts[part] = dict(Counter(progress.counts[part]) + Counter(counts))
        progress.written[part] += 1
        progress.stream = stream
        self.folder.write_progress(self.group.rank, progress)

    def _read_progress(self, rank: int) -> Progress:
        lengths = len(self.capture.layers), self.capture.lm.d_model, self.settings.contexts.context_length
        return self.folder.read_progress(rank, Progress(CacheStatistics(*lengths)))

    def _wait(self) -> None:
        """Wait for the other processes."""
        self.group.sum(torch.zeros(1, device=self.capture.device))


def disk_bytes(capture: ActivationCapture, settings: CacheSettings, tokens: float) -> float:
    """Estimate the bytes on disk of the activations of so many tokens."""
    row = len(capture.layers) * capture.lm.d_model * STORED_DTYPES[settings.stored_dtype].itemsize + 20
    return row * tokens


def check_disk(folder: Path, needed: float) -> None:
    """Raise a SelOrthoError if the disk has less room than the shards will take beyond those that are there."""
    present = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder.is_dir() else 0
    if needed - present > (free := free_disk(folder)):
        raise SelOrthoError(
            f"the activations need about {needed / 1e9:.2f} GB of disk, but {existing_folder(folder)} has "
            f"{free / 1e9:.2f} GB free: use --max_tokens, fewer --layers or another --output_dir"
        )


def forecast(
    capture: ActivationCapture, stream: ContextStream, settings: CacheSettings, tokens: float, folder: Path
) -> str:
    """Write a small cache beside `folder`, throw it away, and say what that of all `tokens` needs and takes.

    Args:
        capture, settings: of the cache in full. stream: contexts, endless.

    Raises:
        SelOrthoError: the disk cannot be written, or there is too little memory.
    """
    started = time.perf_counter()
    capture.capture_all(stream.take_tokens(_WARM_UP))
    speed = _WARM_UP / (time.perf_counter() - started)
    probed = min(settings.shard_tokens, max(_WARM_UP, int(PROBE_SECONDS * speed)))
    small = replace(settings, shard_tokens=probed, max_tokens=probed, processes=1)
    available, before = available_memory(capture.device), memory_now(capture.device)
    start_peak(capture.device)
    try:
        with TemporaryDirectory(prefix=".probe-", dir=existing_folder(folder)) as name:
            target = CacheFolder(Path(name))
            target.begin(small)
            started = time.perf_counter()
            CacheWriter(capture, stream, [], target, small).run()
            speed = settings.processes * probed / (time.perf_counter() - started)
    except OSError as error:
        raise SelOrthoError(f"cannot write beside {folder} ({reason(error)}): choose another --output_dir") from error
    # one shard is computed while the one before it is written, of which one layer is being turned into bytes
    row = (2 * len(capture.layers) + 2) * capture.lm.d_model * STORED_DTYPES[settings.stored_dtype].itemsize
    peak = peak_memory(capture.device)
    if capture.device.type == "cpu":
        peak += row * (settings.shard_tokens - probed)
    if available is not None and peak > available + before:
        raise SelOrthoError(
            f"each process needs {peak / 1e9:.2f} GB of memory, {(available + before) / 1e9:.2f} GB are available: "
            "lower --shard_tokens or --lm_batch_tokens, or read fewer --layers"
        )
    return (
        f"{tokens:,.0f} tokens at {speed:,.0f} tokens/s: {timedelta(seconds=round(tokens / speed))}\n"
        f"peak memory of a process {peak / 1e9:.2f} GB, of shards {row * settings.shard_tokens / 1e9:.2f} GB; "
        f"disk {disk_bytes(capture, settings, tokens) / 1e9:.2f} GB\n"
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of what a tokenizer does: its vocabulary, merges and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _token_tensors(contexts: list[Context], origins: TokenOrigins, *, with_contexts: bool) -> dict[str, Tensor]:
    """Return what the file of a shard's tokens holds."""
    tensors = {
        "token_ids": origins.token_ids.int(),
        "positions": origins.positions.int(),
        "document_ids": origins.document_ids,
        "context_ids": origins.context_ids.int(),
    }
    if with_contexts:
        ids = [token for context in contexts for token in context.input_ids]
        tensors |= {
            "context_token_ids": torch.tensor(ids, dtype=torch.int32),
            "context_lengths": torch.tensor([len(c.input_ids) for c in contexts], dtype=torch.int32),
            "context_document_ids": torch.tensor([c.document_id for c in contexts], dtype=torch.int64),
        }
    return tensors
