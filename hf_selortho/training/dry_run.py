"""What a run would need and take: the run itself in small for a few seconds, and arithmetic for the rest."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ..data.buffer import ActivationBuffer
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..process_group import ProcessGroup
from ..utils.memory import available_memory, free_disk, memory_now, recent_peak, start_peak
from .arguments import TrainingArguments
from .data import TrainingData
from .sae_trainer import SAETrainer

PROBE_SECONDS = 20.0  # of training steps
_PROBE_BATCHES = 2  # that the buffer holds in small
_PROBE_CE = 4  # contexts on which the language model's loss is measured
_POOL_BATCHES = 8  # that the evaluation mixes at once
_OPTIMIZER_BYTES = 16  # a parameter, its gradient and Adam's two moments, in float32
_CHECKPOINT_BYTES = 12  # the same without the gradient

# (SAEs, data, contexts, contexts with cross-entropy) -> None
EvaluateFn = Callable[[Sequence[SelOrthoSAE], TrainingData, int, int], None]


@dataclass(frozen=True)
class Forecast:
    """A run, before it has begun."""

    parameters: int  # of all SAEs
    tokens: int  # drawn in training, over all processes
    harvested: int  # activations computed in training, over all processes; 0 from shards
    memory: dict[str, int]  # bytes of a process by part, on its device; they add up to the peak
    available: int | None
    host: int  # bytes of activations in the memory of the machine, where the device has its own
    host_available: int | None
    disk: int
    free_disk: int
    seconds: dict[str, float]
    steps_probed: int

    @property
    def peak(self) -> int:
        """Most bytes that a process will take."""
        return sum(self.memory.values())


def in_small(arguments: TrainingArguments) -> TrainingArguments:
    """The same run with a buffer of two batches."""
    contexts = math.ceil(_PROBE_BATCHES * arguments.run.batch_size / arguments.sae.context_length)
    contexts = min(contexts, arguments.data.buffer_contexts)
    data = dataclasses.replace(arguments.data, buffer_contexts=contexts, refresh_every=1)
    return dataclasses.replace(arguments, data=data)


def forecast(
    arguments: TrainingArguments,
    accelerator: Accelerator,
    data: TrainingData,
    make_trainers: Callable[[TrainingData], list[SAETrainer]],
    evaluate_fn: EvaluateFn,
    before: int,
) -> Forecast:
    """Run in small, and extrapolate.

    Args:
        arguments: of the run in full.
        data: of the run [`in_small`].
        make_trainers: fills the buffer and makes SAEs and trainers.
        evaluate_fn: evaluates the SAEs.
        before: bytes taken before anything was loaded.
    """
    device, run = accelerator.device, arguments.run
    loaded = memory_now(device)
    available = available_memory(device)
    full = data.source_bytes(arguments)
    start_peak(device)
    started = time.perf_counter()
    trainers = make_trainers(data)
    filling = time.perf_counter() - started
    saes = [trainer.sae for trainer in trainers]
    parameters = sum(parameter.numel() for sae in saes for parameter in sae.parameters())
    step_seconds, steps = _probe_steps(trainers, data)
    training_peak, held = recent_peak(device), data.source.memory_bytes()
    data.source.release()
    start_peak(device)
    evaluation_seconds = _probe_evaluation(arguments, saes, data, evaluate_fn)
    pools = _POOL_BATCHES * run.batch_size * 4 * sum(sae.W_dec.shape[1] for sae in _one_a_layer(saes))
    evaluation_peak = recent_peak(device) + (pools if data.held_out else 0)
    on_device = data.source_device.type == device.type
    if on_device:
        training_peak += full - held
    live = isinstance(data.source, ActivationBuffer)
    memory = {
        "libraries and process": before,
        "language model" if live else "manifest and shards": loaded - before,
        "activations held": full if on_device else 0,
        "SAE weights, gradients, Adam": _OPTIMIZER_BYTES * parameters,
    }
    if run.checkpoint_every and device.type == "cpu":
        memory["checkpoint on its way to the disk"] = _CHECKPOINT_BYTES * parameters
        training_peak += _CHECKPOINT_BYTES * parameters
    peak = max(training_peak, evaluation_peak)
    memory["steps, selection, forward passes, evaluation"] = max(0, peak - sum(memory.values()))
    tokens = run.max_steps * run.batch_size * run.gradient_accumulation_steps
    harvested, fill_seconds, refresh_seconds = _harvest_time(arguments, data, filling, tokens, accelerator)
    return Forecast(
        parameters=parameters,
        tokens=tokens,
        harvested=harvested,
        memory=memory,
        available=None if available is None else available + loaded,
        host=0 if on_device else full,
        host_available=None if on_device else available_memory(data.source_device),
        disk=_disk_bytes(arguments, len(saes), parameters, full * accelerator.num_processes if live else 0),
        free_disk=free_disk(Path(run.output_dir)),
        seconds={
            "filling the buffer": fill_seconds,
            "language model while training": refresh_seconds,
            "training steps": step_seconds * run.max_steps * run.gradient_accumulation_steps,
            "evaluation": evaluation_seconds,
        },
        steps_probed=steps,
    )


def forecast_words(found: Forecast, saes: int) -> str:
    """A forecast as a table."""
    lines = [
        f"{saes} SAE{'s' if saes > 1 else ''} with {found.parameters:,} parameters, trained on {found.tokens:,} tokens"
        + (f"; the language model computes {found.harvested:,} activations" if found.harvested else ""),
        "",
        "memory of a process",
        *(f"  {part:<46}{size / 1e9:>8.2f} GB" for part, size in found.memory.items()),
        f"  {'peak':<46}{found.peak / 1e9:>8.2f} GB"
        + ("" if found.available is None else f" of {found.available / 1e9:.2f} GB"),
        *([f"activations, in the machine's memory{'':<12}{found.host / 1e9:>8.2f} GB"] if found.host else []),
        f"disk{'':<44}{found.disk / 1e9:>8.2f} GB of {found.free_disk / 1e9:.2f} GB",
        "",
        f"time, from {found.steps_probed} steps and a small evaluation",
        *(f"  {part:<46}{_duration(seconds):>11}" for part, seconds in found.seconds.items() if seconds),
        f"  {'in all':<46}{_duration(sum(found.seconds.values())):>11}",
    ]
    return "\n".join(lines) + "\n"


def refuse_what_cannot_fit(found: Forecast) -> None:
    """Raise a SelOrthoError if memory or disk do not suffice; names what takes most."""
    if found.available is not None and found.peak > found.available:
        part = max(found.memory, key=lambda name: found.memory[name])
        raise SelOrthoError(
            f"this run needs {found.peak / 1e9:.2f} GB of memory, {found.available / 1e9:.2f} GB are available; most "
            f"is for {part}: lower --buffer_contexts, --d_sae, --batch_size or the number of SAEs"
        )
    _check_host(found.host, found.host_available)
    if found.disk > found.free_disk:
        raise SelOrthoError(
            f"this run needs {found.disk / 1e9:.2f} GB of disk, {found.free_disk / 1e9:.2f} GB are free: use another "
            "--output_dir, or fewer --keep_checkpoints"
        )


def check_memory(arguments: TrainingArguments, data: TrainingData, parameters: int, device: torch.device) -> None:
    """Refuse, before anything large is allocated, a run whose buffer and weights alone cannot fit.

    Raises:
        SelOrthoError: says what needs how much.
    """
    available, held = available_memory(device), data.source_bytes(arguments)
    if data.source_device.type != device.type:
        _check_host(held, available_memory(data.source_device))
        held = 0
    needed = held + _OPTIMIZER_BYTES * parameters
    if available is not None and needed > available:
        raise SelOrthoError(
            f"this run cannot fit: activations held {held / 1e9:.2f} GB, SAE weights, gradients and Adam "
            f"{(needed - held) / 1e9:.2f} GB, and {available / 1e9:.2f} GB of memory are available; lower "
            "--buffer_contexts, --d_sae or the number of SAEs"
        )


def _check_host(needed: int, available: int | None) -> None:
    if available is not None and needed > available:
        raise SelOrthoError(
            f"the activations held need {needed / 1e9:.2f} GB of the machine's memory, {available / 1e9:.2f} GB are "
            "available: lower --buffer_contexts"
        )


def _probe_steps(trainers: Sequence[SAETrainer], data: TrainingData) -> tuple[float, int]:
    """Seconds of a step of all SAEs on one batch over and over, and how many were timed."""
    batch = data.source.next_batch()
    for trainer in trainers:
        trainer.model.train()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < PROBE_SECONDS:
        started = time.perf_counter()
        for trainer in trainers:
            trainer.train_step(batch)
        elapsed = ProcessGroup.of_run().mean(time.perf_counter() - started, trainers[0].accelerator.device)
        seconds.append(elapsed or 0.0)  # of all processes, such that they agree on when to stop
    later = seconds[1:]  # the first one warms up
    return sum(later) / len(later), len(seconds)


def _probe_evaluation(
    arguments: TrainingArguments, saes: Sequence[SelOrthoSAE], data: TrainingData, evaluate_fn: EvaluateFn
) -> float:
    """Seconds that the evaluation of the whole run will take."""
    contexts = len(data.held_out)
    if contexts == 0:
        return 0.0
    few = min(contexts, math.ceil(1.5 * arguments.run.batch_size / arguments.sae.context_length))
    started = time.perf_counter()
    evaluate_fn(saes, data, few, 0)
    features = (time.perf_counter() - started) * contexts / few
    if not data.measures_loss:
        return features
    wanted = min(arguments.evaluation.eval_ce_samples, contexts)
    started = time.perf_counter()
    evaluate_fn(saes, data, few, _PROBE_CE)
    return features + (time.perf_counter() - started - features * few / contexts) * wanted / _PROBE_CE


def _harvest_time(
    arguments: TrainingArguments, data: TrainingData, filling: float, tokens: int, accelerator: Accelerator
) -> tuple[int, float, float]:
    """Activations that the language model computes, seconds to fill the buffer and seconds to refresh it."""
    source = data.source
    if not isinstance(source, ActivationBuffer):
        return 0, 0.0, 0.0
    per_token = filling / source.capacity
    processes = accelerator.num_processes
    capacity = -(-arguments.data.buffer_contexts // processes) * arguments.sae.context_length
    drawn = tokens // processes - arguments.run.batch_size // processes * arguments.data.refresh_every
    refreshed = max(0.0, drawn / arguments.data.buffer_reuse)
    return round((capacity + refreshed) * processes), capacity * per_token, refreshed * per_token


def _disk_bytes(arguments: TrainingArguments, saes: int, parameters: int, buffers: int) -> int:
    """What a run leaves: SAEs with their reports, and the checkpoints, each with the buffers of all processes."""
    run = arguments.run
    kept = run.keep_checkpoints + 2  # the best one, and the one that is being written
    checkpoints = kept * (_CHECKPOINT_BYTES * parameters + buffers) if run.checkpoint_every else 0
    return checkpoints + 4 * parameters + 2_000_000 * saes


def _one_a_layer(saes: Sequence[SelOrthoSAE]) -> list[SelOrthoSAE]:
    return list({sae.config.layer: sae for sae in saes}.values())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
