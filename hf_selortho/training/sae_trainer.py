"""Trains one SAE: the gradient of a batch, the constrained Adam step, counters and reports."""

from __future__ import annotations

import copy
import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.buffer import ActivationBatch
from ..data.pair_history import PairHistory
from ..errors import NonFiniteError
from ..language_models.capture import only
from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE
from ..pair_selection import Pairs
from ..process_group import ProcessGroup
from .arguments import RunArguments
from .non_finite import ADVICE, LossSpikes, NonFinitePolicy, first_not_finite, is_finite
from .optimizer import SAEOptimizer
from .resampling import resample_dead
from .run_folder import MetricsLog
from .schedules import PenaltySchedule, learning_rate_at, steer
from .state import GradientShare, TrainState, pair_churn, step_report

LAST_STEPS = 100  # the paper averages its training metrics over the last 100 steps; all of them are logged


class SAETrainer:
    """Trains one SAE, a batch at a time.

    Args:
        accelerator: device, mixed precision and data parallelism.
        sae: the model, in float32; its decoder rows have norm 1 after every step.
        arguments: optimisation and logging.
        log: where the figures of its steps go; None in all processes but the main one.
        controller: steers the penalty's coefficient ([`make_controller`]).
        name: of the SAE among several; "" if there is one.
        policy: what becomes of steps that are not finite; by default the first one ends the run.
        history: where the pairs that it selects go; None in all processes but the main one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        sae: SelOrthoSAE,
        arguments: RunArguments,
        log: MetricsLog | None,
        controller: GradientShare | None = None,
        name: str = "",
        policy: NonFinitePolicy | None = None,
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
        self.policy = policy or NonFinitePolicy(None)
        self.spikes = LossSpikes(arguments.loss_spike_factor, name)
        self._skips = False  # whether a batch of the current step was not finite
        self.start_timing()

    def start_timing(self) -> None:
        """Count times and tokens from the current step on."""
        self._seconds = {"data": 0.0, "step": 0.0}
        self._tokens_timed, self._reported_at = 0, self.state.step

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps of this process, besides weights and Adam: tensors, and JSON-able rest."""
        state, scaler = self.state, self.scaler
        return state.tensors(), {
            "step": state.step,
            "tokens": state.tokens,
            "skipped": state.skipped,
            "coefficient": None if state.controller is None else state.controller.coefficient,
            "scaler": None if scaler is None else scaler.state_dict(),
            "spikes": self.spikes.state_dict(),
        }

    def load_state_dict(self, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        """Go on from a [`state_dict`]; raises KeyError, ValueError or TypeError if something is missing or unfit."""
        self.state.load_tensors(tensors, self.sae.config)
        self.state.step, self.state.tokens = content["step"], content["tokens"]
        self.state.skipped = content["skipped"]
        if self.state.controller is not None:
            self.state.controller.coefficient = content["coefficient"]
        if self.scaler is not None:
            self.scaler.load_state_dict(content["scaler"])
        self.spikes.load_state_dict(content["spikes"])
        self.start_timing()

    def release(self) -> None:
        """Drop the model that shares its gradients with other processes: the training is over."""
        self.model = self.sae

    def train_step(self, batch: ActivationBatch, last: bool = True, data_seconds: float = 0.0) -> dict[str, Any] | None:
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
        layer, previous, output = self.sae.config.layer, self.state.pairs, None
        activations = only(batch.by_layer) if layer is None else batch.by_layer[layer]
        activations = activations.to(self.accelerator.device)
        self.policy.step = self.state.step + 1
        self._set_learning_rate(self.state.step + 1)
        try:
            if not self._skips:
                output = self._add_gradient(batch, activations, last)
            if last and output is not None:
                self._update(output)
        except NonFiniteError as error:  # in all processes alike
            output, self._skips = None, True
            self.policy.handle(f"{error}{self._of_name}", batch.origins, {layer or 0: activations})
        if last:
            self._finish_step(batch, activations, output)
        self._seconds["step"] += time.perf_counter() - started
        self._seconds["data"] += data_seconds
        if output is None or not (last and self._is_logged()):
            return None
        return self._report(activations, output, previous)

    def _add_gradient(self, batch: ActivationBatch, activations: Tensor, last: bool) -> SelOrthoOutput:
        """Compute loss and gradient of a batch.

        Raises:
            NonFiniteError: something was not finite in any process; counters are as they were.
        """
        if int(self.group.sum((~is_finite(activations)).int())):
            tokens = int((~activations.isfinite()).any(1).sum())
            raise NonFiniteError(f"NaN or infinity in the activations on {tokens} of {len(activations)} tokens")
        carried, controller = copy.copy(self.state.carried), copy.copy(self.state.controller)
        try:
            output, loss = self._forward_backward(activations, last)
        except NonFiniteError:
            self.state.carried, self.state.controller = carried, controller
            raise
        tokens = len(activations) * self.group.size
        self.state.count(output.features.detach(), tokens)
        if output.threshold is not None:
            self.sae.update_threshold(output.threshold)
        self._tokens_timed += tokens
        if last:
            self.spikes.add(self.state.step + 1, loss, batch.origins)
        return output

    def _forward_backward(self, activations: Tensor, last: bool) -> tuple[SelOrthoOutput, float]:
        """Compute a batch, and the mean of its loss over the processes; gradients are added up in the parameters."""
        plan = self.penalty.plan(self.state)
        dead = None
        if self.sae.aux_features:
            dead = self.state.dead(self.arguments.dead_after_tokens, self.group)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                output = self.model(activations, group=self.group, plan=plan, dead=dead, return_feature_acts=False)
            if last and self.state.controller is not None:
                steer(self.state.controller, self.sae, output, plan, self.group)
            loss = output.loss / self.arguments.gradient_accumulation_steps
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        gradient = self._gradient_norm() if last and self.scaler is None else torch.zeros_like(output.loss)
        # NaN and infinity of any process survive the sum: a single look at what the device computed
        total, norm = self.group.sum(torch.stack([output.loss.detach(), gradient]).double()).tolist()
        if not math.isfinite(total):
            terms = ", ".join(f"{name} {term.item():g}" for name, term in output.losses.items())
            raise NonFiniteError(f"NaN or infinity in the loss ({terms})")
        if not math.isfinite(norm):
            gradients = {name: parameter.grad for name, parameter in self.sae.named_parameters()}
            raise NonFiniteError(f"NaN or infinity in the gradient: {first_not_finite(gradients) or 'its norm'}")
        return output, total / self.group.size

    def _update(self, output: SelOrthoOutput) -> None:
        """Take the constrained Adam step: no gradient along the decoder rows, which have norm 1 afterwards (eq. 6).

        Raises:
            NonFiniteError: float16 finds no scale at which gradients are finite.
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
            raise NonFiniteError("NaN or infinity in the gradient, however small the scale of the loss")
        self.optimizer.zero_grad()
        self.sae.normalize_decoder()
        if output.pairs is not None:
            self.state.pairs = output.pairs

    def _finish_step(self, batch: ActivationBatch, activations: Tensor, output: SelOrthoOutput | None) -> None:
        """Count a step that was taken, or one that was skipped (`output` is None)."""
        self.state.step += 1
        self._skips = False
        if output is None:
            self.optimizer.zero_grad()
            self.state.skipped += 1
            return
        if not all(bool(is_finite(weights)) for weights in self.sae.parameters()):
            weights = first_not_finite(dict(self.sae.named_parameters()))
            fault = f"NaN or infinity in the weights{self._of_name}, {weights}, after step {self.state.step}"
            kept = self.policy.keep(fault, batch.origins, batch.by_layer)
            raise NonFiniteError(f"{fault}, which cannot be taken back: the run ends. {kept}; {ADVICE}")
        if self.history is not None and output.pairs is not None:
            self.history.add(self.state.step, output.pairs)
        every, step = self.arguments.resample_every, self.state.step
        if every and step % every == 0 and step < self.arguments.max_steps:
            self._resample(activations, output)

    def _resample(self, activations: Tensor, output: SelOrthoOutput) -> None:
        assert output.reconstruction is not None
        dead = self.state.dead(self.arguments.dead_after_tokens, self.group)
        errors = (output.reconstruction - activations).square().sum(1).detach()
        generator = torch.Generator().manual_seed(self.arguments.seed + self.state.step)
        resample_dead(self.sae, self.optimizer.moments(), dead, activations, errors, generator, self.group)
        self.state.tokens_since_fired[dead] = 0

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

    def _report(self, activations: Tensor, output: SelOrthoOutput, previous: Pairs | None) -> dict[str, Any]:
        """Log the figures of the step and what the steps since the last report took."""
        pairs = output.pairs if output.pairs is not None or not self.penalty.acts else self.state.pairs
        config, controller = self.sae.config, self.state.controller
        figures = self._mean_over_processes(step_report(self.sae, activations, output, pairs, self.group))
        row = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            **figures,
            "pair_churn": pair_churn(output.pairs, previous, config.d_sae),
            "dead_features": int(self.state.dead(self.arguments.dead_after_tokens, self.group).sum()),
            "ortho_coefficient": config.ortho_coefficient if controller is None else controller.coefficient,
            "learning_rate": self._adam.param_groups[0]["lr"],
            "skipped_steps": self.state.skipped,
            "loss_spikes": self.spikes.count,
        }
        steps = self.state.step - self._reported_at
        timings = {
            "tokens_per_second": self._tokens_timed / sum(self._seconds.values()),
            "seconds_per_step": self._seconds["step"] / steps,
            "seconds_per_step_data": self._seconds["data"] / steps,
        }
        self.start_timing()
        if self.log is not None:
            self.log.add(row, timings)
        prefix = f"{self.name}/" if self.name else ""
        tracked = {f"{prefix}{key}": value for key, value in {**row, **timings}.items() if value is not None}
        self.accelerator.log(tracked, step=self.state.step)
        return {**row, **timings}

    def _mean_over_processes(self, figures: dict[str, float | None]) -> dict[str, float | None]:
        if self.group.size == 1:  # whole numbers stay whole
            return figures
        names = [name for name, value in figures.items() if value is not None]
        values = torch.tensor([figures[name] for name in names], device=self.accelerator.device)
        means = (self.group.sum(values) / self.group.size).tolist()
        return {**figures, **dict(zip(names, means, strict=True))}

    def _gradient_norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self.sae.parameters() if parameter.grad is not None]
        return torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()

    @property
    def _of_name(self) -> str:
        return f" of {self.name}" if self.name else ""
