"""Records to tables, differences from the twin, intervals and tests: closed form."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
import pytest

from experiments.analysis import Study, changed_tests, consistent, differences, gains, interval, read_record, worth
from experiments.tables import all_tables, cell, over_seeds
from hf_selortho import SelOrthoError

TWIN = {
    "fvu": 0.08, "l0": 32.0, "dead_features": 10.0, "top_correlation": 0.7, "peak_correlation": 0.9,
    "max_decoder_cosine": 0.25, "loss_recovered": 0.9,
}  # fmt: skip


def sae(variant: str, seed: int, sweep: str, **figures: float) -> dict[str, Any]:
    arguments = {"activation": "relu" if sweep == "relu" else "topk"}
    return {"schema_version": 1, "kind": "sae", "sweep": sweep, "layer": 8, "variant": variant, "seed": seed,
            "arguments": arguments, "evaluation": TWIN | figures}  # fmt: skip


@pytest.fixture
def study_of(tmp_path):
    """Write records and read them as a study."""

    def make(*records: dict[str, Any]) -> Study:
        for number, record in enumerate(records):
            (tmp_path / f"{number:03}.json").write_text(json.dumps(record), encoding="utf-8")
        return Study.read(tmp_path)

    return make


def test_differences_are_taken_seed_by_seed(study_of) -> None:
    twins = [sae("none", seed, "topk", fvu=0.1 * seed) for seed in (1, 2)]
    own = [sae("a-1", seed, "topk", fvu=0.1 * seed + 0.01, l0=32 + seed) for seed in (1, 2, 3)]  # seed 3 has no twin
    found = differences(study_of(*twins, *own).sweep("topk"))
    assert found["fvu"].to_list() == pytest.approx([0.01, 0.01])
    assert found["fvu_share"].to_list() == pytest.approx([0.1, 0.05])
    assert found["l0_share"].to_list() == pytest.approx([1 / 32, 2 / 32])


def test_relu_is_compared_at_equal_l0_and_nothing_is_extrapolated(study_of) -> None:
    twins = [sae("none", 0, "relu", l0=100, fvu=0.10), sae("none-l0.03", 0, "relu", l0=120, fvu=0.08)]
    inside, outside = sae("a-1", 0, "relu", l0=110, fvu=0.095), sae("b-1", 0, "relu", l0=90, fvu=0.1)
    found = differences(study_of(*twins, inside, outside).sweep("relu")).droplevel("seed")
    expected = 0.10 * 0.8 ** (math.log(1.1) / math.log(1.2))  # a power law through both twins
    assert found.loc["a-1", "fvu"] == pytest.approx(0.095 - expected)
    assert found.loc["a-1", "fvu_share"] == pytest.approx(0.095 / expected - 1)
    assert found.loc["a-1", "same_l1_fvu_share"] == pytest.approx(-0.05)
    assert math.isnan(found.loc["b-1", "fvu"]) and found.loc["b-1", "dead_features"] == 0


def test_intervals_are_those_of_student() -> None:
    assert interval(pd.Series([1.0, 2.0, 3.0])) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(interval(pd.Series([1.0])))
    assert cell(-0.36364, 0.0276, 3, "+") == "-0.364 ± 0.028"
    assert (cell(-0.0001, math.nan, 1, "+"), cell(math.nan, 1.0, 1)) == ("+0.0", "-")


def test_what_is_worth_it(study_of) -> None:
    variants = {
        "none": {},
        "both-1": {"fvu": 0.0807, "top_correlation": 0.5, "max_decoder_cosine": 0.14},
        "cut-1": {"fvu": 0.0835, "top_correlation": 0.5},
        "dear-1": {"fvu": 0.09, "top_correlation": 0.1, "max_decoder_cosine": 0.1},
        "deadly-1": {"top_correlation": 0.1, "max_decoder_cosine": 0.1, "dead_features": 11.0},
    }
    study = study_of(*(sae(name, seed, "topk", **own) for name, own in variants.items() for seed in (0, 1, 2)))
    marks = worth(study.sweep("topk"), differences(study.sweep("topk")))
    assert {name: list(marks.columns[row]) for name, row in marks.iterrows()} == {
        "both-1": ["correlation", "cosine", "both"], "cut-1": ["correlation"], "dear-1": [], "deadly-1": [],
    }  # fmt: skip
    assert "| `" not in (shown := all_tables(study)["topk-changes"]).loc["`both-1`", "worth it"]
    assert shown.loc["`both-1`", "max decoder cosine, %"] == "-44.0 ± 0.0"


def test_gains_on_synthetic_data_and_the_sign_test(study_of) -> None:
    def world(seed: int, mcc: float, f1: float) -> dict[str, Any]:
        scores = {"explained_variance": 0.8, "uniqueness": 0.5, "recovered": 0.3, "precision": 0.5, "l0": 9.0}
        own = scores | {"mcc": mcc, "f1": f1, "explained_variance": 0.9}
        return {
            "schema_version": 1, "kind": "world", "recipe": "topk", "world": {"name": "flat"}, "seed": seed,
            "scores": {"none": scores | {"mcc": 0.5, "f1": 0.5}, "a-1": own}, "peers": {"topk": own},
        }  # fmt: skip

    study = study_of(*(world(seed, 0.6, 0.6 if seed else 0.4) for seed in range(12)))
    found = gains(study.synthetic, "topk")
    assert len(found) == 12 and changed_tests(found) == 8
    assert found["fvu_share"].to_list() == pytest.approx([-0.5] * 12)
    assert consistent(found["mcc"], 8), "12 of 12: p = 0.0002"
    assert consistent(found["f1"], 8) and not consistent(found["f1"], 96), "11 of 12: p = 0.003"
    assert not consistent(found["recovered"], 1), "ties say nothing"
    assert all_tables(study)["synthetic-topk"].loc["`a-1`", "MCC"] == "**+0.100 (12/12)**"


def test_tables_show_the_twin_first_and_a_dash_for_what_is_not_known(study_of) -> None:
    study = study_of(sae("a-1", 0, "topk"), sae("none-k28", 0, "topk"), sae("none", 0, "topk", fvu=float("nan")))
    shown = over_seeds(study.sweep("topk"), [("fvu", "FVU", 2), ("not_there", "x", 1)])
    assert shown.to_dict("list") == {"FVU": ["-", "0.08", "0.08"], "x": ["-"] * 3}
    assert list(shown.index) == ["`none`", "`none-k28`", "`a-1`"]


def test_a_damaged_record_is_named(tmp_path) -> None:
    path = tmp_path / "none-layer8-seed0.json"
    path.write_text('{"schema', encoding="utf-8")
    with pytest.raises(SelOrthoError, match=r"none-layer8-seed0.json is missing or damaged.*run the plan again"):
        read_record(path)
    path.write_text('{"schema_version": 9}', encoding="utf-8")
    with pytest.raises(SelOrthoError, match="schema_version 9, expected 1"):
        read_record(path)
