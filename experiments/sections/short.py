"""The findings in a few sentences, for the head of a report and for README, which quotes them word for word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...configuration_selortho import SelOrthoConfig
from ..comparison import (
    BOUGHT,
    CORRELATION_CUT,
    COSINE_CUT,
    RELATIVE_ROOM,
    Comparison,
    best_of_both,
    cheapest_by,
    comparisons,
)
from ..figures import family
from ..findings import Findings
from ..summaries import NAMES, Figure
from ..world_gains import SCORES, by_recipe, enough, gain_over_twin, price_over_twin, raised_and_lowered, rules
from .glossary import WORDS
from .pairs import duplicates_words

PAPER = "activation"  # family of the paper's own penalty
BRIEF = {PAPER: "the paper's penalty", "full": "the penalty on all pairs"}  # where WORDS has more than a sentence needs


def in_short(findings: Findings, figures: Path, link: str) -> str:
    """A sentence for each kind of SAE on activations, and one for the synthetic worlds."""
    lines = []
    for sweep in findings.pareto:
        pairs = findings.examples
        duplicates = duplicates_words(pairs) if pairs is not None and pairs["sweep"] == sweep else ""
        lines.append(sae_words(NAMES.get(sweep, sweep), comparisons(findings.of(sweep)), duplicates))
    lines.append(world_words(by_recipe(findings.worlds)))
    shown = [f"- {line}" for line in lines if line]
    if not shown:
        return ""
    prices = "*FVU* here: relative to the twin's, the same run without penalty; on real activations at equal L0."
    return "## In short\n\n" + "\n".join(shown) + f"\n\n{prices}"


def sae_words(name: str, found: Sequence[Comparison], more: str = "") -> str:
    """What the paper's penalty and the best others of a sweep buy, and what they cost; and what else is to be said."""
    if not found:
        return ""
    own = [one for one in found if family(one.summary.variant) == PAPER]
    correlations = _cuts("correlation", cheapest_by(own, "correlation"))
    cosines = _cuts("cosine", cheapest_by(found, "cosine"), _with_more_dead(found))
    told = [correlations, cosines, _both(found), more]
    return f"**{name}**: {'; '.join(filter(None, told))}."


def _cuts(key: str, *by: Comparison | None) -> str:
    """By how much some variants cut one of [`BOUGHT`], and at what price; those that buy both are told of elsewhere."""
    told: list[str] = []
    for one in by:
        if one is not None and getattr(one, key).mean < 0 and not one.both:
            of = one.summary.settings["d_sae"]
            dead = "" if one.no_more_dead else f", {one.dead.mean:.1f} more dead features of {of}"
            verb = "" if told else f" cuts the {BOUGHT[key]}"
            by_how_much = f"by {-getattr(one, key).mean:.0%} ({_price(one.relative_excess)}{dead})"
            told.append(f"{_named(one.summary.variant)}{verb} {by_how_much}")
    return ", ".join(told)


def _with_more_dead(found: Sequence[Comparison]) -> Comparison | None:
    """What cuts the cosine for less than `cheapest_by` names, if one puts up with dead features."""
    reach = [one for one in found if one.cuts_cosine and one.within_room]
    cheapest = min(reach, key=lambda one: one.fvu_excess.mean, default=None)
    return None if cheapest is None or cheapest.no_more_dead else cheapest


def _both(found: Sequence[Comparison]) -> str:
    """Whether a setting buys both cuts, and which."""
    if (best := best_of_both(found)) is not None:
        cuts = f"{-best.correlation.mean:.0%} less correlation and {-best.cosine.mean:.0%} less maximum decoder cosine"
        lost = "" if best.recovered is None else f", loss recovered {best.recovered.mean:+.3f}"
        return f"{_named(best.summary.variant)} buys {cuts} ({_price(best.relative_excess)}{lost})"
    assert CORRELATION_CUT == 0.25  # or the words below are wrong
    asked = f"a quarter less correlation and {COSINE_CUT:.0%} less cosine for {RELATIVE_ROOM:.0%} of FVU"
    return f"none of the {len(found)} settings tried buys {asked}"


def _named(variant: str) -> str:
    """A variant in words, with its name."""
    name = family(variant)
    if not name.startswith(f"{PAPER}-"):  # those differ from the paper's penalty in what their names add
        name = name.partition("-")[0]
    words = BRIEF.get(name, WORDS.get(name))
    return f"`{variant}`" if words is None else f"{words} (`{variant}`)"


def _price(relative_fvu: Figure) -> str:
    return f"FVU {100 * relative_fvu.mean:+.1f}%"


def world_words(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What the paper's penalty and the rule that raises most do to the recovery of known features.

    Args:
        groups: records of worlds by the name of their recipe.
    """
    own = [name for records in groups.values() for name in rules(records) if family(name) == PAPER]
    if not own:
        return ""
    wanted = f"{PAPER}-{SelOrthoConfig.default_settings()['ortho_coefficient']}"
    shown = wanted if wanted in own else own[0]
    count = sum(len(records) for records in groups.values())
    told = [f"{_named(shown)} changes {_changes(groups, shown)}"]
    if not all(enough(records) for records in groups.values()):
        told.append("too few trainings to tell a rise of a score from chance")
    elif (best := _best_rule(groups)) is None:
        told.append("no rule raises a score in more trainings than chance would have it")
    else:
        told.append(f"{_named(best)} buys {', '.join(_changing(one, name, best) for name, one in groups.items())}")
    return f"**Known features** ({count} trainings on synthetic worlds): {'; '.join(told)}."


def _changes(groups: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> str:
    """What a rule does to F1, and at what price, by kind of SAE."""
    found = []
    for recipe, records in groups.items():
        gain, price = gain_over_twin(records, name, "f1"), price_over_twin(records, name)
        if gain is not None and price is not None:
            found.append(f"{gain.mean:+.3f} ({NAMES.get(recipe, recipe)}, {_price(price)})")
    return f"the features' F1 as detectors of true ones by {' and '.join(found)}"


def _best_rule(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """The rule that raises the most scores, less those that it lowers; of equal ones, that with the largest F1."""
    merits: dict[str, int] = {}
    for records in groups.values():
        for key in SCORES:
            for found, sign in zip(raised_and_lowered(records, key), (1, -1), strict=True):
                for name in found:
                    merits[name] = merits.get(name, 0) + sign

    def merit(name: str) -> tuple[int, float]:
        gains = [gain_over_twin(records, name, "f1") for records in groups.values()]
        return merits[name], sum(gain.mean for gain in gains if gain is not None)

    return max((name for name, count in merits.items() if count > 0), key=merit, default=None)


def _changing(records: Sequence[Mapping[str, Any]], recipe: str, name: str) -> str:
    """The scores that a rule raises or lowers with a kind of SAE in more trainings than chance, and its price."""
    told = []
    for key, score in SCORES.items():
        words = "true features recovered" if key == "recovered" else score
        told += [f"{words} {found[name].mean:+.3f}" for found in raised_and_lowered(records, key) if name in found]
    price = price_over_twin(records, name)
    cost = "" if price is None else f" ({_price(price)})"
    return f"with {NAMES.get(recipe, recipe)} {_listed(told) or 'nothing'}{cost}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
