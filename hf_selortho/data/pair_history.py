"""The pairs that a training selected, at some of its steps: the folder `pair_history/` beside an SAE's config.json.

pair_history/step_000121.safetensors
    i, j          (T,) int32, i < j: the strongest pairs of the selection of this step
    correlation   (T,) float32, the signed score that they were selected by, by falling absolute value
    metadata      step, selected: the number of pairs that were selected, of which the file keeps T
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..pair_selection import Pairs
from ..utils.files import reason, replace_file, sync, target_outside, when_there_is_room
from ..utils.library_errors import one_line

PAIR_HISTORY = "pair_history"
KEPT = 20_000  # pairs of a snapshot
MOST = 32  # snapshots, besides that of the last selection: between 17 and 32 of a training with as many selections
_NAME = re.compile(r"step_(\d{6,12})\.safetensors")
_DTYPES = {"i": torch.int32, "j": torch.int32, "correlation": torch.float32}


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


class PairHistory:
    """Writes the snapshots of one SAE's training, from the main process.

    Two runs with the same seed leave the same files, byte for byte, however often they were interrupted, and also if
    the first part was to end at an earlier step: between two snapshots there is a power of two of selections.

    Args:
        folder: of the SAE.
        config: only the selective penalty selects pairs; with another one nothing is written.
        max_steps: of the training.
        resume_at: snapshots up to this step are kept if they are such as this run writes; others are removed.
    """

    def __init__(self, folder: Path, config: SelOrthoConfig, max_steps: int, *, resume_at: int = 0) -> None:
        self.folder = folder / PAIR_HISTORY
        self._selects = config.penalty == "selective"
        self._interval = config.selection_interval
        self._last = (max_steps - 1) // self._interval  # selections are counted from 0
        self._stride = 1
        while self._last // self._stride >= MOST:
            self._stride *= 2
        for path in [*self.folder.glob("step_[0-9]*.safetensors"), *self.folder.glob(".step_[0-9]*.tmp")]:
            match = _NAME.fullmatch(path.name)
            if not match or int(match[1]) > resume_at or not self.is_due(int(match[1])):
                path.unlink()
        with suppress(OSError):  # snapshots are in it, or something of somebody else, or it is not there
            self.folder.rmdir()

    def is_due(self, step: int) -> bool:
        """Tell whether a step, counted from 1, is a selection that leaves a snapshot."""
        selection, rest = divmod(step - 1, self._interval)
        return self._selects and rest == 0 and (selection % self._stride == 0 or selection == self._last)

    def add(self, step: int, pairs: Pairs) -> None:
        """Write the pairs of a step's selection if it is one that leaves a snapshot: whole or not at all.

        Raises:
            SelOrthoError: there is no room.
        """
        if not self.is_due(step):
            return
        path, data = self.folder / snapshot_name(step), snapshot_bytes(step, pairs.i, pairs.j, pairs.correlation)
        if not self.folder.exists():
            self.folder.mkdir()
            sync(self.folder.parent)
        try:
            when_there_is_room(lambda: replace_file(path, data))
        except OSError as error:
            raise SelOrthoError(
                f"cannot write {path}: {reason(error)}; make room there and run the same command again with "
                "--resume_from_checkpoint auto"
            ) from error


def snapshot_name(step: int) -> str:
    """Name the file of a step."""
    return f"step_{step:06d}.safetensors"


def snapshot_bytes(step: int, i: Tensor, j: Tensor, correlation: Tensor) -> bytes:
    """Return the content of the file of a selection, the same bytes for the same pairs.

    Args:
        step: of the training, counted from 1.
        i, j, correlation: all pairs that were selected, (T,) each and on any device, by falling absolute correlation;
            the first [`KEPT`] are kept.
    """
    columns = zip(_DTYPES.items(), (i, j, correlation), strict=True)
    tensors = {name: column[:KEPT].to("cpu", dtype).contiguous() for (name, dtype), column in columns}
    data = save(tensors, {"step": str(step), "selected": str(len(i))})
    # safetensors writes metadata in an order that changes from call to call
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


def read_pair_history(folder: str | Path, d_sae: int | None = None) -> list[PairSnapshot]:
    """Read the selections that a training has left, by rising step; none if it left no history.

    Args:
        folder: of the SAE, beside whose config.json `pair_history/` is.
        d_sae: features of the SAE, if its indices shall be compared with that.

    Raises:
        SelOrthoError: a file is no snapshot, or does not fit (names it).
    """
    snapshots = []
    for path in Path(folder, PAIR_HISTORY).glob("step_*.safetensors"):
        if not _NAME.fullmatch(path.name) or not path.is_file():
            continue
        try:
            if outside := target_outside(Path(folder), path):
                raise ValueError(f"it leads out of {folder}, to {outside}")
            snapshots.append(_read(path, d_sae))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise SelOrthoError(
                f"{path} is not a valid snapshot: {one_line(error)}; copy it from the training's folder again, or "
                "remove it"
            ) from error
    return sorted(snapshots, key=lambda snapshot: snapshot.step)


def _read(path: Path, d_sae: int | None) -> PairSnapshot:
    """Read a file; raises ValueError, KeyError, OSError or SafetensorError if it is not the snapshot of its step."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in _DTYPES}  # the file may go
    step, selected = int(metadata["step"]), int(metadata["selected"])
    if {name: tensor.dtype for name, tensor in tensors.items()} != _DTYPES or path.name != snapshot_name(step):
        raise ValueError(f"expected the columns {_DTYPES} of the step in its name")
    i, j, correlation = tensors["i"].long(), tensors["j"].long(), tensors["correlation"]
    strength = correlation.abs()
    valid = i.ndim == 1 and i.shape == j.shape == correlation.shape and len(i) <= selected
    if not (
        valid
        and bool(((i >= 0) & (i < j) & correlation.isfinite()).all())
        and bool((j < (d_sae or 1 << 31)).all())
        and bool((strength[1:] <= strength[:-1]).all())
        and len(torch.unique((i << 31) | j)) == len(i)
    ):
        among = "" if d_sae is None else f" < {d_sae}"
        raise ValueError(
            f"expected at most {selected} pairs 0 <= i < j{among}, none twice, by falling absolute correlation"
        )
    return PairSnapshot(step, i, j, correlation, selected)
