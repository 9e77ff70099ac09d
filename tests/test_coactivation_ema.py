"""The running average of co-activations: its sums and selections, ties, dead features, memory, processes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_selortho import select_pairs
from hf_selortho.pair_search import Blocks
from hf_selortho.pair_selection import CoactivationEMA
from hf_selortho.process_group import ProcessGroup
from hf_selortho.sparse_ops import active_features

N = 30


def batch(seed: int, tokens: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randint(-4, 3, (tokens, N), generator=generator).float())


@pytest.mark.parametrize("tokens", [4, 16])
@pytest.mark.parametrize(("fraction", "support"), [(0.05, 1), (0.3, 1), (0.6, 1), (1.0, 1), (1.0, 2)])
def test_nothing_carried_is_the_selection_of_the_batch_down_to_its_zeros(tokens, fraction, support) -> None:
    carried = CoactivationEMA(N, decay=0.0, limit=10_000)
    for seed in range(3):
        h = batch(seed, tokens)
        carried.update(h)
        expected, found = select_pairs(h, fraction, support), carried.select(fraction, support)
        assert torch.equal(found.keys(N), expected.keys(N))
        torch.testing.assert_close(found.correlation, expected.correlation)


@pytest.mark.parametrize("sparse", [False, True])
def test_sums_are_exponential_averages_of_the_batches(sparse) -> None:
    carried = CoactivationEMA(N, decay=0.5, limit=10_000)
    gram, support = torch.zeros(N, N), torch.zeros(N)
    for seed in range(4):
        h = batch(seed)
        carried.update(active_features(h) if sparse else h)
        gram, support = 0.5 * gram + h.T @ h, 0.5 * support + (h > 0).sum(0)
    correlations = gram / (gram.diag().sqrt()[:, None] * gram.diag().sqrt())
    correlations[(support < 4), :] = 0
    correlations[:, support < 4] = 0
    found = carried.select(0.1, 4)
    torch.testing.assert_close(found.correlation, correlations[found.i, found.j])
    strongest = correlations.triu(1).flatten().sort(descending=True).values[: len(found)]
    torch.testing.assert_close(found.correlation, strongest)
    assert len(found) == 44  # ceil(0.1 * 435)


def test_rare_features_count_after_some_batches() -> None:
    carried = CoactivationEMA(N, decay=0.9, limit=10_000)
    h = torch.zeros(8, N)
    h[0, [4, 9]] = 1.0  # both fire once a batch, on the same token
    h[1:, 20] = 1.0
    seen = []
    for _ in range(6):
        carried.update(h)
        seen.append(len(carried.select(0.001, min_support=4)))
    assert seen[0] == 0 and seen[-1] == 1
    assert carried.select(0.001, 4).keys(N).tolist() == [4 * N + 9]


def test_pairs_below_the_threshold_are_left_alone() -> None:
    carried = CoactivationEMA(N, 0.0, 10_000)
    carried.update(batch(1))
    found = carried.select(1.0, 1, correlation_threshold=0.5)
    assert 0 < len(found) < len(carried.select(1.0, 1)) and found.correlation.min() >= 0.5


def test_it_goes_on_where_it_stopped() -> None:
    one = CoactivationEMA(N, 0.7, 50)
    one.update(batch(0))
    other = CoactivationEMA(N, 0.7, 50)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    for carried in (one, other):
        carried.update(batch(1))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(("decay", "steps"), [(0.0, 1), (0.5, 200), (0.9, 700)])
def test_features_that_died_leave_room(decay, steps) -> None:
    carried = CoactivationEMA(N, decay, limit=20)
    dying, living = torch.zeros(8, N), torch.zeros(8, N)
    dying[:, :7] = torch.arange(1, 8).float()  # 21 pairs of correlation 1, more than the limit
    living[:, 10:15] = torch.randint(1, 5, (8, 5)).float()
    carried.update(dying)
    for _ in range(steps):
        carried.update(living)
    gram = living.T @ living
    expected = gram / (gram.diag().sqrt()[:, None] * gram.diag().sqrt())
    found = carried.select(1.0, 1)
    assert len(found) == 10 and found.i.min() >= 10
    torch.testing.assert_close(found.correlation, expected[found.i, found.j])
    assert carried.sums.isfinite().all() and carried.keys.min() >= 10 * N


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_activations_of_any_size(scale) -> None:
    one, other = CoactivationEMA(N, 0.5, 40), CoactivationEMA(N, 0.5, 40)
    for seed in range(3):
        one.update(batch(seed))
        other.update(batch(seed) * 2.0 ** round(torch.tensor(scale).log2().item()))
    assert torch.equal(one.select(0.05, 2).keys(N), other.select(0.05, 2).keys(N))


def test_the_limit_is_that_of_a_brute_force() -> None:
    """Dense matrices, cut to the limit after every batch; integers and a decay of 1/2 leave no rounding."""
    carried, limit = CoactivationEMA(N, 0.5, 25), 25
    gram, square = torch.zeros(N, N), torch.zeros(N)
    for seed in range(8):
        h = batch(seed)
        gram, square = 0.5 * gram + (h.T @ h).triu(1), 0.5 * square + h.square().sum(0)
        strength = (gram.square() / (square[:, None] * square)).nan_to_num(0).flatten()
        gram.view(-1)[strength.argsort(descending=True, stable=True)[limit:]] = 0
        carried.update(h)
        assert torch.equal(carried.keys, gram.flatten().nonzero()[:, 0])
        assert torch.equal(carried.sums, gram.flatten()[carried.keys])


def test_blocks_are_put_together() -> None:
    many = CoactivationEMA(N, 0.5, 25, Blocks(co_activations=50, slack=3))
    for seed in range(5):
        many.update(batch(seed))
    one = CoactivationEMA(N, 0.5, 25)
    for seed in range(5):
        one.update(batch(seed))
    assert all(torch.equal(value, many.state_dict()[name]) for name, value in one.state_dict().items())


def carry(rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    carried, group = CoactivationEMA(N, 0.5, 40), ProcessGroup.of_run()
    for seed in range(4):
        carried.update(batch(seed, 32)[rank::processes], group)
    return {**carried.state_dict(), "selected": carried.select(0.05, 3).keys(N)}


def run_process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(carry(rank, 2), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_carry_what_one_does(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_process, (port, str(tmp_path)), nprocs=2)
    expected = carry()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
