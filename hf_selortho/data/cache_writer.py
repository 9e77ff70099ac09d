"""One pass of a language model over texts, written as shards: tokenising, computing and writing side by side."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture, TokenOrigins, max_norm_from_ratio, within_norms
from ..process_group import ProcessGroup
from .activation_cache import FORMAT, FORMAT_VERSION, HELD_OUT, STORED_DTYPES, TRAIN
from .cache_folder import Record, ShardFolder
from .cache_statistics import LayerStatistics
from .contexts import Context, ContextStream, count_tokens

T = TypeVar("T")


@dataclass(frozen=True)
class HarvestSettings:
    """How a harvest is cut into shards, and what it leaves out."""

    context_length: int
    stored_dtype: str = "bfloat16"
    max_norm_ratio: float | None = 4.0
    shard_tokens: int = 65_536  # tokens of the contexts of a shard
    max_tokens: int | None = None  # tokens of all contexts for training, over all processes; None: all of the text
    rank: int = 0
    processes: int = 1


@dataclass
class Speed:
    """Of one process of a harvest."""

    tokens: int = 0  # BOS included, padding not
    seconds: float = 0.0
    forward_seconds: float = 0.0  # within the language model

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def forward_share(self) -> float:
        """Share of the time that the language model ran: the speed as a share of its bare forward's."""
        return self.forward_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Raw:
    """The activations of a shard's contexts, sinks included."""

    contexts: list[Context]
    by_layer: dict[int, Tensor]  # (tokens, d_in) each, as they are stored
    norms: Tensor  # (tokens, layers)
    origins: TokenOrigins
    dropped_special: int


