"""What a run leaves for people to read: metrics.json, run.json, pictures, the model card and a table on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..configuration_selortho import SelOrthoConfig
from ..evaluation.plots import (
    plot_correlation_histogram,
    plot_decoder_cosine,
    plot_feature_density,
    plot_training_curves,
)
from ..training.outputs import CARD, METRICS, PICTURES, RUN, write_json, write_text
from .model_card import render_model_card

# Metric, its name on the screen, its format.
_TABLE = [
    ("fvu", "FVU (fraction of variance unexplained)", ".4f"),
    ("mse", "MSE (squared error a token, raw)", ".4g"),
    ("l0", "L0 (active features a token)", ".1f"),
    ("l1", "L1 (sum of feature activations a token)", ".3f"),
    ("top_correlation", "mean correlation of the selected pairs", ".4f"),
    ("peak_correlation", "peak correlation", ".4f"),
    ("mean_correlation", "mean correlation", ".4f"),
    ("max_decoder_cosine", "mean maximum decoder cosine", ".4f"),
    ("unique_features", "unique features in the selected pairs", ".0f"),
    ("active_features", "active features", ".0f"),
    ("dead_features", "dead features", ".0f"),
    ("ce_clean", "LM cross-entropy, clean", ".4f"),
    ("ce_reconstruction", "LM cross-entropy, reconstruction spliced in", ".4f"),
    ("ce_zero_ablation", "LM cross-entropy, layer zero-ablated", ".4f"),
    ("loss_recovered", "loss recovered", ".4f"),
]


# Columns of the table of several SAEs: metric, its heading, its format.
_SUMMARY = [
    ("fvu", "FVU", ".4f"),
    ("l0", "L0", ".1f"),
    ("top_correlation", "top corr.", ".3f"),
    ("peak_correlation", "peak corr.", ".3f"),
    ("mean_correlation", "mean corr.", ".3f"),
    ("max_decoder_cosine", "decoder cos.", ".3f"),
    ("unique_features", "in pairs", ".0f"),
    ("active_features", "active", ".0f"),
    ("dead_features", "dead", ".0f"),
    ("loss_recovered", "loss rec.", ".4f"),
]


@dataclass(frozen=True)
class MemberReport:
    """One of several SAEs of a run, and what was measured of it."""

    name: str
    layer: int
    variant: str | None
    config: SelOrthoConfig
    metrics: dict[str, Any]

    def figure(self, key: str) -> float | None:
        """A figure of the evaluation on held-out text, or else of the end of the training."""
        measured = self.metrics["evaluation"] or self.metrics["training"]
        return measured.get(key)


def summary_rows(reports: Sequence[MemberReport]) -> list[list[str]]:
    """The SAEs of a run side by side, headings first; where there are several layers, their mean by variant too."""
    keys = [row for row in _SUMMARY if any(report.figure(row[0]) is not None for report in reports)]
    rows = [["layer", "variant", *(heading for _, heading, _ in keys)]]
    for report in reports:
        figures = [report.figure(key) for key, _, _ in keys]
        rows.append([str(report.layer), report.variant or "-", *_formatted(figures, keys)])
    if len({report.layer for report in reports}) > 1:
        for variant in dict.fromkeys(report.variant for report in reports):
            of_variant = [report for report in reports if report.variant == variant]
            figures = [_mean([report.figure(key) for report in of_variant]) for key, _, _ in keys]
            rows.append(["mean", variant or "-", *_formatted(figures, keys)])
    return rows


def summary_table(reports: Sequence[MemberReport]) -> str:
    """[`summary_rows`] as aligned text."""
    rows = summary_rows(reports)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    measured = reports[0].metrics["evaluation"]
    title = f"held-out evaluation, {measured['samples']} contexts" if measured else "training, mean of its last steps"
    return "\n".join([title, *lines])


def write_summary(folder: Path, reports: Sequence[MemberReport], run: dict[str, Any]) -> None:
    """Write metrics.json, run.json and README.md of a run of several SAEs, beside their folders."""
    content = {
        "schema_version": 1,
        "saes": {
            report.name: {"layer": report.layer, "variant": report.variant, **report.metrics} for report in reports
        },
    }
    write_json(folder / METRICS, content)
    write_json(folder / RUN, run)
    head, *rows = summary_rows(reports)
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    names = ", ".join(f"[{report.name}]({report.name}/README.md)" for report in reports)
    write_text(
        folder / CARD,
        "# SAEs of one run\n\nTrained side by side on the same batches; a variant has the settings of the SAE of its "
        f"layer but for what its name says, a twin no penalty.\n\n{chr(10).join(lines)}\n\nCards: {names}.\n",
    )


def write_report(
    folder: Path,
    config: SelOrthoConfig,
    metrics: dict[str, Any],
    run: dict[str, Any],
    log_rows: list[dict[str, Any]],
    arrays: dict[str, np.ndarray],
) -> None:
    """Write everything but the weights into the folder of a run."""
    run = {**run, "pictures": [str(path.relative_to(folder)) for path in draw_pictures(folder, log_rows, arrays)]}
    write_json(folder / METRICS, metrics)
    write_json(folder / RUN, run)
    card = render_model_card(config.own_settings(), metrics, run)
    write_text(folder / CARD, str(card))


def draw_pictures(folder: Path, log_rows: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> list[Path]:
    """Training curves, and what the evaluation has arrays for."""
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    drawn = []
    if log_rows:
        drawn.append(plot_training_curves(log_rows, pictures / "training_curves.png"))
    if "correlation_counts" in arrays:
        drawn.append(plot_correlation_histogram(arrays, pictures / "correlations.png"))
    if "feature_density" in arrays:
        drawn.append(plot_feature_density(arrays, pictures / "feature_density.png"))
    if "max_decoder_cosine" in arrays:
        drawn.append(plot_decoder_cosine(arrays, pictures / "decoder_cosine.png"))
    return drawn


def metrics_table(metrics: dict[str, Any]) -> str:
    """The evaluation as an aligned table; the training's own figures where there was no evaluation."""
    measured = metrics["evaluation"]
    title = f"held-out evaluation, {measured['samples']} contexts, {measured['tokens']} tokens" if measured else ""
    if not measured:
        measured = {key: value for key, value in metrics["training"].items() if key != "l1"}  # the weighted loss term
        title = "training, mean of the last 100 steps (no evaluation on held-out text)"
    rows = [(label, format(measured[key], spec)) for key, label, spec in _TABLE if measured.get(key) is not None]
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {value:>12}" for label, value in rows)])


def _formatted(figures: Sequence[float | None], keys: Sequence[tuple[str, str, str]]) -> list[str]:
    pairs = zip(figures, keys, strict=True)
    return ["-" if figure is None else format(figure, spec) for figure, (_, _, spec) in pairs]


def _mean(figures: Sequence[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) / len(known) if known and len(known) == len(figures) else None
