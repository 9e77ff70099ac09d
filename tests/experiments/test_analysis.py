"""Seeds to means and to differences from the twin: closed form."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hf_selortho.experiments.claims import FAILS, HOLDS, SMALLER, UNKNOWN, Evidence, useful_range, verdicts
from hf_selortho.experiments.comparison import best_by, cheapest_by, comparisons, nearest_to_both
from hf_selortho.experiments.records import Records, thinned
from hf_selortho.experiments.sections.steering import steered_words
from hf_selortho.experiments.summaries import Figure, at_equal_l0, interpolate, paired, summarise, value_of

from hf_selortho import SelOrthoError


def record(variant: str, seed: int, sweep: str = "topk", layer: int = 8, **figures: float) -> dict[str, Any]:
    """A record as a measurement writes it, with these figures."""
    evaluation = {
        "fvu": 0.08, "l0": 32.0, "dead_features": 10.0, "top_correlation": 0.7, "peak_correlation": 0.9,
        "max_decoder_cosine": 0.25, "mse": 1.0, "mean_correlation": 0.1, "active_features": 600.0,
        "unique_features": 300.0,
    }  # fmt: skip
    return {
        "kind": "sae", "sweep": sweep, "layer": layer, "variant": variant, "seed": seed,
        "arguments": {"activation": "topk" if sweep == "topk" else "relu", "d_sae": 640},
        "evaluation": evaluation | figures,
    }  # fmt: skip


def test_mean_and_spread_over_seeds() -> None:
    figure = Figure((1.0, 2.0, 4.0))
    assert figure.mean == pytest.approx(7 / 3)
    assert figure.std == pytest.approx(statistics.stdev([1, 2, 4]))
    assert figure.text(2) == "2.33 ± 1.53" and Figure((1.0,)).text(2) == "1.00"
    assert Figure((0.1,)).percent() == "+10.0%" and Figure((-0.25,)).signed(2) == "-0.25"


def test_differences_are_taken_seed_by_seed() -> None:
    found = summarise(
        [record("none", s, fvu=0.1 * s) for s in (1, 2)] + [record("a", s, fvu=0.1 * s + 0.01) for s in (1, 2, 3)]
    )
    twin, other = found["topk", 8, "none"], found["topk", 8, "a"]
    difference = paired(other, twin, "fvu")
    assert difference is not None and difference.values == pytest.approx((0.01, 0.01))  # seed 3 has no twin
    relative = paired(other, twin, "fvu", relative=True)
    assert relative is not None and relative.values == pytest.approx((0.1, 0.05))
    assert paired(other, twin, "not_there") is None


def test_values_by_name_and_by_part() -> None:
    one = record("none", 0) | {"spread_over_batches": {"pair_churn": {"mean": 0.3}, "top_correlation": None}}
    assert value_of(one, "fvu") == 0.08
    assert value_of(one, "spread_over_batches.pair_churn.mean") == 0.3
    assert value_of(one, "spread_over_batches.top_correlation.std") is None
    assert value_of(record("none", 0, fvu=float("nan")), "fvu") is None


def test_equal_l0_is_interpolated_and_never_extrapolated() -> None:
    assert interpolate([(1, 10), (3, 30)], 2) == 20
    assert interpolate([(1, 10), (3, 30)], 3) == 30
    assert interpolate([(1, 10), (3, 30)], 4) is None
    twins = [record("none", 0, l0=100, fvu=0.10), record("none-l0.03", 0, l0=120, fvu=0.08)]
    found = summarise([*twins, record("a", 0, l0=110, fvu=0.095), record("b", 0, l0=90, fvu=0.1)])
    references = [found["topk", 8, "none"], found["topk", 8, "none-l0.03"]]
    excess = at_equal_l0(found["topk", 8, "a"], references)
    expected = 0.10 * 0.8 ** (math.log(1.1) / math.log(1.2))  # a power law through both twins
    assert excess is not None and excess.values == pytest.approx((0.095 - expected,))
    share = at_equal_l0(found["topk", 8, "a"], references, relative=True)
    assert share is not None and share.values == pytest.approx((0.095 / expected - 1,))
    assert at_equal_l0(found["topk", 8, "b"], references) is None


def test_what_is_worth_it() -> None:
    seeds = (0, 1, 2)
    cheap = [record("both-1", s, fvu=0.0807, top_correlation=0.5, max_decoder_cosine=0.14) for s in seeds]
    dear = [record("full-1", s, fvu=0.09, top_correlation=0.1, max_decoder_cosine=0.1) for s in seeds]
    deadly = [
        record("act-1", s, fvu=0.08, top_correlation=0.1, max_decoder_cosine=0.1, dead_features=11) for s in seeds
    ]
    found = comparisons(list(summarise([record("none", s) for s in seeds] + cheap + dear + deadly).values()))
    by_name = {one.summary.variant: one for one in found}
    assert by_name["both-1"].both and by_name["both-1"].affordable
    assert not by_name["full-1"].affordable and not by_name["full-1"].both
    assert not by_name["act-1"].affordable, "one more dead feature in every seed is one too many"
    best = best_by(found, "correlation")
    assert best is not None and best.summary.variant == "both-1"
    near = nearest_to_both(found)
    assert near is not None and near.summary.variant == "both-1"


def test_the_cheapest_that_reaches_a_cut_and_the_one_that_misses_both_least() -> None:
    variants = {
        "none": {}, "a-1": {"top_correlation": 0.5, "fvu": 0.081}, "a-2": {"top_correlation": 0.3, "fvu": 0.083},
        "b-1": {"top_correlation": 0.53, "max_decoder_cosine": 0.17, "fvu": 0.0809},
    }  # fmt: skip
    found = comparisons(list(summarise([record(n, s, **own) for n, own in variants.items() for s in (0, 1)]).values()))
    cheapest, most = cheapest_by(found, "correlation"), best_by(found, "correlation")
    assert cheapest is not None and cheapest.summary.variant == "a-1"
    assert most is not None and most.summary.variant == "a-2"
    best = cheapest_by(found, "cosine")
    assert best is not None and best.summary.variant == "b-1", "none reaches the cut, so the one that comes nearest"
    near = nearest_to_both(found)
    assert near is not None and near.summary.variant == "b-1"


def test_figures_at_the_l0_of_the_twin() -> None:
    twins = {"none": {"l0": 100.0}, "none-l0.03": {"l0": 200.0, "fvu": 0.04, "max_decoder_cosine": 0.125}}
    own = {"a-1": {"l0": 200.0, "fvu": 0.05, "max_decoder_cosine": 0.15, "dead_features": 3.0}}
    names = {**twins, **own}
    (one,) = comparisons(
        list(summarise([record(n, s, sweep="relu", **names[n]) for n in names for s in (0, 1)]).values())
    )
    shown = {key: one.at_twins_l0(key) for key in ("fvu", "max_decoder_cosine", "dead_features", "not_there")}
    assert shown["fvu"] is not None and shown["fvu"].values == pytest.approx((0.09, 0.09)), "0.01 above the twin there"
    assert shown["max_decoder_cosine"] is not None
    assert shown["max_decoder_cosine"].values == pytest.approx((0.275, 0.275))
    assert shown["dead_features"] == Figure((3.0, 3.0)) and shown["not_there"] is None
    (fixed,) = comparisons(list(summarise([record(n, 0) for n in ("none", "a-1")]).values()))
    assert fixed.at_twins_l0("fvu") == Figure((0.08,)), "TopK has the twin's L0 anyway"


def test_a_steered_coefficient_is_more_only_whichever_way_one_interpolates() -> None:
    fixed = {
        "none": {},
        "a-1": {"fvu": 0.0808, "top_correlation": 0.56},
        "a-2": {"fvu": 0.088, "top_correlation": 0.42},
    }
    for bought, word in ((0.40, "; more than fixed"), (0.5, "; about what fixed"), (0.65, "; less than fixed")):
        variants = {**fixed, "a-adaptive": {"fvu": 0.0832, "top_correlation": bought}}
        found = comparisons(list(summarise([record(n, s, **v) for n, v in variants.items() for s in (0, 1)]).values()))
        one = next(one for one in found if one.summary.variant == "a-adaptive")
        assert word in steered_words(one, found, {"a-adaptive"}), bought


def evidence(**changes: dict[str, float]) -> Evidence:
    """Three seeds of the paper's variants; by variant, what differs from the twin."""
    variants = {
        "none": {}, "selective-0.1": {"peak_correlation": 0.5}, "full-0.1": {"peak_correlation": 0.6},
        "selective-0.05": {"peak_correlation": 0.55}, "selective-0.2": {"fvu": 0.1},
        "share-0.05": {"dead_features": 12.0}, "none-l0.03": {"l0": 40.0, "fvu": 0.07},
        "none-l0.055": {"l0": 25.0, "fvu": 0.1},
    }  # fmt: skip
    saes = [
        record(name, seed, sweep="paper", **{**own, **changes.get(name, {})})
        for name, own in {**variants, **{name: {} for name in changes.keys() - variants.keys()}}.items()
        for seed in (0, 1, 2)
    ]
    return Evidence(summarise(saes), 8, (8,), None)


