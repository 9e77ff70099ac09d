"""Real gloo processes that are killed, fail, stop or finish at different times; each wait here has a limit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from hf_selortho.utils.process_watch import ProcessWatch

ROOT = Path(__file__).parents[2]
MESSAGE = "has ended or cannot be reached; this one stops too: start it again"

FORKS = multiprocessing.get_context("forkserver")  # one import of torch for all processes
FORKS.set_forkserver_preload(["torch.distributed", "psutil", "pytest", "hf_selortho.utils.process_watch"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_process(rank: int, processes: int, port: int, timeout: float, what: str, folder: str) -> None:
    with Path(folder, f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    with ProcessWatch("start it\n again", interval=0.1, timeout=timeout):
        Path(folder, f"{rank}.watched").touch()
        exec(what, globals())
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path) -> Iterator[Callable[..., Run]]:
    """`run("pass", "time.sleep(1)", timeout=9)`: processes that each do one of these things while they are watched."""
    runs: list[Run] = []

    def start(*what: str, timeout: float = 30) -> Run:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        runs.append(Run(what, timeout, folder))
        return runs[-1]

    yield start
    for process in (process for started in runs for process in started.processes):
        process.kill()
        process.join(10)


class Run:
    def __init__(self, what: Sequence[str], timeout: float, folder: Path) -> None:
        port, self.folder = free_port(), folder
        self.processes = [
            FORKS.Process(target=run_process, args=(rank, len(what), port, timeout, part, str(folder)))
            for rank, part in enumerate(what)
        ]
        for process in self.processes:
            process.start()

    def wait_until_watched(self) -> None:
        paths = [self.folder / f"{rank}.watched" for rank in range(len(self.processes))]
        deadline = time.monotonic() + 60
        while not all(path.is_file() for path in paths):
            assert time.monotonic() < deadline, [self.shown(rank) for rank in range(len(paths))]
            time.sleep(0.05)

    def shown(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()

    def results(self, ranks: Iterable[int], seconds: float) -> list[tuple[int | None, str]]:
        """Exit codes of these processes, which have so much time together, and what they wrote."""
        deadline = time.monotonic() + seconds
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [(self.processes[rank].exitcode, self.shown(rank)) for rank in ranks]


@pytest.mark.parametrize(("victim", "how"), [(2, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_the_others_end_whatever_they_do(victim, how, run) -> None:
    what = ["time.sleep(300)", "dist.barrier()", "while True: sum(range(1000))"]
    started = run(*what[::-1] if victim == 0 else what, timeout=2)
    started.wait_until_watched()
    time.sleep(0.5)
    assert [process.exitcode for process in started.processes] == [None] * 3
    os.kill(started.processes[victim].pid, how)
    for code, shown in started.results([rank for rank in range(3) if rank != victim], 20):
        assert code == 1 and shown.count(MESSAGE) == 1
        # a process in a collective may show the collective's error, too
        assert len(shown.strip().splitlines()) == 1 or "Traceback" in shown


def test_a_failed_collective_says_why(run) -> None:
    started = run("dist.barrier()", "dist.barrier()", "time.sleep(300)")
    started.wait_until_watched()
    started.processes[2].kill()
    assert all(code == 1 and shown.count(MESSAGE) == 1 for code, shown in started.results([0, 1], 20))


@pytest.mark.parametrize("seconds", [(0, 1, 4), (2, 0)])
def test_they_finish_when_the_last_one_does(seconds, run) -> None:
    started = run(*(f"time.sleep({each})" for each in seconds), timeout=1)
    started.wait_until_watched()
    begun = time.monotonic()
    assert started.results(range(len(seconds)), 30) == [(0, "")] * len(seconds)
    assert max(seconds) - 1 < time.monotonic() - begun < max(seconds) + 10


def test_a_killed_process_that_was_done_is_missed_too(run) -> None:
    started = run("time.sleep(300)", "pass", "pass")
    started.wait_until_watched()
    time.sleep(0.5)
    started.processes[1].kill()
    assert all(code == 1 and MESSAGE in shown for code, shown in started.results([0, 2], 20))


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_is_shown_where_it_happened(culprit, run) -> None:
    what = ["time.sleep(0.5); raise ValueError('mine')" if rank == culprit else "dist.barrier()" for rank in range(3)]
    started = run(*what)
    [(code, shown)] = started.results([culprit], 60)
    assert code == 1 and shown.endswith("ValueError: mine\n") and MESSAGE not in shown
    others = started.results([rank for rank in range(3) if rank != culprit], 20)
    assert all(code == 1 and MESSAGE in shown and "mine" not in shown for code, shown in others)


def test_a_process_that_hangs_after_its_error_keeps_nobody(run) -> None:
    hangs = "import threading; threading.Thread(target=time.sleep, args=[300]).start(); raise ValueError('mine')"
    started = run("time.sleep(300)", hangs, timeout=1)
    [(code, shown)] = started.results([0], 60)
    assert code == 1 and f"(rank 1) {MESSAGE}" in shown
    [(code, shown)] = started.results([1], 20)
    assert code == 1 and "ValueError: mine" in shown


def test_a_stopped_run_goes_on(run) -> None:
    started = run("time.sleep(4)", "time.sleep(4)", timeout=1)
    started.wait_until_watched()
    for what in (signal.SIGSTOP, signal.SIGCONT):
        for process in started.processes:
            os.kill(process.pid, what)
        time.sleep(2)
    assert started.results([0, 1], 20) == [(0, "")] * 2


def test_strangers_are_turned_away(run) -> None:
    """A port scanner among the processes: one stranger says something else, another leaves at once."""
    with_strangers = """
