"""Processes of a plan: how they share the machine, how they are started, and how far all of them are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from hf_selortho.errors import SelOrthoError
from hf_selortho.utils.command_line import own_cores

_POLL = 2.0  # seconds between two looks at a process
_stopping = threading.Event()  # somebody asks for the end
T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """How trainings share the machine."""

    jobs: int = 1  # trainings side by side
    processes: int = 1  # of each training (data parallel)

    @property
    def threads(self) -> int:
        """Threads of each process on a CPU."""
        return max(1, own_cores() // (self.jobs * self.processes))

    def environment(self, slot: int) -> dict[str, str]:
        """Of the processes of a job: a GPU of its own each, if there are any."""
        gpus = torch.cuda.device_count()
        if gpus == 0:
            return {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        first = slot * self.processes
        own = [str((first + k) % gpus) for k in range(self.processes)]
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(own)}


class Progress:
    """A bar over a part of the plan, with the time left."""

    def __init__(self, total: float, what: str, unit: str) -> None:
        self._bar = tqdm(total=round(total), desc=what, unit=unit)
        self._lock = threading.Lock()

    def advance(self, done: float, words: str) -> None:
        """So many more are done."""
        with self._lock:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(done)

    def close(self) -> None:
        """The end."""
        self._bar.close()


def side_by_side(items: Iterable[T], work: Callable[[T, int], None], jobs: int) -> None:
    """Do some work on every item, so many at a time; each is told the number of its slot, 0 to jobs - 1.

    The first failure ends it: what is running is finished, nothing new is begun.
    """
    slots, failed = list(range(jobs)), threading.Event()

    def one(item: T) -> None:
        if failed.is_set():
            return
        slot = slots.pop()
        try:
            work(item, slot)
        except BaseException:
            failed.set()
            raise
        finally:
            slots.append(slot)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(one, item) for item in items]:
                done.result()
        except KeyboardInterrupt:
            _stopping.set()  # the other threads end their processes
            raise


def stop_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, its trainings with it, each after a checkpoint."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def launcher(machine: Machine) -> list[str]:
    """Return the command that starts a script as the processes of a job; SIGTERM to it reaches all of them."""
    if machine.processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(machine.processes)]


def run_process(
    command: Sequence[str],
    log: Path,
    environment: dict[str, str],
    what: str,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Run a process to its end, its words in a log; `look` is called every few seconds.

    Raises:
        SelOrthoError: it has failed; gives its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words, env=environment)
        try:
            while process.poll() is None:
                if _stopping.wait(_POLL):
                    raise KeyboardInterrupt
                look()
        except BaseException:
            process.terminate()  # a training writes a checkpoint first
            process.wait()
            raise
    look()
    if process.returncode:
        last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise SelOrthoError(
            f"{what} ended with exit code {process.returncode}: {last[-1] if last else 'no word'} (see {log}). What is "
            "done is kept: start the plan again to go on"
        )
