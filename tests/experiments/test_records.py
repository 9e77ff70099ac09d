"""The published records are of the plan as it is."""

from __future__ import annotations

from experiments.page import PUBLISHED
from experiments.plan import load_plan
from experiments.records import Records
from experiments.synthetic_data import World


def test_the_records_of_saes_are_of_the_plan_as_it_is() -> None:
    plan, records = load_plan("demo"), Records(PUBLISHED)
    names = set()
    for unit in plan.units():
        for variant, settings in unit.sweep.variants.items():
            wanted = {**unit.sweep.arguments, **settings, "seed": unit.seed}
            arguments = records.read(unit.record(variant))["arguments"]
            assert {key: arguments.get(key) for key in wanted} == wanted, unit.record(variant)
            names.add(unit.record(variant))
    kept = {str(path.relative_to(PUBLISHED).with_suffix("")) for path in PUBLISHED.rglob("*-layer*-seed[0-9].json")}
    assert all("redundancy" in name or "adaptive" in name for name in kept - names), "only these left the plan"


def test_the_records_on_synthetic_data_are_of_the_plan_as_it_is() -> None:
    plan, records = load_plan("demo"), Records(PUBLISHED)
    for run in plan.synthetic:
        known = records.read(run.name)
        assert World.from_json(known["world"]) == World.from_json(run.world)
        assert known["settings"] == run.settings and run.variants.items() <= known["variants"].items()
        assert (known["training"], known["seed"]) == (run.training, run.seed)
    assert len(list((PUBLISHED / "ground_truth").iterdir())) == len(plan.synthetic)
