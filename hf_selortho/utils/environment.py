"""What a run took place on: versions of the libraries, and the machine."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

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


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
