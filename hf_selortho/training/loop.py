"""The training loop: batches of activations in, a trained SAE out."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..activations.buffer import ActivationBatch, BatchSource
from ..activations.capture import NonFiniteActivationsError, only
from ..batch_group import BatchGroup
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE
from .arguments import RunArguments
from .checkpoint import Checkpoints
from .optimizer import SAEOptimizer
from .outputs import MetricsLog
from .penalty import PenaltySchedule, steer
from .revival import resample_dead
from .state import Controller, TrainState, learning_rate_at, pair_churn, step_report

LAST_STEPS = 100  # the paper averages its training metrics over the last 100 steps; all of them are logged


class NonFiniteLossError(SelOrthoError):
    """The loss became NaN or infinite; the step was not applied."""


def train_together(
    trainers: Sequence[Trainer], source: BatchSource, arguments: RunArguments, checkpoints: Checkpoints
) -> None:
    """Train SAEs on the same batches, each step one after the other, to `max_steps`.

    Raises:
        NonFiniteActivationsError, NonFiniteLossError: names the step, the documents and the last checkpoint.
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
    with progress:
        while first.state.step < arguments.max_steps:
            try:
                report = _step(trainers, source, arguments)
            except (NonFiniteActivationsError, NonFiniteLossError) as error:
                latest = f"last good checkpoint: {checkpoints.latest or 'none (see --checkpoint_every)'}"
                raise type(error)(f"{error}. This was before step {first.state.step + 1}; {latest}") from error
            progress.update()
            if report is not None:
                progress.set_postfix(_shown(report))
            if arguments.checkpoint_every and first.state.step % arguments.checkpoint_every == 0:
                checkpoints.save(trainers, source)


