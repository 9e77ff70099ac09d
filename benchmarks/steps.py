"""Times cases in turn, round after round, so that a machine that speeds up or slows down does so for all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.cases import ENCODER, NONE, Case
from benchmarks.inputs import Batches, wait_for
from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.data.buffer import ActivationBatch
from hf_selortho.language_models.capture import TokenOrigins
from hf_selortho.modeling_selortho import SelOrthoSAE
from hf_selortho.penalties import PenaltyPlan, full_penalty_bytes, select_by_config
from hf_selortho.training.arguments import RunArguments
from hf_selortho.training.sae_trainer import SAETrainer
from hf_selortho.training.schedules import PenaltySchedule
from hf_selortho.utils.memory import available_memory

LEAST_REPETITIONS = 3  # of a case with a long interval, and of a selection
_NEVER = 1 << 30  # steps: nothing is logged


@dataclass
class Measured:
    """A case with what was measured of it."""

    case: Case
    seconds: list[float | None] = field(default_factory=list)  # a step, by round; None: it did not take part
    refused: str | None = None  # why it was not measured
    pairs: int | None = None
    selection_seconds: float = 0.0  # of a selection by itself
    memory_bytes: int | None = None  # peak above the state before the steps

    @property
    def done(self) -> list[float]:
        """Return the repetitions that took place."""
        return [seconds for seconds in self.seconds if seconds is not None]


class TrainingSteps:
    """Training steps of one SAE under changing penalties, as the training loop takes them.

    The learning rate is 0: every case finds the same weights, whatever ran before it, and the work is the same.
    """

    def __init__(self, sae: SelOrthoSAE, batches: Batches) -> None:
        arguments = RunArguments(learning_rate=0.0, max_steps=2 * _NEVER, logging_steps=_NEVER)
        self.sae, self.batches, self.device, self.base = sae.train(), batches, sae.device, sae.config
        self.trainer = SAETrainer(Accelerator(cpu=self.device.type == "cpu"), sae, arguments, None)

    def run(self, case: Case, number: int, steps: int | None = None) -> float:
        """Return the seconds a step, from one selection to the next (or over `steps`), on batches from `number` on."""
        if case.mode == ENCODER:
            return self._encode(number)
        self.configure(case.config(self.base))
        steps = case.interval if steps is None else steps
        started = time.perf_counter()
        for step in range(steps):
            self.trainer.train_step(self._batch(number + step))
        wait_for(self.device)
        return (time.perf_counter() - started) / steps

    def configure(self, config: SelOrthoConfig) -> None:
        """Change the penalty; the next step selects pairs, and no feature counts as dead."""
        trainer = self.trainer
        self.sae.config, trainer.penalty = config, PenaltySchedule(config, trainer.group)
        trainer.state.step = config.selection_interval
        trainer.state.tokens_since_fired.zero_()

    @torch.no_grad()
    def l0(self) -> float:
        """Return the mean number of features that fire on a token."""
        return self._features(self.batches.at(0)).l0()

    @torch.no_grad()
    def time_selection(self, case: Case, number: int) -> float:
        """Return the seconds of one selection on the features of a batch."""
        config = case.config(self.base)
        features = self._features(self.batches.at(number))
        wait_for(self.device)
        started = time.perf_counter()
        select_by_config(config, features, self.sae.W_dec)
        wait_for(self.device)
        return time.perf_counter() - started

    def _features(self, batch: Tensor) -> Any:
        return self.sae(batch, plan=PenaltyPlan(acts=False), return_feature_acts=False).features.detach()

    @torch.no_grad()
    def _encode(self, number: int) -> float:
        """Time the encoder's product into memory that is there, with the top-k of a topk SAE: the yardstick."""
        sae = self.sae
        x = sae.normalize_input(self.batches.at(number)).to(sae.W_enc.dtype)
        buffer = torch.zeros(len(x), len(sae.b_enc), device=self.device, dtype=sae.W_enc.dtype)
        wait_for(self.device)
        started = time.perf_counter()
        torch.addmm(sae.b_enc, x, sae.W_enc, out=buffer)
        if sae.config.activation == "topk":
            buffer.topk(sae.config.k, dim=-1, sorted=False)
        wait_for(self.device)
        return time.perf_counter() - started

    def _batch(self, number: int) -> ActivationBatch:
        rows, zeros = self.batches.at(number), torch.zeros(self.batches.size, dtype=torch.int64)
        return ActivationBatch({0: rows}, TokenOrigins.of(zeros, zeros, zeros, zeros))


