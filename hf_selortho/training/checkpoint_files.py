"""The folders of checkpoints: safetensors and JSON, a manifest of hashes, and a name only once all is on the disk.

    checkpoints/step_000100/
        manifest.json              sha256 and size of every other file
        trainer.json               step, settings of the run, what steers it
        process_0.safetensors/json a process's activations, place in its data and random numbers
        process_0_part_1.safetensors
                                   and so on: the rest of a file of more than 32 MiB, but for model.safetensors
        model.safetensors, config.json, optimizer.safetensors, state_0.safetensors
                                   of the SAE; where there are several, in a folder of its own for each

Nothing is pickled, here or anywhere else in a run.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import SelOrthoError
from ..utils.files import sha256_of, sync
from .run_folder import CHECKPOINTS, as_os_error, holds_unfinished_run, write_json

logger = logging.getLogger(__name__)

FORMAT, VERSION = "hf_selortho.checkpoint", 1
MANIFEST, TRAINER, WEIGHTS = "manifest.json", "trainer.json", "model.safetensors"
PART_BYTES = 1 << 25
_NAME = re.compile(r"step_(\d{6,12})")
_DAMAGED = "damaged_"
_FILE = re.compile(r"([a-z0-9_-]+/)?[a-z0-9_]+\.(json|safetensors)")
_LARGEST_MANIFEST = 1 << 24


class DamagedCheckpointError(SelOrthoError):
    """A checkpoint whose files are not those that were written."""


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return output_dir / CHECKPOINTS / f"step_{step:06d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path for path in (output_dir / CHECKPOINTS).glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Step of a checkpoint, by the name of its folder."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match.group(1))


def is_checkpoint_of(checkpoint: Path | None, output_dir: str | Path) -> bool:
    """Whether a checkpoint is one of the run in `output_dir`."""
    return checkpoint is not None and checkpoint.resolve().parent == (Path(output_dir) / CHECKPOINTS).resolve()


def find_checkpoint(wanted: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from: None, the newest one of the output folder ("auto"), or a given folder.

    "auto" passes over damaged checkpoints, which it names, and in a folder without any starts from the beginning.

    Raises:
        SelOrthoError: the given folder is no checkpoint or a damaged one, or all are damaged.
    """
    if wanted is None:
        return None
    output = Path(output_dir)
    if wanted == "auto":
        found = list_checkpoints(output)
        if found:
            return _newest_intact(found)
        if not holds_unfinished_run(output):
            raise SelOrthoError(
                f"{output_dir} holds no checkpoint to resume from (see --checkpoint_every), but a finished run or "
                "other files: choose another --output_dir"
            )
        logger.warning("%s holds no checkpoint: starting from the beginning", output_dir)
        return None
    folder = Path(wanted)
    if not (folder / MANIFEST).is_file():
        available = ", ".join(str(path) for path in list_checkpoints(output)) or "none"
        raise SelOrthoError(
            f"{folder} is not a checkpoint (it has no {MANIFEST}); checkpoints of this run: {available}"
        )
    if is_checkpoint_of(folder, output) and not _NAME.fullmatch(folder.resolve().name):
        raise SelOrthoError(f"{folder} has not the name of a checkpoint, step_N: give it that, or move it elsewhere")
    later = [path for path in list_checkpoints(output) if _is_later(path, folder) and _is_intact(path)]
    if later:
        raise SelOrthoError(
            f"{later[-1]} is later than {folder}: resume from it, move it away, or go on from the earlier one in "
            "another --output_dir"
        )
    verify(folder)
    return folder


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with the manifest.

    Raises:
        DamagedCheckpointError: a file is missing, added or changed; the message names it.
    """
    expected = _read_manifest(folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    for name in sorted({*expected, *found} - {MANIFEST}):
        path = folder / name
        if name not in found:
            raise _damaged(folder, name, "is missing")
        if name not in expected:
            raise _damaged(folder, name, f"is not in {MANIFEST}")
        if path.is_symlink() or path.parent.is_symlink():
            raise _damaged(folder, name, "is a symbolic link, which no checkpoint holds")
        try:
            measured = _hash(path)
        except OSError as error:
            raise _damaged(folder, name, f"cannot be read ({error.strerror})") from error
        if measured != expected[name]:
            expectation = _described(expected[name])
            raise _damaged(folder, name, f"is damaged: it has {_described(measured)}, expected {expectation}")


def read_json(folder: Path, name: str) -> Any:
    """A JSON file of a checkpoint.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    try:
        return json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, name, f"cannot be read ({error})") from error


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint and of its parts, in memory of their own: none keeps a file open.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    pieces: dict[str, list[Tensor]] = {}
    number = 0
    while number == 0 or (folder / _part_name(name, number)).exists():
        part = _part_name(name, number)
        try:
            with safe_open(folder / part, framework="pt") as file:
                for key in file.keys():
                    pieces.setdefault(key, []).append(file.get_tensor(key))
        except (OSError, SafetensorError) as error:
            raise _damaged(folder, part, f"cannot be read ({error})") from error
        number += 1
    return {key: torch.cat(found) if len(found) > 1 else found[0].clone() for key, found in pieces.items()}


