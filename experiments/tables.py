"""Tables of a report, in Markdown, from summaries of records: every number comes from there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .claims import Verdict
from .comparison import Comparison
from .figures import LOOKS, family
from .summaries import TWIN, Figure, Summary

Column = tuple[str, str, int]  # heading, key of the evaluation, digits

METHOD_COLUMNS: tuple[Column, ...] = (
    ("FVU", "fvu", 4),
    ("L0", "l0", 1),
    ("dead", "dead_features", 1),
    ("top 0.1% correlation", "top_correlation", 3),
    ("peak", "peak_correlation", 3),
    ("max decoder cosine", "max_decoder_cosine", 3),
    ("loss recovered", "loss_recovered", 3),
)
MODEL_COLUMNS: tuple[Column, ...] = (
    ("FVU", "fvu", 4),
    ("loss recovered", "loss_recovered", 3),
    ("probing k=1", "probing_accuracy_k1", 3),
    ("k=2", "probing_accuracy_k2", 3),
    ("k=5", "probing_accuracy_k5", 3),
    ("all features", "probing_accuracy_all", 3),
    ("first-letter F1", "first_letter_f1", 3),
    ("absorption rate", "absorption_rate", 3),
    ("absorption fraction", "absorption_fraction", 4),
)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = ["| " + " | ".join(header) + " |", "|:--|" + "--:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def cell(figure: Figure | None, digits: int = 3) -> str:
    """Mean ± spread, or a dash."""
    return "-" if figure is None else figure.text(digits)


def in_order(summaries: Iterable[Summary]) -> list[Summary]:
    """Families in the order of the legend, strengths rising within each."""
    rank = {name: number for number, name in enumerate(LOOKS)}
    return sorted(
        summaries, key=lambda s: (rank.get(family(s.variant), len(rank)), s.variant != TWIN, _strength(s.variant))
    )


def _strength(variant: str) -> tuple[float, str]:
    number = variant.rpartition("-")[2].lstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        return float(number), variant
    except ValueError:
        return 0.0, variant


def summary_table(summaries: Iterable[Summary], columns: Sequence[Column], name: str = "variant") -> str:
    """A row for each variant, mean ± standard deviation over its seeds."""
    rows = [
        [f"`{s.variant}`", *(cell(s.figure(key), digits) for _, key, digits in columns)] for s in in_order(summaries)
    ]
    return table([name, *(heading for heading, _, _ in columns)], rows)


def comparison_table(found: Sequence[Comparison]) -> str:
    """What every variant buys and costs against its twin, at equal L0."""
    by_name = {one.summary.variant: one for one in found}
    rows = []
    for summary in in_order(one.summary for one in found):
        one = by_name[summary.variant]
        marks = [
            word for word, true in (("correlation", one.affordable and one.cuts_correlation),
                                    ("cosine", one.affordable and one.cuts_cosine), ("both", one.both)) if true
        ]  # fmt: skip
        rows.append(
            [
                f"`{summary.variant}`", one.fvu_excess.signed(4), one.relative_excess.percent(),
                one.correlation.percent(),
                one.cosine.percent(), one.dead.signed(1), "-" if one.recovered is None else one.recovered.signed(),
                ", ".join(marks) or "-",
            ]
        )  # fmt: skip
    header = [
        "variant", "FVU", "FVU, relative", "top 0.1% correlation", "max decoder cosine", "dead", "loss recovered",
        "worth it",
    ]  # fmt: skip
    return table(header, rows)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """The paper's claims with what became of them."""
    rows = [[v.claim, v.paper, v.ours, f"**{v.verdict}**" + (f" ({v.why})" if v.why else "")] for v in verdicts]
    return table(["claim", "the paper", "here", "verdict"], rows).replace("|--:|--:|--:|", "|:--|:--|:--|")


def seeds_table(records: Iterable[Mapping[str, Any]]) -> str:
    """How alike the seeds of each variant are."""
    keys = ("max_cosine", "matched_cosine", "shared_features", "distinct_directions_per_feature")
    rows = [[f"`{r['variant']}`", *(f"{r[key]:.3f}" for key in keys)] for r in records]
    header = ["variant", "max cosine", "matched cosine", "shared features", "distinct directions per feature"]
    return table(header, rows)


def world_table(records: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Scores on one world and recipe, a row for each variant and each peer, over seeds."""
    rows = []
    for part, mark in (("scores", ""), ("peers", "SAELens ")):
        names = list(dict.fromkeys(name for record in records for name in record.get(part, {})))
        for name in names:
            values = [record[part][name] for record in records if name in record.get(part, {})]
            rows.append([f"{mark}`{name}`", *(cell(world_figure(values, key), digits) for _, key, digits in columns)])
    return table(["variant", *(heading for heading, _, _ in columns)], rows)


def world_figure(values: Sequence[Mapping[str, Any]], key: str) -> Figure | None:
    """A score over seeds; None if a seed does not have it."""
    found = [value.get(key) for value in values]
    known = [float(v) for v in found if v is not None]
    return Figure(tuple(known)) if found and len(known) == len(found) else None
