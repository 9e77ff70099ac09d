from __future__ import annotations

import pytest
import torch

from hf_selortho import select_pairs
from hf_selortho.pair_selection import CoactivationEMA
from hf_selortho.sparse_ops import active_features

N = 30


def batch(seed: int, tokens: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randint(-4, 3, (tokens, N), generator=generator).float())


def test_nothing_carried_is_the_selection_of_the_batch() -> None:
    carried = CoactivationEMA(N, decay=0.0, limit=10_000)
    for seed in range(3):
        h = batch(seed)
        carried.update(h)
        for fraction, support in ((0.05, 1), (0.2, 3)):
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


def test_the_limit_keeps_the_most_correlated_pairs() -> None:
    h = batch(0, 64)
    everything, limited = CoactivationEMA(N, 0.5, 10_000), CoactivationEMA(N, 0.5, 20)
    everything.update(h)
    limited.update(h)
    assert len(limited.keys) == 20
    assert torch.equal(limited.select(0.02, 1).keys(N), everything.select(0.02, 1).keys(N))


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
