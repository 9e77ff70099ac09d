"""What of a plan is still to be trained, by its records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_selortho.experiments.execute import missing, seeds_record
from hf_selortho.experiments.plan import Plan, load_plan
from hf_selortho.experiments.records import Records
from hf_selortho.experiments.stages import Places

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
        for variant in VARIANTS:
            records.write(unit.record(variant), {"kind": "sae"})
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
