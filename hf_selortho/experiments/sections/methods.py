"""Sections that compare methods: at equal reconstruction, steered, and on the language model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    fvu_at_equal_l0,
    is_twin,
    left_out,
    nearest_to_both,
)
from ..figures import family, headline_figure, pareto_figure
from ..findings import Findings
from ..summaries import TWIN, Figure, interpolate
from ..tables import METHOD_COLUMNS, MODEL_COLUMNS, comparison_table, seeds_table, summary_table

LETTERS_F1 = 0.5  # of the main features, below which absorption means little
NAMES = {"topk": "TopK", "relu": "ReLU + L1", "batchtopk": "BatchTopK"}


def pareto(findings: Findings, figures: Path, link: str) -> str:
    """Methods against one another at equal reconstruction."""
    if not findings.pareto:
        return ""
    parts = [
        "## Methods at equal reconstruction\n\nEvery variant against its twin, the same run without penalty: same "
        "batches, same initial weights. *FVU*: how much more than the twin's at equal L0 (for ReLU, twins of several "
        "L1 are interpolated, as logarithms). The other columns are differences from the twin at equal L0: relative "
        "ones of correlation and cosine, absolute ones of dead features (at its own L0) and loss recovered. *Worth "
        f"it*, in the means over the seeds: at most {FVU_ROOM} more FVU and no more dead features than the twin's "
        f"number varies by between seeds, for {CORRELATION_CUT:.0%} less of the top correlations (correlation) or "
        f"{COSINE_CUT:.0%} less of the mean maximum decoder cosine (cosine); *both*: both of them for at most "
        f"{RELATIVE_ROOM:.0%} of the twin's FVU. A coefficient weighs a mean over the pairs that it acts on: on each "
        "pair, `full-1.0` weighs 30 times less than `activation-0.03`."
    ]
    compared = {NAMES.get(sweep, sweep): comparisons(findings.of(sweep)) for sweep in findings.pareto}
    if drawn := {name: found for name, found in compared.items() if found}:
        headline_figure(drawn, figures / "headline.png")
        parts.append(f"![What each penalty buys and costs]({link}/headline.png)")
    for sweep in findings.pareto:
        summaries = findings.of(sweep)
        name = NAMES.get(sweep, sweep)
        parts.append(f"### {name}")
        if found := compared[name]:
            title = f"{name}: what each method buys, against its price"
            pareto_figure(summaries, fvu_at_equal_l0(found), figures / f"pareto_{sweep}.png", title)
            parts += [f"![{name}]({link}/pareto_{sweep}.png)", pareto_words(name, found), comparison_table(found)]
            if outside := left_out(summaries, found):
                names = ", ".join(f"`{variant}`" for variant in outside)
                parts.append(f"Left out, as the L0 of no twins encloses theirs: {names}.")
        parts.append(summary_table(summaries, METHOD_COLUMNS))
    return "\n\n".join(parts)


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
                "distinct directions: 1 if all seeds find the same, 3 if none of three do).\n\n" + seeds_table(records)
            )
    return "\n\n".join(parts)


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
    fixed = [c for c in same if len(c.fvu_excess.values) == len(own.values)]  # others lack a seed as yet
    prices = ", ".join(f"{100 * price:+.1f}%" for price in one.relative_excess.values)
    words = f"`{one.summary.variant}`: {what} {own.percent()} for {prices} of FVU, by seed"
    gains = []
    for number, (price, bought) in enumerate(zip(one.relative_excess.values, own.values, strict=True)):
        points = sorted((c.relative_excess.values[number], getattr(c, key).values[number]) for c in fixed)
        expected = interpolate(points, price)
        gains += [] if expected is None else [bought - expected]
    if len(gains) < len(own.values):
        return f"{words}; fixed coefficients of these prices enclose it in {len(gains)} seeds."
    beside = f"beside fixed ones of that price, interpolated, {Figure(tuple(gains)).percent()}"
    agreed = "more" if max(gains) < 0 else "less" if min(gains) > 0 else "neither more nor less, as seeds disagree"
    return f"{words}; {beside}: steering buys {agreed}."


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
