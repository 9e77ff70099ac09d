"""Sections on the paper: its claims, its Table 1, its ablations, layers and limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..claims import FULL, MAIN, Evidence, layer_sweep, timing_ratio, useful_range, verdicts
from ..comparison import CORRELATION_CUT, RELATIVE_ROOM, comparisons
from ..figures import curves_figure
from ..findings import Findings
from ..summaries import TWIN, Summary
from ..tables import METHOD_COLUMNS, cell, comparison_table, in_order, summary_table, table, verdict_table


def claims(findings: Findings, figures: Path, link: str) -> str:
    """The paper's claims with a verdict each."""
    if not findings.of("paper"):
        return ""
    return (
        "## The paper's claims\n\nJudged at 1:1 (as many features as dimensions), ReLU with L1, as in the paper, on "
        "this plan's language model and text; unless said otherwise with the penalty as a mean over the pairs and on "
        "activations scaled to a mean squared norm of 1. A comparison holds, or does not, if every seed says so; else "
        "it cannot be judged. The paper speaks of 28% less correlation; its numbers, 0.31 and 0.28, are 9.7% apart. "
        "Absolute seconds and gigabytes cannot be judged on another machine.\n\n"
        + verdict_table(verdicts(findings.evidence))
    )


def table_one(findings: Findings, figures: Path, link: str) -> str:
    """The paper's Table 1, every row, and what it leaves out."""
    evidence = findings.evidence
    full, selective, none = (evidence.of(name) for name in (FULL, MAIN, TWIN))
    if full is None or selective is None or none is None:
        return ""
    columns: list[Summary] = [full, selective, none]
    rows = [_timing_row(findings, "seconds a step", "seconds_per_step", 1.0, "0.42", "0.12", 3)]
    rows.append(_timing_row(findings, "memory of a step, GB", "memory_bytes", 1e9, "14.8", "5.3", 3))
    for words, key, of_full, of_selective, digits in (
        ("active features", "active_features", "1750", "1892", 1),
        ("peak correlation", "peak_correlation", "0.31", "0.28", 3),
        ("different features in the top 0.1% pairs", "unique_features", "512", "487", 1),
        ("mean of the top 0.1% correlations", "top_correlation", "-", "-", 3),
        ("mean correlation", "mean_correlation", "-", "-", 3),
        ("FVU", "fvu", "-", "-", 4),
        ("L0", "l0", "-", "-", 1),
        ("dead features", "dead_features", "-", "-", 1),
        ("loss recovered", "loss_recovered", "-", "-", 3),
    ):
        rows.append([words, of_full, of_selective, *(cell(s.figure(key), digits) for s in columns)])
    ratios = []
    for key, words in (("seconds_per_step", "as long"), ("memory_bytes", "as much memory")):
        ratio = timing_ratio(findings.timing, key, "full", "selective")
        if ratio is not None:
            ratios.append(f"{ratio:.1f} times {words}")
    took = f"With every pair a step takes {' and '.join(ratios)} as with the selected ones. " if ratios else ""
    curves = _curves(findings, figures, link)
    return (
        f"## Table 1\n\n{selective.settings['d_sae']} features, layer {selective.layer}, coefficient 0.1; "
        f"the paper has "
        "2304 features of Gemma-2-2B.\n\n"
        + table(["", "paper: full", "paper: selective", "full", "selective", "no penalty"], rows)
        + f"\n\n{took}Seconds and memory are those of steps timed by themselves (memory beyond weights, optimiser and "
        f"batch).\n\n{curves}"
    )


def _timing_row(
    findings: Findings, words: str, key: str, unit: float, of_full: str, of_selective: str, digits: int
) -> list[str]:
    rows = [] if findings.timing is None else findings.timing["rows"]
    found = []
    for label in ("full", "selective", "no penalty"):
        value = next((row.get(key) for row in rows if row["label"] == label), None)
        found.append("-" if value is None else f"{value / unit:.{digits}f}")
    return [words, of_full, of_selective, *found]


# What the paper's Figures 1 and 2 show over training: title and digits by column.
FIGURE_1 = {"fvu": ("FVU", 4), "l1": ("L1", 2), "l0": ("L0", 0)}
FIGURE_2 = {
    "peak_correlation": ("Peak correlation", 3), "top_correlation": ("Mean of the top 0.1%", 3),
    "dead_features": ("Dead features", 0),
}  # fmt: skip