def temporary_path(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it has its name."""
    return output_dir / CHECKPOINTS / f".step_{step:06d}.tmp"


def begin_folder(temporary: Path, members: Sequence[str]) -> None:
    """An empty folder, with one for each SAE that has a name; what runs that died left beside it goes.

    Raises:
        OSError: it cannot be made.
    """
    for left in temporary.parent.glob(".step_*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for member in members:
        (temporary / member).mkdir(parents=True, exist_ok=True)


def write_part(
    temporary: Path, rank: int, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, Any]
) -> None:
    """Write a process's files, tensors and JSON by name, flush them to the disk and note their hashes.

    Raises:
        OSError: there is no room, or the folder cannot be written.
    """
    hashes: dict[str, tuple[str, int]] = {}
    try:
        _write_part(temporary, tensors, texts, hashes)
        notes = {name: {"sha256": sha, "bytes": size} for name, (sha, size) in hashes.items()}
        write_json(temporary / _notes(rank), notes)
    except (OSError, SelOrthoError):
        for path in temporary.rglob("*"):  # room for what the run writes until somebody looks
            if path.is_file():
                path.unlink(missing_ok=True)
        raise


def _write_part(
    temporary: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, Any],
    hashes: dict[str, tuple[str, int]],
) -> None:
    for name, content in tensors.items():
        for number, part in enumerate([content] if Path(name).name == WEIGHTS else _parts(content)):
            path = temporary / _part_name(name, number)
            try:
                save_file(dict(part), path, metadata={"format": "pt"})
            except SafetensorError as error:
                raise as_os_error(error) from error
            sync(path)
            hashes[path.relative_to(temporary).as_posix()] = _hash(path)
    for name, text in texts.items():
        write_json(temporary / name, text)
        hashes[name] = _hash(temporary / name)


def publish(temporary: Path, folder: Path, processes: int) -> None:
    """Give a checkpoint its name, once all processes have written their parts.

    Raises:
        OSError, SelOrthoError: there is no room; the checkpoints that are there are intact.
    """
    files: dict[str, Any] = {}
    for rank in range(processes):
        files |= json.loads((temporary / _notes(rank)).read_bytes())
        (temporary / _notes(rank)).unlink()
    write_json(temporary / MANIFEST, {"format": FORMAT, "version": VERSION, "files": dict(sorted(files.items()))})
    for place in (*(path for path in temporary.iterdir() if path.is_dir()), temporary):
        sync(place)
    if folder.exists():  # a damaged one of this step
        set_aside(folder)
    temporary.rename(folder)
    sync(folder.parent)


def set_aside(folder: Path) -> Path:
    """Take a damaged checkpoint out of the way, under a name by which it is no checkpoint any more."""
    aside = folder.with_name(f"{_DAMAGED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def set_later_aside(checkpoint: Path | None) -> None:
    """Take the checkpoints after the one that a run resumes from out of the way: they are damaged."""
    if checkpoint is None:
        return
    for path in list_checkpoints(checkpoint.parent.parent):
        if _is_later(path, checkpoint):
            logger.warning("the damaged checkpoint is %s from now on", set_aside(path))


def prune(output_dir: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` and the best one, and damaged ones that were made up for."""
    found = list_checkpoints(output_dir)
    kept = {*found[-keep:], best_checkpoint(output_dir)}
    for folder in found:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (output_dir / CHECKPOINTS).glob(f"{_DAMAGED}step_*"):
        if found and step_of(Path(folder.name.removeprefix(_DAMAGED))) <= step_of(found[-1]):
            shutil.rmtree(folder, ignore_errors=True)


def best_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint with the lowest mean training loss over the steps before it; None if there is none."""
    losses: dict[Path, float] = {}
    for folder in list_checkpoints(output_dir):
        try:
            loss = read_json(folder, TRAINER).get("loss")
        except (DamagedCheckpointError, AttributeError):
            continue
        if isinstance(loss, (int, float)):
            losses[folder] = float(loss)
    return min(losses, key=lambda folder: losses[folder]) if losses else None


def _is_intact(folder: Path) -> bool:
    try:
        verify(folder)
    except DamagedCheckpointError as error:
        logger.warning("%s", error)
        return False
    return True


def _newest_intact(found: Sequence[Path]) -> Path:
    for folder in reversed(found):
        if not _is_intact(folder):
            continue
        if folder != found[-1]:
            logger.warning("going on from the checkpoint before, %s", folder)
        return folder
    raise SelOrthoError(
        f"all checkpoints in {found[0].parent} are damaged: restore one from a copy, or start again with "
        "--overwrite_output_dir and without --resume_from_checkpoint"
    )


def _read_manifest(folder: Path) -> dict[str, tuple[str, int]]:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"{path.stat().st_size} bytes, expected at most {_LARGEST_MANIFEST}")
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
        if content["version"] == VERSION:
            files = {str(name): (str(file["sha256"]), int(file["bytes"])) for name, file in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _damaged(folder, MANIFEST, f"is damaged ({type(error).__name__}: {error})") from error
    if content["version"] != VERSION:
        raise SelOrthoError(
            f"checkpoint {folder} is of version {content['version']!r}, this hf_selortho reads {VERSION}: resume with "
            "the one that wrote it"
        )
    if wrong := [name for name in files if not _FILE.fullmatch(name)]:
        raise _damaged(folder, MANIFEST, f"names {wrong[0]!r}, which is no file of a checkpoint")
    return files


def _damaged(folder: Path, name: str, fault: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {folder}: {name} {fault}; resume from an earlier one")


def _hash(path: Path) -> tuple[str, int]:
    return sha256_of(path), path.stat().st_size


def _described(measured: tuple[str, int]) -> str:
    return f"{measured[1]} bytes and sha256 {measured[0][:16]}..."


def _notes(rank: int) -> str:
    return f"notes_{rank}.json"


def _part_name(name: str, number: int) -> str:
    path = Path(name)
    return name if number == 0 else path.with_name(f"{path.stem}_part_{number}{path.suffix}").as_posix()


def _parts(content: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors in the same order, large ones cut along their first dimension, in files of about `PART_BYTES`."""
    part: dict[str, Tensor] = {}
    held = 0
    for key, tensor in content.items():
        for piece in _pieces(tensor):
            if part and (key in part or held + piece.nbytes > PART_BYTES):
                yield part
                part, held = {}, 0
            part[key] = piece
            held += piece.nbytes
    yield part


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    if tensor.nbytes <= PART_BYTES or len(tensor) < 2:
        return (tensor,)
    return tensor.split(max(1, PART_BYTES * len(tensor) // tensor.nbytes))


def _is_later(path: Path, other: Path) -> bool:
    """Whether a checkpoint comes after another one of the same run."""
    return path.parent.resolve() == other.resolve().parent and step_of(path) > step_of(other.resolve())
