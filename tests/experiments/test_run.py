"""What of a plan is still to be trained, by its records."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.jobs import run_process, side_by_side
from experiments.plan import Plan, SyntheticRun, load_plan
from experiments.plan_run import PlanRun
from experiments.records import Records, thinned
from experiments.run import check_settings, missing, seeds_record
from experiments.synthetic_training import add_scores, missing_scores
from hf_selortho import SelOrthoError

VARIANTS = {"none": {"ortho_coefficient": 0.0}, "full-1": {"penalty": "full"}}


def plan_of(folder: Path, seeds: int, k: int = 4) -> Plan:
    """Two variants on one layer, of which the seeds of the first are compared."""
    content = {
        "training": {"max_steps": 10, "batch_size": 64},
        "recipes": {"topk": {"activation": "topk", "k": k}},
        "sweeps": {
            "one": {
                "sections": ["pareto"], "recipe": "topk", "layers": [1], "variants": VARIANTS, "compared": ["none"]
            }
        },
    }  # fmt: skip
    path = folder / "small.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_plan(str(path), seeds=seeds)


@pytest.fixture
def run(tmp_path: Path) -> PlanRun:
    """Everything of two seeds is recorded, and no weights are left."""
    run = PlanRun(plan_of(tmp_path, 2), tmp_path / "work", tmp_path / "results")
    for unit in run.plan.units():
        for variant, settings in VARIANTS.items():
            arguments = {**unit.sweep.arguments, **settings, "seed": unit.seed}
            run.records.write(unit.record(variant), {"kind": "sae", "arguments": arguments})
    run.records.write(seeds_record(run.plan.units()[0], "none"), {"kind": "seeds", "seeds": 2})
    return run


@pytest.mark.parametrize(
    ("seeds", "expected"), [(1, [[]]), (2, [[], []]), (3, [["none"], ["none"], ["none", "full-1"]])]
)
def test_what_has_a_record_is_trained_again_only_to_be_compared_with_more_seeds(run, tmp_path, seeds, expected) -> None:
    run = replace(run, plan=plan_of(tmp_path, seeds))
    assert [missing(run, unit) for unit in run.plan.units()] == expected


def test_records_of_other_settings_are_refused(run, tmp_path) -> None:
    plan = plan_of(tmp_path, 2, k=8)
    with pytest.raises(SelOrthoError, match=r"none-layer1-seed0.json is of k 4, the plan has 8: remove the record, or"):
        check_settings(plan.units()[0], run.records)


def test_synthetic_records_may_grow_and_those_of_other_settings_are_refused(tmp_path) -> None:
    run = SyntheticRun(
        {"name": "a", "features": 80}, "topk", 0, {"k": 2}, {"none": {}, "x": {"k": 3}}, {"steps": 5}, ("topk",)
    )
    records = Records(tmp_path)
    assert missing_scores(run, records) == (["none", "x"], ["topk"])
    add_scores(replace(run, variants={"none": {}}), records, 100, "scores", {"none": {"mcc": 0.5}})
    assert missing_scores(run, records) == (["x"], ["topk"])
    for change, what in (
        ({"world": {"name": "a", "features": 90}}, "world"),
        ({"training": {"steps": 6}}, "training"),
        ({"settings": {"k": 4}}, "settings"),
        ({"variants": {"none": {"k": 9}}}, "variants"),
    ):
        with pytest.raises(SelOrthoError, match=f"a-topk-seed0.json is of the {what} .*: remove the record, or choose"):
            missing_scores(replace(run, **change), records)


@pytest.mark.parametrize(("content", "fault"), [("{", "damaged"), ("[]", "damaged"), ("{}", "schema_version None")])
def test_damaged_records_are_named(tmp_path, content, fault) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(SelOrthoError, match=f"a.json .*{fault}.*: remove it and run the plan again"):
        Records(tmp_path).read("a")


def test_a_curve_has_the_first_and_the_last_step() -> None:
    curve = thinned([{"step": step, "fvu": 1 / step, "l0": None} for step in range(1, 101)], points=5)
    assert curve == {"step": [1, 26, 51, 75, 100], "fvu": [1.0, 0.03846, 0.01961, 0.01333, 0.01]}


def test_a_failure_ends_what_has_not_begun() -> None:
    done, begun = [], threading.Event()

    def work(item: int, slot: int) -> None:
        if item == 1:
            begun.wait()
            raise SelOrthoError("number 1")
        begun.set()
        time.sleep(0.01)
        done.append((item, slot))

    with pytest.raises(SelOrthoError, match="number 1"):
        side_by_side([1, 2, *range(10, 500)], work, 2, "test")
    assert {slot for _, slot in done} <= {0, 1} and done[0][0] == 2 and len(done) < 490


def test_a_process_that_fails_leaves_its_last_line(tmp_path) -> None:
    command = ["-c", "import sys; print('one'); sys.exit('two')"]
    with pytest.raises(SelOrthoError, match=r"the test ended with exit code 1: two \(see .*log\)"):
        run_process(command, tmp_path / "log", "the test")


def test_a_mistake_is_one_line_and_code_2(tmp_path) -> None:
    command = [sys.executable, "-m", "experiments.reproduce", "--only", "nothing", "--work_dir", str(tmp_path / "w")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and "error: --only nothing: expected some of table1" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
