"""Processes of a plan: how they share the machine, how they are started, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]
import torch
from tqdm.auto import tqdm

from hf_selortho.errors import SelOrthoError

T = TypeVar("T")


def environment_of(slot: int, threads: int) -> dict[str, str]:
    """Return the environment of the processes of a job: a GPU of its own, or a share of the cores."""
    if gpus := torch.cuda.device_count():
        return {**os.environ, "CUDA_VISIBLE_DEVICES": str(slot % gpus)}
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def side_by_side(items: Collection[T], work: Callable[[T, int], None], jobs: int, description: str) -> None:
    """Do some work on every item, so many at a time; each is told the number of its slot, 0 to jobs - 1.

    The first failure ends it: what is running is finished, nothing new is begun. Ctrl-C ends what is running too.
    """
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def in_slot(item: T) -> None:
        slot = slots.get()
        try:
            work(item, slot)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(items), desc=description) as bar:
        try:
            for done in as_completed([pool.submit(in_slot, item) for item in items]):
                done.result()
                bar.update()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                for process in psutil.Process().children():
                    process.terminate()  # a training writes a checkpoint first
            raise


def run_process(command: Sequence[str], log: Path, what: str, environment: dict[str, str] | None = None) -> None:
    """Run a Python program to its end, its words in a log.

    Raises:
        SelOrthoError: it has failed; gives its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as words:
        done = subprocess.run([sys.executable, *command], stdout=words, stderr=words, env=environment, check=False)
    if done.returncode:
        last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise SelOrthoError(
            f"{what} ended with exit code {done.returncode}: {last[-1] if last else 'no word'} (see {log}). What is "
            "done is kept: start the plan again to go on"
        )


def stop_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, its trainings with it, each after a checkpoint."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