def test_verdicts_follow_the_numbers() -> None:
    found = {v.claim: v for v in verdicts(evidence())}
    assert found["Selective reaches a lower peak correlation than full orthogonality"].verdict == HOLDS
    assert found["Half the coefficient (0.05) leaves a higher peak correlation"].verdict == HOLDS
    assert found["Twice the coefficient (0.2) costs reconstruction"].verdict == HOLDS
    assert found["Fewer pairs (0.05%) leave more dead features"].verdict == HOLDS
    assert found["A step is faster than with full orthogonality"].verdict == UNKNOWN
    turned = evidence(
        **{
            "full-0.1": {"peak_correlation": 0.4},
            "selective-0.2": {"fvu": 0.082},
            "share-0.05": {"dead_features": 10.0},
        }
    )
    found = {v.claim: v for v in verdicts(turned)}
    assert found["Selective reaches a lower peak correlation than full orthogonality"].verdict == FAILS
    assert found["Twice the coefficient (0.2) costs reconstruction"].verdict == SMALLER
    assert found["Fewer pairs (0.05%) leave more dead features"].verdict == UNKNOWN, "no difference says nothing"
    full_sum = {"peak_correlation": 0.4}
    found = {v.claim: v for v in verdicts(evidence(**{"selective-sum": {}, "full-sum": full_sum}))}
    judged = found["Selective reaches a lower peak correlation than full orthogonality"]
    assert judged.verdict == UNKNOWN and judged.why == "as a mean it holds; as a sum it does not"


