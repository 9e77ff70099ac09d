"""Files of a run: the output folder, metrics.jsonl, JSON written atomically, and the environment it ran in."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import SelOrthoError

METRICS_LOG, METRICS, RUN, CARD = "metrics.jsonl", "metrics.json", "run.json", "README.md"
PICTURES, CHECKPOINTS = "pictures", "checkpoints"
_OWN_FILES = (METRICS_LOG, METRICS, RUN, CARD, "config.json", "model.safetensors")
_OWN_FOLDERS = (PICTURES, CHECKPOINTS, "trackers")
_MEMBER = re.compile(r"layer_\d+(_[a-z0-9-]+)?")  # folder of one of several SAEs
_UNFINISHED = {METRICS_LOG, f".{METRICS_LOG}.tmp", CHECKPOINTS, "trackers"}
_LIBRARIES = (
    "hf_selortho", "torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface_hub", "safetensors",
    "tokenizers", "numpy",
)  # fmt: skip


def check_output_folder(path: str | Path, *, overwrite: bool, resuming: bool) -> Path:
    """The output folder, if a run may write to it; nothing is changed yet.

    Args:
        path: the folder; it need not exist.
        overwrite: an earlier run in it may be replaced.
        resuming: the run goes on with the one in it, or starts it again if it died before its first checkpoint.

    Raises:
        SelOrthoError: it is a file, holds an earlier run that is to be kept, or something else than a run.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise SelOrthoError(f"output folder {folder} is a file: choose another --output_dir")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if not names or resuming:
        return folder
    if not overwrite:
        raise SelOrthoError(
            f"output folder {folder} is not empty: choose another --output_dir, pass --resume_from_checkpoint auto "
            "to go on from its checkpoints, or --overwrite_output_dir to replace the run in it"
        )
    if not (_holds_run(folder) or holds_unfinished_run(folder)):
        raise SelOrthoError(
            f"output folder {folder} holds no run of this script, so nothing in it is overwritten: choose another "
            "--output_dir"
        )
    return folder


def holds_unfinished_run(folder: Path) -> bool:
    """Whether the folder is what a run leaves that died before its first checkpoint (or is empty or missing)."""
    if not folder.is_dir():
        return True
    names = {entry.name for entry in folder.iterdir()}
    members = {name for name in names if _MEMBER.fullmatch(name)}
    return names - members <= _UNFINISHED and all(
        {entry.name for entry in (folder / name).iterdir()} <= _UNFINISHED for name in members
    )


def _holds_run(folder: Path) -> bool:
    """Whether a run, or one of the SAEs of a run, has left its log or its record in the folder."""
    members = (path for path in folder.glob("layer_*") if _MEMBER.fullmatch(path.name))
    return any((place / name).is_file() for place in (folder, *members) for name in (RUN, METRICS_LOG))


def prepare_output_folder(folder: Path, *, overwrite: bool, resuming: bool) -> None:
    """Create the output folder, or remove an earlier run's files if `overwrite`; nobody else's are ever removed.

    Raises:
        SelOrthoError: the folder cannot be created.
    """
    if overwrite and not resuming:
        members = [path for path in folder.glob("layer_*") if _MEMBER.fullmatch(path.name)]
        for place in (folder, *members):
            _remove_run(place)
        for path in members:
            if not any(path.iterdir()):
                path.rmdir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SelOrthoError(
            f"cannot create output folder {folder} ({error.strerror}): choose another --output_dir"
        ) from None


def _remove_run(folder: Path) -> None:
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, flush it to the disk, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """[`write_text`] of JSON; NaN and infinity become null."""
    write_text(path, json.dumps(_jsonable(content), indent=2, allow_nan=False) + "\n")


class MetricsLog:
    """`metrics.jsonl`: one JSON object a logged step, in order of steps."""

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        self.path = path
        self.rows = [row for row in read_metrics_log(path) if row["step"] <= resume_at] if resume_at else []
        write_text(path, "".join(_line(row) for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is on its way to the disk when this returns."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def mean_of_last(self, steps: int) -> dict[str, float]:
        """Mean of every number over the rows of the last `steps` steps (the paper averages over the last 100)."""
        if not self.rows:
            return {}
        recent = [row for row in self.rows if row["step"] > self.rows[-1]["step"] - steps]
        means = {}
        for key in recent[-1]:
            values = [row[key] for row in recent if isinstance(row.get(key), (int, float))]
            if values and key not in ("step", "tokens"):
                means[key] = sum(values) / len(values)
        return means


def read_metrics_log(path: Path) -> Iterable[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a run depends on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware(device: torch.device, processes: int) -> str:
    """The machine in words: accelerator or processor, cores, number of processes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor_name()} ({os.cpu_count()} cores), {device.type}"
    return name if processes == 1 else f"{processes} processes, each on {name}"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_jsonable(row), allow_nan=False) + "\n"


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: what could not be measured becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value
