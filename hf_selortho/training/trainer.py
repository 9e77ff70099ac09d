"""The training loop: batches of activations in, a trained SAE out."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..data.buffer import ActivationBatch, BatchSource
from ..errors import NonFiniteError, SelOrthoError
from ..language_models.capture import only
from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE
from ..process_group import ProcessGroup
from .arguments import RunArguments
from .checkpoint import Checkpoints
from .non_finite import LossSpikes, NonFiniteGuard, first_not_finite, is_finite
from .optimizer import SAEOptimizer
from .pair_history import PairHistory
from .penalty import PenaltySchedule, steer
from .resampling import resample_dead
from .run_folder import MetricsLog
from .state import Controller, TrainState, learning_rate_at, pair_churn, step_report
from .stop_signals import STOPPING, StopSignals

LAST_STEPS = 100  # the paper averages its training metrics over the last 100 steps; all of them are logged
_ADVICE = "try a lower --learning_rate"
_FAULTS = ("activations", "feature activations", "loss", "gradient")  # in the order in which a step computes them


def train_together(
    trainers: Sequence[Trainer],
    source: BatchSource,
    arguments: RunArguments,
    checkpoints: Checkpoints,
    signals: StopSignals | None = None,
) -> int | None:
    """Train SAEs on the same batches, each step one after the other, to `max_steps`.

    The last step is in a checkpoint if the run writes any, and whenever a signal ends the run.

    Returns:
        The signal that one of the processes has received, and that ended the run before; None if none did.

    Raises:
        NonFiniteError: names the step, where it first appeared, the documents and the last checkpoint.
    """
    first = trainers[0]
    for trainer in trainers:
        trainer.model.train()
    progress = tqdm(
        total=arguments.max_steps,
        initial=first.state.step,
        disable=not first.accelerator.is_main_process,
        desc="training" if len(trainers) == 1 else f"training {len(trainers)} SAEs",
        unit="step",
    )
    every, saved = arguments.checkpoint_every, first.state.step
    try:
        while not (stopped := look_around(first, checkpoints, signals)) and first.state.step < arguments.max_steps:
            first.guard.step = first.state.step + 1
            report = take_step(trainers, source, arguments)
            _show(progress, report)
            if every and first.state.step % every == 0:
                saved = _save(trainers, source, checkpoints, signals)
        _close(progress)
        if saved < first.state.step and (every or stopped):
            saved = _save(trainers, source, checkpoints, signals)
        checkpoints.wait()
        if not stopped and (stopped := look_around(first, checkpoints, signals)) and saved < first.state.step:
            _save(trainers, source, checkpoints, signals)  # the signal came after the last step
        checkpoints.wait()
        look_around(first, checkpoints, signals)
    except SelOrthoError as error:
        if first.group.size == 1:  # else the other processes are somewhere else
            checkpoints.wait()
            look_around(first, checkpoints, None)
        if not isinstance(error, NonFiniteError):
            raise
        latest = f"last good checkpoint: {checkpoints.latest or 'none (see --checkpoint_every)'}"
        raise NonFiniteError(f"{error}. {latest[0].upper()}{latest[1:]}") from error
    finally:
        _close(progress)
        checkpoints.close()
    return stopped


def _show(progress: tqdm, report: dict[str, Any] | None) -> None:
    """One step more. A screen that is gone, as with a pipe whose reader has ended, is no reason to stop."""
    with suppress(OSError):
        progress.update()
        if report is not None:
            progress.set_postfix(_shown(report))


def _close(progress: tqdm) -> None:
    with suppress(OSError):
        progress.close()


def _save(
    trainers: Sequence[Trainer], source: BatchSource, checkpoints: Checkpoints, signals: StopSignals | None
) -> int:
    """Begin to write a checkpoint, once the one before it is done; returns its step."""
    checkpoints.wait()
    look_around(trainers[0], checkpoints, signals)
    checkpoints.save(trainers, source)
    return trainers[0].state.step


def look_around(trainer: Trainer, checkpoints: Checkpoints, signals: StopSignals | None) -> int | None:
    """Learn from all processes how the checkpoint stands that is being written, and which signal asks to stop."""
    received = None if signals is None else signals.received
    own = (*(received == number for number in STOPPING), checkpoints.writing, checkpoints.failed)
    if trainer.group.size > 1:
        found = trainer.group.sum(torch.tensor(own, dtype=torch.int32, device=trainer.accelerator.device))
        own = tuple(count > 0 for count in found.tolist())
    *asked, writing, failed = own
    checkpoints.settle(writing, failed)
    return next((number for number, one in zip(STOPPING, asked, strict=True) if one), None)


def take_step(trainers: Sequence[Trainer], source: BatchSource, arguments: RunArguments) -> dict[str, Any] | None:
    """One optimiser step of all SAEs; returns the report of the first one if the step is logged."""
    reports: list[dict[str, Any] | None] = []
    for index in range(arguments.gradient_accumulation_steps):
        started = time.perf_counter()
        batch = source.next_batch()
        seconds = time.perf_counter() - started
        last = index == arguments.gradient_accumulation_steps - 1
        reports = [trainer.learn(batch, last, seconds) for trainer in trainers]
    return reports[0]


class Trainer:
    """Trains one SAE, a batch at a time.

    Args:
        accelerator: device, mixed precision and data parallelism.
        sae: the model, in float32; its decoder rows have norm 1 after every step.
        arguments: optimisation and logging.
        log: where the figures of its steps go; None in all processes but the main one.
        controller: steers the penalty's coefficient ([`make_controller`]).
        name: of the SAE among several; "" if there is one.
        guard: what becomes of batches that are not finite; by default the first one ends the run.
        history: where the pairs that it selects go; None in all processes but the main one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        sae: SelOrthoSAE,
        arguments: RunArguments,
        log: MetricsLog | None,
        controller: Controller | None = None,
        name: str = "",
        guard: NonFiniteGuard | None = None,
        history: PairHistory | None = None,
    ) -> None:
        self.accelerator, self.arguments, self.log, self.name = accelerator, arguments, log, name
        self.history = history
        self.sae = sae.to(accelerator.device)
        self.optimizer = SAEOptimizer(self.sae, arguments, accelerator.device)
        self.model, self._adam = accelerator.prepare(self.sae, self.optimizer.adam)
        self.scaler = copy.deepcopy(accelerator.scaler)  # of fp16 losses; each SAE has its own
        self._adam.scaler = self.scaler
        self.group = ProcessGroup.of_run()
        self.penalty = PenaltySchedule(self.sae.config, self.group)
        self.state = TrainState(torch.zeros(self.sae.config.d_sae, dtype=torch.int64, device=accelerator.device))
        self.state.controller = controller
        self.guard = guard or NonFiniteGuard(None)
        self.spikes = LossSpikes(arguments.loss_spike_factor, name)
        self._spoilt = False  # whether a batch of the current step was not finite
        self._loss = 0.0  # of the latest batch, the mean over the processes
        self._seconds = {"data": 0.0, "step": 0.0}
        self._tokens_timed, self._reported_at = 0, 0  # since the last report

    def resumed(self) -> None:
        """Note that the state comes from a checkpoint: times are counted from here."""
        self._reported_at = self.state.step

    def release(self) -> None:
        """Let go of the model that shares its gradients with other processes: the training is over."""
        self.model = self.sae

    def learn(self, batch: ActivationBatch, last: bool, data_seconds: float = 0.0) -> dict[str, Any] | None:
        """Add the gradient of a batch and, if it is the step's last one, take the step.

        Args:
            batch: holds the layer that the SAE reads.
            last: gradients are exchanged between processes and applied after the last batch of a step only.
            data_seconds: what the batch took to come.

        Returns:
            The report of the step if one was taken and is logged.

        Raises:
            NonFiniteError: names the step, where it first appeared and the documents of the batch.
        """
        started = time.perf_counter()
        self._set_learning_rate(self.state.step + 1)
        previous, output = self.state.pairs, None
        activations = self._activations_of(batch).to(self.accelerator.device)
        if not self._spoilt:
            output = self._accumulate(batch, activations, last)
            self._spoilt = output is None
        if last:
            self._finish_step(batch, activations, output)
        self._seconds["step"] += time.perf_counter() - started
        self._seconds["data"] += data_seconds
        if output is None or not (last and self._is_logged()):
            return None
        return self._report(activations, output, previous)

    def _finish_step(self, batch: ActivationBatch, activations: Tensor, output: SelOrthoOutput | None) -> None:
        """Take the step, unless one of its batches was not finite."""
        if output is None:
            self.optimizer.zero_grad()
            self.state.skipped += 1
        else:
            self._apply(batch)
            if output.pairs is not None:
                self.state.pairs = output.pairs
                if self.history is not None:
                    self.history.see(self.state.step + 1, self.state.pairs)
        self.state.step += 1
        self._spoilt = False
        if output is not None:
            self._revive(activations, output)

    def _activations_of(self, batch: ActivationBatch) -> Tensor:
        layer = self.sae.config.layer
        return only(batch.by_layer) if layer is None else batch.by_layer[layer]

    def _accumulate(self, batch: ActivationBatch, activations: Tensor, last: bool) -> SelOrthoOutput | None:
        """Add the gradient of a batch; None, and nothing has changed, if something was not finite in any process."""
        carried, controller = copy.copy(self.state.carried), copy.copy(self.state.controller)
        finite = is_finite(activations)
        if self.group.size == 1 and activations.device.type == "cpu" and not finite:
            output, faults = None, [True, False, False, False]
        else:
            # zeros in place of what is not finite: the other processes expect this one to compute with them
            as_it_is = activations.device.type == "cpu" and bool(finite)
            usable = activations if as_it_is else torch.where(finite, activations, 0)
            output, faults = self._compute(usable, finite, last)
        if any(faults):
            self.state.carried, self.state.controller = carried, controller
            self._meet(faults, batch, activations, output)
            return None
        assert output is not None
        tokens = len(activations) * self.accelerator.num_processes
        self.state.count(output.features.detach(), tokens)
        if output.threshold is not None:
            self.sae.update_threshold(output.threshold)
        self._tokens_timed += tokens
        if last:
            self.spikes.see(self.state.step + 1, self._loss, batch.origins)
        return output

    def _compute(self, activations: Tensor, finite: Tensor, last: bool) -> tuple[SelOrthoOutput | None, list[bool]]:
        """Loss and gradient of a batch, and which of `_FAULTS` came up in any process."""
        plan = self.penalty.plan(self.state)
        dead = None
        if self.sae.aux_features:
            dead = self.state.dead(self.arguments.dead_after_tokens, self.group)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            try:
                with self.accelerator.autocast():
                    output = self.model(activations, group=self.group, plan=plan, dead=dead, return_feature_acts=False)
            except NonFiniteError:  # of the sums over all processes, so that it comes up in each of them
                return None, self._agreed(finite, torch.zeros_like(finite), finite.new_zeros((), dtype=torch.float32))
            loss = output.loss.detach()
            if last:
                steer(self.state, self.sae, activations, output, plan, self.group)
            scaled = output.loss / self.arguments.gradient_accumulation_steps
            (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
        gradient = self._gradient_norm() if last and self.scaler is None else torch.zeros_like(loss)
        return output, self._agreed(finite, torch.ones_like(finite), loss, gradient)

    def _agreed(self, finite: Tensor, features: Tensor, loss: Tensor, gradient: Tensor | None = None) -> list[bool]:
        """Which of `_FAULTS` came up in any process, and the mean loss: a single look at what the device computed."""
        checks = [
            finite,
            features,
            loss.isfinite(),
            torch.ones_like(finite) if gradient is None else gradient.isfinite(),
        ]
        values = torch.stack([*(~check for check in checks), loss.nan_to_num(0.0, 0.0, 0.0)]).double()
        values = self.group.sum(values) / self.group.size
        *faults, self._loss = values.tolist()
        return [share > 0 for share in faults]

    def _meet(
        self, faults: list[bool], batch: ActivationBatch, activations: Tensor, output: SelOrthoOutput | None
    ) -> None:
        """Let the guard decide about a batch that was not finite; this process names what it sees of it itself."""
        where = f" of {self.name}" if self.name else ""
        kind = _FAULTS[faults.index(True)]
        rows = int((~activations.isfinite()).any(1).sum())
        weights = None if kind == "activations" else first_not_finite(dict(self.sae.named_parameters()))
        found = None
        if weights is not None:
            found = f"the weights{where} were not finite before: {weights}"
        elif kind == "activations" and rows:
            found = f"NaN or infinity in the activations on {rows} of {len(activations)} tokens"
        elif kind == "feature activations":
            found = f"the feature activations{where} are not finite, or too large to square"
        elif kind == "loss" and output is not None and not bool(output.loss.isfinite()):  # type: ignore[union-attr]
            assert output.losses is not None
            terms = ", ".join(f"{name} {term.item():g}" for name, term in output.losses.items())
            found = f"the loss{where} is not finite ({terms})"
        elif kind == "gradient":
            gradients = {name: parameter.grad for name, parameter in self.sae.named_parameters()}
            found = f"the gradient{where} is not finite: {first_not_finite(gradients) or 'its norm'}"
        if found is None:
            self.guard.meet_in_step(f"another process found that {kind} are not finite{where}", None, {}, _ADVICE)
        else:
            layer = self.sae.config.layer or 0
            advice = "look at where they come from" if kind == "activations" else _ADVICE
            self.guard.meet_in_step(found, batch.origins, {layer: activations}, advice)

    def _revive(self, activations: Tensor, output: SelOrthoOutput) -> None:
        """Resample the dead features of a ReLU SAE, at its steps."""
        every, step = self.arguments.resample_every, self.state.step
        if not every or step % every or step >= self.arguments.max_steps:
            return
        assert output.reconstruction is not None
        dead = self.state.dead(self.arguments.dead_after_tokens, self.group)
        errors = (output.reconstruction - activations).square().sum(1).detach()
        generator = torch.Generator().manual_seed(self.arguments.seed + step)
        resample_dead(self.sae, self.optimizer.moments(), dead, activations, errors, generator, self.group)
        self.state.tokens_since_fired[dead] = 0

    def _apply(self, batch: ActivationBatch) -> None:
        """The constrained Adam step: no gradient along the decoder rows, which have norm 1 afterwards (eq. 6).

        Raises:
            NonFiniteError: the weights are not finite afterwards, or float16 finds no scale at which gradients are.
        """
        self.optimizer.take_gradients()
        if self.arguments.max_grad_norm is not None and self.scaler is not None:
            self.scaler.unscale_(self.optimizer.adam)
        self.sae.project_decoder_gradient()
        if self.arguments.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.arguments.max_grad_norm)
        scale = 0.0 if self.scaler is None else self.scaler.get_scale()
        self._adam.step()
        if self.scaler is not None and self.scaler.get_scale() < scale <= 1:
            # a scale that is too large is nothing to speak of, but this one enlarges nothing
            self.guard.meet_in_step("the gradient is not finite", batch.origins, batch.by_layer, _ADVICE)
        self.optimizer.zero_grad()
        self.sae.normalize_decoder()
        if not all(bool(is_finite(weights)) for weights in self.sae.parameters()):
            fault = f"{first_not_finite(dict(self.sae.named_parameters()))} after step {self.state.step + 1}"
            kept = self.guard.keep(fault, batch.origins, batch.by_layer)
            raise NonFiniteError(
                f"NaN or infinity in the weights {fault}, which cannot be taken back: the run ends{kept}; {_ADVICE}"
            )

    def _set_learning_rate(self, step: int) -> None:
        a = self.arguments
        rate = learning_rate_at(
            step, peak=a.learning_rate, steps=a.max_steps, warmup=a.warmup_steps, decay=a.decay_steps
        )
        for group in self._adam.param_groups:
            group["lr"] = rate

    def _is_logged(self) -> bool:
        step, a = self.state.step, self.arguments
        return step == 1 or step % a.logging_steps == 0 or step > a.max_steps - LAST_STEPS

    def _report(self, activations: Tensor, output: SelOrthoOutput, previous: Any) -> dict[str, Any]:
        pairs = output.pairs if output.pairs is not None or not self.penalty.acts else self.state.pairs
        figures = self._mean_over_processes(step_report(self.sae, activations, output, pairs, self.group))
        figures["pair_churn"] = pair_churn(output.pairs, previous, self.sae.config.d_sae)
        seconds, tokens, steps = sum(self._seconds.values()), self._tokens_timed, self.state.step - self._reported_at
        row = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            **figures,
            "dead_features": int(self.state.dead(self.arguments.dead_after_tokens, self.group).sum()),
            "ortho_coefficient": self._coefficient(),
            "learning_rate": self._adam.param_groups[0]["lr"],
            "skipped_steps": self.state.skipped,
            "loss_spikes": self.spikes.count,
        }
        timings = {
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": self._seconds["step"] / steps,
            "seconds_per_step_data": self._seconds["data"] / steps,
        }
        self._seconds, self._tokens_timed, self._reported_at = {"data": 0.0, "step": 0.0}, 0, self.state.step
        if self.log is not None:
            self.log.add(row, timings)
        prefix = f"{self.name}/" if self.name else ""
        tracked = {f"{prefix}{key}": value for key, value in {**row, **timings}.items() if value is not None}
        self.accelerator.log(tracked, step=self.state.step)
        return {**row, **timings}

    def _mean_over_processes(self, figures: dict[str, float | None]) -> dict[str, float | None]:
        if self.group.size == 1:
            return figures
        names = [name for name, value in figures.items() if value is not None]
        values = torch.tensor([figures[name] for name in names], device=self.accelerator.device)
        means = (self.group.sum(values) / self.group.size).tolist()
        return {**figures, **dict(zip(names, means, strict=True))}

    def _coefficient(self) -> float:
        controller = self.state.controller
        return self.sae.config.ortho_coefficient if controller is None else controller.coefficient

    def _gradient_norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self.sae.parameters() if parameter.grad is not None]
        return torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()


def _shown(report: dict[str, Any]) -> dict[str, str]:
    """The part of a report that the progress bar has room for."""
    formats = {
        "loss": ".4f", "fvu": ".3f", "l0": ".0f", "dead_features": "d", "peak_correlation": ".2f",
        "tokens_per_second": ".0f",
    }  # fmt: skip
    short = {"dead_features": "dead", "peak_correlation": "peak", "tokens_per_second": "tok/s"}
    return {short.get(k, k): format(report[k], spec) for k, spec in formats.items() if report[k] is not None}
