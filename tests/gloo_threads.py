"""Threads of gloo's process groups in this process: which there are, and how to make them late. Linux only."""

from __future__ import annotations

import os
import time
from pathlib import Path

_TASKS = Path("/proc/self/task")


def gloo_threads() -> list[int]:
    """Numbers of the threads that work for a process group; elsewhere than on Linux, none are seen."""
    found = []
    for path in _TASKS.glob("*/comm"):
        try:
            found += [int(path.parent.name)] * path.read_text().startswith("pt_gloo")
        except OSError:  # it has ended meanwhile
            continue
    return found


def gloo_threads_stay(seconds: float = 10.0) -> bool:
    """Whether one of them is there for so long: Linux lists a thread for a moment after somebody has joined it."""
    until = time.monotonic() + seconds
    while gloo_threads():
        if time.monotonic() > until:
            return True
        time.sleep(0.05)
    return False


def make_them_late() -> None:
    """Let these threads have the core of the main thread, in the lowest class, when that one waits.

    They are sure to hold the tensors of the last collective when the main thread goes on after it.
    """
    core = min(os.sched_getaffinity(0))
    for path in _TASKS.iterdir():
        os.sched_setaffinity(int(path.name), {core})
    for number in gloo_threads():
        os.sched_setscheduler(number, os.SCHED_IDLE, os.sched_param(0))
