"""Scores on worlds against the twin's: closed form."""

from __future__ import annotations

from typing import Any

import pytest
from experiments.summaries import Figure

from experiments.world_gains import (
    by_recipe,
    consistent,
    enough,
    gain_over_twin,
    hierarchies,
    price_over_twin,
    raised_and_lowered,
    rules,
)


def record(recipe: str = "topk", structure: str = "flat", **scores: dict[str, float]) -> dict[str, Any]:
    return {"recipe": recipe, "world": {"name": "w", "structure": structure}, "scores": scores}


def test_gains_and_prices_are_against_the_twin_of_the_same_training() -> None:
    records = [
        record(none={"mcc": 0.5, "explained_variance": 0.9}, a={"mcc": 0.6, "explained_variance": 0.88}),
        record(none={"mcc": 0.7, "explained_variance": 0.8}, a={"mcc": 0.6, "explained_variance": 0.8}),
    ]
    gain, price = gain_over_twin(records, "a", "mcc"), price_over_twin(records, "a")
    assert gain is not None and gain.values == pytest.approx((0.1, -0.1))
    assert price is not None and price.values == pytest.approx((0.2, 0.0)), "of the variance that the twin leaves"
    assert gain_over_twin(records, "none", "mcc") is None and gain_over_twin([], "a", "mcc") is None
    assert gain_over_twin(records, "a", "f1") is None
    perfect = record(none={"explained_variance": 1.0}, a={"explained_variance": 1.0})
    assert price_over_twin([perfect], "a") is None
    assert rules(records) == ["a"] and rules([*records, record(none={"mcc": 0.5})]) == []


def test_a_sign_counts_where_chance_would_seldom_have_it() -> None:
    twelve, eleven = Figure((0.1,) * 12), Figure((0.1,) * 11 + (-0.1,))
    assert consistent(twelve, 1, 96) and not consistent(twelve, -1, 96)  # 2**-12 * 96 = 0.023
    assert not consistent(eleven, 1, 96) and consistent(eleven, 1, 15)  # 13 / 2**12 * 15 = 0.048
    assert not consistent(Figure((0.0,) * 12), 1, 1), "no difference has no sign"
    assert consistent(Figure((0.1,) * 12 + (0.0,) * 12), 1, 96), "ties say nothing"
    records = [record(none={"mcc": 0.5}, a={"mcc": 0.6}) for _ in range(8)]
    assert enough(records) and not enough(records[:7])  # 8 tests: 2**-7 * 8 = 0.0625


def test_what_is_raised_and_what_is_lowered() -> None:
    up, down = {"mcc": 0.6, "uniqueness": 0.5}, {"mcc": 0.4, "uniqueness": 0.5}
    records = [record(none={"mcc": 0.5, "uniqueness": 0.5}, a=up, b=down) for _ in range(12)]
    raised, lowered = raised_and_lowered(records, "mcc")
    assert list(raised) == ["a"] and list(lowered) == ["b"] and raised["a"].mean == pytest.approx(0.1)
    assert raised_and_lowered(records, "uniqueness") == ({}, {})


def test_kinds_of_records() -> None:
    records = [record("relu", none={}), record("topk", "hierarchical", none={}), record("topk", none={})]
    assert list(by_recipe(records)) == ["topk", "relu"] and len(by_recipe(records)["topk"]) == 2
    assert hierarchies(records) == [records[1]]
