"""Trains one SAE: the gradient of a batch, the constrained Adam step, counters and reports."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
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
from .non_finite import ADVICE, LossSpikes, NonFinitePolicy, first_not_finite
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
        self._of_name = f" of {name}" if name else ""
        self._skips = False  # whether a batch of the current step was not finite
        self._since_report: dict[str, float] = defaultdict(float)  # steps, tokens, seconds of steps and of data

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps of this process, besides weights and Adam: tensors, and JSON-able rest."""
        tensors, counters = self.state.state_dict()
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return tensors, {**counters, "scaler": scaler, "spikes": self.spikes.state_dict()}

    def load_state_dict(self, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        """Go on from a [`state_dict`]."""
        self.state.load_state_dict(tensors, content, self.sae.config)
        if self.scaler is not None:
            self.scaler.load_state_dict(content["scaler"])
        self.spikes.load_state_dict(content["spikes"])

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
        layer, state, previous, output = self.sae.config.layer, self.state, self.state.pairs, None
        activations = only(batch.by_layer) if layer is None else batch.by_layer[layer]
        activations = activations.to(self.accelerator.device)
        carried, controller = copy.copy(state.carried), copy.copy(state.controller)
        self.policy.step = state.step + 1
        try:
            if not self._skips:
                output = self._forward(activations, last)
                loss = self._backward(output, last)
                tokens = len(activations) * self.group.size
                state.count(output.features.detach(), tokens)
                self._since_report["tokens"] += tokens
                if output.threshold is not None:
                    self.sae.update_threshold(output.threshold)
            if last and output is not None:
                self.spikes.add(state.step + 1, loss, batch.origins)
                self._update(output)
        except NonFiniteError as error:  # in all processes alike
            output, self._skips = None, True
            state.carried, state.controller = carried, controller
            self.policy.handle(self._fault(error, activations), batch.origins, {layer or 0: activations})
        if last:
            self._finish_step(batch, activations, output)
        self._since_report["step"] += time.perf_counter() - started
        self._since_report["data"] += data_seconds
        if last and output is not None and self._is_logged():
            return self._report(activations, output, previous)
        return None

    def _forward(self, activations: Tensor, last: bool) -> SelOrthoOutput:
        """Compute the loss of a batch, its penalty as the schedule has it."""
        plan, dead = self.penalty.plan(self.state), None
        if self.sae.aux_features:
            dead = self.state.dead(self.arguments.dead_after_tokens, self.group)
        with nullcontext() if last else self.accelerator.no_sync(self.model), self.accelerator.autocast():
            output = self.model(activations, group=self.group, plan=plan, dead=dead, return_feature_acts=False)
        if last and self.state.controller is not None:
            steer(self.state.controller, self.sae, output, plan, self.group)
        return output

    def _backward(self, output: SelOrthoOutput, last: bool) -> float:
        """Add the gradient up in the parameters; returns the mean of the loss over the processes.

        Raises:
            NonFiniteError: loss or gradient is not finite in some process.
        """
        assert output.loss is not None and output.losses is not None
        loss = output.loss / self.arguments.gradient_accumulation_steps
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()
        norm = torch.zeros_like(output.loss)
        if last and self.scaler is None:
            gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
            norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
        # NaN and infinity of any process survive the sum: a single look at what the device computed
        total, norm = self.group.sum(torch.stack([output.loss.detach(), norm]).double()).tolist()
        if not math.isfinite(total):
            terms = ", ".join(f"{name} {term.item():g}" for name, term in output.losses.items())
            raise NonFiniteError(f"NaN or infinity in the loss ({terms})")
        if not math.isfinite(norm):
            where = first_not_finite({name: p.grad for name, p in self.sae.named_parameters()})
            raise NonFiniteError(f"NaN or infinity in the gradient: {where or 'its norm'}")
        return total / self.group.size

    def _update(self, output: SelOrthoOutput) -> None:
        """Take the constrained Adam step: no gradient along the decoder rows, which have norm 1 afterwards (eq. 6).

        Raises:
            NonFiniteError: float16 finds no scale at which gradients are finite.
        """
        a = self.arguments
        self._adam.param_groups[0]["lr"] = learning_rate_at(
            self.state.step + 1, peak=a.learning_rate, steps=a.max_steps, warmup=a.warmup_steps, decay=a.decay_steps
        )
        self.optimizer.take_gradients()
        if a.max_grad_norm is not None and self.scaler is not None:
            self.scaler.unscale_(self.optimizer.adam)
        self.sae.project_decoder_gradient()
        if a.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), a.max_grad_norm)
        scale = 0.0 if self.scaler is None else self.scaler.get_scale()
        self._adam.step()
        if self.scaler is not None and self.scaler.get_scale() < scale <= 1:
            # a scale that is too large is nothing to speak of, but this one enlarges nothing
            raise NonFiniteError("NaN or infinity in the gradient, however small the scale of the loss")
        self.optimizer.zero_grad()
        self.sae.normalize_decoder()
        if output.pairs is not None:
            self.state.pairs = output.pairs

    def _fault(self, error: NonFiniteError, activations: Tensor) -> str:
        """Say where NaN or infinity first appeared: in the activations already, or where the error found it."""
        tokens = int(self.group.sum((~activations.isfinite()).any(1).sum()))
        words = f"NaN or infinity in the activations on {tokens} of {len(activations) * self.group.size} tokens"
        return f"{words if tokens else error}{self._of_name}"

    def _finish_step(self, batch: ActivationBatch, activations: Tensor, output: SelOrthoOutput | None) -> None:
        """Count a step that was taken, or one that was skipped (`output` is None)."""
        self.state.step += 1
        self._since_report["steps"] += 1
        self._skips = False
        if output is None:
            self.optimizer.zero_grad()
            self.state.skipped += 1
            return
        sums = torch.stack([parameter.detach().sum() for parameter in self.sae.parameters()])  # NaN survives them
        if not bool(sums.isfinite().all()) and (weights := first_not_finite(dict(self.sae.named_parameters()))):
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

    def _is_logged(self) -> bool:
        step, a = self.state.step, self.arguments
        return step == 1 or step % a.logging_steps == 0 or step > a.max_steps - LAST_STEPS

    def _report(self, activations: Tensor, output: SelOrthoOutput, previous: Pairs | None) -> dict[str, Any]:
        """Log the figures of the step and what the steps since the last report took."""
        pairs = output.pairs if output.pairs is not None or not self.penalty.acts else self.state.pairs
        config, controller, since = self.sae.config, self.state.controller, self._since_report
        row = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            **step_report(self.sae, activations, output, pairs, self.group),
            "pair_churn": pair_churn(output.pairs, previous, config.d_sae),
            "dead_features": int(self.state.dead(self.arguments.dead_after_tokens, self.group).sum()),
            "ortho_coefficient": config.ortho_coefficient if controller is None else controller.coefficient,
            "learning_rate": self._adam.param_groups[0]["lr"],
            "skipped_steps": self.state.skipped,
            "loss_spikes": self.spikes.count,
        }
        timings = {
            "tokens_per_second": since["tokens"] / (since["step"] + since["data"]),
            "seconds_per_step": since["step"] / since["steps"],
            "seconds_per_step_data": since["data"] / since["steps"],
        }
        since.clear()
        if self.log is not None:
            self.log.add(row, timings)
        prefix = f"{self.name}/" if self.name else ""
        tracked = {f"{prefix}{key}": value for key, value in {**row, **timings}.items() if value is not None}
        self.accelerator.log(tracked, step=self.state.step)
        return {**row, **timings}
