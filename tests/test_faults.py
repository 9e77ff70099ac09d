"""Training runs as processes of their own: killed at random moments, told to stop, and resumed, over and over.

As many kills as you like:
HF_SELORTHO_KILLS=200 pytest -m slow tests/test_faults.py -k killed -o faulthandler_timeout=0
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.warm_start import WarmStart

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("HF_SELORTHO_KILLS", 5))  # one of each kind
STOPS = int(os.environ.get("HF_SELORTHO_KILLS", 2))
STEPS, EVERY = 24 * KILLS, 5  # so that there is something left to do after each kill
LAUNCHERS = {
    1: [sys.executable],
    2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
# everything that remembers something from step to step: thresholds, carried sums, a controller, schedules, spikes
SETTINGS = {
    "activation": "batchtopk", "k": 4, "selection_interval": 2, "carry_decay": 0.9, "ortho_budget": "gradient",
    "warmup_steps": 10, "decay_steps": 20, "d_sae": 64, "pair_fraction": 0.01, "batch_size": 64, "buffer_contexts": 32,
    "refresh_every": 5, "max_steps": STEPS, "checkpoint_every": EVERY, "learning_rate": 1e-3, "logging_steps": 3,
    "eval_samples": 8, "eval_ce_samples": 0, "cpu": True, "cpu_threads": 1, "dead_after_tokens": 1000,
}  # fmt: skip


@pytest.fixture
def command(tiny_lm_dir, sample_text_files, tmp_path) -> Callable[..., list[str]]:
    """`command(processes, "live" | "shards", folder)`: the command line of a run of some hundred steps in `folder`."""
    text = {"dataset": sample_text_files.jsonl, "context_length": 32}
    model = {"model": tiny_lm_dir("llama"), "lm_dtype": "float32"}

    def build(processes: int, source: str, folder: Path) -> list[str]:
        inputs = {**model, **text, "layer": 1}
        if source == "shards":
            acts = tmp_path / "acts"
            if not acts.exists():
                harvest = {**model, **text, "layers": 1, "shard_tokens": 1000, "output_dir": acts, "eval_samples": 8}
                finish(start([sys.executable, "scripts/cache_activations.py", *arguments(harvest), "--cpu"]))
            inputs = {"activations": acts, "layer": 1}
        return [*LAUNCHERS[processes], "scripts/train.py", *arguments({**inputs, **SETTINGS, "output_dir": folder})]

    return build


def arguments(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


class Run(Protocol):
    """A run of one or several processes, whose output is in a file."""

    output: Path

    def ended(self) -> bool: ...


@dataclass
class Process:
    """A command with its children, and what they say."""

    popen: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def ended(self) -> bool:
        return self.popen.poll() is not None

    def everybody(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.popen.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait(self, others: list[psutil.Process], seconds: float = 120) -> int:
        """Exit code, once it and its children are gone."""
        code = self.popen.wait(seconds)
        _, alive = psutil.wait_procs(others, timeout=seconds)
        assert not alive, self.said()[-3000:]
        return code


class WarmRun:
    """A run of processes that have imported everything before they start, as a launcher would start them."""

    def __init__(self, warm: WarmStart, command: list[str], processes: int) -> None:
        self._warm, self.output = warm, new_output()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{**group, "RANK": str(n), "LOCAL_RANK": str(n)} if processes > 1 else {} for n in range(processes)]
        given = command[command.index("scripts/train.py") + 1 :]  # without the launcher
        self.pids = [warm.start(given, self.output, rank) for rank in ranks]

    def ended(self) -> bool:
        return not any(is_alive(pid) for pid in self.pids)

    def signal(self, number: int, pids: list[int]) -> list[int]:
        """Send a signal to some of the processes, or what is left of them; the exit codes of all, once all are gone."""
        for pid in pids:
            os.kill(pid, number)  # none has been waited for: each id is still that of the process
        return [self._warm.wait(pid) for pid in self.pids]


def is_alive(pid: int) -> bool:
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


_number = 0


def new_output() -> Path:
    global _number
    _number += 1
    return Path(os.environ["HF_DATASETS_CACHE"]).parent / f"output-{_number}.txt"


def start(command: list[str], **environment: str) -> Process:
    output = new_output()
    with output.open("wb") as file:
        popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return Process(popen, output)


def finish(process: Process) -> str:
    """What it has said, once it has ended well."""
    assert process.wait(process.everybody(), 300) == 0, process.said()[-3000:]
    return process.said()


def left(folder: Path) -> dict[str, str]:
    """Hashes of what a finished run must leave the same however often it was interrupted: its SAE, its log by step, the
    history of its pairs, and the checkpoint of its last step with the optimiser, the counters, the selected pairs and
    the random numbers."""
    last = folder / "checkpoints" / f"step_{STEPS:06d}"
    files = [folder / "model.safetensors", folder / "config.json", folder / "metrics.jsonl", *last.rglob("*.*")]
    files += (folder / "pair_history").iterdir()
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def steps_logged(folder: Path) -> int:
    """The latest step in the log of a run."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    return max((int(found[1]) for line in lines if (found := re.match(rb'{"step": (\d+),', line))), default=0)


