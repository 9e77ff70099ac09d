"""Scores on synthetic worlds against the twin's: what a rule raises or lowers, and in how many trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

from experiments.summaries import NAMES, TWIN, Figure, is_twin

SCORES = {"mcc": "MCC", "uniqueness": "uniqueness", "recovered": "recovered", "f1": "F1"}  # that a rule is to raise
LEVEL = 0.05  # of the sign tests, all of a kind of SAE taken together

WorldRecord = Mapping[str, Any]  # a record of one world, recipe and seed


def by_world(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records by the names of world and recipe."""
    return _by_key(records, lambda record: (record["world"]["name"], record["recipe"]))


def by_recipe(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records by the name of the recipe, in the order of [`NAMES`]."""
    groups = _by_key(records, lambda record: str(record["recipe"]))
    order = {name: number for number, name in enumerate(NAMES)}
    return {name: groups[name] for name in sorted(groups, key=lambda name: order.get(name, len(order)))}


def _by_key(records: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def hierarchies(records: Sequence[WorldRecord]) -> list[WorldRecord]:
    """Those of worlds whose features have parents, in which there is absorption."""
    return [record for record in records if record["world"]["structure"] == "hierarchical"]


def rules(records: Sequence[WorldRecord]) -> list[str]:
    """Variants with a penalty that every one of the trainings has."""
    names = list(records[0]["scores"]) if records else []
    return [name for name in names if all(gain_over_twin([record], name, "mcc") is not None for record in records)]


def gain_over_twin(records: Sequence[WorldRecord], variant: str, key: str) -> Figure | None:
    """Difference of a score from the twin's of the same seed; None for the twin itself, or where a seed lacks it.

    Absorption is a score of hierarchies alone, and its difference one of those among the records.
    """
    pairs = _pairs(hierarchies(records) if key == "absorption" else records, variant, key)
    return None if pairs is None else Figure(tuple(own - twin for own, twin in pairs))


def price_over_twin(records: Sequence[WorldRecord], variant: str) -> Figure | None:
    """How much more variance is unexplained than by the twin, as a share of that."""
    pairs = _pairs(records, variant, "explained_variance")
    if pairs is None or any(twin >= 1 for _, twin in pairs):
        return None
    return Figure(tuple((1 - own) / (1 - twin) - 1 for own, twin in pairs))


def _pairs(records: Sequence[WorldRecord], variant: str, key: str) -> list[tuple[float, float]] | None:
    if is_twin(variant):
        return None
    pairs = [(r["scores"].get(variant, {}).get(key), r["scores"].get(TWIN, {}).get(key)) for r in records]
    return None if not pairs or any(own is None or twin is None for own, twin in pairs) else pairs


def consistent(gain: Figure, sign: int, tests: int) -> bool:
    """Whether a gain has a sign in more of the trainings than chance would have it, by a sign test without ties.

    Args:
        gain: one value for each training.
        sign: 1 or -1.
        tests: how many there are, all of which are to be right at the [`LEVEL`] (Bonferroni).
    """
    told = [value * sign > 0 for value in gain.values if value != 0]
    return bool(told) and bool(binomtest(sum(told), len(told), alternative="greater").pvalue < LEVEL / tests)


def count_of_tests(records: Sequence[WorldRecord]) -> int:
    """Sign tests of all rules and scores, in both directions."""
    return 2 * len(rules(records)) * len(SCORES)


def enough(records: Sequence[WorldRecord]) -> bool:
    """Whether there are so many trainings that a rule could pass, if all of them agreed."""
    return bool(records) and 2.0 ** -len(records) * count_of_tests(records) < LEVEL


def raised_and_lowered(records: Sequence[WorldRecord], key: str) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """The rules that raise a score over the twin's and those that lower it in more trainings than chance would."""
    tests = count_of_tests(records)
    found: tuple[dict[str, Figure], dict[str, Figure]] = ({}, {})
    for name in rules(records):
        gain = gain_over_twin(records, name, key)
        for held, sign in zip(found, (1, -1), strict=True):
            if gain is not None and consistent(gain, sign, tests):
                held[name] = gain
    return found
