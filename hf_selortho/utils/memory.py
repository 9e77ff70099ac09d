"""Measure memory and disk: what this process has taken at most, and what it may still take."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from ..errors import SelOrthoError


def start_peak(device: torch.device) -> None:
    """Forget the peak so far, such that [`peak_memory`] is that of what follows, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has taken, of the GPU's memory or else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, IndexError):  # Linux; not ru_maxrss: a process starts with that of its parent
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_now(device: torch.device) -> int:
    """Return the bytes that this process takes at the moment."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that this process may still take on a device, None if unknown.

    Where several processes of a run share a machine, each has its share of the machine's memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    left = [psutil.virtual_memory().available, room_in_container()]
    return min(size for size in left if size is not None) // local_processes()


def room_in_container(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes left under the limit of the container that this process runs in (cgroup v2); None without one.

    The cache of files counts as used there, though the kernel gives it back on demand.
    """
    try:
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        cached = re.findall(r"^(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no control group, or "max": no limit
        return None
    return max(0, left + sum(map(int, cached)))


def existing_folder(path: Path) -> Path:
    """Return the folder, or the closest one above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def free_disk(folder: Path) -> int:
    """Return the bytes free where a folder is, or would be."""
    return shutil.disk_usage(existing_folder(folder)).free


def local_processes() -> int:
    """Count the processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_fits(kind: str, parts: Mapping[str, int], available: int | None, remedy: str) -> None:
    """Raise a SelOrthoError that names the parts, in bytes, if they need more than is available of a kind."""
    needed = sum(parts.values())
    if available is not None and needed > available:
        listed = ", ".join(f"{part} {gigabytes(size)}" for part, size in parts.items())
        raise SelOrthoError(
            f"this run cannot fit: it needs {gigabytes(needed)} of {kind} ({listed}), {gigabytes(available)} are "
            f"available; {remedy}"
        )


def gigabytes(size: float) -> str:
    """Write a number of bytes."""
    return f"{size / 1e9:.2f} GB"
