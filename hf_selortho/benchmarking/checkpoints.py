"""What checkpoints cost: the same training goes on with and without them, in turns, on a real buffer of activations."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..modeling_selortho import SelOrthoSAE
from ..training.arguments import parse_arguments, sae_config
from ..training.checkpoint import Checkpoints
from ..training.data import LiveData
from ..training.trainer import Trainer, look_around, take_step

EVERY = 100  # steps between two checkpoints
_WARM_UP = 10


def measure_checkpoints(
    model: str, layer: int, dataset: str, d_sae: int, batch: int, rounds: int, folder: Path, cpu: bool
) -> list[dict[str, float]]:
    """Seconds of `EVERY` training steps without and with a checkpoint, and the bytes of one, by round.

    A checkpoint is begun before the first of these steps, and is on the disk, flushed, before the time is taken.

    Args:
        model: language model. layer: decoder layer, counted from 0. dataset: what is read.
        d_sae: number of features. batch: tokens of a step. rounds: each with both cases, in turn the one or the other
        first. folder: where the checkpoints go and are removed from. cpu: leave an accelerator alone.
    """
    settings = {
        "model": model, "layer": layer, "dataset": dataset, "d_sae": d_sae, "batch_size": batch, "buffer_reuse": 12,
        "buffer_contexts": 1536, "eval_samples": 0, "max_steps": 1 << 30,
    }  # fmt: skip
    arguments = parse_arguments([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    accelerator = Accelerator(cpu=cpu)
    data = LiveData(arguments, [layer], accelerator)
    statistics = data.statistics(progress=True)[layer]
    sae = SelOrthoSAE(sae_config(arguments, **data.provenance(layer)))
    sae.set_input_statistics(statistics.mean, statistics.scale)
    trainer = Trainer(accelerator, sae, arguments.run, None)
    trainer.model.train()
    rows = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".checkpoints-") as scratch:
        checkpoints = Checkpoints(accelerator, Path(scratch), arguments.flat(), EVERY, keep=1)
        for _ in range(_WARM_UP):
            take_step([trainer], data.source, arguments.run)
        for number in tqdm(range(rounds), desc="checkpoints", unit="round"):
            row = {}
            for saves in (False, True) if number % 2 == 0 else (True, False):
                row["with" if saves else "without"] = _seconds(trainer, data, checkpoints, saves)
            latest = checkpoints.latest
            assert latest is not None
            rows.append({**row, "bytes": sum(path.stat().st_size for path in latest.iterdir())})
        checkpoints.close()
    return rows


def checkpoints_words(rows: Sequence[dict[str, Any]]) -> str:
    """The share of the throughput that is left with checkpoints."""
    shares = [row["without"] / row["with"] for row in rows]
    step, size = median(row["without"] for row in rows) / EVERY, median(row["bytes"] for row in rows)
    return (
        f"throughput with a checkpoint every {EVERY} steps: {median(shares):.1%} of that without (median of "
        f"{len(rows)} rounds, {min(shares):.1%} to {max(shares):.1%}); {step:.3f} s a step, {size / 1e6:,.0f} MB a "
        "checkpoint"
    )


def _seconds(trainer: Trainer, data: LiveData, checkpoints: Checkpoints, saves: bool) -> float:
    started = time.perf_counter()
    if saves:
        checkpoints.save([trainer], data.source)
    for _ in range(EVERY):
        look_around(trainer, checkpoints, None)
        take_step([trainer], data.source, trainer.arguments)
    checkpoints.wait()
    look_around(trainer, checkpoints, None)
    return time.perf_counter() - started
