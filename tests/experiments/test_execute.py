"""What of a plan is still to be trained, by its records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.execute import check_settings, missing, seeds_record
from experiments.plan import Plan, WorldRun, load_plan
from experiments.records import Records
from experiments.stages import Places
from experiments.world_run import add_scores, missing_scores
from hf_selortho import SelOrthoError

VARIANTS = {"none": {"ortho_coefficient": 0.0}, "full-1": {"penalty": "full"}}


def plan_of(folder: Path, seeds: int) -> Plan:
    """Two variants on one layer, of which the seeds of the first are compared."""
    content = {
        "seeds": 2,
        "training": {"max_steps": 10, "batch_size": 64},
        "recipes": {"topk": {"activation": "topk", "k": 4}},
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
def places(tmp_path: Path) -> Places:
    """Everything of two seeds is recorded, and no weights are left."""
    found = Places(tmp_path / "work", tmp_path / "results", tmp_path / "scripts")
    plan, records = plan_of(tmp_path, 2), Records(found.results)
    for unit in plan.units():
        for variant, settings in VARIANTS.items():
            arguments = {**unit.sweep.arguments, **settings, "seed": unit.seed}
            records.write(unit.record(variant), {"kind": "sae", "arguments": arguments})
    records.write(seeds_record(plan.sweeps[0], "none", 1), {"kind": "seeds", "seeds": 2})
    return found


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_has_all_its_records_is_not_trained_again(places, tmp_path, seeds) -> None:
    plan = plan_of(tmp_path, seeds)
    assert [missing(unit, Records(places.results), places, plan) for unit in plan.units()] == [[]] * seeds


def test_more_seeds_want_the_weights_of_those_that_are_compared_with_them(places, tmp_path) -> None:
    plan = plan_of(tmp_path, 3)
    wanted = [missing(unit, Records(places.results), places, plan) for unit in plan.units()]
    assert wanted == [["none"], ["none"], ["none", "full-1"]]


def test_records_of_other_settings_are_refused(places, tmp_path) -> None:
    plan_of(tmp_path, 2)
    changed = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    changed["recipes"]["topk"]["k"] = 8
    (tmp_path / "small.json").write_text(json.dumps(changed), encoding="utf-8")
    plan = load_plan(str(tmp_path / "small.json"), seeds=2)
    with pytest.raises(SelOrthoError, match=r"none-layer1-seed0.json is of k 4, the plan has 8: remove the record, or"):
        check_settings(plan.units()[0], Records(places.results))


def test_a_record_of_another_world_is_refused(tmp_path) -> None:
    run = WorldRun(
        {"name": "a", "features": 80}, "topk", 0, {"k": 2}, {"none": {}, "x": {"k": 3}}, {"steps": 5}, ("topk",)
    )
    records = Records(tmp_path)
    assert missing_scores(run, records) == (["none", "x"], ["topk"])
    score = {"none": {"mcc": 0.5}}
    add_scores(replace(run, variants={"none": {}}), records, 100, "scores", score)
    assert missing_scores(run, records) == (["x"], ["topk"]), "a plan may grow"
    for change, what in (
        ({"world": {"name": "a", "features": 90}}, "world"),
        ({"training": {"steps": 6}}, "training"),
        ({"settings": {"k": 4}}, "settings"),
        ({"variants": {"none": {"k": 9}}}, "variants"),
    ):
        with pytest.raises(SelOrthoError, match=f"a-topk-seed0.json is of the {what} .*: remove the record, or choose"):
            missing_scores(replace(run, **change), records)
