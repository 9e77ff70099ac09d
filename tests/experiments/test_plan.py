"""Plans: what a file may say, what it comes to, and how mistakes in it are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.plan import SECTIONS, list_plans, load_plan, merged
from experiments.synthetic_training import baseline_settings
from hf_selortho import SelOrthoConfig, SelOrthoError

SMALL: dict[str, Any] = {
    "seeds": 2,
    "training": {"max_steps": 10, "batch_size": 64},
    "recipes": {"topk": {"activation": "topk", "k": 4}},
    "variant_sets": {"a": {"none": {"ortho_coefficient": 0.0}}, "b": {"full-1": {"penalty": "full"}}},
    "sweeps": {
        "one": {"sections": ["pareto"], "recipe": "topk", "layers": [1, 3], "variants": ["a", "b"]},
        "two": {"sections": ["limits"], "recipe": "topk", "layers": [1], "variants": {"x": {"k": 2}}},
    },
    "quick": {"seeds": 1, "training": {"max_steps": 2}, "sweeps": {"two": None}},
}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "small.json"
    path.write_text(json.dumps({**SMALL, **changes}), encoding="utf-8")
    return str(path)


def test_units_are_sweeps_times_layers_times_seeds(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path))
    assert [unit.name for unit in plan.units()] == [
        "one-layer1-seed0", "one-layer1-seed1", "one-layer3-seed0", "one-layer3-seed1", "two-layer1-seed0",
        "two-layer1-seed1",
    ]  # fmt: skip
    assert plan.units()[0].record("full-1") == "one/full-1-layer1-seed0"
    assert plan.sweeps[0].variants == {"none": {"ortho_coefficient": 0.0}, "full-1": {"penalty": "full"}}
    assert plan.sweeps[0].arguments == {"max_steps": 10, "batch_size": 64, "activation": "topk", "k": 4}
    assert plan.layers == [1, 3]


def test_quick_merges_and_removes_and_seeds_of_the_command_line_come_first(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path), quick=True)
    assert plan.name == "small-quick" and plan.seeds == 1
    assert [sweep.name for sweep in plan.sweeps] == ["one"]
    assert plan.sweeps[0].arguments["max_steps"] == 2 and plan.sweeps[0].arguments["batch_size"] == 64
    assert load_plan(write(tmp_path), quick=True, seeds=5).seeds == 5
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": None, "e": 5}) == {
        "a": {"b": 4, "c": 2}, "e": 5,
    }  # fmt: skip


def test_only_keeps_the_sweeps_of_a_section(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path))
    assert [sweep.name for sweep in plan.only(["limits"]).sweeps] == ["two"]
    assert plan.only(["limits"]).layers == [1]
    assert plan.only(["ground_truth"]).sweeps == ()


def test_every_seed_has_a_world_of_its_own_and_the_recipes_share_it(tmp_path: Path) -> None:
    block = {
        "worlds": {"a": {"features": 64, "recipes": ["relu"]}, "b": {"features": 32}, "c": {"features": 64, "seed": 5}},
        "recipes": {"topk": {"k": 2}, "relu": {}},
        "variants": ["a"],
        "peers": {"topk": ["topk"]},
    }
    runs = load_plan(write(tmp_path, ground_truth=block), seeds=2).synthetic
    assert [run.name for run in runs if run.seed == 0] == [
        f"ground_truth/{name}-seed0" for name in ("a-relu", "b-topk", "b-relu", "c-topk", "c-relu")
    ]
    assert runs[0].world == {"name": "a", "features": 64, "seed": runs[0].world["seed"]}
    assert [run.baselines for run in runs if run.seed == 0] == [(), ("topk",), (), ("topk",), ()]
    seeds = {(run.world["name"], run.recipe, run.seed): run.world["seed"] for run in runs}
    assert all(seeds["b", "topk", seed] == seeds["b", "relu", seed] for seed in (0, 1))
    assert len(set(seeds.values())) == 5 and seeds["c", "topk", 0] == seeds["c", "relu", 1] == 5


SWEEP: dict[str, Any] = {"recipe": "topk", "layers": [1], "variants": ["a"]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sweeps": {"s": {**SWEEP, "recipe": "x"}}}, "sweep 's': recipe: 'x' is not known; expected one of topk"),
        ({"sweeps": {"s": {**SWEEP, "layers": []}}}, "expected decoder layers"),
        ({"sweeps": {"s": {**SWEEP, "variants": ["c"]}}}, "variants: 'c' is not known; expected one of a, b"),
        ({"sweeps": {"s": {**SWEEP, "variants": []}}}, "no variants"),
        ({"sweeps": {"s": {**SWEEP, "variants": {"x": {"kk": 1}}}}}, "variant 'x': 'kk' is not known"),
        ({"sweeps": {"s": {**SWEEP, "layer": [1]}}}, "'layer' is not known"),
        ({"sweeps": {"s": {**SWEEP, "sections": ["x"]}}}, "sections: 'x' is not known; expected one of table1"),
        ({"ground_truth": {"worlds": {"w": {"recipes": ["x"]}}, "recipes": {"topk": {}}}}, "world 'w': recipe: 'x'"),
        ({"sweps": {}}, "'sweps' is not known"),
        ({"seeds": 0}, "seeds 0: expected a whole number"),
        ({"examples": {"sweep": "three", "variant": "x"}}, "examples: sweep: 'three' is not known"),
        ({"examples": {"sweep": "two", "variant": "x"}}, "of sweep 'two': 'none' is not known; expected one of x"),
        ({"examples": {"sweep": "one", "variant": "y"}}, "'y' is not known; expected one of none, full-1"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(SelOrthoError, match=expected):
        load_plan(write(tmp_path, **changes))


def test_an_unknown_plan_is_named() -> None:
    with pytest.raises(SelOrthoError, match="unknown plan 'x': expected one of demo"):
        load_plan("x")


@pytest.mark.parametrize("name", list_plans())
@pytest.mark.parametrize("quick", [False, True])
def test_plans_that_come_with_the_study(name: str, quick: bool) -> None:
    plan = load_plan(name, quick=quick)
    assert plan.description and plan.harvest["model"]
    assert {section for sweep in plan.sweeps for section in sweep.sections} <= set(SECTIONS)
    for sweep in plan.sweeps:
        assert "none" in sweep.variants, f"{sweep.name} has no twin to be compared with"
        settings = {key: sweep.arguments[key] for key in sweep.arguments if key in SelOrthoConfig.describe()}
        for variant in sweep.variants.values():
            SelOrthoConfig(**{**settings, **variant, "d_in": 640})
    for run in plan.synthetic:
        assert "none" in run.variants
        for baseline in run.baselines:
            baseline_settings(baseline, run.settings, 1.0)  # says what is missing
        for variant in run.variants.values():
            SelOrthoConfig(**{**run.settings, **variant, "d_in": 64})
