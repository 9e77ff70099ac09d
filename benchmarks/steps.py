"""Timed training steps, as the training loop does them, and the timed encoder that they are compared with."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Batches
from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.errors import SelOrthoError
from hf_selortho.modeling_selortho import SelOrthoOutput, SelOrthoSAE
from hf_selortho.pair_selection import Selection
from hf_selortho.penalties import penalty, select_by_config, selective_penalty
from hf_selortho.process_group import SINGLE_PROCESS
from hf_selortho.sparse_ops import ActiveFeatures, FeatureActivations
from hf_selortho.training.arguments import RunArguments
from hf_selortho.training.optimizer import SAEOptimizer
from hf_selortho.training.schedules import PenaltySchedule
from hf_selortho.training.state import TrainState

# optimiser: with the check of the gradient's norm, the counters of dead features and the projection of the gradient
PHASES = ("forward", "selection", "penalty", "backward", "optimiser", "normalisation")


@dataclass(frozen=True)
class Repetition:
    """One timed repetition of a case, averaged over its steps."""

    seconds: float  # a step
    phases: dict[str, float] = field(default_factory=dict)  # seconds a step, by phase; empty if not measured
    l0: float | None = None
    pairs: int | None = None  # selected at the first step


class Stopwatch:
    """Time by phase: on CUDA from events in the stream, so that only start and stop wait for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._synchronize()
        self._marks = [("", self._now())]
        self._began = time.perf_counter()

    def mark(self, name: str) -> None:
        """What happened since the last mark belongs to phase `name`."""
        self._marks.append((name, self._now()))

    def stop(self) -> float:
        """Seconds since the start."""
        self._synchronize()
        return time.perf_counter() - self._began

    def phases(self) -> dict[str, float]:
        """Seconds by phase, once stopped."""
        sums: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            spent = before.elapsed_time(after) / 1000 if self._cuda else after - before
            sums[name] = sums.get(name, 0.0) + spent
        return sums

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class EncoderOnly:
    """The matrix product of the encoder into memory that is there, with the top-k of a topk SAE: the yardstick."""

    def __init__(self, sae: SelOrthoSAE, batches: Batches) -> None:
        self.sae, self.batches = sae, batches
        self.buffer = torch.empty(batches.size, len(sae.b_enc), device=sae.device, dtype=sae.W_enc.dtype)
        self.k = sae.config.k if sae.config.activation == "topk" else None

    @torch.no_grad()
    def run(self, number: int, top_k: bool = True) -> Repetition:
        """Time it on batch `number`; without `top_k` the product alone."""
        sae = self.sae
        x = sae.normalize_input(self.batches.at(number)).to(sae.W_enc.dtype)
        watch = Stopwatch(sae.device)
        torch.addmm(sae.b_enc, x, sae.W_enc, out=self.buffer)
        if self.k is not None and top_k:
            self.buffer.topk(self.k, dim=-1, sorted=False)
        return Repetition(watch.stop())


