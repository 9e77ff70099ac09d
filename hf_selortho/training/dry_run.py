"""Measure what a run would need and take, by training in small for some seconds, and refuse what cannot fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from ..modeling_selortho import SelOrthoSAE
from ..process_group import ProcessGroup
from ..utils.memory import available_memory, check_fits, free_disk, gigabytes, memory_now, peak_memory, start_peak
from .data import LiveData, TrainingData
from .run import REMEDY, TRAINING_BYTES, TrainingRun
from .trainer import Trainer

PROBE_SECONDS = 20.0  # of training steps
_PROBE_BATCHES = 2  # that the buffer holds in small
_CHECKPOINT_BYTES = 12  # a parameter and Adam's two moments, in float32
_REPORT_BYTES = 2_000_000  # metrics, pictures and card of an SAE


def dry_run(run: TrainingRun) -> str:
    """Train in small, and return what the whole run needs and takes, as a table.

    Raises:
        SelOrthoError: it cannot fit.
    """
    device, arguments, before = run.accelerator.device, run.arguments.run, memory_now(run.accelerator.device)
    data = run.open_data()
    loaded, available, full = memory_now(device), available_memory(device), data.source.memory_bytes()
    start_peak(device)
    saes, filling, step_seconds, steps = _probe(run, data)

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
    check_fits("memory", memory, None if available is None else available + loaded, REMEDY)
    check_fits("disk", disk, free_disk(run.output), "use another --output_dir, or fewer --keep_checkpoints")
    tokens = arguments.max_steps * arguments.batch_size * arguments.gradient_accumulation_steps
    return (
        f"{len(saes)} SAE{'s' if len(saes) > 1 else ''} with {parameters:,} parameters, trained on {tokens:,} tokens\n"
        + _table("memory of a process", memory, gigabytes)
        + _table("disk", disk, gigabytes)
        + _table("time, without the evaluation", seconds, lambda value: str(timedelta(seconds=round(value))))
    )


def _probe(run: TrainingRun, data: TrainingData) -> tuple[list[SelOrthoSAE], float, float, int]:
    """Train on a small buffer; returns the SAEs, seconds to fill the whole one, seconds a step, and the steps timed."""
    arguments = run.arguments
    wanted = arguments.data.buffer_contexts
    contexts = min(math.ceil(_PROBE_BATCHES * arguments.run.batch_size / arguments.sae.context_length), wanted)
    arguments.data.buffer_contexts, arguments.data.refresh_every = contexts, 1
    data.source = data.make_source()
    started = time.perf_counter()
    saes = run.new_saes()
    filling = (time.perf_counter() - started) * wanted / contexts
    trainer = Trainer(run.make_trainers(saes), data.source, arguments.run, run.checkpoints)
    for sae in trainer.saes:
        sae.model.train()
    group, device, seconds = ProcessGroup.of_run(), run.accelerator.device, list[float]()
    while len(seconds) < 3 or sum(seconds) < PROBE_SECONDS:
        started = time.perf_counter()
        trainer.train_step()
        # the mean over the processes, such that they agree on when to stop
        seconds.append(group.mean(time.perf_counter() - started, device) or 0.0)
    later = seconds[1:]  # the first one warms up
    return saes, filling, sum(later) / len(later), len(later)


def _table(title: str, parts: Mapping[str, float], words: Callable[[float], str]) -> str:
    rows = [*parts.items(), ("in all", sum(parts.values()))]
    return f"\n{title}\n" + "".join(f"  {part:<40}{words(value):>14}\n" for part, value in rows)