def _step(trainers: Sequence[Trainer], source: BatchSource, arguments: RunArguments) -> dict[str, Any] | None:
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
    """

    def __init__(
        self,
        accelerator: Accelerator,
        sae: SelOrthoSAE,
        arguments: RunArguments,
        log: MetricsLog | None,
        controller: Controller | None = None,
        name: str = "",
    ) -> None:
        self.accelerator, self.arguments, self.log, self.name = accelerator, arguments, log, name
        self.sae = sae.to(accelerator.device)
        self.optimizer = SAEOptimizer(self.sae, arguments, accelerator.device)
        self.model, self._adam = accelerator.prepare(self.sae, self.optimizer.adam)
        self.scaler = copy.deepcopy(accelerator.scaler)  # of fp16 losses; each SAE has its own
        self._adam.scaler = self.scaler
        self.group = BatchGroup() if accelerator.num_processes > 1 else None
        self.penalty = PenaltySchedule(self.sae.config, self.group)
        self.state = TrainState(torch.zeros(self.sae.config.d_sae, dtype=torch.int64, device=accelerator.device))
        self.state.controller = controller
        self._seconds = {"data": 0.0, "step": 0.0}
        self._tokens_timed, self._reported_at = 0, 0  # since the last report

    def resumed(self) -> None:
        """Note that the state comes from a checkpoint: times are counted from here."""
        self._reported_at = self.state.step

    def learn(self, batch: ActivationBatch, last: bool, data_seconds: float = 0.0) -> dict[str, Any] | None:
        """Add the gradient of a batch and, if it is the step's last one, take the step.

        Args:
            batch: holds the layer that the SAE reads.
            last: gradients are exchanged between processes and applied after the last batch of a step only.
            data_seconds: what the batch took to come.

        Returns:
            The report of the step if one was taken and is logged.

        Raises:
            NonFiniteLossError: names the step and the documents of the batch.
        """
        started = time.perf_counter()
        self._set_learning_rate(self.state.step + 1)
        previous = self.state.pairs
        output, activations = self._accumulate(batch, last)
        if last:
            self._apply()
            self.state.step += 1
            if output.pairs is not None:
                self.state.pairs = output.pairs.detached()
            self._revive(activations, output)
        self._seconds["step"] += time.perf_counter() - started
        self._seconds["data"] += data_seconds
        return self._report(activations, output, previous) if last and self._is_logged() else None

    def _accumulate(self, batch: ActivationBatch, last: bool) -> tuple[SelOrthoOutput, Tensor]:
        layer = self.sae.config.layer
        found = only(batch.by_layer) if layer is None else batch.by_layer[layer]
        activations = found.to(self.accelerator.device)
        plan = self.penalty.plan(self.state)
        dead = None
        if self.sae.revives_dead_features:
            dead = self.state.dead(self.arguments.dead_after_tokens, self.group)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                output = self.model(activations, group=self.group, plan=plan, dead=dead, return_feature_acts=False)
            self._check_finite(output.loss, "loss", output, batch)
            if last:
                steer(self.state, self.sae, activations, output, plan, self.group)
            loss = output.loss / self.arguments.gradient_accumulation_steps
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if last and self.scaler is None:
            self._check_finite(self._gradient_norm(), "gradient", output, batch)
        tokens = len(activations) * self.accelerator.num_processes
        self.state.count(output.features.detach(), tokens)
        if output.threshold is not None:
            self.sae.update_threshold(output.threshold)
        self._tokens_timed += tokens
        return output, activations

    def _check_finite(self, value: Tensor, what: str, output: SelOrthoOutput, batch: ActivationBatch) -> None:
        if not torch.isfinite(value):
            raise NonFiniteLossError(self._non_finite_message(what, output, batch))

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

    def _apply(self) -> None:
        """The constrained Adam step: no gradient along the decoder rows, which have norm 1 afterwards (eq. 6)."""
        self.optimizer.take_gradients()
        if self.arguments.max_grad_norm is not None and self.scaler is not None:
            self.scaler.unscale_(self.optimizer.adam)
        self.sae.project_decoder_gradient()
        if self.arguments.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.arguments.max_grad_norm)
        self._adam.step()
        self.optimizer.zero_grad()
        self.sae.normalize_decoder()

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
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": self._seconds["step"] / steps,
            "seconds_per_step_data": self._seconds["data"] / steps,
        }
        self._seconds, self._tokens_timed, self._reported_at = {"data": 0.0, "step": 0.0}, 0, self.state.step
        if self.log is not None:
            self.log.add(row)
        prefix = f"{self.name}/" if self.name else ""
        tracked = {f"{prefix}{key}": value for key, value in row.items() if value is not None}
        self.accelerator.log(tracked, step=self.state.step)
        return row

    def _mean_over_processes(self, figures: dict[str, float | None]) -> dict[str, float | None]:
        if self.group is None:
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

    def _non_finite_message(self, what: str, output: SelOrthoOutput, batch: ActivationBatch) -> str:
        assert output.losses is not None
        terms = ", ".join(f"{name} {term.item():g}" for name, term in output.losses.items())
        documents = batch.origins.document_ids.unique().tolist()
        of = f" of {self.name}" if self.name else ""
        named = ", ".join(map(str, documents[:16])) + (" ..." if len(documents) > 16 else "")
        return (
            f"{what} is not finite at step {self.state.step + 1}{of} ({terms}); the step was not applied. Documents of "
            f"the batch: {named}; try a lower --learning_rate"
        )


def _shown(report: dict[str, Any]) -> dict[str, str]:
    """The part of a report that the progress bar has room for."""
    formats = {
        "loss": ".4f", "fvu": ".3f", "l0": ".0f", "dead_features": "d", "peak_correlation": ".2f",
        "tokens_per_second": ".0f",
    }  # fmt: skip
    short = {"dead_features": "dead", "peak_correlation": "peak", "tokens_per_second": "tok/s"}
    return {short.get(k, k): format(report[k], spec) for k, spec in formats.items() if report[k] is not None}
