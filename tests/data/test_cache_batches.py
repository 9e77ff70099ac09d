"""Batches out of a cache made by hand: every row once an epoch, exact resumption, disjoint parts."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_selortho import SelOrthoError
from hf_selortho.data.cache_batches import CachedBatches, held_out_batches
from tests.data.caches import D_IN, write_cache


def draw(batches: CachedBatches, count: int) -> list[int]:
    """Numbers of the rows of the next batches, once layers and origins are known to agree."""
    rows: list[int] = []
    for _ in range(count):
        batch = batches.next_batch()
        ids = batch.origins.token_ids
        for layer, sign in ((2, 1), (5, -1)):
            assert torch.equal(batch.by_layer[layer], sign * ids[:, None].float().expand(-1, D_IN))
        rows += ids.tolist()
    return rows


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=7),
    batch=st.integers(1, 9),
    pool=st.integers(1, 60),
    processes=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_row_once_an_epoch_on_exactly_one_process(tmp_path_factory, sizes, batch, pool, processes, seed) -> None:
    cache = write_cache(tmp_path_factory.mktemp("cache"), sizes)
    seen: list[int] = []
    for rank in range(processes):
        try:
            batches = CachedBatches(
                cache, [2, 5], batch_size=batch, pool_tokens=pool, seed=seed, rank=rank, processes=processes
            )
        except SelOrthoError as error:
            assert "fewer than a batch" in str(error)
            return
        epochs = draw(batches, 3 * batches.rows)  # 3 * batch epochs
        for epoch in range(3):
            one = epochs[epoch * batches.rows : (epoch + 1) * batches.rows]
            assert len(set(one)) == batches.rows and set(one) == set(epochs[: batches.rows])
        seen += epochs[: batches.rows]
    assert sorted(seen) == list(range(sum(sizes)))


def test_epochs_pools_and_seeds_differ(tmp_path) -> None:
    cache = write_cache(tmp_path, [40, 30, 50])
    first = draw(CachedBatches(cache, [2, 5], batch_size=10, pool_tokens=1000, seed=0), 36)
    other = draw(CachedBatches(cache, [2, 5], batch_size=10, pool_tokens=1000, seed=1), 12)
    assert first[:120] != first[120:240] != first[240:] and first[:120] != other
    # all shards in one pool: a batch is drawn from all of them
    assert len({0 if row < 40 else 1 if row < 70 else 2 for row in first[:10]}) > 1


@pytest.mark.parametrize("pool", [1, 60, 1000])
def test_resumes_at_any_batch(tmp_path, pool) -> None:
    cache = write_cache(tmp_path, [40, 30, 50, 7])
    arguments = {"batch_size": 11, "pool_tokens": pool, "seed": 3}
    whole = draw(CachedBatches(cache, [2, 5], **arguments), 30)
    for stop in (0, 5, 11, 12, 23):
        before = CachedBatches(cache, [2, 5], **arguments)
        draw(before, stop)
        tensors, rest = before.state_dict()
        assert tensors == {} and set(rest) == {"seed", "epoch", "cursor", "activations"}
        after = CachedBatches(cache, [2, 5], **arguments)
        after.load_state_dict({}, json.loads(json.dumps(rest)))
        assert draw(after, 30 - stop) == whole[11 * stop :]


def test_a_checkpoint_of_other_activations_is_refused(tmp_path) -> None:
    one, two = (write_cache(tmp_path / str(n), [20 + n]) for n in range(2))
    state = CachedBatches(one, [2], batch_size=5).state_dict()
    with pytest.raises(SelOrthoError, match="made on other activations"):
        CachedBatches(two, [2], batch_size=5).load_state_dict(*state)


def test_what_is_not_in_the_cache_is_named(tmp_path) -> None:
    cache = write_cache(tmp_path, [20])
    with pytest.raises(SelOrthoError, match="holds no layer 3: choose from 2, 5"):
        CachedBatches(cache, [2, 3], batch_size=5)
    with pytest.raises(SelOrthoError, match="20 tokens for this process, fewer than a batch of 21"):
        CachedBatches(cache, [2], batch_size=21)


def test_held_out_rows_come_once_in_mixed_batches(tmp_path) -> None:
    cache = write_cache(tmp_path, [8], held_out=(10, 17))
    batches = list(held_out_batches(cache, [2, 5], 6))
    assert [len(batch[2]) for batch in batches] == [6, 6, 6, 6, 3]
    rows = torch.cat([batch[2][:, 0] for batch in batches])
    assert rows.sort().values.tolist() == list(range(8, 35)) and rows.tolist() != list(range(8, 35))
    assert torch.equal(torch.cat([batch[5] for batch in batches])[:, 0], -rows)


def test_memory_is_that_of_two_pools(tmp_path) -> None:
    cache = write_cache(tmp_path, [100] * 10)
    row = 2 * D_IN * 4 + 8 * 4 + 8
    assert CachedBatches(cache, [2, 5], batch_size=10, pool_tokens=150).memory_bytes() == 400 * row
    assert CachedBatches(cache, [2, 5], batch_size=10, pool_tokens=10_000).memory_bytes() == 1000 * row
