"""The folder of a run: who may write to it, its logs by step, files written whole, and the environment of the run."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..data.pair_history import PAIR_HISTORY
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.files import LOCK, reason, replace_file, sync, when_there_is_room

METRICS_LOG, METRICS, RUN, CARD = "metrics.jsonl", "metrics.json", "run.json", "README.md"
TIMINGS_LOG = "timings.jsonl"
PICTURES, CHECKPOINTS, TRACKERS, DEBUG = "pictures", "checkpoints", "trackers", "debug"
MARKER = ".selortho_run.json"  # by which a run's folder is known
FORMAT = 2  # of the folder; that of version 0.1.0 had no marker
_SAVING = ".saving.tmp"
# what a run leaves, in the order in which it is removed; batches in debug/ stay
_OURS = (
    "checkpoints/step_[0-9]*", "checkpoints/damaged_step_[0-9]*", "checkpoints/.step_[0-9]*.tmp",
    "pair_history/step_[0-9]*.safetensors", "pair_history/.step_[0-9]*.tmp", "pictures/*.png", "trackers/hf_selortho",
    _SAVING, CARD, "config.json", "model.safetensors", METRICS, TIMINGS_LOG, METRICS_LOG, RUN,
)  # fmt: skip
_LIBRARIES = (
    "hf_selortho", "torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface_hub", "safetensors",
    "tokenizers", "numpy",
)  # fmt: skip


def check_output_folder(path: str | Path, *, overwrite: bool, resuming: bool) -> Path:
    """Return the output folder, if a run may write to it; nothing is changed yet.

    Args:
        path: the folder; it need not exist.
        overwrite: an earlier run in it may be replaced.
        resuming: the run goes on with the one in it, or starts it again if it died before its first checkpoint.

    Raises:
        SelOrthoError: it holds an earlier run that is to be kept, or something else than a run.
    """
    folder = Path(path)
    if not (resuming or is_free(folder) or (overwrite and (folder / MARKER).is_file())):
        raise SelOrthoError(
            f"output folder {folder} is not empty: choose another --output_dir; a run of this version (which has left "
            f"{MARKER} in it) can go on with --resume_from_checkpoint auto, or be replaced with --overwrite_output_dir"
        )
    return folder


def is_free(folder: Path) -> bool:
    """Tell whether nothing is in a folder but a lock and batches kept in debug/ before a run could start."""
    return not folder.is_dir() or {entry.name for entry in folder.iterdir()} <= {LOCK, DEBUG}


def holds_unfinished_run(folder: Path) -> bool:
    """Tell whether a folder is what a run leaves that has not finished, or is free for one."""
    return is_free(folder) or ((folder / MARKER).is_file() and not any(folder.rglob(RUN)))


def prepare_output_folder(folder: Path, *, overwrite: bool, resuming: bool) -> None:
    """Create the output folder and mark it as a run's; remove an earlier run's files if `overwrite`, nobody else's.

    Args:
        folder, overwrite, resuming: as for [`check_output_folder`], which has been asked.
    """
    if overwrite and not resuming and (folder / MARKER).is_file():
        for place in (*folder.glob("layer_*"), folder):
            _remove_run(place)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARKER, {"format": FORMAT})


def _remove_run(folder: Path) -> None:
    for pattern in _OURS:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for name in (CHECKPOINTS, PAIR_HISTORY, PICTURES, TRACKERS, ""):
        with suppress(OSError):  # something of somebody else is in it
            (folder / name).rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a file whole: readers see the old one or the new one, also after a power cut.

    Raises:
        SelOrthoError: there is no room, or the folder cannot be written; what was there before is intact.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """[`write_text`] of JSON; NaN and infinity become null."""
    write_text(path, json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n")


def cannot_write(path: Path, error: OSError) -> SelOrthoError:
    """Make the error of a file of a run that cannot be written."""
    return SelOrthoError(
        f"cannot write {path}: {reason(error)}; make room there and run the same command again, a training with "
        "--resume_from_checkpoint auto: its checkpoints are as they were"
    )


def save_sae(sae: SelOrthoSAE, folder: Path) -> None:
    """Write config.json and model.safetensors, each whole or not at all.

    Raises:
        SelOrthoError: there is no room, or the folder cannot be written.
    """
    temporary = folder / _SAVING
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        sae.save_pretrained(temporary)
        for path in sorted(temporary.iterdir(), reverse=True):  # the weights before the config
            sync(path)
            path.replace(folder / path.name)
        temporary.rmdir()
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(folder / "model.safetensors", as_os_error(error)) from error


def as_os_error(error: Exception) -> OSError:
    """Return the error of the operating system that safetensors gives as text, "... (os error 28)"."""
    if number := re.search(r"os error (\d+)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return error if isinstance(error, OSError) else OSError(str(error))


class _StepLog:
    """Rows by step, in memory and as lines of JSON in a file; rows after step `resume_at` go."""

    def __init__(self, path: Path, resume_at: int) -> None:
        self.path = path
        self.rows = [row for row in read_rows(path) if row["step"] <= resume_at]
        write_text(path, "".join(map(_line, self.rows)))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        try:
            when_there_is_room(lambda: _append(self.path, _line(row).encode()))
        except OSError as error:
            raise cannot_write(self.path, error) from error


class MetricsLog:
    """The figures of each logged step, in order: `metrics.jsonl`, and what they took, `timings.jsonl`.

    Two runs with the same seed leave the same metrics.jsonl, byte for byte, however often they were interrupted; times
    are never the same twice.

    Args:
        folder: of the SAE.
        resume_at: rows up to this step are kept, later ones go.

    Raises:
        SelOrthoError: the files cannot be written.
    """

    def __init__(self, folder: Path, *, resume_at: int = 0) -> None:
        self._figures, self._timings = (_StepLog(folder / name, resume_at) for name in (METRICS_LOG, TIMINGS_LOG))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Figures and timings of every logged step together."""
        timings = {row["step"]: row for row in self._timings.rows}
        return [{**row, **timings.get(row["step"], {})} for row in self._figures.rows]

    def add(self, figures: dict[str, Any], timings: Mapping[str, float]) -> None:
        """Append a step; it is on its way to the disk when this returns.

        Raises:
            SelOrthoError: there is no room.
        """
        self._figures.add(figures)
        self._timings.add({"step": figures["step"], **timings})

    def sync(self) -> None:
        """Flush what was added to the disk, or raise an OSError."""
        for log in (self._figures, self._timings):
            sync(log.path)

    def mean_of_last(self, steps: int) -> dict[str, float]:
        """Average every number over the rows of the last `steps` steps (the paper averages over the last 100)."""
        rows = self.rows
        return _means([row for row in rows if row["step"] > rows[-1]["step"] - steps])

    def mean_of_first(self, steps: int) -> dict[str, float]:
        """Average every number, timings left out, over the rows of the first `steps` steps."""
        return _means([row for row in self._figures.rows if row["step"] <= steps])


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    means = {}
    for key in rows[-1] if rows else ():
        values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
        if values and key not in ("step", "tokens"):
            means[key] = sum(values) / len(values)
    return means


def _append(path: Path, line: bytes) -> None:
    """Add a line whole or not at all."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) < len(line):  # there was room for some of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a log by step; a line that a kill has cut off is left out, and what is no row of one."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def library_versions() -> dict[str, str]:
    """Look up the versions of Python and of the libraries that a run depends on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def hardware(device: torch.device, processes: int) -> str:
    """Describe the machine: accelerator or processor, cores, number of processes."""
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
    return json.dumps(jsonable(row), allow_nan=False) + "\n"


def jsonable(value: Any) -> Any:
    """Turn a value into what JSON has: NaN and infinity, what could not be measured, become null, a tuple a list."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value
