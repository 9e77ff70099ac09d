"""Learning rate and steered coefficient by step."""

from __future__ import annotations

import math

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.arguments import parse_arguments
from hf_selortho.training.schedules import learning_rate_at
from hf_selortho.training.state import GradientShare


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate_at(s, peak=1.0, steps=10, warmup=4, decay=5) for s in range(1, 11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    shares = [learning_rate_at(s, peak=1.0, steps=10, warmup=0.4, decay=0.5) for s in range(1, 11)]
    assert shares == pytest.approx(rates)
    assert learning_rate_at(1, peak=3e-4, steps=10) == learning_rate_at(10, peak=3e-4, steps=10) == 3e-4


@pytest.mark.parametrize("initial", [1e-4, 0.1, 50.0])
def test_the_gradient_share_is_reached_and_kept(initial) -> None:
    controller = GradientShare(initial, share=0.05)
    for step in range(200):
        reconstruction = 3.0 / (1 + step / 100)  # it falls while training goes on
        controller.update(7.0 * controller.coefficient, reconstruction)
    assert 7.0 * controller.coefficient == pytest.approx(0.05 * reconstruction, rel=0.1)


@pytest.mark.parametrize("norms", [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_norms_that_tell_nothing_leave_the_coefficient(norms) -> None:
    controller = GradientShare(0.1, share=0.05)
    controller.update(*norms)
    assert controller.coefficient == 0.1


def test_the_coefficient_stays_between_its_ends() -> None:
    share = GradientShare(0.1, 0.05, low=0.01, high=0.2)
    for _ in range(500):
        share.update(1e-3, 10.0)
    assert share.coefficient == 0.2


def test_the_budget_on_fvu_is_gone() -> None:
    with pytest.raises(SelOrthoError, match="ortho_budget.*none or gradient"):
        parse_arguments(["--model", "m", "--layer", "5", "--ortho_budget", "fvu"])
