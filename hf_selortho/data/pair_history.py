"""The pairs that a training selected, at some of its steps: the folder `pair_history/` beside an SAE's config.json.

pair_history/step_000121.safetensors
    i, j          (T,) int32, i < j: the strongest pairs of the selection of this step
    correlation   (T,) float32, the signed score that they were selected by, by falling absolute value
    metadata      step, selected: the number of pairs that were selected, of which the file keeps T
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import SelOrthoError
from ..utils.files import target_outside

PAIR_HISTORY = "pair_history"
KEPT = 20_000  # pairs of a snapshot
_NAME = re.compile(r"step_(\d{6,12})\.safetensors")
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_DTYPES = {"i": "I32", "j": "I32", "correlation": "F32"}  # as safetensors calls them
_LARGEST_FILE = 1 << 24  # bytes; the largest one that is written has a quarter of a million


@dataclass(frozen=True)
class PairSnapshot:
    """The strongest pairs of one selection, by falling absolute correlation; no pair is there twice."""

    step: int  # of the training, counted from 1
    i: Tensor = field(repr=False)  # (T,) int64 on the CPU, the smaller index
    j: Tensor = field(repr=False)  # (T,) int64, the larger index
    correlation: Tensor = field(repr=False)  # (T,) float32, signed: the score of the selection
    selected: int  # pairs that were selected, at least T

    def __len__(self) -> int:
        return len(self.i)


def snapshot_name(step: int) -> str:
    """Name of the file of a step."""
    return f"step_{step:06d}.safetensors"


def step_of_snapshot(name: str) -> int | None:
    """The reverse of [`snapshot_name`]; None for the name of anything else."""
    match = _NAME.fullmatch(name)
    step = int(match.group(1)) if match else None
    return step if step is not None and snapshot_name(step) == name else None


def snapshot_bytes(step: int, i: Tensor, j: Tensor, correlation: Tensor) -> bytes:
    """The file of a selection, the same bytes for the same pairs.

    Args:
        step: of the training, counted from 1.
        i, j, correlation: all pairs that were selected, (T,) each and on any device, by falling absolute correlation;
            the first [`KEPT`] are kept.
    """
    kept = {
        "i": i[:KEPT].to("cpu", torch.int32),
        "j": j[:KEPT].to("cpu", torch.int32),
        "correlation": correlation[:KEPT].to("cpu", torch.float32),
    }
    data = save(
        {name: tensor.contiguous() for name, tensor in kept.items()}, {"step": str(step), "selected": str(len(i))}
    )
    # safetensors writes metadata in an order that changes from call to call
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


def read_pair_history(folder: str | Path, d_sae: int | None = None) -> list[PairSnapshot]:
    """The selections that a training has left, by rising step; none if it left no history.

    Args:
        folder: of the SAE, beside whose config.json `pair_history/` is.
        d_sae: features of the SAE, if its indices shall be compared with that.

    Raises:
        SelOrthoError: a file is damaged, holds something else than a selection, or does not fit (names it).
    """
    place = Path(folder, PAIR_HISTORY)
    try:
        names = [path.name for path in place.iterdir()] if place.exists() else []
    except OSError as error:
        raise SelOrthoError(f"{place} cannot be read ({error.strerror}): expected a folder of snapshots") from error
    steps = {name: step_of_snapshot(name) for name in names if _NAME.fullmatch(name)}
    if wrong := [name for name, step in steps.items() if step is None]:
        raise _refused(place / min(wrong), "is named with needless zeros")
    found = sorted((step, name) for name, step in steps.items() if step is not None)
    return [_read(Path(folder), place / name, step, d_sae) for step, name in found]


def _read(folder: Path, path: Path, step: int, d_sae: int | None) -> PairSnapshot:
    """One file, once it is known to be the snapshot of the step."""
    if outside := target_outside(folder, path):
        raise _refused(path, f"leads out of {folder}, to {outside}")
    try:
        if not path.is_file():
            raise _refused(path, "is no file")
        if (size := path.stat().st_size) > _LARGEST_FILE:
            raise _refused(path, f"has {size:,} bytes, expected at most {_LARGEST_FILE:,}")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_header(path, file)
            tensors = {name: file.get_tensor(name).clone() for name in _DTYPES}  # the file may go
    except (SafetensorError, OSError) as error:
        raise _refused(path, f"is damaged or incomplete ({' '.join(str(error).split())[:200]})") from error
    numbers = {name: metadata.get(name, "") for name in ("step", "selected")}
    if wrong := [f"{name} {value[:20]!r}" for name, value in numbers.items() if not _NUMBER.fullmatch(value)]:
        raise _refused(path, f"names no number of its {wrong[0]}")
    if int(numbers["step"]) != step or step == 0:
        raise _refused(path, f"is of step {numbers['step']}, its name says {step}")
    i, j = tensors["i"].long(), tensors["j"].long()
    snapshot = PairSnapshot(step, i, j, tensors["correlation"], int(numbers["selected"]))
    if fault := _fault(snapshot, d_sae):
        raise _refused(path, fault)
    return snapshot


def _check_header(path: Path, file: Any) -> None:
    """Names, shapes and dtypes, before any tensor is read."""
    names = set(file.keys())
    if names != set(_DTYPES):
        shown = ", ".join(sorted(names)[:5])[:100] or "nothing"
        raise _refused(path, f"holds {shown}, expected {', '.join(_DTYPES)}")
    parts = {name: file.get_slice(name) for name in _DTYPES}
    for name, part in parts.items():
        if part.get_dtype() != _DTYPES[name]:
            raise _refused(path, f"holds {name} as {part.get_dtype()}, expected {_DTYPES[name]}")
    shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    if len(set(shapes.values())) > 1 or len(shapes["i"]) != 1:
        said = ", ".join(f"{name} {str(shape)[:60]}" for name, shape in shapes.items())
        raise _refused(path, f"holds {said}, expected one number of each for every pair")


def _fault(snapshot: PairSnapshot, d_sae: int | None) -> str | None:
    """What is wrong with the pairs, if anything is."""
    i, j, correlation = snapshot.i, snapshot.j, snapshot.correlation
    if len(snapshot) > snapshot.selected:
        return f"holds {len(snapshot)} pairs, of {snapshot.selected} that were selected"
    if len(snapshot) == 0:
        return None
    if bool((i < 0).any()) or bool((i >= j).any()):
        return "holds pairs that are not 0 <= i < j"
    if d_sae is not None and int(j.max()) >= d_sae:
        return f"names feature {int(j.max())}, the SAE has {d_sae}"
    if not bool(correlation.isfinite().all()):
        return "holds correlations that are NaN or infinite"
    strength = correlation.abs()
    if bool((strength[1:] > strength[:-1]).any()):
        return "is not sorted by falling absolute correlation"
    if len(torch.unique((i << 31) | j)) < len(snapshot):
        return "holds a pair twice"
    return None


def _refused(path: Path, fault: str) -> SelOrthoError:
    return SelOrthoError(f"{path} {fault}: copy it from the training's folder again, or remove it")
