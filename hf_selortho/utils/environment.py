"""What a run takes place on: versions of the libraries, the machine, and the share of it that a process may use."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from .command_line import started_processes
from .memory import local_processes

_LIBRARIES = (
    "hf_selortho", "torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface_hub", "safetensors",
    "tokenizers", "numpy",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Look up the versions of Python and of the libraries that a run depends on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def hardware(device: torch.device, processes: int) -> str:
    """Describe the machine: accelerator or processor, cores, number of processes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor_name()} ({os.cpu_count()} cores), {device.type}"
    return name if processes == 1 else f"{processes} processes, each on {name}"


def on_cpu(asked: bool) -> bool:
    """Tell whether to use the CPU: asked to, on a Mac, whose GPUs have no float64, or in a group without GPUs.

    Of several processes without a GPU, accelerate forms a group only if it is told to use the CPU.
    """
    return asked or torch.backends.mps.is_available() or (started_processes() > 1 and not torch.cuda.is_available())


def use_all_cores(threads: int | None = None) -> None:
    """Give this process its share of the machine's cores (or `threads`).

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS to 1, which would leave all cores but one idle.
    """
    torch.set_num_threads(threads or max(1, own_cores() // local_processes()))


def own_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
