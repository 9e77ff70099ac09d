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
from .activation_cache import ActivationCache, Shard
from .buffer import ActivationBatch, ActivationStatistics
from .cache_manifest import HELD_OUT, STORED_DTYPES


@dataclass(frozen=True)
class _Plan:
    """Which rows of an epoch a pool holds, and out of which shards."""

    epoch: int
    start: int
    end: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class _Pool:
    """Shards in memory, by number, and the order in which their rows are drawn."""

    plan: _Plan
    shards: dict[int, Shard]
    order: Tensor  # (rows,)

    def gather(self, rows: Tensor, by_layer: dict[int, Tensor], origins: TokenOrigins) -> None:
        """Put these rows of the pool into tensors of as many rows."""
        start = 0
        for shard in self.shards.values():
            targets = ((rows >= start) & (rows < start + len(shard))).nonzero()[:, 0]
            local = rows[targets] - start
            start += len(shard)
            for layer, tensor in by_layer.items():
                tensor[targets] = shard.by_layer[layer][local].float()
            for name in ORIGIN_NAMES:
                getattr(origins, name)[targets] = getattr(shard.origins, name)[local]


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
        check_layers(cache, layers)
        self.cache, self.layers, self.batch_size = cache, tuple(layers), batch_size
        self._pool_tokens, self._seed, self._rank = pool_tokens, seed, rank
        self._processes = processes
        shards = cache.manifest.shards
        by_shard = len(shards) >= processes
        self._rows = slice(0, None) if by_shard else slice(rank, None, processes)  # of each shard
        self._shards = shards[rank::processes] if by_shard else tuple(s for s in shards if s.rows > rank)
        self._sizes = [len(range(s.rows)[self._rows]) for s in self._shards]
        self.rows = sum(self._sizes)  # of an epoch of this process
        if self.rows < batch_size:
            raise SelOrthoError(
                f"{cache.source} holds {self.rows} tokens for this process, fewer than a batch of {batch_size}: "
                "cache more text, or lower --batch_size"
            )
        self.epoch, self.cursor = 0, 0
        self._reader = ThreadPoolExecutor(1)
        self._pool: _Pool | None = None
        self._coming: Future[_Pool] | None = None
        self._plans: list[_Plan] = []  # the pools of an epoch

    def statistics(self) -> dict[int, ActivationStatistics]:
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
        by_layer = {n: torch.empty(self.batch_size, self.cache.manifest.layer(n).d_in) for n in self.layers}
        origins = TokenOrigins.empty(self.batch_size)
        done = 0
        while done < self.batch_size:
            pool = self._current_pool()
            end = min(self.batch_size, done + pool.plan.end - self.cursor)
            first = self.cursor - pool.plan.start
            rows = pool.order[first : first + end - done]
            pool.gather(rows, {n: tensor[done:end] for n, tensor in by_layer.items()}, origins[done:end])
            self.cursor += end - done
            done = end
            if self.cursor == self.rows:
                self.epoch, self.cursor = self.epoch + 1, 0
        return ActivationBatch(by_layer, origins)

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
        self._pool, self._coming, self._plans = None, None, []

    def memory_bytes(self) -> int:
        """Return what the pool, and the one that is read ahead, take."""
        manifest = self.cache.manifest
        largest = max(plan.end - plan.start for plan in self._pools(0))
        width = sum(manifest.layer(layer).d_in for layer in self.layers)
        row = width * STORED_DTYPES[manifest.stored_dtype].itemsize + 8 * len(ORIGIN_NAMES) + 8
        return min(2 * largest, self.rows) * row

    def release(self) -> None:
        """Let go of the pools, and end the thread that reads ahead; there are no batches afterwards."""
        self._reader.shutdown(cancel_futures=True)
        self._pool = self._coming = None

    def _current_pool(self) -> _Pool:
        """Return the pool that the cursor is in, and begin to read the one after it."""
        plan = self._plan(self.epoch, self.cursor)
        if self._pool is None or self._pool.plan != plan:
            coming = self._coming.result() if self._coming is not None else None
            self._pool = coming if coming is not None and coming.plan == plan else self._load(plan, self._pool)
            at_end = plan.end == self.rows
            following = self._plan(self.epoch + at_end, 0 if at_end else plan.end)
            self._coming = self._reader.submit(self._load, following, self._pool)
        return self._pool

    def _plan(self, epoch: int, cursor: int) -> _Plan:
        """Say which shards make the pool that holds a row of an epoch."""
        return next(plan for plan in self._pools(epoch) if cursor < plan.end)

    def _pools(self, epoch: int) -> list[_Plan]:
        """Plan the pools of an epoch, in order."""
        if not self._plans or self._plans[0].epoch != epoch:
            order = np.random.default_rng([self._seed, self._rank, epoch]).permutation(len(self._shards)).tolist()
            self._plans, start, chosen = [], 0, []
            for number in order:
                chosen.append(number)
                rows = sum(self._sizes[n] for n in chosen)
                if rows >= self._pool_tokens or number == order[-1]:
                    self._plans.append(_Plan(epoch, start, start + rows, tuple(chosen)))
                    start, chosen = start + rows, []
        return self._plans

    def _load(self, plan: _Plan, previous: _Pool | None) -> _Pool:
        """Read the shards of a pool, but those that the previous one holds if it holds them all."""
        held = previous.shards if previous is not None else {}
        if set(held) != set(plan.shards):
            held = {number: self._read(number) for number in plan.shards}
        generator = np.random.default_rng([self._seed, self._rank, plan.epoch, plan.start + 1])
        order = torch.from_numpy(generator.permutation(plan.end - plan.start))
        return _Pool(plan, {number: held[number] for number in plan.shards}, order)

    def _read(self, number: int) -> Shard:
        shard = self.cache.read(self._shards[number], self.layers)
        if self._rows == slice(0, None):
            return shard
        by_layer = {layer: tensor[self._rows].clone() for layer, tensor in shard.by_layer.items()}  # not a view
        return Shard(by_layer, TokenOrigins.concatenate([shard.origins[self._rows]]), 0)


def check_layers(cache: ActivationCache, layers: Sequence[int]) -> None:
    """Raise a SelOrthoError unless the cache holds all these layers."""
    if missing := [layer for layer in layers if layer not in cache.manifest.layers]:
        raise SelOrthoError(
            f"{cache.source} holds no layer {', '.join(map(str, missing))}: choose from "
            f"{', '.join(map(str, cache.manifest.layers))}"
        )


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
