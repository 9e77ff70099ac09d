"""The training loop: batches of activations in, trained SAEs out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from ..data.buffer import BatchSource
from ..errors import NonFiniteError
from ..utils.progress import Bar
from .arguments import RunArguments
from .checkpoint import Checkpoints
from .sae_trainer import SAETrainer
from .stage_costs import training_words
from .stop_signals import StopSignals

# figures of a step that the progress bar shows, the name there, and the format
_SHOWN = {
    "loss": ("loss", ".4f"), "fvu": ("fvu", ".3f"), "l0": ("l0", ".0f"), "dead_features": ("dead", "d"),
    "peak_correlation": ("peak", ".2f"), "tokens_per_second": ("tok/s", ".0f"),
}  # fmt: skip


class Trainer:
    """Trains SAEs on the same batches, each step one after the other.

    Args:
        saes: one trainer for each SAE.
        source: of the batches.
        arguments: of the run.
        checkpoints: writes them.
        signals: what asks to stop; by default nothing does.
    """

    def __init__(
        self,
        saes: Sequence[SAETrainer],
        source: BatchSource,
        arguments: RunArguments,
        checkpoints: Checkpoints,
        signals: StopSignals | None = None,
    ) -> None:
        self.saes, self.source, self.arguments = saes, source, arguments
        self.checkpoints, self.signals = checkpoints, signals or StopSignals()

    @property
    def step(self) -> int:
        """Steps taken, those of earlier runs included."""
        return self.saes[0].state.step

    def fit(self) -> int | None:
        """Train to `max_steps`. The last step is in a checkpoint if the run writes any, or if a signal ends it.

        Returns:
            The signal that one of the processes has received, and that ended the run before; None if none did.

        Raises:
            NonFiniteError: names the step, where it first appeared, the documents and the last checkpoint.
        """
        every, progress, saved = self.arguments.checkpoint_every, self._progress_bar(), self.step
        for sae in self.saes:
            sae.model.train()
        try:
            while not self.sync_signals() and self.step < self.arguments.max_steps:
                report = self.train_step()
                _show(progress, report)
                if every and self.step % every == 0:
                    self.checkpoints.save(self.saes, self.source)
                    saved = self.step
            if saved < self.step and (every or self.sync_signals()):
                self.checkpoints.save(self.saes, self.source)
            self.checkpoints.wait()
            return self.sync_signals()
        except NonFiniteError as error:
            self.checkpoints.close()  # the latest one may only just be complete
            latest = self.checkpoints.latest or "none (see --checkpoint_every)"
            raise NonFiniteError(f"{error}. Last good checkpoint: {latest}") from error
        finally:
            with suppress(OSError):
                progress.close()
            self.checkpoints.close()

    def train_step(self) -> dict[str, Any] | None:
        """Take one optimiser step of all SAEs; returns the report of the first one if the step is logged."""
        reports: list[dict[str, Any] | None] = []
        for remaining in reversed(range(self.arguments.gradient_accumulation_steps)):
            started = time.perf_counter()
            self.saes[0].policy.step = self.step + 1
            batch = self.source.next_batch()
            seconds = time.perf_counter() - started
            reports = [sae.train_step(batch, last=remaining == 0, data_seconds=seconds) for sae in self.saes]
        return reports[0]

    def sync_signals(self) -> int | None:
        """Agree with all processes on the signal that asks to stop; None if none has come."""
        received = torch.tensor(-(self.signals.received or 0), device=self.saes[0].accelerator.device)
        return -int(self.saes[0].group.minimum(received)) or None

    def _progress_bar(self) -> Bar:
        return Bar(
            training_words(len(self.saes)),
            total=self.arguments.max_steps,
            initial=self.step,
            disable=not self.saes[0].accelerator.is_main_process,
            unit="step",
        )


def _show(progress: Bar, report: dict[str, Any] | None) -> None:
    """Move the bar on. A screen that is gone, as with a pipe whose reader has ended, is no reason to stop."""
    with suppress(OSError):
        progress.update()
        if report is not None:
            shown = {name: format(report[key], spec) for key, (name, spec) in _SHOWN.items() if report[key] is not None}
            progress.set_postfix(shown)
