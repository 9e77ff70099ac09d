"""Memory and disk: what this process has taken at most, and what it may still take."""

from __future__ import annotations

import os
import re
import shutil
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
    try:  # not ru_maxrss: a process starts with that of the one that started it
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else peak_memory(device)


def memory_now(device: torch.device) -> int:
    """Bytes that this process takes at the moment."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device, None if unknown.

    Where several processes of a run share a machine, each has its share of the machine's memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    return min([psutil.virtual_memory().available, *_room_in_containers()]) // local_processes()


def existing_folder(path: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be."""
    return shutil.disk_usage(existing_folder(folder)).free


def local_processes() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _room_in_containers(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in each control group of Linux that this process is in and that has a limit.

    The cache of files counts as used there, though the kernel gives it back on demand.
    """
    try:
        groups = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    room = []
    for _, controllers, path in groups:
        if controllers in ("", "memory"):  # of version 2, of version 1
            top = root / controllers
            place = top / path.strip("/")
            folders = (place, *(parent for parent in place.parents if parent.is_relative_to(top)))
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            )
            room += [left for folder in folders if (left := _room_in(folder, *names)) is not None]
    return room


def _room_in(group: Path, limit: str, used: str) -> int | None:
    try:
        left = int((group / limit).read_text()) - int((group / used).read_text())
        found = re.findall(r"^(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    return max(0, left + sum(map(int, found)))
