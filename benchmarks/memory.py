"""Measures the peak memory of a training step, each case in a process of its own.

What is reported is the peak above the state before the steps, which holds the weights, the state of the optimiser and
the batches.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import ENCODER, NONE, Case
from benchmarks.inputs import Batches, wait_for
from benchmarks.steps import TrainingSteps
from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.modeling_selortho import SelOrthoSAE
from hf_selortho.utils.memory import memory_now, peak_memory, start_peak

logger = logging.getLogger(__name__)

# glibc would keep what was freed before the steps, and the steps would seem to take less than they do
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STEPS = 2  # the first selects pairs, the second may act on them


def peak_in_own_process(case: Case, sae: SelOrthoSAE, base: SelOrthoConfig, batches: Batches) -> int | None:
    """Return the bytes that the steps of a case take at their peak; None if the process that measures them died."""
    rows = torch.cat([batches.at(number) for number in range(STEPS)]).cpu()  # (STEPS * B, d_in)
    weights = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    settings, threads = base.own_settings(), torch.get_num_threads()
    os.environ.update(RETURN_FREED_MEMORY)  # read when a process starts
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            job = pool.submit(_measure, case, settings, weights, rows, batches.size, str(sae.device), threads)
            return job.result()
        except BrokenProcessPool as error:
            logger.warning("memory of %s on %d features not measured: %s", case.label, len(sae.b_enc), error)
            return None


def _measure(
    case: Case, settings: dict[str, Any], weights: dict[str, Tensor], rows: Tensor, size: int, place: str, threads: int
) -> int:
    torch.set_num_threads(threads)
    device = torch.device(place)
    batches = Batches(rows, size, device)
    sae: Any = SelOrthoSAE(SelOrthoConfig(**settings))
    sae.load_state_dict(weights)
    steps = TrainingSteps(sae.to(device), batches)
    if case.mode != ENCODER:
        steps.run(Case(NONE), 0)  # brings in the state of the optimiser
    wait_for(device)
    start_peak(device)
    before = memory_now(device)
    steps.run(case, 0, steps=min(case.interval, STEPS))
    return max(0, peak_memory(device) - before)
