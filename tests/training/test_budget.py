from __future__ import annotations

import json
import math
import random

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.budget import HIGHEST, LOWEST, FVUBudget, GradientShare, read_reference


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


@pytest.mark.parametrize("initial", [1e-3, 10.0])
def test_the_fvu_budget_is_reached_in_spite_of_noise_and_drift(initial) -> None:
    noise = random.Random(0)
    controller = FVUBudget(initial, excess=0.02, reference=lambda step: 0.5 / (1 + step / 500))
    excesses = []
    for step in range(3000):
        excess = 0.1 * min(controller.coefficient, 100.0)
        fvu = controller.reference(step) * (1 + excess) * (1 + noise.gauss(0, 0.01))
        controller.update(step, fvu)
        excesses.append(excess)
        assert LOWEST <= controller.coefficient <= HIGHEST
    assert sum(excesses[-500:]) / 500 == pytest.approx(0.02, rel=0.1)


def test_without_a_reference_the_coefficient_stays() -> None:
    controller = FVUBudget(0.1, excess=0.01, reference=lambda step: None)
    controller.update(1, 0.3)
    assert controller.coefficient == 0.1


def test_controllers_go_on_where_they_stopped() -> None:
    def reference(step: int) -> float:
        return 0.2

    one, other = FVUBudget(0.1, 0.01, reference), FVUBudget(0.5, 0.01, reference)
    one.update(1, 0.21)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for controller in (one, other):
        controller.update(2, 0.19)
    assert one.state_dict() == other.state_dict()


def test_the_reference_is_read_from_a_run(tmp_path) -> None:
    rows = [{"step": step, "fvu": 1 / step} for step in range(10, 310, 10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for path in (tmp_path, tmp_path / "metrics.jsonl"):
        reference = read_reference(path)
        assert reference(150) == pytest.approx(1 / 150, rel=0.01)
        assert reference(160) < reference(155) < reference(150)
        assert reference(10_000) == reference(300) and reference(1) == reference(10)


def test_single_noisy_batches_do_not_move_the_reference(tmp_path) -> None:
    rows = [{"step": step, "fvu": 5.0 if step == 15 else 0.1} for step in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_reference(tmp_path)(15) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected the folder of a run without penalty"),
        ("", "holds no fvu"),
        ('{"step": 1}', "holds no fvu"),
        ('{"step": 1, "fvu": 0.1}\n{"step": 2, "f', "line 2 is damaged"),
        ('{"fvu": 0.1}', "line 1 is damaged"),
        ("[1]", "line 1 is damaged"),
    ],
)
def test_a_bad_reference_is_named(text, message, tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SelOrthoError, match=message):
        read_reference(file)
