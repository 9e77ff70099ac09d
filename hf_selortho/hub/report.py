"""Write what a run leaves for people to read: metrics.json, run.json, pictures, the model card, tables."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..configuration_selortho import SelOrthoConfig
from ..evaluation.evaluator import Evaluation
from ..evaluation.plots import (
    plot_correlation_histogram,
    plot_decoder_cosine,
    plot_feature_density,
    plot_training_curves,
)
from ..training.run import TrainingRun
from ..training.run_folder import CARD, METRICS, PICTURES, RUN, START
from ..training.sae_trainer import LAST_STEPS
from ..utils.files import write_json, write_text
from .card_results import METRICS as EVALUATION_METRICS
from .card_results import TASK_METRICS, TWIN, SaeReport, beside_twins, probes_of, summary_rows
from .markdown import number
from .model_card import SaeCard, render_model_card


def summary_table(saes: Sequence[SaeReport]) -> str:
    """Align [`summary_rows`] as text."""
    rows = summary_rows(saes)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    measured = saes[0].metrics["evaluation"]
    title = f"held-out evaluation, {measured['samples']} contexts" if measured else "training, mean of its last steps"
    return "\n".join([title, *lines])


def report_run(
    run: TrainingRun,
    evaluations: list[Evaluation] | list[None],
    info: dict[str, Any],
    all_layers: Mapping[str, Any] | None = None,
) -> list[SaeReport]:
    """Write the report of each SAE, and of all of them together where there are several.

    Args:
        info: what run.json says besides the arguments.
        all_layers: see [`write_summary`].
    """
    all_metrics: dict[str, dict[str, Any]] = {}
    for variant, trainer, evaluation in zip(run.variants, run.trainers, evaluations, strict=True):
        assert trainer.log is not None
        all_metrics[variant.name] = {
            "schema_version": 1,
            "evaluation": evaluation.metrics if evaluation else {},
            "training": {
                **trainer.log.mean_of_last(LAST_STEPS),
                "steps": trainer.state.step,
                "tokens": trainer.state.tokens,
            },
            "training_start": trainer.log.mean_of_first(LAST_STEPS),
            "data": {**run.totals, "held_out_fraction": run.arguments.data.held_out_fraction},
        }
        if run.start:
            all_metrics[variant.name]["moved"] = run.start.write_moved(trainer.sae, run.output, variant.name)
            info = {**info, "init_from": run.start.origin}
    reports = []
    for variant, trainer, evaluation in zip(run.variants, run.trainers, evaluations, strict=True):
        assert trainer.log is not None
        arguments = {**variant.arguments.flat(), "output_dir": str(run.output / variant.name)}
        arrays = evaluation.arrays if evaluation else {}
        reports.append(
            write_report(
                run.output,
                variant.name,
                trainer.sae.config,
                all_metrics[variant.name],
                {**info, "arguments": arguments},
                trainer.log.rows,
                arrays,
                all_metrics.get(f"{variant.name}{TWIN}"),
            )
        )
    if run.start:
        shutil.rmtree(run.output / START)
    if run.variants[0].name:
        write_summary(run.output, reports, {**info, "arguments": run.arguments.flat()}, all_layers)
    return reports


def write_summary(
    folder: Path, saes: Sequence[SaeReport], run: dict[str, Any], all_layers: Mapping[str, Any] | None = None
) -> None:
    """Write metrics.json, run.json and README.md of a run of several SAEs, beside their folders.

    Args:
        all_layers: by variant ("" is the SAEs' own), figures of the language model with all layers replaced at once.
    """
    content = {
        "schema_version": 1,
        "saes": {sae.name: {"layer": sae.layer, "variant": sae.variant, **sae.metrics} for sae in saes},
    }
    if all_layers:
        content["all_layers"] = dict(all_layers)
    write_json(folder / METRICS, content)
    write_json(folder / RUN, run)
    write_text(folder / CARD, str(SaeCard(beside_twins(saes), run, all_layers=all_layers or {}).render()))


def write_report(
    run_folder: Path,
    name: str,
    config: SelOrthoConfig,
    metrics: dict[str, Any],
    run: dict[str, Any],
    log_rows: list[dict[str, Any]],
    arrays: dict[str, np.ndarray],
    twin: dict[str, Any] | None = None,
) -> SaeReport:
    """Write everything but the weights into the folder of an SAE.

    Args:
        run_folder: of the run.
        name: of the SAE's folder within it; "" if it is the only one.
        config, metrics, run: what the files of these names say.
        log_rows: figures by step.
        arrays: what the evaluation has for pictures.
        twin: metrics of the twin of the same run.
    """
    folder = run_folder / name
    drawn = draw_pictures(folder, log_rows, arrays)
    run = {**run, "pictures": [path.relative_to(folder).as_posix() for path in drawn]}
    write_json(folder / METRICS, metrics)
    write_json(folder / RUN, run)
    card = render_model_card(config.own_settings(), metrics, run, twin=twin)
    write_text(folder / CARD, str(card))
    pictures = [path.relative_to(run_folder).as_posix() for path in drawn]
    return SaeReport(name, config.own_settings(), metrics, pictures)


def draw_pictures(folder: Path, log_rows: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> list[Path]:
    """Draw training curves, and what the evaluation has arrays for."""
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
    """Align the evaluation as a table; the training's own figures where there was no evaluation."""
    measured = metrics["evaluation"]
    title = f"held-out evaluation, {measured['samples']} contexts, {measured['tokens']} tokens" if measured else ""
    if not measured:
        measured = {key: value for key, value in metrics["training"].items() if key != "l1"}  # the weighted loss term
        title = "training, mean of the last 100 steps (no evaluation on held-out text)"
    known = [metric for metric in (*EVALUATION_METRICS, *TASK_METRICS) if measured.get(metric.key) is not None]
    width = max(len(metric.name) for metric in known)
    lines = [f"  {metric.name:<{width}}  {number(measured[metric.key], metric.kind):>12}" for metric in known]
    for name, other in (measured.get("compared_with") or {}).items():
        lines.append(
            f"  decoder beside {name}: matched cosine {other['matched_cosine']:.4f}, shared features "
            f"{other['shared_features']:.1%}"
        )
    return "\n".join([title, *lines, *_probe_lines(metrics)])


def _probe_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Align the probes, where there are any."""
    probes = probes_of(metrics)
    if probes is None:
        return []
    rows = [
        ("", f"{probes['clean']} sets not trained on", f"{probes['trained_on']} trained on"),
        *((name, *(cells[0] for cells in groups)) for name, groups in probes["rows"]),
    ]
    texts = f"{probes['texts']} texts a set, " if probes["texts"] else ""
    lines = [f"probes, test AUC (95% interval over sets; {texts}last {probes['tokens']} tokens)"]
    lines += [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, (23, 24, 24), strict=True)).rstrip()
        for row in rows
    ]
    return [*lines, *([f"  on the benchmark's own rows: {probes['benchmark']}"] if probes["benchmark"] else [])]
