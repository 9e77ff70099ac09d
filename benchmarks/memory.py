"""Peak memory of a training step, each case in a process of its own: `python -m benchmarks.memory JOB`.

What is reported is the peak above the state before the steps, which holds the weights, the state of the optimiser and
the batches.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.cases import ENCODER, NONE, Case
from benchmarks.inputs import Batches
from benchmarks.pipeline import wait_for
from benchmarks.steps import EncoderOnly, TrainingSteps
from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.modeling_selortho import SelOrthoSAE
from hf_selortho.utils.memory import memory_now, peak_memory, start_peak

logger = logging.getLogger(__name__)

JOB, TENSORS = "job.json", "tensors.safetensors"
# glibc would keep what was freed before the steps, and the steps would seem to take less than they do
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STEPS = 2  # the first selects pairs, the second may act on them


def peak_in_own_process(case: Case, sae: SelOrthoSAE, batches: Batches) -> int | None:
    """Bytes that the steps of a case take at their peak, measured in a fresh process; None if that process died."""
    with tempfile.TemporaryDirectory(prefix="hf_selortho-memory-") as folder:
        write_job(Path(folder), case, sae, batches)
        package = str(Path(__file__).parents[1])
        environment = {
            **os.environ,
            **RETURN_FREED_MEMORY,
            "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "benchmarks.memory", folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        logger.warning("memory of %s on %d features not measured: %s", case.label, len(sae.b_enc), last)
        return None
    return int(done.stdout.split()[-1])


def write_job(folder: Path, case: Case, sae: SelOrthoSAE, batches: Batches) -> None:
    """Leave in `folder` what [`measure`] needs."""
    rows = torch.cat([batches.at(number) for number in range(STEPS)])  # (STEPS * B, d_in)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    save_file({**weights, "rows": rows.cpu().contiguous()}, folder / TENSORS)
    job = {
        "config": sae.config.own_settings(), "mode": case.mode, "interval": case.interval, "batch": batches.size,
        "device": str(sae.device), "threads": torch.get_num_threads(),
    }  # fmt: skip
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")


def measure(folder: Path) -> int:
    """Bytes that the steps of the job in `folder` take at their peak."""
    job: dict[str, Any] = json.loads((folder / JOB).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    tensors = load_file(folder / TENSORS)
    rows = tensors.pop("rows")
    case, config = Case(job["mode"], job["interval"]), SelOrthoConfig(**job["config"])
    batches = Batches(rows, job["batch"], device)
    sae: Any = SelOrthoSAE(config)
    sae.load_state_dict(tensors)
    sae.to(device)
    del tensors, rows
    if case.mode == ENCODER:
        before = _start(device)
        EncoderOnly(sae, batches).run(0)
    else:
        steps = TrainingSteps(sae, batches)
        steps.run(Case(NONE).config(config), 0)  # brings in the state of the optimiser
        before = _start(device)
        steps.run(case.config(config), 0, steps=min(case.interval, STEPS))
    return max(0, peak_memory(device) - before)


def _start(device: torch.device) -> int:
    """Bytes in use now; the peak starts anew, where the system can do that."""
    wait_for(device)
    start_peak(device)
    return memory_now(device)


if __name__ == "__main__":
    sys.stdout.write(f"{measure(Path(sys.argv[1]))}\n")