accept, strangers = socket.socket.accept, []
def accept_strangers(listener):
    if not strangers:
        strangers.extend(socket.create_connection(("127.0.0.1", listener.getsockname()[1])) for _ in range(2))
        strangers[0].sendall(bytes(20))
        strangers[1].close()
    return accept(listener)
socket.socket.accept = accept_strangers
with ProcessWatch("start it again", interval=0.1, timeout=10): dist.barrier()
assert len(strangers) == 2
"""
    started = run(with_strangers, "with ProcessWatch('start it again', interval=0.1, timeout=10): dist.barrier()")
    assert started.results([0, 1], 60) == [(0, "")] * 2


def test_a_process_that_cannot_connect_says_so(run) -> None:
    lost = "os.environ['MASTER_ADDR'] = 'nowhere.invalid' if dist.get_rank() else '127.0.0.1'\n"
    started = run(*[f"{lost}with ProcessWatch('start it again', timeout=20): dist.barrier()"] * 2)
    [(code, shown)] = started.results([1], 60)
    assert code == 1 and "SelOrthoError: the processes of this run cannot connect" in shown


def test_a_single_process_has_nobody_to_watch() -> None:
    before = threading.active_count()
    watch = ProcessWatch("start it again")
    with watch:
        assert threading.active_count() == before
    watch.finish()
    with pytest.raises(ValueError, match="mine"), ProcessWatch("start it again"):
        raise ValueError("mine")


SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from accelerate import Accelerator
from hf_selortho.utils.command_line import start_cpu_processes
from hf_selortho.utils.process_watch import ProcessWatch, leave_process_group

if __name__ == "__main__":
    start_cpu_processes()
    accelerator = Accelerator(cpu=True)
    with ProcessWatch("start it again", interval=0.5, timeout=10):
        ones = accelerator.reduce(torch.ones(1)).item()
        rank = accelerator.process_index
        path = Path(sys.argv[2], f"{rank}.txt")
        path.with_suffix(".new").write_text(f"{os.getpid()} {ones:.0f} {accelerator.num_processes}")
        path.with_suffix(".new").rename(path)
        if sys.argv[1] == "hang":
            time.sleep(300)
    leave_process_group(accelerator)
"""


@pytest.fixture
def machines(tmp_path) -> Iterator[Callable[[str], list[subprocess.Popen]]]:
    """`machines("hang")`: the same on two "machines" of one process each."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}
    launched: list[subprocess.Popen] = []

    def launch(what: str) -> list[subprocess.Popen]:
        port = str(free_port())
        for rank in ("0", "1"):
            command = [
                *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
                *("--num_machines", "2", "--machine_rank", rank, "--main_process_ip", "127.0.0.1"),
                *("--main_process_port", port, str(script), what, str(tmp_path)),
            ]
            with (tmp_path / f"machine{rank}.log").open("w") as log:
                launched.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        return launched

    yield launch
    for process in launched:
        if process.poll() is None:
            for part in [*psutil.Process(process.pid).children(recursive=True), process]:
                part.kill()
            process.wait(10)


def test_two_machines(machines, tmp_path) -> None:
    assert [process.wait(90) for process in machines("go on")] == [0, 0], (tmp_path / "machine0.log").read_text()
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.txt").read_text().split()[1:] == ["2", "2"]
        assert MESSAGE not in (tmp_path / f"machine{rank}.log").read_text()


def test_the_other_machine_ends_too(machines, tmp_path) -> None:
    launched = machines("hang")
    deadline = time.monotonic() + 90
    while not all((tmp_path / f"{rank}.txt").is_file() for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(int((tmp_path / "1.txt").read_text().split()[0]), signal.SIGKILL)
    assert launched[0].wait(60) == 1
    assert f"(rank 1) {MESSAGE}" in (tmp_path / "machine0.log").read_text()
