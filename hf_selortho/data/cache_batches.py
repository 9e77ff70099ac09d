"""Shuffled batches out of cached activations: no language model, no text, and a state of three numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SelOrthoError
from ..language_models.capture import ORIGIN_NAMES, TokenOrigins
from .activation_cache import ActivationCache
from .buffer import ActivationBatch, ActivationStatistics
from .cache_manifest import HELD_OUT, STORED_DTYPES


@dataclass(frozen=True)
class _Pool:
    """Some shards of an epoch in memory, and the order in which their rows are drawn."""

    epoch: int
    start: int  # of its rows among those of the epoch
    shards: list[int]  # by rising number, as their rows are held
    by_layer: dict[int, Tensor]  # (rows, d_in) each, as stored
    origins: Tensor  # (rows, 4), see `TokenOrigins`
    order: Tensor  # (rows,)

    @property
    def end(self) -> int:
        """The row of the epoch behind the last one of the pool."""
        return self.start + len(self.order)


class CachedBatches:
    """Batches of activations drawn from shards, token by token in random order, endless over epochs.

    An epoch takes the shards in a random order. As many as hold `pool_tokens` tokens make a pool, whose rows are drawn
    in a random order; meanwhile the next pool is read in the background. Where all shards fit into a pool, every token
    of an epoch is drawn at random from all of them. The state is (seed, epoch, cursor): a resumed run reads one pool,
    not what came before it.

    Processes read different shards, or, where there are fewer shards than processes, different rows of all of them.
    Each goes through its own part at its own pace, so that none waits for another at the end of an epoch.

    Args:
        cache: the shards. layers: which layers to read of them.
        batch_size: tokens of a batch on this process.
        pool_tokens: tokens that a pool holds at least, all in memory, and those of the next pool beside them.
        seed: of the order.
        rank, processes: this process's number, and how many there are.

    Raises:
        SelOrthoError: a layer is not in the cache (names those that are), or there are too few tokens for a batch.
    """

    def __init__(
        self,
        cache: ActivationCache,
        layers: Sequence[int],
        *,
        batch_size: int = 4096,
        pool_tokens: int = 1 << 18,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if missing := [layer for layer in layers if layer not in cache.manifest.layers]:
            raise SelOrthoError(
                f"{cache.source} holds no layer {', '.join(map(str, missing))}: choose from "
                f"{', '.join(map(str, cache.manifest.layers))}"
            )
        self.cache, self.layers, self.batch_size = cache, tuple(layers), batch_size
        self._pool_tokens, self._seed, self._rank, self._processes = pool_tokens, seed, rank, processes
        shards = cache.manifest.shards
        by_shard = len(shards) >= processes
        self._rows = slice(None) if by_shard else slice(rank, None, processes)  # of each shard
        self._shards = shards[rank::processes] if by_shard else [shard for shard in shards if shard.rows > rank]
        self._sizes = [len(range(shard.rows)[self._rows]) for shard in self._shards]
        self.rows = sum(self._sizes)  # of an epoch of this process
        if self.rows < batch_size:
            raise SelOrthoError(
                f"{cache.source} holds {self.rows} tokens for this process, fewer than a batch of {batch_size}: "
                "cache more text, or lower --batch_size"
            )
        self.epoch, self.cursor = 0, 0
        self._reader = ThreadPoolExecutor(1)
        self._pool: _Pool | None = None
        self._coming: Future[_Pool] | None = None  # the pool behind it

    def statistics(self, progress: bool = False) -> dict[int, ActivationStatistics]:
        """Return mean, scale and sink threshold of each layer, as they were measured when the cache was written."""
        summaries = {layer: self.cache.manifest.layer(layer) for layer in self.layers}
        return {
            layer: ActivationStatistics(torch.tensor(entry.mean), entry.scale, entry.median_norm, entry.max_norm)
            for layer, entry in summaries.items()
        }

    def next_batch(self) -> ActivationBatch:
        """Return the next batch.

        Raises:
            CacheError: a shard is damaged or missing; nothing of it is handed out.
        """
        parts: list[tuple[Tensor, ...]] = []  # origins and the layers of some rows
        left = self.batch_size
        while left:
            pool = self._current_pool()
            first = self.cursor - pool.start
            rows = pool.order[first : first + left]
            parts.append((pool.origins[rows], *(pool.by_layer[layer][rows].float() for layer in self.layers)))
            left -= len(rows)
            self.cursor += len(rows)
            if self.cursor == self.rows:
                self.epoch, self.cursor = self.epoch + 1, 0
        origins, *layers = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return ActivationBatch(dict(zip(self.layers, layers, strict=True)), TokenOrigins(origins))

    def totals(self) -> dict[str, int]:
        """Return what was read and left out when the cache was written."""
        counts = self.cache.manifest.counts
        names = ("contexts", "documents", "dropped_special", "dropped_sinks", "dropped_tails")
        totals = {name: getattr(counts, name) for name in names}
        return {**totals, "tokens_kept": counts.rows, "processes": self._processes}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return where the batches stand: no tensors, a few numbers."""
        state = {"seed": self._seed, "epoch": self.epoch, "cursor": self.cursor}
        return {}, {**state, "activations": self.cache.sha256}

    def hold(self, reader: Future[None]) -> None:
        """Do nothing: the state is a copy."""

    def load_state_dict(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Go on exactly where the saved batches stopped.

        Raises:
            SelOrthoError: they were drawn from other activations.
        """
        if rest.get("activations") != self.cache.sha256:
            raise SelOrthoError(
                f"the checkpoint was made on other activations than those of {self.cache.source}: use the same ones, "
                "or start a new run in another --output_dir"
            )
        self._seed, self.epoch, self.cursor = rest["seed"], rest["epoch"], rest["cursor"]
        self._pool = self._coming = None

    def memory_bytes(self) -> int:
        """Return what the pool, and the one that is read ahead, take."""
        manifest = self.cache.manifest
        largest = max(sum(self._sizes[number] for number in shards) for _, shards in self._split(0))
        width = sum(manifest.layer(layer).d_in for layer in self.layers)
        row = width * STORED_DTYPES[manifest.stored_dtype].itemsize + 8 * len(ORIGIN_NAMES) + 8
        return min(2 * largest, self.rows) * row

    def release(self) -> None:
        """Let go of the pools, and end the thread that reads ahead; there are no batches afterwards."""
        self._reader.shutdown(cancel_futures=True)
        self._pool = self._coming = None

    def _current_pool(self) -> _Pool:
        """Return the pool that the cursor is in, and begin to read the one after it."""
        pool = self._pool
        if pool is None or pool.epoch != self.epoch or self.cursor >= pool.end:
            pool = self._coming.result() if self._coming else self._load(self.epoch, self.cursor, None)
            last = pool.end == self.rows
            self._coming = self._reader.submit(self._load, pool.epoch + last, 0 if last else pool.end, pool)
            self._pool = pool
        return pool

    def _split(self, epoch: int) -> Iterator[tuple[int, list[int]]]:
        """Put the shards of an epoch into pools: the first row of each, and its shards in their order."""
        order = np.random.default_rng([self._seed, self._rank, epoch]).permutation(len(self._shards)).tolist()
        start, rows, shards = 0, 0, list[int]()
        for number in order:
            shards.append(number)
            rows += self._sizes[number]
            if rows >= self._pool_tokens or number == order[-1]:
                yield start, shards
                start, rows, shards = start + rows, 0, []

    def _load(self, epoch: int, cursor: int, previous: _Pool | None) -> _Pool:
        """Read the pool that holds a row of an epoch; what the previous one holds is not read again."""
        start, drawn = [(start, shards) for start, shards in self._split(epoch) if start <= cursor][-1]
        shards = sorted(drawn)
        offsets = dict(zip(shards, np.cumsum([0, *(self._sizes[number] for number in shards)]).tolist(), strict=False))
        if previous is not None and previous.shards == shards:
            by_layer, origins = previous.by_layer, previous.origins
        else:
            by_layer, origins = self._read(offsets)
        rows = np.concatenate([offsets[number] + np.arange(self._sizes[number]) for number in drawn])
        generator = np.random.default_rng([self._seed, self._rank, epoch, start + 1])
        order = torch.from_numpy(rows[generator.permutation(len(rows))])
        return _Pool(epoch, start, shards, by_layer, origins, order)

    def _read(self, offsets: dict[int, int]) -> tuple[dict[int, Tensor], Tensor]:
        """Read this process's rows of some shards, each to its place: activations by layer, and origins."""
        manifest, rows = self.cache.manifest, sum(self._sizes[number] for number in offsets)
        dtype = STORED_DTYPES[manifest.stored_dtype]
        by_layer = {layer: torch.empty(rows, manifest.layer(layer).d_in, dtype=dtype) for layer in self.layers}
        origins = torch.empty(rows, len(ORIGIN_NAMES), dtype=torch.int64)
        for number, offset in offsets.items():
            shard, places = (
                self.cache.read(self._shards[number], self.layers),
                slice(offset, offset + self._sizes[number]),
            )
            origins[places] = shard.origins.table[self._rows]
            for layer, held in by_layer.items():
                held[places] = shard.by_layer[layer][self._rows]
        return by_layer, origins


def held_out_batches(
    cache: ActivationCache, layers: Sequence[int], batch_size: int, seed: int = 0, contexts: int | None = None
) -> Iterator[dict[int, Tensor]]:
    """Yield the held-out activations in batches of mixed contexts, by layer (B, d_in) float32; the last may be shorter.

    Args:
        cache, layers: which activations. batch_size: tokens of a batch. seed: of their order.
        contexts: only those of so many contexts, the first ones.

    Raises:
        CacheError: a shard is damaged or missing.
    """
    generator = torch.Generator().manual_seed(seed)
    rest = {layer: torch.zeros(0, cache.manifest.layer(layer).d_in) for layer in layers}
    for entry in cache.manifest.held_out:
        if contexts is not None and contexts <= 0:
            break
        shard = cache.read(entry, layers, HELD_OUT)
        order = torch.randperm(len(shard), generator=generator)
        if contexts is not None:
            order = order[shard.origins.context_ids[order] < contexts]
            contexts -= shard.contexts
        rest = {layer: torch.cat([rest[layer], shard.by_layer[layer][order].float()]) for layer in layers}
        while len(rest[layers[0]]) >= batch_size:
            yield {layer: tensor[:batch_size] for layer, tensor in rest.items()}
            rest = {layer: tensor[batch_size:] for layer, tensor in rest.items()}
    if len(rest[layers[0]]):
        yield rest
