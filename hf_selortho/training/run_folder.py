"""Files of a run: the output folder, its logs by step, files written whole, and the environment it ran in."""

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
from functools import partial
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
_SAVING = ".saving.tmp"
_REPLACED = ".replaced.tmp"  # checkpoints on their way out
_OWN_FOLDERS = (PICTURES, TRACKERS, _SAVING)
# in the order in which they are removed: by the last two a run is known
_OWN_FILES = (CARD, "config.json", "model.safetensors", METRICS, TIMINGS_LOG, METRICS_LOG, RUN)
SNAPSHOT = re.compile(r"step_\d{6,12}\.safetensors|\.step_\d{6,12}\.safetensors\.tmp")
# what these folders, which others may have too, hold of ours
_ENTRIES = {
    CHECKPOINTS: re.compile(r"(damaged_)?step_\d{6,12}|\.step_\d{6,12}\.tmp"),
    DEBUG: re.compile(r"\.?step_\d{6,12}\w*\.safetensors(\.tmp)?"),
    PAIR_HISTORY: SNAPSHOT,
    TRACKERS: re.compile(r"hf_selortho"),
}
_MEMBER = re.compile(r"layer_\d+(_[a-z0-9-]+)?")  # folder of one of several SAEs
_LOGS = (METRICS_LOG, TIMINGS_LOG)
_UNFINISHED = {LOCK, *_LOGS, *(f".{name}.tmp" for name in _LOGS), *_ENTRIES, _REPLACED}
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
    names = {entry.name for entry in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
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
    members = [path for path in folder.iterdir() if _MEMBER.fullmatch(path.name) and path.is_dir()]
    return _holds_only_ours(folder, members) and all(_holds_only_ours(member, []) for member in members)


def _holds_only_ours(folder: Path, members: list[Path]) -> bool:
    """Whether all that is in a folder, but for the folders of SAEs, may be what a run leaves before it is finished."""
    rest = {path for path in folder.iterdir() if path not in members}
    inside = ((entry.name, own) for name, own in _ENTRIES.items() for entry in _entries(folder / name))
    return {path.name for path in rest} <= _UNFINISHED and all(own.fullmatch(name) for name, own in inside)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _holds_run(folder: Path) -> bool:
    """Whether a run, or one of the SAEs of a run, has left its log or its record in the folder."""
    members = (path for path in folder.glob("layer_*") if _MEMBER.fullmatch(path.name))
    return any((place / name).is_file() for place in (folder, *members) for name in (RUN, METRICS_LOG))


def prepare_output_folder(folder: Path, *, overwrite: bool, resuming: bool, since: float = math.inf) -> None:
    """Create the output folder, or remove an earlier run's files if `overwrite`; nobody else's are ever removed.

    Args:
        folder, overwrite, resuming: as for [`check_output_folder`], which has been asked.
        since: seconds of the epoch; batches that were kept in `debug/` since then are of this run, and stay.

    Raises:
        SelOrthoError: the folder cannot be created.
    """
    if overwrite and not resuming:
        members = [path for path in folder.glob("layer_*") if _MEMBER.fullmatch(path.name)]
        for place in (folder, *members):
            _remove_run(place, since)
        for path in members:
            if not any(path.iterdir()):
                path.rmdir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SelOrthoError(
            f"cannot create output folder {folder} ({error.strerror}): choose another --output_dir"
        ) from None


def _remove_run(folder: Path, since: float) -> None:
    """In an order in which what is left by a kill is still known as a run, and never resumed."""
    replaced = folder / _REPLACED
    shutil.rmtree(replaced, ignore_errors=True)
    for path in _entries(folder / CHECKPOINTS):
        if _ENTRIES[CHECKPOINTS].fullmatch(path.name):
            replaced.mkdir(exist_ok=True)
            path.rename(replaced / path.name)
    shutil.rmtree(replaced, ignore_errors=True)
    for path in _entries(folder / DEBUG):
        if _ENTRIES[DEBUG].fullmatch(path.name) and path.stat().st_mtime < since:
            path.unlink()
    for path in _entries(folder / PAIR_HISTORY):
        if SNAPSHOT.fullmatch(path.name):
            path.unlink()
    for name in (CHECKPOINTS, DEBUG, PAIR_HISTORY):
        with suppress(OSError):  # something of somebody else is in it, or of this run
            (folder / name).rmdir()
    for name in _OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)


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
    """What to say when a file of a run cannot be written."""
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
    """The error of the operating system behind one of safetensors, which gives it as text: "... (os error 28)"."""
    found = re.search(r"os error (\d+)", str(error))
    if found:
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return error if isinstance(error, OSError) else OSError(str(error))


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
        self.folder = folder
        self._files = {METRICS_LOG: read_rows(folder / METRICS_LOG), TIMINGS_LOG: read_rows(folder / TIMINGS_LOG)}
        for name, rows in self._files.items():
            kept = {row["step"]: row for row in rows if row["step"] <= resume_at}
            self._files[name] = list(kept.values())
            write_text(folder / name, "".join(map(_line, kept.values())))

    def __len__(self) -> int:
        """Steps that were logged."""
        return len(self._files[METRICS_LOG])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Figures and timings of every logged step together."""
        timings = {row["step"]: row for row in self._files[TIMINGS_LOG]}
        return [{**row, **timings.get(row["step"], {})} for row in self._files[METRICS_LOG]]

    def add(self, figures: dict[str, Any], timings: Mapping[str, float]) -> None:
        """Append a step; it is on its way to the disk when this returns.

        Raises:
            SelOrthoError: there is no room.
        """
        rows = {METRICS_LOG: figures, TIMINGS_LOG: {"step": figures["step"], **timings}}
        for name, row in rows.items():
            self._files[name].append(row)
            add = partial(_append, self.folder / name, _line(row).encode())
            try:
                when_there_is_room(add)
            except OSError as error:
                raise cannot_write(self.folder / name, error) from error

    def mean_loss(self, after: int) -> float | None:
        """Mean loss of the rows after a step, or else that of the last row; None if there is none."""
        rows = self._files[METRICS_LOG]
        losses = [row["loss"] for row in rows if row["step"] > after] or [row["loss"] for row in rows[-1:]]
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if known else None

    def sync(self) -> None:
        """Flush what was added to the disk.

        Raises:
            OSError: it cannot be.
        """
        for name in self._files:
            sync(self.folder / name)

    def mean_of_last(self, steps: int) -> dict[str, float]:
        """Mean of every number over the rows of the last `steps` steps (the paper averages over the last 100)."""
        rows = self.rows
        return _means([row for row in rows if row["step"] > rows[-1]["step"] - steps])

    def mean_of_first(self, steps: int) -> dict[str, float]:
        """The same over the first `steps` steps, without timings."""
        return _means([row for row in self._files[METRICS_LOG] if row["step"] <= steps])


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
    """Rows of a log by step; a last line that was cut off by a kill is left out, and what is no row of one."""
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
    return json.dumps(jsonable(row), allow_nan=False) + "\n"


def jsonable(value: Any) -> Any:
    """A value as JSON has it, without NaN and infinity: what could not be measured becomes null, a tuple a list."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value
