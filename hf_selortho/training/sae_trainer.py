"""Trains one SAE: the gradient of a batch, the constrained Adam step, counters and reports."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.buffer import ActivationBatch
from ..data.pair_history import PairHistory
from ..errors import NonFiniteError
from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE
from ..pair_selection import Pairs
from ..process_group import ProcessGroup
from ..sparse_ops import FeatureActivations
from .arguments import RunArguments
from .non_finite import ADVICE, LossSpikes, NonFinitePolicy, first_not_finite
from .optimizer import SAEOptimizer
from .resampling import resample_dead
from .run_folder import MetricsLog
from .schedules import PenaltySchedule, learning_rate_at
from .step_report import pair_churn, step_report

LAST_STEPS = 100  # the paper averages its training metrics over the last 100 steps; all of them are logged


@dataclass
class TrainState:
    """What the training of an SAE counts."""

    tokens_since_fired: Tensor  # (d_sae,) int64, as seen by this process
    step: int = 0
    tokens: int = 0  # drawn from the buffers of all processes
    skipped: int = 0  # steps that were not taken, as something was not finite

    def count(self, features: FeatureActivations, tokens: int) -> None:
        """Count a batch: feature activations (B, d_sae) of this process, `tokens` over all processes."""
        self.tokens += tokens
        self.tokens_since_fired += tokens
        self.tokens_since_fired[features.fired()] = 0

    def dead(self, after_tokens: int, group: ProcessGroup) -> Tensor:
        """Return the features that fired in no process for `after_tokens` tokens, (d_sae,) bool."""
        return group.minimum(self.tokens_since_fired) >= after_tokens


class SAETrainer:
    """Trains one SAE, a batch at a time.

    Args:
        accelerator: device, mixed precision and data parallelism.
        sae: the model, in float32; its decoder rows have norm 1 after every step.
        arguments: optimisation and logging.
        log: where the figures of its steps go; None in all processes but the main one.
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
        self.penalty = PenaltySchedule(self.sae.config, self.group, arguments)
        self.state = TrainState(torch.zeros(self.sae.config.d_sae, dtype=torch.int64, device=accelerator.device))
        self.policy = policy or NonFinitePolicy(None)
        self.spikes = LossSpikes(arguments.loss_spike_factor, name)
        self._of_name = f" of {name}" if name else ""
        self._skips = False  # whether a batch of the current step was not finite
        self._since_report: dict[str, float] = defaultdict(float)  # steps, tokens, seconds of steps and of data

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps of this process, besides weights and Adam: tensors, and JSON-able rest."""
        tensors, content = self.penalty.state_dict()
        counts = dict(vars(self.state))
        tensors["tokens_since_fired"] = counts.pop("tokens_since_fired")
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return tensors, {**content, "counts": counts, "scaler": scaler, "spikes": self.spikes.state_dict()}

    def load_state_dict(self, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        """Go on from a [`state_dict`]."""
        tensors = {name: tensor.to(self.accelerator.device) for name, tensor in tensors.items()}
        self.penalty.load_state_dict(tensors, content)
        self.state = TrainState(tensors["tokens_since_fired"], **content["counts"])
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
        layer, before, output = self.sae.config.layer, self.penalty.copy(), None
        layer = next(iter(batch.by_layer)) if layer is None else layer
        activations = batch.by_layer[layer].to(self.accelerator.device)
        target = batch.targets[layer].to(self.accelerator.device) if self.sae.config.is_transcoder else None
        self.policy.step = self.state.step + 1
        try:
            if not self._skips:
                output = self._forward(activations, target, last)
                loss = self._backward(output, last)
                self._count(output, len(activations) * self.group.size)
            if last and output is not None:
                self.spikes.add(self.state.step + 1, loss, batch.origins)
                self._update(output)
        except NonFiniteError as error:  # in all processes alike
            output, self._skips, self.penalty = None, True, before
            kept = {layer: activations} | ({} if target is None else {f"target.{layer}": target})
            self.policy.handle(self._fault(error, activations, target), batch.origins, kept)
        if last:
            self._finish_step(batch, activations, target, output)
        self._since_report["step"] += time.perf_counter() - started
        self._since_report["data"] += data_seconds
        if last and output is not None and self._is_logged():
            return self._report(activations if target is None else target, output, before.pairs)
        return None

    def _forward(self, activations: Tensor, target: Tensor | None, last: bool) -> SelOrthoOutput:
        """Compute the loss of a batch, its penalty as the schedule has it."""
        plan = self.penalty.plan(self.state.step + 1)
        dead = self._dead() if self.sae.aux_features else None
        with nullcontext() if last else self.accelerator.no_sync(self.model), self.accelerator.autocast():
            output = self.model(activations, self.group, plan, dead, return_feature_acts=False, target=target)
        if last:
            self.penalty.steer(self.sae, output, plan)
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

    def _count(self, output: SelOrthoOutput, tokens: int) -> None:
        """Count a batch of `tokens` over all processes."""
        self.state.count(output.features.detach(), tokens)
        self._since_report["tokens"] += tokens
        if output.threshold is not None and self.sae.W_enc.requires_grad:
            self.sae.update_threshold(output.threshold)

    def _dead(self) -> Tensor:
        return self.state.dead(self.arguments.dead_after_tokens, self.group)

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
        if self.sae.W_dec.requires_grad:
            self.sae.normalize_decoder()
        if output.pairs is not None:
            self.penalty.pairs = output.pairs

    def _fault(self, error: NonFiniteError, activations: Tensor, target: Tensor | None) -> str:
        """Say where NaN or infinity first appeared: in the activations already, or where the error found it."""
        bad = (~activations.isfinite()).any(1)
        if target is not None:
            bad |= (~target.isfinite()).any(1)
        tokens = int(self.group.sum(bad.sum()))
        words = f"NaN or infinity in the activations on {tokens} of {len(activations) * self.group.size} tokens"
        return f"{words if tokens else error}{self._of_name}"

    def _finish_step(
        self, batch: ActivationBatch, activations: Tensor, target: Tensor | None, output: SelOrthoOutput | None
    ) -> None:
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
            self._resample(activations, target, output)

    def _resample(self, activations: Tensor, target: Tensor | None, output: SelOrthoOutput) -> None:
        assert output.reconstruction is not None
        dead = self._dead()
        errors = (output.reconstruction - (activations if target is None else target)).square().sum(1).detach()
        generator = torch.Generator().manual_seed(self.arguments.seed + self.state.step)
        resample_dead(self.sae, self.optimizer.moments(), dead, activations, errors, generator, self.group, target)
        self.state.tokens_since_fired[dead] = 0

    def _is_logged(self) -> bool:
        step, a = self.state.step, self.arguments
        return step == 1 or step % a.logging_steps == 0 or step > a.max_steps - LAST_STEPS

    def _report(self, target: Tensor, output: SelOrthoOutput, previous: Pairs | None) -> dict[str, Any]:
        """Log the figures of the step and what the steps since the last report took."""
        pairs = output.pairs if output.pairs is not None or not self.penalty.acts else self.penalty.pairs
        since = self._since_report
        row = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            **step_report(self.sae, target, output, pairs, self.group),
            "pair_churn": pair_churn(output.pairs, previous, self.sae.config.d_sae),
            "dead_features": int(self._dead().sum()),
            "ortho_coefficient": self.penalty.coefficient,
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
