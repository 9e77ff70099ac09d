"""Shuffled batches out of cached activations: no language model, no text, and a state of three numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
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
    targets: dict[int, Tensor]  # (rows, d_out) each, where there are targets
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
        site, target: at which site, and what it is to become; default: the site of the cache, and nothing else.
        batch_size: tokens of a batch on this process.
        pool_tokens: tokens that a pool holds at least, all in memory, and those of the next pool beside them.
        seed: of the order.
        rank, processes: this process's number, and how many there are.

    Raises:
        SelOrthoError: a layer or a site is not in the cache (names those that are), or there are too few tokens for a
            batch.
    """

    def __init__(
        self,
        cache: ActivationCache,
        layers: Sequence[int],
        *,
        site: str | None = None,
        target: str | None = None,
        batch_size: int = 4096,
        pool_tokens: int = 1 << 18,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        cache.check_sites(layers, site, target)
        self.cache, self.layers, self.batch_size = cache, tuple(layers), batch_size
        self.site, self.target = site, target
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
        found = {}
        for layer in self.layers:
            entry = self.cache.manifest.layer(layer, self.site)
            mean = torch.tensor(entry.mean)
            found[layer] = ActivationStatistics(mean, entry.scale, entry.median_norm, entry.max_norm)
            if self.target:
                goal = self.cache.manifest.layer(layer, self.target)
                found[layer] = replace(found[layer], target_mean=torch.tensor(goal.mean), target_scale=goal.scale)
        return found

    def next_batch(self) -> ActivationBatch:
        """Return the next batch.

        Raises:
            CacheError: a shard is damaged or missing; nothing of it is handed out.
        """
        parts: list[tuple[Tensor, ...]] = []  # origins, the layers of some rows, and their targets
        left = self.batch_size
        while left:
            pool = self._current_pool()
            first = self.cursor - pool.start
            rows = pool.order[first : first + left]
            held = (*pool.by_layer.values(), *pool.targets.values())
            parts.append((pool.origins[rows], *(tensor[rows].float() for tensor in held)))
            left -= len(rows)
            self.cursor += len(rows)
            if self.cursor == self.rows:
                self.epoch, self.cursor = self.epoch + 1, 0
        origins, *columns = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        by_layer, targets = (
            zip(self.layers, columns, strict=False),
            zip(self.layers, columns[len(self.layers) :], strict=True) if self.target else (),
        )
        return ActivationBatch(dict(by_layer), TokenOrigins(origins), dict(targets))

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
        sites = (self.site, self.target) if self.target else (self.site,)
        width = sum(manifest.layer(layer, site).d_in for layer in self.layers for site in sites)
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
            by_layer, targets, origins = previous.by_layer, previous.targets, previous.origins
        else:
            by_layer, targets, origins = self._read(offsets)
        rows = np.concatenate([offsets[number] + np.arange(self._sizes[number]) for number in drawn])
        generator = np.random.default_rng([self._seed, self._rank, epoch, start + 1])
        order = torch.from_numpy(rows[generator.permutation(len(rows))])
        return _Pool(epoch, start, shards, by_layer, targets, origins, order)

    def _read(self, offsets: dict[int, int]) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        """Read this process's rows of some shards, each to its place: activations by layer, targets, and origins."""
        manifest, rows = self.cache.manifest, sum(self._sizes[number] for number in offsets)
        dtype = STORED_DTYPES[manifest.stored_dtype]

        def room(site: str | None) -> dict[int, Tensor]:
            widths = {layer: manifest.layer(layer, site).d_in for layer in self.layers}
            return {layer: torch.empty(rows, width, dtype=dtype) for layer, width in widths.items()}

        by_layer, targets = room(self.site), room(self.target) if self.target else {}
        origins = torch.empty(rows, len(ORIGIN_NAMES), dtype=torch.int64)
        for number, offset in offsets.items():
            shard = self.cache.read(self._shards[number], self.layers, site=self.site, target=self.target)
            places = slice(offset, offset + self._sizes[number])
            origins[places] = shard.origins.table[self._rows]
            for kind, fresh in ((by_layer, shard.by_layer), (targets, shard.targets)):
                for layer, held in kind.items():
                    held[places] = fresh[layer][self._rows]
        return by_layer, targets, origins


def held_out_batches(
    cache: ActivationCache,
    layers: Sequence[int],
    batch_size: int,
    seed: int = 0,
    contexts: int | None = None,
    site: str | None = None,
    target: str | None = None,
) -> Iterator[dict[int, Tensor | tuple[Tensor, Tensor]]]:
    """Yield the held-out activations in batches of mixed contexts, by layer; the last batch may be shorter.

    Args:
        cache, layers: which activations. batch_size: tokens of a batch. seed: of their order.
        contexts: only those of so many contexts, the first ones.
        site, target: as of [`CachedBatches`].

    Yields:
        Activations (B, d_in) float32 by layer; with a target, pairs of these and of the target's (B, d_out).

    Raises:
        CacheError: a shard is damaged or missing.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = [(layer, name) for name in ((site, target) if target else (site,)) for layer in layers]
    rest = [torch.zeros(0, cache.manifest.layer(layer, name).d_in) for layer, name in kinds]

    def batch(rows: int) -> dict[int, Tensor | tuple[Tensor, Tensor]]:
        columns = [tensor[:rows] for tensor in rest]
        if not target:
            return dict(zip(layers, columns, strict=True))
        return dict(zip(layers, zip(columns, columns[len(layers) :], strict=False), strict=False))

    for entry in cache.manifest.held_out:
        if contexts is not None and contexts <= 0:
            break
        shard = cache.read(entry, layers, HELD_OUT, site, target)
        order = torch.randperm(len(shard), generator=generator)
        if contexts is not None:
            order = order[shard.origins.context_ids[order] < contexts]
            contexts -= shard.contexts
        fresh = (*shard.by_layer.values(), *shard.targets.values())
        rest = [torch.cat([old, rows[order].float()]) for old, rows in zip(rest, fresh, strict=True)]
        while len(rest[0]) >= batch_size:
            yield batch(batch_size)
            rest = [tensor[batch_size:] for tensor in rest]
    if len(rest[0]):
        yield batch(batch_size)
