"""The published records are of the plan as it is."""

from __future__ import annotations

from experiments.page import PUBLISHED
from experiments.plan import load_plan
from experiments.records import Records
from experiments.worlds import World


def test_the_records_of_saes_are_of_the_plan_as_it_is() -> None:
    plan, records = load_plan("demo"), Records(PUBLISHED)
    names = {
        unit.record(variant): {**unit.sweep.arguments, **settings, "seed": unit.seed}
        for unit in plan.units()
        for variant, settings in unit.sweep.variants.items()
    }
    for name, wanted in names.items():
        if records.has(name):
            arguments = records.read(name)["arguments"]
            assert {key: arguments.get(key) for key in wanted} == wanted, name
    assert sum(map(records.has, names)) == len(list(records.all("sae"))), "records of variants that the plan lacks"


def test_the_records_on_synthetic_data_are_of_the_plan_as_it_is() -> None:
    plan, records = load_plan("demo"), Records(PUBLISHED)
    for run in plan.worlds:
        known = records.read(run.name)
        assert World.from_json(known["world"]) == World.from_json(run.world)
        assert (known["settings"], known["variants"]) == (run.settings, run.variants)
        assert (known["training"], known["seed"]) == (run.training, run.seed)
    assert len(list(records.all("world"))) == len(plan.worlds)
