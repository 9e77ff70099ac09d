"""What a run leaves for people to read: metrics.json, run.json, pictures, the model card and a table on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ..training.run_folder import CARD, METRICS, PICTURES, RUN
from ..utils.files import write_json, write_text
from .card_results import Measured
from .model_card import render_card, render_model_card
from .summary import SaeReport, beside_twins, summary_rows

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
    ("probing_accuracy_k1", "probing, balanced accuracy of 1 feature", ".4f"),
    ("probing_accuracy_k5", "probing, of 5 features", ".4f"),
    ("probing_accuracy_all", "probing, of all features", ".4f"),
    ("probing_accuracy_lm", "probing, of the activations themselves", ".4f"),
    ("absorption_rate", "first-letter absorption, rate", ".4f"),
    ("absorption_fraction", "first-letter absorption, fraction", ".4f"),
    ("first_letter_f1", "F1 of first-letter features", ".4f"),
]


def summary_table(saes: Sequence[SaeReport]) -> str:
    """[`summary_rows`] as aligned text."""
    rows = summary_rows(saes)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    measured = saes[0].metrics["evaluation"]
    title = f"held-out evaluation, {measured['samples']} contexts" if measured else "training, mean of its last steps"
    return "\n".join([title, *lines])


def write_summary(folder: Path, saes: Sequence[SaeReport], run: dict[str, Any]) -> None:
    """Write metrics.json, run.json and README.md of a run of several SAEs, beside their folders."""
    content = {
        "schema_version": 1,
        "saes": {sae.name: {"layer": sae.layer, "variant": sae.variant, **sae.metrics} for sae in saes},
    }
    write_json(folder / METRICS, content)
    write_json(folder / RUN, run)
    write_text(folder / CARD, str(render_card(beside_twins(saes), run)))


def write_report(
    run_folder: Path,
    name: str,
    config: SelOrthoConfig,
    metrics: dict[str, Any],
    run: dict[str, Any],
    log_rows: list[dict[str, Any]],
    arrays: dict[str, np.ndarray],
) -> SaeReport:
    """Write everything but the weights into the folder of an SAE.

    Args:
        run_folder: of the run.
        name: of the SAE's folder within it; "" if it is the only one.
        config, metrics, run: what the files of these names say.
        log_rows: figures by step.
        arrays: what the evaluation has for pictures.
    """
    folder = run_folder / name
    drawn = draw_pictures(folder, log_rows, arrays)
    run = {**run, "pictures": [path.relative_to(folder).as_posix() for path in drawn]}
    write_json(folder / METRICS, metrics)
    write_json(folder / RUN, run)
    card = render_model_card(config.own_settings(), metrics, run)
    write_text(folder / CARD, str(card))
    pictures = [path.relative_to(run_folder).as_posix() for path in drawn]
    return SaeReport(name, config.own_settings(), Measured(metrics), pictures)


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


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The evaluation as an aligned table; the training's own figures where there was no evaluation."""
    measured = metrics["evaluation"]
    title = f"held-out evaluation, {measured['samples']} contexts, {measured['tokens']} tokens" if measured else ""
    if not measured:
        measured = {key: value for key, value in metrics["training"].items() if key != "l1"}  # the weighted loss term
        title = "training, mean of the last 100 steps (no evaluation on held-out text)"
    rows = [(label, format(measured[key], spec)) for key, label, spec in _TABLE if measured.get(key) is not None]
    width = max(len(label) for label, _ in rows)
    lines = [f"  {label:<{width}}  {value:>12}" for label, value in rows]
    for name, found in (measured.get("compared_with") or {}).items():
        lines.append(
            f"  decoder beside {name}: matched cosine {found['matched_cosine']:.4f}, shared features "
            f"{found['shared_features']:.1%}"
        )
    return "\n".join([title, *lines])
