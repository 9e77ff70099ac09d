"""The training loop: batches of activations in, trained SAEs out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.buffer import BatchSource
from ..errors import NonFiniteError
from .arguments import RunArguments
from .checkpoint import Checkpoints
from .sae_trainer import SAETrainer
from .stop_signals import STOPPING, StopSignals


class Trainer:
    """Trains SAEs on the same batches, each step one after the other.

    Args:
        saes: one trainer for each SAE.
        source: of the batches.
        arguments: of the run.
        checkpoints: writes them.
        signals: what asks to stop; None: nothing does.
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
        self.checkpoints, self.signals = checkpoints, signals
        self._saved = self.step  # of the latest checkpoint

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
        every = self.arguments.checkpoint_every
        for sae in self.saes:
            sae.model.train()
        progress = self._progress_bar()
        try:
            while not (stopped := self.sync_signals()) and self.step < self.arguments.max_steps:
                report = self.train_step()
                _show(progress, report)
                if every and self.step % every == 0:
                    self._save()
            self.checkpoints.wait()
            stopped = self.sync_signals() or stopped
            if self._saved < self.step and (every or stopped):
                self._save()
                self.checkpoints.wait()
                self.sync_signals()
        except NonFiniteError as error:
            self.checkpoints.close()  # the latest one may only just be complete
            latest = self.checkpoints.latest or "none (see --checkpoint_every)"
            raise NonFiniteError(f"{error}. Last good checkpoint: {latest}") from error
        finally:
            with suppress(OSError):
                progress.close()
            self.checkpoints.close()
        return stopped

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
        """Agree with all processes on the signal that asks to stop, and on how the checkpoint on its way stands."""
        received = None if self.signals is None else self.signals.received
        flags = [*(received == number for number in STOPPING), *self.checkpoints.progress()]
        *asked, writing, failed = _in_any_process(flags, self.saes[0])
        self.checkpoints.settle(writing, failed)
        return next((number for number, asks in zip(STOPPING, asked, strict=True) if asks), None)

    def _save(self) -> None:
        """Begin to write a checkpoint, once the one before it is done."""
        self.checkpoints.wait()
        self.sync_signals()
        self.checkpoints.save(self.saes, self.source)
        self._saved = self.step

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.arguments.max_steps,
            initial=self.step,
            disable=not self.saes[0].accelerator.is_main_process,
            desc="training" if len(self.saes) == 1 else f"training {len(self.saes)} SAEs",
            unit="step",
        )


def _in_any_process(flags: Sequence[bool], trainer: SAETrainer) -> list[bool]:
    """Tell which flags are set in at least one process."""
    if trainer.group.size == 1:  # a look at the device at every step would cost
        return list(flags)
    counts = trainer.group.sum(torch.tensor(flags, dtype=torch.int32, device=trainer.accelerator.device))
    return [count > 0 for count in counts.tolist()]


def _show(progress: tqdm, report: dict[str, Any] | None) -> None:
    """Move the bar on. A screen that is gone, as with a pipe whose reader has ended, is no reason to stop."""
    formats = {
        "loss": ".4f", "fvu": ".3f", "l0": ".0f", "dead_features": "d", "peak_correlation": ".2f",
        "tokens_per_second": ".0f",
    }  # fmt: skip
    short = {"dead_features": "dead", "peak_correlation": "peak", "tokens_per_second": "tok/s"}
    with suppress(OSError):
        progress.update()
        if report is not None:
            progress.set_postfix(
                {short.get(k, k): format(report[k], spec) for k, spec in formats.items() if report[k] is not None}
            )