def test_useful_range_asks_for_a_cut_and_a_price() -> None:
    found = evidence(
        **{
            "selective-0.05": {"top_correlation": 0.5, "fvu": 0.0805},  # cuts, and is cheap
            "selective-0.1": {"top_correlation": 0.6},  # cuts too little
            "selective-0.2": {"top_correlation": 0.2, "fvu": 0.09},  # costs too much
        }
    )
    assert useful_range(found) == [0.05]


def test_records_are_whole_and_damage_is_named(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write("topk/none-layer8-seed0", record("none", 0) | {"nan": float("nan")})
    content = records.read("topk/none-layer8-seed0")
    assert content["evaluation"]["fvu"] == 0.08 and content["nan"] is None
    assert [r["variant"] for r in records.all("sae")] == ["none"] and not list(records.all("world"))
    records.path("topk/none-layer8-seed0").write_text('{"schema', encoding="utf-8")
    with pytest.raises(SelOrthoError, match=r"none-layer8-seed0.json is missing or damaged.*run the plan again"):
        records.read("topk/none-layer8-seed0")
    records.path("topk/none-layer8-seed0").write_text('{"schema_version": 9}', encoding="utf-8")
    with pytest.raises(SelOrthoError, match="schema_version 9, expected 1"):
        records.read("topk/none-layer8-seed0")


def test_a_thinned_curve_keeps_its_ends() -> None:
    rows = [{"step": step, "fvu": 1 / step, "l0": None} for step in range(1, 400)]
    columns = thinned(rows, 10)
    assert len(columns["step"]) == 10 and columns["step"][0] == 1 and columns["step"][-1] == 399
    assert columns["fvu"][0] == 1.0 and "l0" not in columns