def wait_for(condition: Callable[[], bool], run: Run) -> None:
    """Return when the condition holds, or the run has ended."""
    until = time.monotonic() + 120
    while not run.ended() and not condition():
        assert time.monotonic() < until, run.output.read_text(errors="replace")[-3000:]
        time.sleep(0.001)


def wait_for_moment(kind: str, target: int, before: int, folder: Path, run: Run, generator: random.Random) -> None:
    """Wait for a moment of a kind, not before the log has come to the target step and beyond what it held before."""
    wait_for(lambda: steps_logged(folder) >= max(target, before + 1), run)
    checkpoints = folder / "checkpoints"
    complete = set(checkpoints.glob("step_*"))
    if kind == "writing":  # files are on their way to the disk
        wait_for(lambda: any(checkpoints.glob(".step_*.tmp/*")), run)
    elif kind == "written":  # the power goes right after a write
        wait_for(lambda: bool(set(checkpoints.glob("step_*")) - complete), run)
    else:
        time.sleep(generator.uniform(0, 0.15))


def all_logged_once(folder: Path) -> None:
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows)) and rows[-1] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "source"), [(1, "live"), (2, "shards")])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(processes, source, command, tmp_path) -> None:
    finish(start(command(processes, source, tmp_path / "whole")))
    expected = left(tmp_path / "whole")
    assert len(expected) > 8 + 17  # with the fewest snapshots of a long run
    folder, generator = tmp_path / "killed", random.Random(processes)
    resuming = [*command(processes, source, folder), "--resume_from_checkpoint", "auto"]
    died = []
    before_a_step = 0.0  # seconds
    with WarmStart() as warm:
        for number in range(KILLS):
            before, run = steps_logged(folder), WarmRun(warm, resuming, processes)
            kind = ("writing", "step", "written", "step", "start")[number % 5]
            target = int((number + generator.random()) / KILLS * (STEPS - 10 * EVERY))
            if kind == "start":
                time.sleep(generator.uniform(0, before_a_step))
            else:
                began = time.monotonic()
                wait_for(lambda: steps_logged(folder) > before, run)  # noqa: B023  called here and now
                before_a_step = time.monotonic() - began
                wait_for_moment(kind, target, before, folder, run, generator)
            # as a machine without power: all at once; or one of the run's processes, and the others end by themselves,
            # but for those that do not know one another yet, which a launcher ends
            alone = kind != "start" and number % 2 == 0
            died.append(run.signal(signal.SIGKILL, run.pids[-1:] if alone else run.pids))
    finish(start(resuming))
    assert all(-signal.SIGKILL in codes and 0 not in codes for codes in died), died  # none was done before
    assert left(folder) == expected
    all_logged_once(folder)
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_told_to_stop_it_does_and_ends_as_if_nothing_had_happened(command, tmp_path) -> None:
    processes, source = 2, "live"
    finish(start(command(processes, source, tmp_path / "whole")))
    folder, generator = tmp_path / "stopped", random.Random(processes)
    resuming = [*command(processes, source, folder), "--resume_from_checkpoint", "auto"]
    with WarmStart() as warm:
        for number in range(STOPS):
            before, run = steps_logged(folder), WarmRun(warm, resuming, processes)
            target = int((number + generator.random()) / STOPS * (STEPS - 10 * EVERY)) + 1
            wait_for_moment("step", target, before, folder, run, generator)
            # all of them, as a cluster does, or one, and all stop after the same step
            codes = run.signal(signal.SIGTERM, run.pids if number % 2 else run.pids[-1:])
            said = run.output.read_text(errors="replace")
            assert codes == [128 + signal.SIGTERM] * processes, said[-3000:]
            check_words_of_a_stop(said, folder, "python scripts/train.py ")
    finish(start(resuming))
    assert left(folder) == left(tmp_path / "whole")
    all_logged_once(folder)


