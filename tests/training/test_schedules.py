"""Learning rate, penalty and its steered coefficient by step."""

from __future__ import annotations

import math

import pytest
import torch

from hf_selortho import Pairs, SelOrthoConfig
from hf_selortho.sparse_ops import DenseFeatures
from hf_selortho.training.schedules import GradientShare, PenaltySchedule, learning_rate_at


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate_at(s, peak=1.0, steps=10, warmup=4, decay=5) for s in range(1, 11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    shares = [learning_rate_at(s, peak=1.0, steps=10, warmup=0.4, decay=0.5) for s in range(1, 11)]
    assert shares == pytest.approx(rates)
    assert learning_rate_at(1, peak=3e-4, steps=10) == learning_rate_at(10, peak=3e-4, steps=10) == 3e-4


def test_the_penalty_acts_at_selections_or_at_every_step_on_the_latest_pairs() -> None:
    pairs = Pairs(torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    settings = {"d_in": 4, "d_sae": 8, "selection_interval": 3, "ortho_coefficient": 0.5}
    sparse, dense = (
        PenaltySchedule(SelOrthoConfig(**settings, penalty_schedule=name)) for name in ("on_selection", "every_step")
    )
    sparse.pairs = dense.pairs = pairs
    plans = [[schedule.plan(step) for step in range(1, 5)] for schedule in (sparse, dense)]
    assert [(p.acts, p.pairs, p.weight) for p in plans[0]] == [(acts, None, 3.0) for acts in (True, False, False, True)]
    assert [(p.acts, p.pairs, p.weight) for p in plans[1]] == [(True, held, 1.0) for held in (None, pairs, pairs, None)]
    assert {plan.coefficient for plan in sum(plans, [])} == {0.5}


def test_a_copy_keeps_what_the_schedule_forgets() -> None:
    config = SelOrthoConfig(d_in=4, d_sae=8, carry_decay=0.5, selection_interval=1, min_support=1)
    schedule = PenaltySchedule(config)
    select = schedule.plan(1).select
    assert select is not None
    select(DenseFeatures(torch.rand(20, 8)))
    before, kept = schedule.copy(), {name: value.clone() for name, value in schedule.state_dict()[0].items()}
    select(DenseFeatures(torch.rand(20, 8)))
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict()[0].items())
    assert not torch.equal(schedule.state_dict()[0]["average.squares"], kept["average.squares"])


@pytest.mark.parametrize("initial", [1e-4, 0.1, 50.0])
def test_the_gradient_share_is_reached_and_kept(initial) -> None:
    controller = GradientShare(initial, share=0.05)
    for step in range(200):
        reconstruction = 3.0 / (1 + step / 100)  # it falls while training goes on
        controller.update(7.0 * controller.coefficient, reconstruction)
    assert 7.0 * controller.coefficient == pytest.approx(0.05 * reconstruction, rel=0.1)


def test_the_steered_coefficient_stays_between_its_ends_and_where_norms_tell_nothing() -> None:
    share = GradientShare(0.1, 0.05, low=0.01, high=0.2)
    for norms in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)):
        share.update(*norms)
        assert share.coefficient == 0.1
    for _ in range(500):
        share.update(1e-3, 10.0)
    assert share.coefficient == 0.2
