"""Section on coefficients that are steered by a budget, beside fixed ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from ..comparison import Comparison, comparisons
from ..figures import family
from ..findings import Findings
from ..summaries import TWIN, Figure, interpolate
from ..tables import METHOD_COLUMNS, comparison_table, summary_table


def steered_words(one: Comparison, found: Sequence[Comparison], steered: Collection[str]) -> str:
    """A steered coefficient beside fixed ones of the same penalty, seed by seed at the price that it came to."""
    key, what = max(
        (("correlation", "correlation"), ("cosine", "decoder cosine")), key=lambda pair: -getattr(one, pair[0]).mean
    )
    name = family(one.summary.variant)
    own: Figure = getattr(one, key)
    same = [c for c in found if c.summary.variant not in steered and family(c.summary.variant) == name]
    fixed = [c for c in same if seeds_of(c) == seeds_of(one)]  # others lack a seed as yet
    prices = ", ".join(f"{100 * price:+.1f}%" for price in one.relative_excess.values)
    words = f"`{one.summary.variant}`: {what} {own.percent()} for {prices} of FVU, by seed"
    gains, seeds = [], 0
    if len(own.values) != len(one.relative_excess.values):
        return f"{words}."
    for number, (price, bought) in enumerate(zip(one.relative_excess.values, own.values, strict=True)):
        points = sorted((c.relative_excess.values[number], getattr(c, key).values[number]) for c in fixed)
        expected = _between(points, price)
        gains += [bought - each for each in expected]
        seeds += bool(expected)
    if seeds < len(own.values):
        return f"{words}; fixed coefficients enclose its price in {seeds} of {len(own.values)} seeds."
    points_apart = f"{100 * min(gains):+.1f} to {100 * max(gains):+.1f} points"
    if min(gains) <= 0 <= max(gains):
        return f"{words}; about what fixed ones of that price buy ({points_apart} by seed and way of interpolating)."
    return f"{words}; {'more' if max(gains) < 0 else 'less'} than fixed ones of that price buy ({points_apart})."


def seeds_of(one: Comparison) -> list[tuple[int, ...]]:
    """Seeds of a variant, and how many of them its figures are of."""
    figures = (one.relative_excess, one.correlation, one.cosine)
    return [tuple(sorted(one.summary.by_seed)), *((len(figure.values),) for figure in figures)]


def _between(points: Sequence[tuple[float, float]], price: float) -> list[float]:
    """What a price buys between fixed ones, by straight lines over the price and, as the gain grows ever more slowly,
    over its logarithm; nothing outside of them."""
    straight = interpolate(points, price)
    positive = [(math.log(x), y) for x, y in points if x > 0]
    curved = interpolate(positive, math.log(price)) if price > 0 else None
    return [expected for expected in (straight, curved) if expected is not None]


def adaptive(findings: Findings, figures: Path, link: str) -> str:
    """The coefficient steered by the FVU budget, beside fixed ones."""
    parts = []
    for sweep in findings.plan.sweeps:
        if sweep.referred is None or not (own := findings.of(sweep.name)):
            continue
        base = findings.of(sweep.referred[0])
        fixed = [s for s in base if s.variant == TWIN or family(s.variant) in {family(o.variant) for o in own}]
        found = comparisons([*fixed, *own])
        budget = sweep.arguments.get("ortho_budget_value", float("nan"))
        steered = {summary.variant for summary in own}
        words = [steered_words(one, found, steered) for one in found if one.summary.variant in steered]
        parts.append(
            f"### {sweep.name}\n\nSteered to an FVU {budget:.0%} above the twin's. {' '.join(words)}\n\n"
            f"{comparison_table(found)}\n\n{summary_table(own, METHOD_COLUMNS)}"
        )
    if not parts:
        return ""
    return (
        "## Adaptive coefficient\n\n`--ortho_budget fvu`, which has been removed since, moved the coefficient so that "
        "the FVU of the training batches stayed a given share above the twin's; beside it fixed coefficients of the "
        "same penalties.\n\n" + "\n\n".join(parts)
    )
