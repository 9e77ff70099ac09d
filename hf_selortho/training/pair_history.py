"""Writes the pair history of a training: what it selected, at steps spread evenly over it ([`..pair_history`])."""

from __future__ import annotations

from pathlib import Path

from ..configuration_selortho import SelOrthoConfig
from ..data.pair_history import PAIR_HISTORY, snapshot_bytes, snapshot_name, step_of_snapshot
from ..pair_selection import Pairs
from ..utils.files import replace_file, sync
from .run_folder import SNAPSHOT, cannot_write, when_there_is_room

MOST = 32  # snapshots, besides that of the last selection: between 17 and 32 of a training with as many selections


class PairHistory:
    """The snapshots of one SAE's training, written by the main process.

    Two runs with the same seed leave the same files, byte for byte, however often they were interrupted, and also if
    the first part was to end at an earlier step: between two snapshots there is a power of two of selections.

    Args:
        folder: of the SAE.
        config: only the selective penalty selects pairs; with another one nothing is written.
        max_steps: of the training.
        resume_at: snapshots up to this step are kept if they are such as this run writes; others go.

    Raises:
        SelOrthoError: those cannot be removed.
    """

    def __init__(self, folder: Path, config: SelOrthoConfig, max_steps: int, *, resume_at: int = 0) -> None:
        self.folder = folder / PAIR_HISTORY
        self._selects = config.penalty == "selective"
        self._interval = config.selection_interval
        self._last = (max_steps - 1) // self._interval  # selections are counted from 0
        self._stride = 1
        while self._last // self._stride >= MOST:
            self._stride *= 2
        try:
            self._remove_others(resume_at)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 1, is a selection that leaves a snapshot."""
        selection, rest = divmod(step - 1, self._interval)
        return self._selects and rest == 0 and (selection % self._stride == 0 or selection == self._last)

    def see(self, step: int, pairs: Pairs) -> None:
        """Write the pairs of a step's selection if it is one that leaves a snapshot: whole or not at all.

        Raises:
            SelOrthoError: there is no room.
        """
        if not self.is_due(step):
            return
        path = self.folder / snapshot_name(step)
        data = snapshot_bytes(step, pairs.i, pairs.j, pairs.correlation)
        try:
            when_there_is_room(lambda: self._write(path, data))
        except OSError as error:
            raise cannot_write(path, error) from error

    def _write(self, path: Path, data: bytes) -> None:
        if not self.folder.exists():
            self.folder.mkdir()
            sync(self.folder.parent)
        replace_file(path, data)

    def _remove_others(self, resume_at: int) -> None:
        """Remove what comes after the step that the run goes on from, and what only another run would have written."""
        if not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            step = step_of_snapshot(path.name)
            kept = step is not None and 0 < step <= resume_at and self.is_due(step)
            if SNAPSHOT.fullmatch(path.name) and not kept:
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
