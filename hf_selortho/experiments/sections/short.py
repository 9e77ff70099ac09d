"""The findings in a few sentences, for the head of a report and for README, which quotes them word for word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...configuration_selortho import SelOrthoConfig
from ..comparison import (
    CORRELATION_CUT,
    COSINE_CUT,
    FVU_ROOM,
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
    return "## In short\n\n" + "\n".join(shown) if shown else ""


def sae_words(name: str, found: Sequence[Comparison], more: str = "") -> str:
    """What the paper's penalty and the best others of a sweep buy, and what they cost; and what else is to be said."""
    if not found:
        return ""
    own = [one for one in found if family(one.summary.variant) == PAPER]
    bought = [
        f"{_named(one)} cuts {what} by {-getattr(one, key).mean:.0%} for {_price(one)}"
        for one, key, what in (
            (cheapest_by(own, "correlation"), "correlation", "the mean of the top 0.1% correlations"),
            (cheapest_by(found, "cosine"), "cosine", "the mean maximum decoder cosine"),
        )
        if one is not None and getattr(one, key).mean < 0 and not one.both
    ]
    return f"**{name}**: {'; '.join([*bought, *_more_dead(found), _both(found), *filter(None, [more])])}."


def _more_dead(found: Sequence[Comparison]) -> list[str]:
    """Whether a cut of the cosine is to be had for less by whoever puts up with dead features."""
    strict = cheapest_by(found, "cosine")
    reach = [one for one in found if one.cuts_cosine and one.fvu_excess.mean <= FVU_ROOM]
    cheapest = min(reach, key=lambda one: one.fvu_excess.mean, default=None)
    if cheapest is None or cheapest is strict or cheapest.no_more_dead:
        return []
    features = cheapest.summary.settings["d_sae"]
    return [
        f"{_named(cheapest)} cuts the cosine by {-cheapest.cosine.mean:.0%} for {_price(cheapest)} and "
        f"{cheapest.dead.mean:.1f} more dead features of {features}"
    ]


def _both(found: Sequence[Comparison]) -> str:
    """Whether a setting buys both cuts, and which."""
    if (best := best_of_both(found)) is not None:
        cuts = f"{-best.correlation.mean:.0%} less correlation and {-best.cosine.mean:.0%} less cosine"
        lost = ""
        if best.recovered is not None:
            word = "less" if best.recovered.mean < 0 else "more"
            lost = f" and {abs(best.recovered.mean):.3f} {word} loss recovered"
        return f"{_named(best)} buys both, {cuts} for {_price(best)} at equal L0{lost}"
    assert CORRELATION_CUT == 0.25  # or the words below are wrong
    asked = f"a quarter less correlation and {COSINE_CUT:.0%} less cosine for {RELATIVE_ROOM:.0%}"
    return f"none of the {len(found)} settings tried buys both ({asked})"


def _named(one: Comparison) -> str:
    return named_variant(one.summary.variant)


def named_variant(variant: str) -> str:
    """A variant in words, with its name."""
    name = family(variant)
    if not name.startswith(f"{PAPER}-"):  # those differ from the paper's penalty in what their names add
        name = name.partition("-")[0]
    words = BRIEF.get(name, WORDS.get(name))
    return f"`{variant}`" if words is None else f"{words} (`{variant}`)"


def _price(one: Comparison) -> str:
    return _share(one.relative_excess)


def _share(price: Figure) -> str:
    excess = 100 * price.mean
    return f"{abs(excess):.1f}% {'more' if excess >= 0 else 'less'} unexplained variance"


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
    told = [f"{named_variant(shown)} changes {_changes(groups, shown)}"]
    if not all(enough(records) for records in groups.values()):
        told.append("too few trainings to tell a rise of a score from chance")
    elif (best := _best_rule(groups)) is None:
        told.append("no rule raises a score in more trainings than chance would have it")
    else:
        told.append(f"{named_variant(best)} {'; '.join(_raising(one, name, best) for name, one in groups.items())}")
    return f"**Known features** ({count} trainings on synthetic worlds): {'; '.join(told)}."


def _changes(groups: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> str:
    """What a rule does to F1, and at what price, by kind of SAE."""
    found = []
    for recipe, records in groups.items():
        gain, price = gain_over_twin(records, name, "f1"), price_over_twin(records, name)
        if gain is not None and price is not None:
            found.append(f"{gain.mean:+.3f} ({NAMES.get(recipe, recipe)}, for {_share(price)})")
    return f"the F1 of features as detectors of true ones by {' and '.join(found)}"


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


def _raising(records: Sequence[Mapping[str, Any]], recipe: str, name: str) -> str:
    """What a rule raises and lowers with a kind of SAE, and its price."""
    told: dict[str, list[str]] = {"raises": [], "lowers": []}
    for key, score in SCORES.items():
        for words, found in zip(told.values(), raised_and_lowered(records, key), strict=True):
            full = "the share of true features recovered" if key == "recovered" else score
            words += [f"{full} ({found[name].mean:+.3f})"] if name in found else []
    price = price_over_twin(records, name)
    cost = "" if price is None else f" for {_share(price)}"
    does = [f"{verb} {_listed(words)}" for verb, words in told.items() if words]
    return f"with {NAMES.get(recipe, recipe)} {' and '.join(does) or 'raises nothing'}{cost}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
