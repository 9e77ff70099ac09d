"""The folder of a run: who may write to it, the SAE, and the log of its steps."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..data.pair_history import PAIR_HISTORY
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.files import (
    LOCK,
    as_os_error,
    cannot_write,
    jsonable,
    sync,
    when_there_is_room,
    write_json,
    write_text,
)

METRICS_LOG, METRICS, RUN, CARD = "metrics.jsonl", "metrics.json", "run.json", "README.md"
TIMINGS_LOG = "timings.jsonl"
PICTURES, CHECKPOINTS, TRACKERS, DEBUG = "pictures", "checkpoints", "trackers", "debug"
START = "start"  # the SAE that an unfinished run of --init_from has started from
MOVED = "moved.safetensors"  # how far each feature has moved since, as cosines
MARKER = ".selortho_run.json"  # by which a run's folder is known
FORMAT = 2  # of the folder; that of version 0.1.0 had no marker
_SAVING = ".saving.tmp"
_FOLDERS = (CHECKPOINTS, PAIR_HISTORY, PICTURES, TRACKERS, START, _SAVING)  # batches in debug/ outlive the run
_FILES = (CARD, "config.json", "model.safetensors", METRICS, TIMINGS_LOG, METRICS_LOG, MOVED, RUN)


def replaces_run(folder: Path, *, overwrite: bool, resuming: bool) -> bool:
    """Tell whether an earlier run in the output folder, which need not exist, is to be replaced.

    Args:
        folder: of the new run.
        overwrite: an earlier run in it may be replaced.
        resuming: the run goes on with the one in it, or starts it again if it died before its first checkpoint.

    Raises:
        SelOrthoError: it holds an earlier run that is to be kept, or something else than a run.
    """
    if resuming or is_free(folder):
        return False
    if overwrite and (folder / MARKER).is_file():
        return True
    raise SelOrthoError(
        f"output folder {folder} is not empty: choose another --output_dir; a run of this version (which has left "
        f"{MARKER} in it) can go on with --resume_from_checkpoint auto, or be replaced with --overwrite_output_dir"
    )


def is_free(folder: Path) -> bool:
    """Tell whether nothing is in a folder but a lock and batches kept in debug/ before a run could start."""
    return not folder.is_dir() or {entry.name for entry in folder.iterdir()} <= {LOCK, DEBUG}


def holds_unfinished_run(folder: Path) -> bool:
    """Tell whether a folder is what a run leaves that has not finished, or is free for one."""
    return is_free(folder) or ((folder / MARKER).is_file() and not any(folder.rglob(RUN)))


def prepare_output_folder(folder: Path, *, replace: bool) -> None:
    """Create the output folder and mark it as a run's, without what an earlier run has left there if `replace`."""
    for place in (*folder.glob("layer_*"), folder) if replace else ():
        for name in _FOLDERS:
            shutil.rmtree(place / name, ignore_errors=True)
        for name in _FILES:
            (place / name).unlink(missing_ok=True)
        with suppress(OSError):  # something of somebody else is in it
            place.rmdir()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARKER, {"format": FORMAT})


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
        self._paths = (folder / METRICS_LOG, folder / TIMINGS_LOG)
        self._figures, self._timings = (
            [row for row in read_rows(path) if row["step"] <= resume_at] for path in self._paths
        )
        for path, rows in zip(self._paths, (self._figures, self._timings), strict=True):
            write_text(path, "".join(map(_line, rows)))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Figures and timings of every logged step together."""
        timings = {row["step"]: row for row in self._timings}
        return [{**row, **timings.get(row["step"], {})} for row in self._figures]

    def add(self, figures: dict[str, Any], timings: Mapping[str, float]) -> None:
        """Append a step; it is on its way to the disk when this returns.

        Raises:
            SelOrthoError: there is no room.
        """
        timed = {"step": figures["step"], **timings}
        self._figures.append(figures)
        self._timings.append(timed)
        for path, row in zip(self._paths, (figures, timed), strict=True):
            try:
                when_there_is_room(lambda: _append(path, _line(row).encode()))  # noqa: B023  called here and now
            except OSError as error:
                raise cannot_write(path, error) from error

    def sync(self) -> None:
        """Flush what was added to the disk, or raise an OSError."""
        for path in self._paths:
            sync(path)

    def mean_of_last(self, steps: int) -> dict[str, float]:
        """Average every number over the rows of the last `steps` steps (the paper averages over the last 100)."""
        rows = self.rows
        return _means([row for row in rows if row["step"] > rows[-1]["step"] - steps])

    def mean_of_first(self, steps: int) -> dict[str, float]:
        """Average every number, timings left out, over the rows of the first `steps` steps."""
        return _means([row for row in self._figures if row["step"] <= steps])


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


def _line(row: dict[str, Any]) -> str:
    return json.dumps(jsonable(row), allow_nan=False) + "\n"


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


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    means = {}
    for key in rows[-1] if rows else ():
        values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
        if values and key not in ("step", "tokens"):
            means[key] = sum(values) / len(values)
    return means