class TrainingSteps:
    """Training steps of one SAE under changing penalties.

    The learning rate is 0: every case finds the same weights, whatever ran before it, and the work is the same.
    """

    def __init__(self, sae: SelOrthoSAE, batches: Batches) -> None:
        self.sae, self.batches, self.device = sae.train(), batches, sae.device
        self.arguments = RunArguments(learning_rate=0.0)
        self.optimizer = SAEOptimizer(sae, self.arguments, self.device)

    def run(self, config: SelOrthoConfig, number: int, phases: bool = False, steps: int | None = None) -> Repetition:
        """Time the steps from one selection to the next (or `steps`), on the batches from `number` on.

        With `phases`, selection and penalty are then timed once more by themselves, on the features of the last batch.
        """
        self.sae.config = config
        schedule = PenaltySchedule(config, SINGLE_PROCESS)
        state = TrainState(torch.zeros(len(self.sae.b_enc), dtype=torch.int64, device=self.device))
        steps = config.selection_interval if steps is None else steps
        selected = None
        watch = Stopwatch(self.device)
        for step in range(steps):
            output = self._step(self.batches.at(number + step), schedule, state, watch)
            if step == 0 and output.pairs is not None:
                selected = len(output.pairs)
        seconds = watch.stop()
        split = self._split(watch.phases(), output, steps) if phases else {}
        return Repetition(seconds / steps, split, output.features.l0(), selected)

    def _step(self, batch: Tensor, schedule: PenaltySchedule, state: TrainState, watch: Stopwatch) -> SelOrthoOutput:
        """What the training loop does with a batch."""
        sae = self.sae
        dead = state.dead(self.arguments.dead_after_tokens, SINGLE_PROCESS) if sae.aux_features else None
        output = sae(batch, plan=schedule.plan(state), dead=dead, return_feature_acts=False)
        finite = bool(torch.isfinite(output.loss))
        watch.mark("forward")
        output.loss.backward()
        watch.mark("backward")
        norm = torch.nn.utils.get_total_norm([p.grad for p in sae.parameters() if p.grad is not None])
        if not finite or not torch.isfinite(norm):
            raise SelOrthoError("loss or gradient is not finite: look at the activations")
        state.count(output.features.detach(), len(batch))
        self.optimizer.take_gradients()
        sae.project_decoder_gradient()
        self.optimizer.adam.step()
        self.optimizer.zero_grad()
        watch.mark("optimiser")
        sae.normalize_decoder()
        watch.mark("normalisation")
        state.step += 1
        if output.pairs is not None:
            state.pairs = output.pairs
        return output

    def _split(self, phases: dict[str, float], output: SelOrthoOutput, steps: int) -> dict[str, float]:
        """Return seconds a step by phase: `forward` and `backward` are freed of selection and penalty."""
        cfg, h = self.sae.config, _without_caches(output.features)
        selection = forward = backward = 0.0
        selected = None
        if cfg.penalty == "selective":
            watch = Stopwatch(self.device)
            selected = select_by_config(cfg, h, self.sae.W_dec)
            selection = watch.stop()
        if cfg.penalty != "none":
            forward, backward = self._time_penalty(h, selected)
        if cfg.penalty_schedule == "every_step" and selected is not None and steps > 1:
            again = self._time_penalty(h, Selection(selected.pairs))  # on a batch that the pairs are not of
            forward, backward = forward + (steps - 1) * again[0], backward + (steps - 1) * again[1]
        split = {
            **phases,
            "selection": selection,
            "penalty": forward + backward,
            "forward": max(0.0, phases["forward"] - selection - forward),
            "backward": max(0.0, phases["backward"] - backward),
        }
        return {name: split[name] / steps for name in PHASES}

    def _time_penalty(self, h: FeatureActivations, selected: Selection | None) -> tuple[float, float]:
        """Return the seconds of the penalty on `h` (B, n) and of its gradient."""
        leaf = h.with_values(h.values.detach().requires_grad_())
        cfg, W_dec = self.sae.config, self.sae.W_dec
        watch = Stopwatch(self.device)
        if selected is None:
            loss, _ = penalty(cfg, leaf, W_dec)
        else:
            selected = dataclasses.replace(selected, features=leaf if selected.features is h else None)
            loss = selective_penalty(cfg, leaf, W_dec, selected, cfg.ortho_coefficient)
        forward = watch.stop()
        target = W_dec if cfg.penalty == "ortsae" or cfg.penalty_space != "activation" else leaf.values
        watch = Stopwatch(self.device)
        if loss.requires_grad:
            torch.autograd.grad(loss, target)
        return forward, watch.stop()


def _without_caches(h: FeatureActivations) -> FeatureActivations:
    """Return the features as the encoder leaves them: sorting entries by feature is part of what uses them first."""
    return ActiveFeatures(h.crow, h.cols, h.values.detach(), h.n) if isinstance(h, ActiveFeatures) else h.detach()