def check_words_of_a_stop(said: str, folder: Path, command: str) -> None:
    """That they tell the step of the newest checkpoint, and how to go on."""
    found = re.search(r"stopped after step (\d+); latest checkpoint: \S+. To go on:\n  (.*)", said)
    assert found, said[-3000:]
    assert max((folder / "checkpoints").glob("step_*")).name == f"step_{int(found[1]):06d}"
    assert found[2].startswith(command) and found[2].endswith(" --resume_from_checkpoint auto")
    assert "scripts/train.py" in found[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("python -m accelerate.commands.launch --quiet --cpu --num_processes 1", signal.SIGTERM),
        ("python -m torch.distributed.run --standalone --nproc_per_node 2", signal.SIGINT),
    ],
)
def test_a_launched_run_is_told_to_stop(launcher, number, command, tmp_path) -> None:
    """The whole command line, launcher included; what it says is what one has to type."""
    folder = tmp_path / "run"
    run = command(1, "live", folder)
    process = start([sys.executable, *launcher.split()[1:], *run[run.index("scripts/train.py") :]])
    wait_for(lambda: steps_logged(folder) > 0, process)
    everybody = process.everybody()
    if number == signal.SIGINT:
        os.killpg(process.popen.pid, number)  # Ctrl-C reaches all processes of the terminal
    else:
        process.popen.terminate()
    process.wait(everybody)
    check_words_of_a_stop(process.said(), folder, launcher)


@pytest.mark.slow
def test_two_processes_agree_about_a_batch_that_is_not_finite(command, tmp_path) -> None:
    steps = ["--max_steps", "300"]  # such that the shard's turn comes
    stopping = [*command(2, "shards", tmp_path / "stopped"), *steps]
    shard = tmp_path / "acts" / "layer_1" / "00000.safetensors"  # which only the first process reads
    tensors = load_file(shard)
    tensors["activations"][:20] = torch.nan
    save_file(tensors, shard)
    manifest = tmp_path / "acts" / "manifest.json"
    content = json.loads(manifest.read_text())
    hashed = {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest(), "bytes": shard.stat().st_size}
    content["shards"][0]["files"]["layer_1/00000.safetensors"] = hashed
    manifest.write_text(json.dumps(content))

    process = start(stopping)
    assert process.wait(process.everybody(), 180) != 0
    assert "NaN or infinity in the activations on" in process.said()
    kept = sorted(path.name for path in (tmp_path / "stopped" / "debug").iterdir())
    assert len(kept) == 2 and [name[11:] for name in kept] == ["_rank_0.safetensors", "_rank_1.safetensors"]

    finish(start([*command(2, "shards", tmp_path / "skipped"), *steps, "--non_finite", "skip", "--max_skipped", "40"]))
    rows = [json.loads(line) for line in (tmp_path / "skipped" / "metrics.jsonl").read_text().splitlines()]
    for rank in (0, 1):
        kept = list((tmp_path / "skipped" / "debug").glob(f"*_rank_{rank}.safetensors"))
        assert rows[-1]["skipped_steps"] == len(kept) > 0
    assert rows[-1]["step"] == 300
