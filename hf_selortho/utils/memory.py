"""Measure memory and disk: what this process has taken at most, and what it may still take."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from ..errors import SelOrthoError, is_out_of_memory, out_of_memory

_SPARE = 1 << 29  # bytes of a limited process that threads, libraries and reports may come to need


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


def mapped_memory() -> int:
    """Return the bytes of files, such as weights, that this process has mapped and read so far; 0 where unknown."""
    return getattr(psutil.Process().memory_info(), "shared", 0)


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that this process may still take on a device, None if unknown.

    Where several processes of a run share a machine, each has its share of the machine's memory and of the container's.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    shared = [psutil.virtual_memory().available, room_in_container()]
    shares = [size // local_processes() for size in shared if size is not None]
    return min([*shares, *_room_of_process()])


def _room_of_process() -> list[int]:
    """Return the bytes left under each limit of this process, `ulimit -v` and `ulimit -d`, but for some to spare."""
    try:
        import resource  # does not exist on Windows

        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except (ImportError, OSError):
        return []
    room = []
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, taken = resource.getrlimit(limit)[0], int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024
        if most != resource.RLIM_INFINITY:
            room.append(max(0, most - taken - _SPARE))
    return room


def room_in_container(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the bytes left under the limits of the containers that this process runs in; None without one.

    The cache of files counts as used there, though the kernel gives it back on demand.

    Args:
        root: where control groups (cgroup v1 or v2) are mounted. membership: the file that lists those of the process.
    """
    rooms = []
    groups = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    for _, kinds, path in (line.split(":", 2) for line in groups):
        if kinds == "":
            base, files = root, ("memory.max", "memory.current", "")
        elif kinds == "memory":
            base, files = root / kinds, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        place = Path(path.lstrip("/"))  # within a container, base may itself be the group of this name
        rooms += [_room_in_group(base / folder, *files) for folder in (place, *place.parents)]
    return min((room for room in rooms if room is not None), default=None)


def _room_in_group(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    try:
        left = int((group / limit).read_text()) - int((group / usage).read_text())
        stat = (group / "memory.stat").read_text()
    except (OSError, ValueError):  # no control group, or "max": no limit
        return None
    return max(0, left + sum(map(int, re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE))))


@contextmanager
def where_memory_ends(remedy: str) -> Iterator[None]:
    """Turn what libraries raise where memory runs out into a SelOrthoError with a remedy; also decorates functions.

    Raises:
        SelOrthoError: that, or a limit of the process leaves too little from the start.
    """
    if (room := _room_of_process()) and min(room) == 0:
        raise SelOrthoError(
            f"the limits of this process (ulimit -v, -d) leave it less than {gigabytes(_SPARE)} beside its libraries: "
            "raise them"
        )
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, remedy) from error


def free_disk(folder: Path) -> int:
    """Return the bytes free where a folder is, or would be."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def local_processes() -> int:
    """Count the processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_fits(kind: str, parts: Mapping[str, float], available: int | None, remedy: str) -> None:
    """Raise a SelOrthoError that names the parts, in bytes, if they need more than is available of a kind."""
    needed = sum(parts.values())
    if available is not None and needed > available:
        listed = ", ".join(f"{part} {gigabytes(size)}" for part, size in parts.items())
        within = " to this process (its container and ulimit count)" if "memory" in kind else ""
        raise SelOrthoError(
            f"this run cannot fit: it needs {gigabytes(needed)} of {kind} ({listed}), {gigabytes(available)} are "
            f"available{within}; {remedy}"
        )


def gigabytes(size: float) -> str:
    """Write a number of bytes."""
    return f"{size / 1e9:.2f} GB"