def run_rounds(
    steps: TrainingSteps, cases: Sequence[Case], rounds: int, limit_seconds: float, progress: tqdm | None = None
) -> list[Measured]:
    """Measure cases on one SAE in `rounds` rounds, in another order in every round.

    A case of interval r is measured over r steps, in fewer rounds, so that it takes about as many steps as the others.
    A case whose first step exceeds `limit_seconds` is measured once, one that memory is too small for not at all.
    """
    results = [Measured(case, refused=_refusal(case, steps)) for case in cases]
    turns = {case: turns_of(case.interval, rounds) for case in cases}
    for result in results:  # the first step of a kind is slow: memory is laid out, kernels are chosen
        if result.refused is None and _time(steps, result, 0, 1) > limit_seconds:
            turns[result.case] = [0]
    for number in range(rounds):
        by = number % len(results)
        for result in [*results[by:], *results[:by]]:
            takes_part = result.refused is None and number in turns[result.case]
            result.seconds.append(_time(steps, result, number) if takes_part else None)
            if progress is not None:
                progress.update()
    for result in results:
        if result.refused is None and result.pairs is not None:
            times = [steps.time_selection(result.case, number) for number in range(LEAST_REPETITIONS)]
            result.selection_seconds = median(times)
    return results


def _time(steps: TrainingSteps, result: Measured, number: int, count: int | None = None) -> float:
    seconds = steps.run(result.case, number, count)
    if result.case.mode != ENCODER and (pairs := steps.trainer.penalty.pairs) is not None:
        result.pairs = len(pairs)
    return seconds


def _refusal(case: Case, steps: TrainingSteps) -> str | None:
    """Say why a case is not tried; None if it is."""
    if case.mode != "full":
        return None
    needed, available = full_penalty_bytes(len(steps.sae.b_enc), steps.batches.size), available_memory(steps.device)
    if available is None or needed <= available:
        return None
    return f"needs {needed:,} bytes ({needed / 2**30:.1f} GiB), {available:,} are available"


def turns_of(interval: int, rounds: int) -> list[int]:
    """List the rounds in which a case that takes `interval` steps at a time takes part, evenly spread."""
    count = min(rounds, max(LEAST_REPETITIONS, math.ceil(rounds / interval)))
    return [part * rounds // count for part in range(count)]


def ratio(times: Sequence[float | None], yardstick: Sequence[float | None]) -> float | None:
    """Return the median over the rounds of `times / yardstick` of the same round; None if they share no round."""
    ratios = [a / b for a, b in zip(times, yardstick, strict=True) if a is not None and b is not None]
    return median(ratios) if ratios else None


def rows_of(results: Sequence[Measured], batch: int, l0: float, **common: Any) -> list[dict[str, Any]]:
    """Return the results of the cases of one SAE as rows for JSON; `common` is put into each of them."""
    times = {result.case.mode: result.seconds for result in results if result.case.mode in (ENCODER, NONE)}
    rows = []
    for result in results:
        row = {
            **common, "mode": result.case.mode, "label": result.case.label, "interval": result.case.interval,
            "skipped": result.refused, "memory_bytes": result.memory_bytes,
        }  # fmt: skip
        if result.done:
            seconds = median(result.done)
            row |= {
                "repetitions": len(result.done),
                "seconds_per_step": seconds,
                "seconds_per_step_min": min(result.done),
                "tokens_per_second": batch / seconds,
                "ratio_to_encoder": ratio(result.seconds, times[ENCODER]),
                "ratio_to_no_penalty": ratio(result.seconds, times[NONE]),
                "l0": None if result.case.mode == ENCODER else l0,
                "pairs": result.pairs,
                "seconds_by_phase": {"selection": result.selection_seconds / result.case.interval},
            }
        rows.append(row)
    return rows