class ShardHarvest:
    """The part of a harvest that one process does.

    A shard is the activations of a fixed run of contexts, so that what it holds depends on nothing but the text, the
    language model and the settings. The limit for sinks is a multiple of the median norm over the first shard of every
    process, and is written down before any shard is.

    Args:
        capture: the layers to read.
        stream: this process's training contexts, not endless.
        held_out: this process's part of the held-out contexts.
        folder: where the shards go; [`ShardFolder.begin`] has been called.
        settings: see there.
    """

    def __init__(
        self,
        capture: ActivationCapture,
        stream: ContextStream,
        held_out: Sequence[Context],
        folder: ShardFolder,
        settings: HarvestSettings,
    ) -> None:
        self.capture, self.stream, self.held_out = capture, stream, held_out
        self.folder, self.settings = folder, settings
        self.speed = Speed()
        self._max_norms: tuple[float | None, ...] | None = None

    def run(self, progress: tqdm | None = None) -> Speed:
        """Harvest what is not on the disk yet. All processes together; each returns when its own part is done."""
        self.capture.max_norms = (None,) * len(self.capture.layers)  # sinks are told apart afterwards
        self._max_norms = self.folder.read_calibration(self.capture.layers)
        started, forward = time.perf_counter(), self.capture.forward_seconds
        self._run_part(TRAIN, self._training_groups, progress)
        self._run_part(HELD_OUT, self._held_out_groups, progress)
        self.folder.write_rank(self.settings.rank, self.stream.counts)
        self.speed.seconds = time.perf_counter() - started
        self.speed.forward_seconds = self.capture.forward_seconds - forward
        return self.speed

    def _run_part(
        self,
        part: str,
        groups_after: Callable[[list[dict[str, Any]]], Iterator[tuple[list[Context], dict[str, Any]]]],
        progress: tqdm | None,
    ) -> None:
        settings = self.settings
        done: list[dict[str, Any]] = []
        if self._max_norms is not None:  # else what is there was not told apart by limits that are known
            done = [record.content for record in self.folder.records(part, settings.rank, settings.processes)]
        number = settings.rank + settings.processes * len(done)
        if progress is not None:
            progress.update(sum(content["counts"]["tokens"] for content in done))
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            for contexts, state in _ahead(groups_after(done), reader):
                raw = self._compute(contexts, progress)
                if self._max_norms is None:
                    self._calibrate(raw.norms)
                if writing is not None:
                    writing.result()  # one at a time: what waits is held in memory
                writing = writer.submit(self._write, part, number, raw, state)
                number += settings.processes
            if writing is not None:
                writing.result()
        if self._max_norms is None:  # no context came to this process; the others wait for its word
            self._calibrate(None)

    def _training_groups(self, done: list[dict[str, Any]]) -> Iterator[tuple[list[Context], dict[str, Any]]]:
        """Contexts of each shard that is not there yet, and the state of the stream behind them."""
        settings, taken = self.settings, 0
        if done:
            self.stream.load_state_dict(done[-1]["stream"])
            taken = sum(content["counts"]["tokens"] for content in done)
        share = None if settings.max_tokens is None else -(-settings.max_tokens // settings.processes)
        while True:
            wanted = settings.shard_tokens if share is None else min(settings.shard_tokens, share - taken)
            contexts = self.stream.take_tokens(wanted)
            if not contexts:
                return
            taken += count_tokens(contexts)
            yield contexts, {"stream": self.stream.state_dict()}

    def _held_out_groups(self, done: list[dict[str, Any]]) -> Iterator[tuple[list[Context], dict[str, Any]]]:
        groups: list[list[Context]] = []
        held = self.settings.shard_tokens
        for context in self.held_out:
            if held >= self.settings.shard_tokens:
                groups.append([])
                held = 0
            groups[-1].append(context)
            held += len(context.input_ids)
        for group in groups[len(done) :]:
            yield group, {}

    def _compute(self, contexts: list[Context], progress: tqdm | None) -> _Raw:
        capture, dtype = self.capture, STORED_DTYPES[self.settings.stored_dtype]
        tokens = count_tokens(contexts)
        by_layer = {layer: torch.empty(tokens, capture.lm.d_model, dtype=dtype) for layer in capture.layers}
        norms, origins = [], []
        rows = special = 0
        for part in capture.capture_batches(contexts):
            for layer, activations in part.by_layer.items():
                by_layer[layer][rows : rows + len(part)] = activations
            rows += len(part)
            special += part.dropped_special
            norms.append(part.norms)
            origins.append(part.origins)
            if progress is not None:
                progress.update(len(part) + part.dropped_special)
        self.speed.tokens += tokens
        by_layer = {layer: activations[:rows] for layer, activations in by_layer.items()}
        return _Raw(contexts, by_layer, torch.cat(norms), TokenOrigins.concatenate(origins), special)

    def _calibrate(self, norms: Tensor | None) -> None:
        """Agree with the other processes on what a sink is; it is on the disk before any shard is."""
        medians, together = [], self.settings.processes > 1
        for column in range(len(self.capture.layers)):
            median = None if norms is None or len(norms) == 0 else float(norms[:, column].median())
            medians.append((ProcessGroup.of_run().mean(median, self.capture.device) if together else median) or 0.0)
        limits = tuple(max_norm_from_ratio(median, self.settings.max_norm_ratio) or None for median in medians)
        if self.settings.rank == 0:
            self.folder.write_calibration(self.capture.layers, medians, limits)
        if together:
            ProcessGroup.of_run().sum(torch.zeros(1, device=self.capture.device))  # wait until it is written
        self._max_norms = limits

    def _write(self, part: str, number: int, raw: _Raw, state: dict[str, Any]) -> None:
        """Tell sinks apart, gather the statistics and write a shard."""
        assert self._max_norms is not None
        kept = within_norms(raw.norms, self._max_norms)
        everything = bool(kept.all())
        origins = raw.origins if everything else raw.origins[kept]
        tensors: dict[str, Tensor] = {}
        by_layer: dict[int, Tensor] = {}
        for column, (layer, limit) in enumerate(zip(self.capture.layers, self._max_norms, strict=True)):
            activations = raw.by_layer.pop(layer)  # one layer after the other: half the memory
            by_layer[layer] = activations if everything else activations[kept]
            statistics = LayerStatistics(self.capture.lm.d_model, self.settings.context_length)
            statistics.see(raw.norms[:, column], raw.origins, limit)
            statistics.keep(by_layer[layer], raw.norms[kept, column])
            tensors |= {f"layer_{layer}.{name}": value for name, value in statistics.state_dict().items()}
        content = {
            **state,
            "rows": len(origins),
            "counts": {
                "contexts": len(raw.contexts),
                "tokens": count_tokens(raw.contexts),
                "dropped_special": raw.dropped_special,
                "dropped_sinks": int((~kept).sum()),
            },
        }
        tokens = _token_tensors(raw, origins, with_contexts=part == HELD_OUT)
        self.folder.commit(part, number, tokens, by_layer, Record(number, content, tensors))


def _token_tensors(raw: _Raw, origins: TokenOrigins, *, with_contexts: bool) -> dict[str, Tensor]:
    """What the file of a shard's tokens holds."""
    tensors = {
        "token_ids": origins.token_ids.int(),
        "positions": origins.positions.int(),
        "document_ids": origins.document_ids,
        "context_ids": origins.context_ids.int(),
    }
    if with_contexts:
        ids = [token for context in raw.contexts for token in context.input_ids]
        tensors |= {
            "context_token_ids": torch.tensor(ids, dtype=torch.int32),
            "context_lengths": torch.tensor([len(c.input_ids) for c in raw.contexts], dtype=torch.int32),
            "context_document_ids": torch.tensor([c.document_id for c in raw.contexts], dtype=torch.int64),
        }
    return tensors


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does, as a sha256: its vocabulary, merges and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def assemble_manifest(
    folder: ShardFolder,
    capture: ActivationCapture,
    plan: dict[str, Any],
    settings: HarvestSettings,
    versions: dict[str, str],
) -> dict[str, Any]:
    """The manifest of a harvest whose shards are all there.

    Raises:
        SelOrthoError: there is none, as no text was long enough.
    """
    statistics = {layer: LayerStatistics(capture.lm.d_model, settings.context_length) for layer in capture.layers}
    parts: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, Counter[str]] = {}
    for name, part in (("shards", TRAIN), ("held_out", HELD_OUT)):
        parts[name], counts[name] = [], Counter({"rows": 0, "contexts": 0})
        for record in folder.records(part):
            counts[name].update({**record.content["counts"], "rows": record.content["rows"]})
            if record.content["rows"]:
                parts[name].append({key: record.content[key] for key in ("number", "rows", "files")})
            for layer in capture.layers if part == TRAIN else ():
                _merge(statistics[layer], record, layer, settings.context_length)
    if not parts["shards"]:
        raise SelOrthoError("the text gives no activation to train on: use other texts or a lower --min_tokens")
    ranks = Counter[str]()
    for rank in range(settings.processes):
        found = folder.read_rank(rank)
        ranks.update({key: found[key] for key in ("documents", "dropped_tails", "dropped_tail_tokens")})
    medians, limits = folder.calibration()
    layers = {}
    for layer in capture.layers:
        limit = limits[str(layer)]
        layers[str(layer)] = {
            "hook_name": capture.hook_name_of(layer),
            "d_in": capture.lm.d_model,
            "median_norm": medians[str(layer)],
            "max_norm": limit,
            **statistics[layer].summary(limit, lambda token: str(capture.lm.tokenizer.decode([token]))),
        }
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **plan,
        "rows": counts["shards"]["rows"],
        "counts": {**counts["shards"], **ranks},
        "held_out_counts": dict(counts["held_out"]),
        "versions": versions,
        "layers": layers,
        **parts,
    }


def _merge(statistics: LayerStatistics, record: Record, layer: int, context_length: int) -> None:
    prefix = f"layer_{layer}."
    other = LayerStatistics(len(statistics.total), context_length)
    other.load_state_dict({k.removeprefix(prefix): v for k, v in record.tensors.items() if k.startswith(prefix)})
    statistics.merge(other)


def _ahead(items: Iterable[T], reader: ThreadPoolExecutor) -> Iterator[T]:
    """The items, each made in the background while the one before it is used."""
    iterator = iter(items)
    end = object()
    coming = reader.submit(next, iterator, end)
    while (item := coming.result()) is not end:
        coming = reader.submit(next, iterator, end)
        yield item  # type: ignore[misc]
