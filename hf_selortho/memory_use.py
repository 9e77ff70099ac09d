"""Memory of this process: what it has taken at most, and what it may still take."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has taken, of the GPU's memory or else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def start_peak(device: torch.device) -> bool:
    """Forget the peak so far, so that [`recent_peak`] is that of what follows; False where this cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def recent_peak(device: torch.device) -> int:
    """Most bytes taken since [`start_peak`]; since the process began where that could not be noted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else peak_memory(device)


def memory_now(device: torch.device) -> int:
    """Bytes that this process takes at the moment."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def available_memory(device: torch.device) -> int | None:
    """Bytes that a process may still take on a device, None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available if device.type == "cpu" else None
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        within = int(limit.read_text()) - int(used.read_text())  # of a container
    except (OSError, ValueError):
        return available
    return within if available is None else min(available, within)
