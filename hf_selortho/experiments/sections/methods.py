"""Sections that compare methods: at equal L0, steered, and on the language model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comparison import (
    CORRELATION_CUT,
    COSINE_CUT,
    FVU_ROOM,
    RELATIVE_ROOM,
    Comparison,
    best_by,
    best_of_both,
    comparisons,
    is_twin,
    left_out,
    nearest_to_both,
)
from ..figures import drawn_in_headline, family, headline_figure, pareto_figure
from ..findings import Findings
from ..summaries import NAMES, TWIN, Figure, Summary, interpolate, paired
from ..tables import METHOD_COLUMNS, MODEL_COLUMNS, comparison_table, in_order, seeds_table, summary_table

LETTERS_F1 = 0.5  # of the main features, below which absorption means little


def pareto(findings: Findings, figures: Path, link: str) -> str:
    """Methods against one another at equal L0."""
    if not findings.pareto:
        return ""
    parts = [
        "## Methods at equal L0\n\nEvery variant against its twin, the same run without penalty: same "
        "batches, same initial weights. *FVU*: how much more than the twin's at equal L0 (for ReLU, twins of several "
        "L1 are interpolated, as logarithms). The other columns are differences from the twin at equal L0: relative "
        "ones of correlation and cosine, absolute ones of dead features (at its own L0) and loss recovered. *Worth "
        f"it*, in the means over the seeds: at most {FVU_ROOM} more FVU and no more dead features than the twin's "
        f"number varies by between seeds, for {CORRELATION_CUT:.0%} less of the top correlations (correlation) or "
        f"{COSINE_CUT:.0%} less of the mean maximum decoder cosine (cosine); *both*: both of them for at most "
        f"{RELATIVE_ROOM:.0%} of the twin's FVU. A coefficient multiplies a mean over the pairs that the penalty acts "
        "on, a thousand times as many with `full` as with the paper's share of 0.1%."
    ]
    compared = {NAMES.get(sweep, sweep): comparisons(findings.of(sweep)) for sweep in findings.pareto}
    if drawn := {name: found for name, found in compared.items() if found}:
        headline_figure(drawn, figures / "headline.png")
        parts.append(f"![What each penalty buys and costs]({link}/headline.png)\n\n{headline_words(drawn)}")
    for sweep in findings.pareto:
        summaries = findings.of(sweep)
        name = NAMES.get(sweep, sweep)
        parts.append(f"### {name}")
        if found := compared[name]:
            title = f"{name}: what each method buys, against its price"
            pareto_figure(found, figures / f"pareto_{sweep}.png", title)
            parts += [f"![{name}]({link}/pareto_{sweep}.png)", pareto_words(name, found), comparison_table(found)]
            parts += filter(None, [pruned_words(found), sparser_words(summaries)])
            if outside := left_out(summaries, found):
                names = ", ".join(f"`{variant}`" for variant in outside)
                parts.append(f"Left out, as the L0 of no twins encloses theirs: {names}.")
        parts.append(summary_table(summaries, METHOD_COLUMNS))
    return "\n\n".join(parts)


TELLING = 0.1  # relative change from which a penalty is said to lower something


def headline_words(compared: Mapping[str, Sequence[Comparison]]) -> str:
    """What the figure shows: which families lower correlations, cosines or both."""
    lines = []
    for name, found in compared.items():
        kinds: dict[str, list[str]] = {"correlations alone": [], "cosines alone": [], "both": []}
        for group in dict.fromkeys(family(one.summary.variant) for one in found):
            shown = [one for one in found if family(one.summary.variant) == group and drawn_in_headline(one)]
            lowers = [any(getattr(one, key).mean <= -TELLING for one in shown) for key in ("correlation", "cosine")]
            if any(lowers):
                kind = "both" if all(lowers) else "correlations alone" if lowers[0] else "cosines alone"
                kinds[kind].append(f"`{group}`")
        told = [f"{kind}: {', '.join(groups)}" for kind, groups in kinds.items() if groups]
        lines.append(f"{name}: {'; '.join(told) or 'none'}.")
    return (
        f"Penalties that lower these figures by {TELLING:.0%} or more, at prices that the figure has room for. "
        f"{' '.join(lines)} Families that are not drawn are in the tables below."
    )


def pareto_words(name: str, found: Sequence[Comparison]) -> str:
    """What a figure shows, in sentences."""
    words = []
    for key, what in (
        ("correlation", "the mean of the top 0.1% correlations"),
        ("cosine", "the mean maximum decoder cosine"),
    ):
        best = best_by(found, key)
        if best is None:
            words.append(f"No variant stays within {FVU_ROOM} of the twin's FVU without more dead features.")
        else:
            cut: Any = getattr(best, key)
            words.append(
                f"Within {FVU_ROOM} of the twin's FVU and without more dead features, "
                f"`{best.summary.variant}` changes {what} "
                f"most: {cut.percent()} for {best.fvu_excess.signed(4)} FVU."
            )
    if (best := best_of_both(found)) is not None:
        words.append(
            f"Both at once, for at most {RELATIVE_ROOM:.0%} of FVU: `{best.summary.variant}`, correlation "
            f"{best.correlation.percent()} and cosine {best.cosine.percent()} for {best.relative_excess.percent()}."
        )
    elif (near := nearest_to_both(found)) is not None:
        words.append(
            f"None of the {len(found)} variants buys both cuts for at most {RELATIVE_ROOM:.0%} of FVU; least is missed "
            f"by `{near.summary.variant}`: correlation {near.correlation.percent()}, cosine "
            f"{near.cosine.percent()} for {near.relative_excess.percent()}."
        )
    return f"{name}: " + " ".join(words)


PRUNED = -0.05  # of the twin's L0, below which a penalty counts as one that makes activations sparser


def pruned_words(found: Sequence[Comparison]) -> str:
    """Which penalties lower L0 by themselves, and what their FVU is at the twin's L1."""
    told = []
    for one in found:
        l0 = paired(one.summary, one.twin, "l0", relative=True)
        fvu = paired(one.summary, one.twin, "fvu", relative=True)
        if one.twins and l0 is not None and fvu is not None and l0.mean <= PRUNED:
            told.append(f"`{one.summary.variant}` ({l0.mean:+.0%} L0, {fvu.mean:+.1%} FVU)")
    if not told:
        return ""
    return (
        "Some penalties lower L0 by themselves, as a larger L1 would. At equal L0 they then cost less than at the same "
        f"L1, whose users see: {', '.join(told)}."
    )


