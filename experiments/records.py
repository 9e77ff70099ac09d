"""What is kept of an experiment: one JSON file for each SAE, synthetic run and comparison, under `results/<plan>/`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_selortho.errors import SelOrthoError
from hf_selortho.training.run_folder import METRICS, METRICS_LOG, RUN, TIMINGS_LOG, read_rows
from hf_selortho.utils.files import write_json

SCHEMA_VERSION = 1
CURVE_POINTS = 30
CURVES = ("fvu", "l1", "l0", "peak_correlation", "top_correlation", "dead_features", "active_features")
_LAST = 100  # steps whose batches tell how much a figure varies from batch to batch, as in the paper
_SPREADS = ("peak_correlation", "top_correlation", "mean_correlation", "pair_churn", "unique_features")
_PATHS = ("output_dir", "activations", "variants", "ortho_reference", "dataset", "resume_from_checkpoint")


def read_record(path: Path) -> dict[str, Any]:
    """Read one record.

    Raises:
        SelOrthoError: it is damaged, or of another schema version.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = record.get("schema_version")
    except (OSError, ValueError, AttributeError) as error:
        raise SelOrthoError(f"{path} is missing or damaged ({error}): remove it and run the plan again") from error
    if version != SCHEMA_VERSION:
        raise SelOrthoError(
            f"{path} has schema_version {version}, expected {SCHEMA_VERSION}: remove it and run the plan again"
        )
    return record


class Records:
    """The records of one plan in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Path of a record by its name, such as "topk/none-layer8-seed0"."""
        return self.folder / f"{name}.json"

    def has(self, name: str) -> bool:
        """Tell whether the record is there."""
        return self.path(name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """Read one record.

        Raises:
            SelOrthoError: it is missing or damaged, or of another version.
        """
        return read_record(self.path(name))

    def refuse_other(self, name: str, facts: Iterable[tuple[str, Any, Any]]) -> None:
        """Refuse a record that is of something else than the plan.

        Args:
            name: of the record.
            facts: what it is of in words, what the record has, and what the plan has.

        Raises:
            SelOrthoError: names the record, and the first thing that differs with both values.
        """
        for what, found, wanted in facts:
            if found != wanted:
                raise SelOrthoError(
                    f"{self.path(name)} is of {what} {found}, the plan has {wanted}: remove the record, or choose "
                    "another --results_dir"
                )

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a record, whole or not at all."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema_version": SCHEMA_VERSION, "name": name, **content})


def training_facts(folder: Path) -> dict[str, Any]:
    """Say what the record of an SAE keeps of its training, from the files that the training has left in its folder."""
    rows = read_rows(folder / METRICS_LOG)
    if not rows:
        raise SelOrthoError(f"{folder} has no {METRICS_LOG}: its training has not ended; run the plan again")
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    last = [row for row in rows if row["step"] > rows[-1]["step"] - _LAST]
    return {
        "arguments": {key: run["arguments"][key] for key in sorted(run["arguments"]) if key not in _PATHS},
        "training": metrics.get("training", {}),
        "spread_over_batches": {key: _spread(last, key) for key in _SPREADS},
        "curve": thinned(rows),
        "versions": run["versions"],
        "hardware": run["hardware"],
        "started": run["started"],
        "peak_memory_gb": run.get("peak_memory_gb"),
        "seconds": training_seconds(folder),
    }


def training_seconds(folder: Path) -> float:
    """Sum what the steps of an SAE took by themselves, also beside others that were trained in turns with it."""
    seconds, before = 0.0, 0
    for row in read_rows(folder / TIMINGS_LOG):
        seconds += row["seconds_per_step"] * (row["step"] - before)
        before = row["step"]
    return seconds


def thinned(rows: Sequence[Mapping[str, Any]], points: int = CURVE_POINTS) -> dict[str, list[Any]]:
    """Take some rows of a training's log as columns, evenly spread over the steps, the last one among them."""
    if len(rows) > points:
        rows = [rows[round(k * (len(rows) - 1) / (points - 1))] for k in range(points)]
    columns = {"step": [row["step"] for row in rows]}
    for key in CURVES:
        values = [row.get(key) for row in rows]
        if any(value is not None for value in values):
            columns[key] = [float(f"{value:.4g}") if isinstance(value, float) else value for value in values]
    return columns


def _spread(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float] | None:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    if len(values) < 2:
        return None
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values), "batches": len(values)}
