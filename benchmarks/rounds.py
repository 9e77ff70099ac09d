"""Cases measured in turn, round after round, so that a machine that speeds up or slows down does so for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.cases import ENCODER, NONE, Case, Conditions, refusal
from benchmarks.steps import PHASES, EncoderOnly, Repetition, TrainingSteps

SPLIT_REPETITIONS = 3  # of a case, in which selection and penalty are timed by themselves too
LEAST_REPETITIONS = 3  # of a case with a long interval
Times = Sequence[float | None]  # seconds a step by round, None in a round that a case did not take part in


@dataclass
class Measured:
    """A case with what was measured of it."""

    case: Case
    repetitions: list[Repetition | None] = field(default_factory=list)  # by round
    refused: str | None = None  # why it was not measured
    memory_bytes: int | None = None  # peak above the state before the steps

    @property
    def done(self) -> list[Repetition]:
        """The repetitions that took place."""
        return [repetition for repetition in self.repetitions if repetition is not None]

    @property
    def times(self) -> Times:
        """Seconds a step by round."""
        return [None if repetition is None else repetition.seconds for repetition in self.repetitions]


def run_rounds(
    steps: TrainingSteps,
    cases: Sequence[Case],
    rounds: int,
    limit_seconds: float,
    earlier: Mapping[Case, tuple[int, float]] | None = None,
    progress: tqdm | None = None,
) -> list[Measured]:
    """Measure cases on one SAE in `rounds` rounds.

    A case of interval r is measured over r steps, in fewer rounds, so that it takes about as many steps as the others.
    A case whose first step exceeds `limit_seconds` is measured once, without the split into phases.

    Args:
        earlier: of cases measured on fewer features, these and the seconds a step.
    """
    sae, batches = steps.sae, steps.batches
    base, earlier = sae.config, earlier or {}
    encoder = EncoderOnly(sae, batches)
    product = min(encoder.run(0, top_k=False).seconds for _ in range(3))
    on = Conditions(len(sae.b_enc), batches.size, batches.rows.shape[1], sae.device, product, limit_seconds)
    results = [Measured(case, refused=refusal(case, on, earlier.get(case))) for case in cases]
    turns = {case: turns_of(case.interval, rounds) for case in cases}
    slow: dict[Case, Repetition] = {}

    def measure(result: Measured, number: int) -> Repetition:
        case = result.case
        if case.mode == ENCODER:
            return encoder.run(number)
        if case in slow and case.interval == 1:
            return slow[case]
        phases = case not in slow and len(result.done) < SPLIT_REPETITIONS
        return steps.run(case.config(base), number, phases=phases)

    for result in results:  # the first step of a kind is slow: memory is laid out, kernels are chosen
        if result.refused is None and result.case.mode != ENCODER:
            first = _unless_memory_ends(result, steps.run, result.case.config(base), 0, steps=1)
            if first is not None and first.seconds > limit_seconds:
                slow[result.case], turns[result.case] = first, [0]
    for number in range(rounds):
        for result in _rotated(results, number):
            takes_part = result.refused is None and number in turns[result.case]
            found = _unless_memory_ends(result, measure, result, number) if takes_part else None
            result.repetitions.append(found)
            if progress is not None:
                progress.update()
    sae.config = base
    return results


def turns_of(interval: int, rounds: int) -> list[int]:
    """The rounds in which a case that takes `interval` steps at a time takes part, evenly spread."""
    count = min(rounds, max(LEAST_REPETITIONS, math.ceil(rounds / interval)))
    return [part * rounds // count for part in range(count)]


def ratio(times: Times, yardstick: Times) -> float | None:
    """Median over the rounds of `times / yardstick`, both of the same round; None if they share no round."""
    ratios = [a / b for a, b in zip(times, yardstick, strict=True) if a is not None and b is not None]
    return median(ratios) if ratios else None


def rows_of(results: Sequence[Measured], batch: int, **common: Any) -> list[dict[str, Any]]:
    """The results of the cases of one SAE as JSON-able rows; `common` is put into each of them."""
    times: Mapping[str, Times] = {r.case.mode: r.times for r in results if r.case.mode in (ENCODER, NONE)}
    rows = []
    for result in results:
        row: dict[str, Any] = {
            **common, "mode": result.case.mode, "label": result.case.label, "interval": result.case.interval,
            "skipped": result.refused, "memory_bytes": result.memory_bytes,
        }  # fmt: skip
        if result.done:
            seconds = median(r.seconds for r in result.done)
            row |= {
                "repetitions": len(result.done),
                "seconds_per_step": seconds,
                "seconds_per_step_min": min(r.seconds for r in result.done),
                "tokens_per_second": batch / seconds,
                "ratio_to_encoder": ratio(result.times, times[ENCODER]),
                "ratio_to_no_penalty": ratio(result.times, times[NONE]),
                "l0": _mean([r.l0 for r in result.done if r.l0 is not None]),
                "pairs": result.done[0].pairs,
                "seconds_by_phase": _median_phases(result.done),
            }
        rows.append(row)
    return rows


def _median_phases(repetitions: Sequence[Repetition]) -> dict[str, float] | None:
    split = [r.phases for r in repetitions if r.phases]
    return {name: median(phases[name] for phases in split) for name in PHASES} if split else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _unless_memory_ends(
    result: Measured, run: Callable[..., Repetition], *args: Any, **kwargs: Any
) -> Repetition | None:
    """What `run` returns; a case that the GPU has no room for is taken out instead."""
    try:
        return run(*args, **kwargs)
    except torch.OutOfMemoryError:
        result.refused = "the GPU's memory was not enough"
    torch.cuda.empty_cache()
    return None


def _rotated(results: Sequence[Measured], by: int) -> list[Measured]:
    """The cases in another order in every round: none always follows the same one."""
    by %= len(results)
    return [*results[by:], *results[:by]]