def sparser_words(summaries: Sequence[Summary]) -> str:
    """What twins of another k lose and what they gain: what is to be had without a penalty."""
    twin = next((s for s in summaries if s.variant == TWIN), None)
    told = []
    for other in summaries:
        if twin is None or other is twin or not is_twin(other) or not twin.settings.get("k"):
            continue
        figures = [paired(other, twin, key, relative=True) for key in ("fvu", "top_correlation", "max_decoder_cosine")]
        known = [figure.percent() for figure in figures if figure is not None]
        if len(known) == len(figures):
            fvu, correlation, cosine = known
            told.append(f"`{other.variant}`: FVU {fvu}, correlation {correlation}, cosine {cosine}")
    return f"Without penalty, at another k: {'; '.join(told)}." if told else ""


def on_the_model(findings: Findings, figures: Path, link: str) -> str:
    """Probing, absorption and stability."""
    if not findings.pareto:
        return ""
    parts = ["## On the language model", _task_words(findings)]
    for sweep in findings.pareto:
        summaries = [s for s in findings.of(sweep) if s.variant == TWIN or not is_twin(s)]
        records = [
            r
            for r in findings.seeds
            if r["sweep"] == sweep and (r["variant"] == TWIN or not r["variant"].startswith(f"{TWIN}-"))
        ]
        parts.append(f"### {NAMES.get(sweep, sweep)} inside the model\n\n{summary_table(summaries, MODEL_COLUMNS)}")
        parts += filter(None, [changed_words(summaries)])
        twin = next((s for s in summaries if s.variant == TWIN), None)
        if twin is not None and (f1 := twin.figure("first_letter_f1")) is not None and f1.mean < LETTERS_F1:
            parts.append(
                f"The features that stand best for a letter reach a mean F1 of {f1.text(2)} without "
                f"penalty: an SAE of this "
                "size has few features of letters that could be absorbed, so the absorption figures say little here."
            )
        if records:
            parts.append(
                "How alike the seeds are (decoder cosines; features are shared if their matched cosine exceeds 0.7; "
                "distinct directions: 1 if all seeds find the same, the number of seeds if none do).\n\n"
                + seeds_table(records)
            )
    return "\n\n".join(parts)


TASKS = {
    "probing_accuracy_k1": "probing with one feature", "probing_accuracy_k5": "with five",
    "first_letter_f1": "first-letter F1",
}  # fmt: skip


def changed_words(summaries: Sequence[Summary]) -> str:
    """Which variants differ from the twin on the tasks in every seed."""
    twin = next((s for s in summaries if s.variant == TWIN), None)
    lines = []
    for key, words in TASKS.items():
        changes = (
            {} if twin is None else {s.variant: paired(s, twin, key) for s in in_order(summaries) if s is not twin}
        )
        known = {name: change for name, change in changes.items() if change is not None and len(change.values) > 2}
        told = []
        for word, sign in (("higher", 1), ("lower", -1)):
            found = {name: change for name, change in known.items() if all(sign * v > 0 for v in change.values)}
            listed = ", ".join(f"`{name}` ({change.mean:+.3f})" for name, change in found.items())
            told.append(f"{word}: {listed or 'none'}")
        lines += [f"- {words}, {'; '.join(told)}."] * bool(known)
    if not lines:
        return ""
    return (
        "Higher or lower than the twin in every seed, with the mean difference; of three seeds, chance alone would "
        "have a quarter of all variants agree:\n\n" + "\n".join(lines)
    )


def _task_words(findings: Findings) -> str:
    lines = []
    for layer, facts in sorted(findings.tasks.items()):
        if "probing_accuracy_lm" in facts:
            lines.append(
                f"Layer {layer}: {facts['probing_texts']} texts of {facts['probing_classes']} classes; a probe on the "
                f"activations themselves reaches {facts['probing_accuracy_lm']:.3f} (balanced accuracy, "
                f"one class against "
                "the rest)."
            )
        elif "no_probing" in facts:
            lines.append(f"Layer {layer}: no sparse probing, {facts['no_probing']}.")
        if "spelling_accuracy" in facts:
            lines.append(
                f"First letters, layer {layer}: the language model names that of "
                f"{facts['spelling_accuracy']:.0%} of the "
                f"words; linear probes reach a mean F1 of {facts['first_letter_probe_f1']:.2f}. "
                + (facts.get("first_letter_caution") or "")
            )
        elif "no_first_letter" in facts:
            lines.append(f"Layer {layer}: no absorption, {facts['no_first_letter']}.")
    return "\n".join(f"- {line.strip()}" for line in lines)


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
        found = [c for c in comparisons([*fixed, *own])]
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
        "## Adaptive coefficient\n\n`--ortho_budget fvu` moves the coefficient so that the FVU of the training batches "
        "stays a given share above the twin's; beside it fixed coefficients of the same penalties.\n\n"
        + "\n\n".join(parts)
    )
