"""The findings in a few sentences, for the head of a report and for README, which quotes them word for word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comparison import CORRELATION_CUT, COSINE_CUT, RELATIVE_ROOM, Comparison, best_of_both, cheapest_by, comparisons
from ..figures import SCORES, family
from ..findings import Findings
from ..summaries import Figure
from .methods import NAMES
from .truth import by_world, gain_over_twin, rules

PAPER = "activation"  # family of the paper's own penalty
WORDS = {  # for families of variants
    PAPER: "the paper's penalty as a mean over the pairs",
    "activation-wide": "a penalty on the correlations of 1% of the pairs",
    "full": "the penalty on the correlations of all pairs",
    "decoder": "a penalty on decoder cosines",
    "decoder-wide": "a penalty on the decoder cosines of 1% of the pairs",
    "both": "a penalty on correlations and decoder cosines",
    "both-nearest": "a penalty on correlations and each feature's nearest direction",
    "both-nearest-wide": "a penalty on the correlations of 1% of the pairs and each feature's nearest direction",
    "redundancy": "a penalty on the decoder cosines of pairs that fire together",
    "exclusion": "a penalty on the decoder cosines of pairs that do not fire together",
    "exclusion-wide": "a penalty on the decoder cosines of pairs that do not fire together, 1% of all",
    "ortsae": "OrtSAE",
}


def in_short(findings: Findings, figures: Path, link: str) -> str:
    """A sentence for each kind of SAE on activations, and one for the synthetic worlds."""
    lines = [sae_words(NAMES.get(sweep, sweep), comparisons(findings.of(sweep))) for sweep in findings.pareto]
    lines.append(world_words(by_world(findings.worlds)))
    shown = [f"- {line}" for line in lines if line]
    return "## In short\n\n" + "\n".join(shown) if shown else ""


def sae_words(name: str, found: Sequence[Comparison]) -> str:
    """What the paper's penalty and the best others of a sweep buy, and what they cost."""
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
    return f"**{name}**: {'; '.join([*bought, _both(found)])}."


def _both(found: Sequence[Comparison]) -> str:
    """Whether a setting buys both cuts, and which."""
    if (best := best_of_both(found)) is not None:
        cuts = f"{-best.correlation.mean:.0%} less correlation and {-best.cosine.mean:.0%} less cosine"
        return f"{_named(best)} buys both, {cuts} for {_price(best)}"
    assert CORRELATION_CUT == 0.25  # or the words below are wrong
    asked = f"a quarter less correlation and {COSINE_CUT:.0%} less cosine for {RELATIVE_ROOM:.0%}"
    return f"none of the {len(found)} settings tried buys both ({asked})"


def _named(one: Comparison) -> str:
    return named_variant(one.summary.variant)


def named_variant(variant: str) -> str:
    """A variant in words, with its name."""
    words = WORDS.get(family(variant))
    return f"`{variant}`" if words is None else f"{words} (`{variant}`)"


def _price(one: Comparison) -> str:
    excess = 100 * one.relative_excess.mean
    return f"{abs(excess):.1f}% {'more' if excess >= 0 else 'less'} unexplained variance"


def world_words(groups: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> str:
    """What the paper's penalty and the rule that does best by it do to the recovery of known features."""
    runs = [record for records in groups.values() for record in records]
    if not runs:
        return ""
    gains = {name: [gain_over_twin(runs, name, key) for key in SCORES] for name in rules(runs)}
    known: dict[str, list[Figure]] = {
        name: [one for one in found if one is not None] for name, found in gains.items() if None not in found
    }
    own = [name for name in known if family(name) == PAPER]
    others = [name for name in known if family(name) != PAPER]
    if not own or not others:
        return ""
    mildest = max(own, key=lambda name: _sum(known[name]))
    best = max(others, key=lambda name: _sum(known[name]))
    worlds = f"{len(groups)} synthetic worlds of known features" if len(groups) > 1 else "known features"
    return (
        f"**Ground truth** ({worlds}, {len(runs)} trainings): {named_variant(mildest)} changes "
        f"{_gains(known[mildest])}; the other rule with the largest sum of the three, "
        f"{named_variant(best)}, {_gains(known[best])}."
    )


def _sum(gains: Sequence[Figure]) -> float:
    return sum(gain.mean for gain in gains)


def _gains(gains: Sequence[Figure]) -> str:
    mcc, uniqueness, f1 = gains
    return f"MCC by {mcc.signed()}, uniqueness by {uniqueness.signed()} and F1 by {f1.signed()}"