def _curves(findings: Findings, figures: Path, link: str) -> str:
    """The paper's Figures 1 and 2."""
    evidence = findings.evidence
    kinds = {"no penalty": TWIN, "selective": MAIN, "full": FULL}
    curves = {
        words: [record["curve"] for record in summary.by_seed.values()]
        for words, name in kinds.items()
        if (summary := evidence.of(name)) is not None
    }
    parts = []
    for file, columns, title in (
        ("figure1_training", FIGURE_1, "Training, range over the seeds (the paper's Figure 1)"),
        ("figure2_correlation", FIGURE_2, "Correlation and use of features (the paper's Figure 2)"),
    ):
        curves_figure(curves, {key: words for key, (words, _) in columns.items()}, figures / f"{file}.png", title)
        parts += [f"![{title}]({link}/{file}.png)", _end_words(evidence, kinds, columns)]
    return "\n\n".join(filter(None, parts))


def _end_words(evidence: Evidence, kinds: Mapping[str, str], columns: Mapping[str, tuple[str, int]]) -> str:
    """Where curves end, in words: means over the last 100 steps and the seeds."""
    found = []
    for key, (words, digits) in columns.items():
        ends = {kind: evidence.figure(f"training.{key}", name) for kind, name in kinds.items()}
        shown = [f"{end.mean:.{digits}f} ({kind})" for kind, end in ends.items() if end is not None]
        found += [f"{words} {', '.join(shown)}"] * bool(shown)
    return f"Over the last 100 steps: {'; '.join(found)}." if found else ""


def ablations(findings: Findings, figures: Path, link: str) -> str:
    """Coefficient, share of pairs and reduction."""
    summaries = findings.of("paper")
    if not summaries:
        return ""
    found = comparisons(summaries)
    cheap = [one for one in found if one.relative_excess.mean <= RELATIVE_ROOM]
    best = min(cheap, key=lambda one: one.correlation.mean, default=None)
    words = (
        f"For at most {RELATIVE_ROOM:.0%} of FVU at equal L0, `{best.summary.variant}` lowers the top correlations "
        f"most: {best.correlation.percent()} for {best.relative_excess.percent()}.\n\n"
        if best is not None and best.correlation.mean < 0
        else ""
    )
    against = f"Against the twin, at equal L0:\n\n{comparison_table(found)}\n\n{words}" if found else ""
    return (
        "## Ablations\n\n`selective-0.2`: coefficient 0.2; `share-0.5`: 0.5% of the pairs instead of 0.1%; `-sum`: the "
        f"equation as printed, a sum over the pairs.\n\n{against}{summary_table(summaries, METHOD_COLUMNS)}"
    )


def layers(findings: Findings, figures: Path, link: str) -> str:
    """The paper's depths."""
    evidence, rows = findings.evidence, []
    for layer in evidence.layers:
        for variant in (TWIN, MAIN):
            summary = evidence.of(variant, layer_sweep(evidence, layer), layer)
            if summary is not None:
                keys = ("mean_correlation", "top_correlation", "peak_correlation", "fvu", "l0", "max_decoder_cosine")
                rows.append([f"{layer}", f"`{variant}`", *(cell(summary.figure(key)) for key in keys)])
    if len(rows) < 3:
        return ""
    header = ["layer", "variant", "mean correlation", "top 0.1%", "peak", "FVU", "L0", "max decoder cosine"]
    return "## Layers\n\nThe paper's depths, 5, 12 and 19 of 26 (mean correlation 0.12, 0.09, 0.06).\n\n" + table(
        header, rows
    )


def limits(findings: Findings, figures: Path, link: str) -> str:
    """Spread over batches and seeds, useful range."""
    evidence, rows = findings.evidence, []
    for summary in in_order(findings.of("paper")):
        if summary.variant == TWIN or summary.variant.startswith("selective-"):
            over_seeds = summary.figure("top_correlation")
            rows.append(
                [
                    f"`{summary.variant}`",
                    cell(summary.figure("spread_over_batches.top_correlation.std"), 4),
                    cell(summary.figure("spread_over_batches.peak_correlation.std"), 4),
                    "-" if over_seeds is None or over_seeds.std is None else f"{over_seeds.std:.4f}",
                    cell(summary.figure("spread_over_batches.pair_churn.mean")),
                ]
            )
    if not rows:
        return ""
    found = useful_range(evidence)
    words = ", ".join(f"{coefficient:g}" for coefficient in found) or "none"
    header = [
        "variant",
        "top 0.1%, std over batches",
        "peak, std over batches",
        "top 0.1%, std over seeds",
        "new pairs a step",
    ]
    return (
        "## Limits\n\nHow much the correlations of training batches vary over the last 100 steps, and "
        "between seeds; and "
        "which share of the selected pairs was not selected the step before.\n\n"
        + table(header, rows)
        + f"\n\nOf the coefficients tried, useful at this layer and width: {words}. Useful is what cuts the "
        f"mean of the top correlations by {CORRELATION_CUT:.0%} or more for at most {RELATIVE_ROOM:.0%} of FVU, at "
        "equal L0."
    )
