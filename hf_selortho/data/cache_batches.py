"""Shuffled batches out of shards: no language model, no text, and a state of three numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SelOrthoError
from ..language_models.capture import ORIGIN_NAMES, TokenOrigins
from .activation_cache import HELD_OUT, STORED_DTYPES, TRAIN, ActivationStore, Shard, ShardEntry
from .buffer import ActivationBatch, ActivationStatistics


@dataclass(frozen=True)
class _Part:
    """A shard, or every n-th of its rows, as one process reads it."""

    entry: ShardEntry
    first: int = 0
    step: int = 1

    @property
    def rows(self) -> int:
        return len(range(self.first, self.entry.rows, self.step))


class ShardBatches:
    """Batches of activations drawn from shards, token by token in random order, endless over epochs.

    An epoch takes the shards in a random order. As many as hold `pool_tokens` tokens make a pool, whose rows are drawn
    in a random order; meanwhile the next pool is read in the background. Where all shards fit into a pool, every token
    of an epoch is drawn at random from all of them. The place within all this is (seed, epoch, cursor): a resumed run
    reads one pool, not what came before it.

    Processes read different shards, or, where there are fewer shards than processes, different rows of all of them.
    Each goes through its own part at its own pace, so that none waits for another at the end of an epoch.

    Args:
        store: the shards. layers: which layers to read of them.
        batch_size: tokens of a batch on this process.
        pool_tokens: tokens that a pool holds at least, all in memory, and those of the next pool beside them.
        seed: of the order.
        rank, processes: this process's number, and how many there are.

    Raises:
        SelOrthoError: a layer was not harvested (names those that were), or there are too few tokens for a batch.
    """

    def __init__(
        self,
        store: ActivationStore,
        layers: Sequence[int],
        *,
        batch_size: int = 4096,
        pool_tokens: int = 1 << 18,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        check_layers(store, layers)
        self.store, self.layers, self.batch_size = store, tuple(layers), batch_size
        self._pool_tokens, self._seed, self._rank, self._processes = pool_tokens, seed, rank, processes
        shards = store.manifest.shards
        if len(shards) >= processes:
            self._parts = [_Part(entry) for entry in shards[rank::processes]]
        else:
            self._parts = [part for part in (_Part(entry, rank, processes) for entry in shards) if part.rows]
        self.rows = sum(part.rows for part in self._parts)  # of an epoch of this process
        if self.rows < batch_size:
            raise SelOrthoError(
                f"{store.source} holds {self.rows} tokens for this process, fewer than a batch of {batch_size}: "
                "harvest more text, or lower --batch_size"
            )
        self.epoch, self.cursor = 0, 0
        self._reader = ThreadPoolExecutor(1)
        self._pool: _Pool | None = None
        self._coming: Future[_Pool] | None = None
        self._planned: list[_Plan] | None = None  # the pools of an epoch

    def statistics(self) -> dict[int, ActivationStatistics]:
        """Mean, scale and sink threshold of each layer, as the harvest measured them."""
        return {layer: layer_statistics(self.store, layer) for layer in self.layers}

    def next_batch(self) -> ActivationBatch:
        """The next batch.

        Raises:
            ShardError: a shard is damaged or missing; nothing of it is handed out.
        """
        by_layer = {
            layer: torch.empty(self.batch_size, self.store.manifest.layer(layer)["d_in"]) for layer in self.layers
        }
        origins = TokenOrigins.empty(self.batch_size)
        done = 0
        while done < self.batch_size:
            pool = self._current_pool()
            end = min(self.batch_size, done + pool.end - self.cursor)
            rows = pool.order[self.cursor - pool.start : self.cursor - pool.start + end - done]
            pool.gather(rows, {k: v[done:end] for k, v in by_layer.items()}, origins[done:end])
            self.cursor += end - done
            done = end
            if self.cursor == self.rows:
                self.epoch, self.cursor = self.epoch + 1, 0
        return ActivationBatch(by_layer, origins)

    def totals(self) -> dict[str, int]:
        """What the harvest has read, and left out."""
        counts = self.store.manifest.content["counts"]
        names = ("contexts", "documents", "dropped_special", "dropped_sinks", "dropped_tails")
        return {
            **{name: counts[name] for name in names},
            "tokens_kept": counts["rows"],
            "processes": self._processes,
        }

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the batches stand: no tensors, a few numbers."""
        return {}, {
            "seed": self._seed,
            "epoch": self.epoch,
            "cursor": self.cursor,
            "activations": self.store.manifest.sha256,
        }

    def hold(self, reader: Future[None]) -> None:
        """Nothing to do: the state is a copy."""

    def load_state_dict(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Go on exactly where the saved batches stopped.

        Raises:
            SelOrthoError: they were drawn from other activations.
        """
        if rest.get("activations") != self.store.manifest.sha256:
            raise SelOrthoError(
                f"the checkpoint was made on other activations than those of {self.store.source}: use the same ones, "
                "or start a new run in another --output_dir"
            )
        self._seed, self.epoch, self.cursor = rest["seed"], rest["epoch"], rest["cursor"]
        self._pool = self._coming = self._planned = None

    def memory_bytes(self) -> int:
        """What the pool, and the one that is read ahead, take."""
        manifest = self.store.manifest
        largest = max(plan.end - plan.start for plan in self._pools(0))
        itemsize = STORED_DTYPES[manifest.content["stored_dtype"]].itemsize
        row = sum(manifest.layer(layer)["d_in"] for layer in self.layers) * itemsize + 8 * len(ORIGIN_NAMES) + 8
        return min(2 * largest, self.rows) * row

    def release(self) -> None:
        """Let go of the pools, and end the thread that reads ahead; there are no batches afterwards."""
        self._reader.shutdown(cancel_futures=True)
        self._pool = self._coming = None

    def _current_pool(self) -> _Pool:
        """The pool that the cursor is in; the one after it is being read when this returns."""
        if self._pool is not None and self._pool.holds(self.epoch, self.cursor):
            return self._pool
        plan = self._plan(self.epoch, self.cursor)
        coming = self._coming.result() if self._coming is not None else None
        if coming is not None and coming.plan == plan:
            self._pool = coming
        else:
            self._pool = self._load(plan, self._pool)
        at_end = self._pool.end == self.rows
        following = self._plan(self.epoch + at_end, 0 if at_end else self._pool.end)
        self._coming = self._reader.submit(self._load, following, self._pool)
        return self._pool

    def _plan(self, epoch: int, cursor: int) -> _Plan:
        """Which shards make the pool that holds a row of an epoch."""
        pools = self._pools(epoch)
        return pools[bisect_right(pools, cursor, key=lambda plan: plan.start) - 1]

    def _pools(self, epoch: int) -> list[_Plan]:
        """The pools of an epoch, in order."""
        if self._planned is None or self._planned[0].epoch != epoch:
            order = np.random.default_rng([self._seed, self._rank, epoch]).permutation(len(self._parts)).tolist()
            pools, start, rows, chosen = [], 0, 0, []
            for number in order:
                chosen.append(number)
                rows += self._parts[number].rows
                if rows >= self._pool_tokens or number == order[-1]:
                    pools.append(_Plan(epoch, start, start + rows, tuple(chosen)))
                    start, rows, chosen = start + rows, 0, []
            self._planned = pools
        return self._planned

    def _load(self, plan: _Plan, previous: _Pool | None) -> _Pool:
        if previous is not None and set(previous.plan.parts) == set(plan.parts):
            held = dict(zip(previous.plan.parts, previous.shards, strict=True))
            shards = [held[number] for number in plan.parts]
        else:
            shards = [self._read(self._parts[number]) for number in plan.parts]
        generator = np.random.default_rng([self._seed, self._rank, plan.epoch, plan.start + 1])
        order = torch.from_numpy(generator.permutation(plan.end - plan.start))
        return _Pool(plan, shards, order)

    def _read(self, part: _Part) -> Shard:
        shard = self.store.read(part.entry, self.layers, TRAIN)
        if part.step == 1:
            return shard
        rows = slice(part.first, None, part.step)
        by_layer = {layer: held[rows].clone() for layer, held in shard.by_layer.items()}  # else all rows stay
        return Shard(by_layer, TokenOrigins.concatenate([shard.origins[rows]]), shard.contexts)


@dataclass(frozen=True)
class _Plan:
    """Which rows of an epoch a pool holds, and out of which parts."""

    epoch: int
    start: int
    end: int
    parts: tuple[int, ...]


class _Pool:
    """Shards in memory, and the order in which their rows are drawn."""

    def __init__(self, plan: _Plan, shards: Sequence[Shard], order: Tensor) -> None:
        self.plan, self.shards, self.order = plan, shards, order
        self.start, self.end = plan.start, plan.end
        self._bounds = torch.tensor([len(shard) for shard in shards]).cumsum(0)

    def holds(self, epoch: int, cursor: int) -> bool:
        """Whether a row of an epoch is in it."""
        return epoch == self.plan.epoch and self.start <= cursor < self.end

    def gather(self, rows: Tensor, by_layer: dict[int, Tensor], origins: TokenOrigins) -> None:
        """Put these rows of the pool into tensors of as many rows."""
        numbers = torch.bucketize(rows, self._bounds, right=True)
        for number, shard in enumerate(self.shards):
            places = (numbers == number).nonzero()[:, 0]
            local = rows[places] - (self._bounds[number] - len(shard))
            for layer, target in by_layer.items():
                target[places] = shard.by_layer[layer][local].float()
            for name in ORIGIN_NAMES:
                getattr(origins, name)[places] = getattr(shard.origins, name)[local]


def check_layers(store: ActivationStore, layers: Sequence[int]) -> None:
    """Raise a SelOrthoError unless the activations of all these layers were harvested."""
    missing = [layer for layer in layers if layer not in store.manifest.layers]
    if missing:
        raise SelOrthoError(
            f"{store.source} holds no layer {', '.join(map(str, missing))}: choose from "
            f"{', '.join(map(str, store.manifest.layers))}"
        )


def layer_statistics(store: ActivationStore, layer: int) -> ActivationStatistics:
    """Mean, scale and sink threshold of a layer, as the harvest measured them."""
    found = store.manifest.layer(layer)
    mean = torch.tensor(found["mean"], dtype=torch.float32)
    return ActivationStatistics(mean, float(found["scale"]), float(found["median_norm"]), found["max_norm"])


def held_out_batches(
    store: ActivationStore, layers: Sequence[int], batch_size: int, seed: int = 0, contexts: int | None = None
) -> Iterator[dict[int, Tensor]]:
    """The held-out activations in batches of mixed contexts, by layer (B, d_in) float32; the last may be shorter.

    Args:
        store, layers: which activations. batch_size: tokens of a batch. seed: of their order.
        contexts: only those of so many contexts, the first ones.

    Raises:
        ShardError: a shard is damaged or missing.
    """
    generator = torch.Generator().manual_seed(seed)
    rest = {layer: torch.zeros(0, store.manifest.layer(layer)["d_in"]) for layer in layers}
    for entry in store.manifest.held_out:
        if contexts is not None and contexts <= 0:
            break
        shard = store.read(entry, layers, HELD_OUT)
        order = torch.randperm(len(shard), generator=generator)
        if contexts is not None:
            order = order[shard.origins.context_ids[order] < contexts]
            contexts -= shard.contexts
        pool = {layer: torch.cat([rest[layer], shard.by_layer[layer][order].float()]) for layer in layers}
        full = len(pool[layers[0]]) // batch_size * batch_size
        for start in range(0, full, batch_size):
            yield {layer: held[start : start + batch_size] for layer, held in pool.items()}
        rest = {layer: held[full:] for layer, held in pool.items()}
    if len(rest[layers[0]]):
        yield rest
