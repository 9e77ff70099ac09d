"""Measure what a run would need and take, by training on a little text for some seconds, and refuse what cannot fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, cast

from ..data.probe import SampleBatches, probe_capture
from ..modeling_selortho import SelOrthoSAE
from ..process_group import ProcessGroup
from ..utils.memory import (
    available_memory,
    check_fits,
    free_disk,
    gigabytes,
    mapped_memory,
    memory_now,
    peak_memory,
    start_peak,
)
from .data import LiveData, TrainingData
from .run import REMEDY, TRAINING_BYTES, TrainingRun
from .trainer import Trainer

PROBE_SECONDS = 20.0  # half of them for the language model, half for training steps
_CHECKPOINT_BYTES = 12  # a parameter and Adam's two moments, in float32
_REPORT_BYTES = 2_000_000  # metrics, pictures and card of an SAE


def dry_run(run: TrainingRun) -> str:
    """Train on a little text, and return what the whole run needs and takes, as a table.

    Raises:
        SelOrthoError: it cannot fit.
    """
    device, arguments, before = run.accelerator.device, run.arguments.run, memory_now(run.accelerator.device)
    data = run.open_data()
    loaded, available, full = memory_now(device), available_memory(device), data.source.memory_bytes()
    in_use, mapped = loaded, mapped_memory()
    start_peak(device)
    saes, filling, step_seconds, steps = _probe(run, data)
    if device.type == "cpu":  # weights are read from their file when they are first used
        loaded += max(0, mapped_memory() - mapped)

    live, on_device = isinstance(data, LiveData), data.source_device.type == device.type
    parameters = sum(parameter.numel() for sae in saes for parameter in sae.parameters())
    training = TRAINING_BYTES * parameters
    checkpoint = _CHECKPOINT_BYTES * parameters if arguments.checkpoint_every else 0
    small = data.source.memory_bytes() if on_device else 0
    memory = {
        "libraries and process": before,
        "language model" if live else "manifest": loaded - before,
        "SAE weights, gradients, Adam": training,
        "activations held": full if on_device else 0,
        "checkpoint on its way to the disk": checkpoint if device.type == "cpu" else 0,
        "steps, selection, forward passes": max(0, peak_memory(device) - loaded - training - small),
    }
    kept = arguments.keep_checkpoints + 2  # the best one, and the one that is being written
    buffers = full * run.accelerator.num_processes if live else 0
    disk = {
        "SAEs and reports": 4 * parameters + _REPORT_BYTES * len(saes),
        "checkpoints": kept * (checkpoint + buffers) if checkpoint else 0,
    }
    seconds = {
        "filling the buffer": filling if live else 0.0,
        f"training, from {steps} steps": step_seconds * arguments.max_steps,
    }
    check_fits("memory", memory, None if available is None else available + in_use, REMEDY)
    check_fits("disk", disk, free_disk(run.output), "use another --output_dir, or fewer --keep_checkpoints")
    tokens = arguments.max_steps * arguments.batch_size * arguments.gradient_accumulation_steps
    return (
        f"{len(saes)} SAE{'s' if len(saes) > 1 else ''} with {parameters:,} parameters, trained on {tokens:,} tokens\n"
        + _table("memory of a process", memory, gigabytes)
        + _table("disk", disk, gigabytes)
        + _table("time, without the evaluation", seconds, lambda value: str(timedelta(seconds=round(value))))
    )


def _probe(run: TrainingRun, data: TrainingData) -> tuple[list[SelOrthoSAE], float, float, int]:
    """Train on a little text; returns the SAEs, seconds to fill the buffer, seconds a step, and the steps timed."""
    arguments, group, device = run.arguments, ProcessGroup.of_run(), run.accelerator.device
    filling = reading = 0.0
    if isinstance(data, LiveData):
        buffer, batch = data.source, arguments.run.batch_size // group.size
        parts, token = probe_capture(data.capture, buffer.stream, PROBE_SECONDS / 2, group)
        filling, reading = token * buffer.capacity, token * batch / arguments.data.buffer_reuse
        data.source = cast(Any, SampleBatches(parts, batch))
    saes = run.new_saes()
    trainer = Trainer(run.make_trainers(saes), data.source, arguments.run, run.checkpoints)
    for sae in trainer.saes:
        sae.model.train()
    seconds = list[float]()
    while not seconds or sum(seconds) < PROBE_SECONDS / 2:
        started = time.perf_counter()
        trainer.train_step()
        # the mean over the processes, such that they agree on when to stop
        seconds.append(group.mean(time.perf_counter() - started, device) or 0.0)
    later = seconds[1:] or seconds  # the first one warms up
    reading *= arguments.run.gradient_accumulation_steps
    return saes, filling, reading + sum(later) / len(later), len(later)


def _table(title: str, parts: Mapping[str, float], words: Callable[[float], str]) -> str:
    rows = [*parts.items(), ("in all", sum(parts.values()))]
    return f"\n{title}\n" + "".join(f"  {part:<40}{words(value):>14}\n" for part, value in rows)
