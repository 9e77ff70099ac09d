"""Training runs as processes of their own: killed, told to stop, and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 120, 5
LAUNCHERS = {
    "python": "python",
    "accelerate": "python -m accelerate.commands.launch --quiet --cpu --num_processes 1",
    "torchrun": "python -m torch.distributed.run --standalone --nproc_per_node 2",
}
# everything that remembers something from step to step: thresholds, carried sums, a controller, schedules, spikes
SETTINGS = {
    "activation": "batchtopk", "k": 4, "selection_interval": 2, "carry_decay": 0.9, "ortho_budget": "gradient",
    "warmup_steps": 10, "decay_steps": 20, "d_sae": 64, "pair_fraction": 0.01, "batch_size": 64, "buffer_contexts": 32,
    "refresh_every": 5, "max_steps": STEPS, "checkpoint_every": EVERY, "learning_rate": 1e-3, "logging_steps": 3,
    "eval_samples": 8, "eval_ce_samples": 0, "cpu": True, "cpu_threads": 1, "dead_after_tokens": 1000,
}  # fmt: skip

Command = Callable[[str, str, Path], list[str]]


@pytest.fixture(scope="module")
def command(tiny_lm_dir, sample_text_files, tmp_path_factory) -> Command:
    """`command("torchrun", "live" | "shards", folder)`: the command line of a run of some hundred steps in `folder`."""
    text = {"dataset": sample_text_files.jsonl, "context_length": 32}
    model = {"model": tiny_lm_dir("llama"), "lm_dtype": "float32"}
    acts = tmp_path_factory.mktemp("cache") / "acts"

    def build(launcher: str, source: str, folder: Path) -> list[str]:
        inputs = {**model, **text, "layer": 1}
        if source == "shards":
            if not acts.exists():
                cache = {**model, **text, "layers": 1, "shard_tokens": 1000, "output_dir": acts, "eval_samples": 8}
                finish(start([sys.executable, "scripts/cache_activations.py", *arguments(cache), "--cpu"]))
            inputs = {"activations": acts, "layer": 1}
        words = [sys.executable, *LAUNCHERS[launcher].split()[1:]]
        return [*words, "scripts/train.py", *arguments({**inputs, **SETTINGS, "output_dir": folder})]

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Callable[[str, str], dict[str, str]]:
    """`whole("python", "live")`: what a run leaves that nothing interrupts."""
    done: dict[tuple[str, str], dict[str, str]] = {}

    def train(launcher: str, source: str) -> dict[str, str]:
        if (launcher, source) not in done:
            folder = tmp_path_factory.mktemp("whole") / "run"
            finish(start(command(launcher, source, folder)))
            done[launcher, source] = left(folder)
        return done[launcher, source]

    return train


def arguments(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@dataclass
class Process:
    """A command with its children, and what they say."""

    popen: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def everybody(self) -> list[psutil.Process]:
        """The launcher first; of a training without one, it alone."""
        own = psutil.Process(self.popen.pid)
        return [own, *own.children(recursive=True)]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds, which it must before the run has ended."""
        until = time.monotonic() + 120
        while not condition():
            assert self.popen.poll() is None and time.monotonic() < until, self.said()[-3000:]
            time.sleep(0.001)

    def wait(self, others: list[psutil.Process], seconds: float = 120) -> int:
        """Exit code, once it and its children are gone."""
        code = self.popen.wait(seconds)
        _, alive = psutil.wait_procs(others, timeout=seconds)
        assert not alive, self.said()[-3000:]
        return code


_number = 0


def start(command: list[str]) -> Process:
    global _number
    _number += 1
    output = Path(os.environ["HF_DATASETS_CACHE"]).parent / f"output-{_number}.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with output.open("wb") as file:
        popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    return Process(popen, output)


def finish(process: Process) -> None:
    """Wait until it has ended well."""
    assert process.wait(process.everybody(), 300) == 0, process.said()[-3000:]


def left(folder: Path) -> dict[str, str]:
    """Hashes of what a finished run must leave the same however often it was interrupted: its SAE, its log by step, the
    history of its pairs, and the checkpoint of its last step with the optimiser, the counters, the selected pairs and
    the random numbers."""
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows)) and rows[-1] == STEPS
    assert not list((folder / "checkpoints").glob(".*"))
    files = [folder / "model.safetensors", folder / "config.json", folder / "metrics.jsonl"]
    files += [*(folder / "checkpoints" / f"step_{STEPS:06d}").iterdir(), *(folder / "pair_history").iterdir()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps_logged(folder: Path) -> int:
    """The latest step in the log of a run."""
    log = folder / "metrics.jsonl"
    steps = re.findall(rb'{"step": (\d+),', log.read_bytes()) if log.exists() else []
    return int(steps[-1]) if steps else 0


def wait_for_moment(kind: str, folder: Path, before: int, run: Process) -> None:
    """Wait for a moment of a kind: at the start of a run, or else when it has gone on for some steps."""
    if kind == "start":
        return run.wait_for(lambda: "resuming from" in run.said())
    run.wait_for(lambda: steps_logged(folder) > before + 2 * EVERY)
    checkpoints = folder / "checkpoints"
    complete = set(checkpoints.glob("step_*"))
    if kind == "writing":  # files are on their way to the disk
        run.wait_for(lambda: any(checkpoints.glob(".step_*.tmp/*")))
    elif kind == "written":  # the power goes right after a write
        run.wait_for(lambda: bool(set(checkpoints.glob("step_*")) - complete))
    else:
        time.sleep(random.uniform(0, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "source", "kinds"),
    [("python", "live", ("writing", "start")), ("torchrun", "shards", ("written", "one of two"))],
)
def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(
    launcher, source, kinds, command, whole, tmp_path
) -> None:
    folder = tmp_path / "killed"
    resuming = [*command(launcher, source, folder), "--resume_from_checkpoint", "auto"]
    for kind in kinds:
        before, run = steps_logged(folder), start(resuming)
        wait_for_moment(kind, folder, before, run)
        everybody = run.everybody()
        # as a machine without power: all at once; or one of the processes, and its launcher ends the others
        for process in everybody[-1:] if kind == "one of two" else everybody:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert run.wait(everybody) != 0
    finish(start(resuming))
    assert left(folder) == whole(launcher, source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "source", "how"),
    [("accelerate", "live", "SIGTERM"), ("torchrun", "shards", "Ctrl-C"), ("torchrun", "shards", "SIGTERM to one")],
)
def test_told_to_stop_it_does_and_ends_as_if_nothing_had_happened(
    launcher, source, how, command, whole, tmp_path
) -> None:
    folder = tmp_path / "stopped"
    run = start(command(launcher, source, folder))
    run.wait_for(lambda: steps_logged(folder) > 0)
    everybody = run.everybody()
    if how == "Ctrl-C":
        os.killpg(run.popen.pid, signal.SIGINT)  # reaches all processes of the terminal
    else:
        everybody[-1 if how == "SIGTERM to one" else 0].terminate()
    run.wait(everybody)
    found = re.search(r"stopped after step (\d+); latest checkpoint: \S+. To go on:\n  (.*)", run.said())
    assert found, run.said()[-3000:]
    assert max((folder / "checkpoints").glob("step_*")).name == f"step_{int(found[1]):06d}"
    assert found[2].startswith(f"{LAUNCHERS[launcher]} scripts/train.py ")
    assert found[2].endswith(" --resume_from_checkpoint auto")
    finish(start([*command(launcher, source, folder), "--resume_from_checkpoint", "auto"]))
    assert left(folder) == whole("python" if launcher == "accelerate" else launcher, source)


@pytest.mark.slow
def test_two_processes_agree_about_a_batch_that_is_not_finite(command, tmp_path) -> None:
    stopping = command("torchrun", "shards", tmp_path / "stopped")
    acts = tmp_path / "acts"
    shutil.copytree(stopping[stopping.index("--activations") + 1], acts)
    stopping += ["--activations", str(acts), "--max_steps", "300"]  # such that the shard's turn comes
    shard = acts / "layer_1" / "00000.safetensors"  # which only the first process reads
    tensors = load_file(shard)
    tensors["activations"][:20] = torch.nan
    save_file(tensors, shard)
    content = json.loads((acts / "manifest.json").read_text())
    hashed = {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest(), "bytes": shard.stat().st_size}
    content["shards"][0]["files"]["layer_1/00000.safetensors"] = hashed
    (acts / "manifest.json").write_text(json.dumps(content))

    process = start(stopping)
    assert process.wait(process.everybody(), 180) != 0
    assert "NaN or infinity in the activations on" in process.said()
    kept = sorted(path.name for path in (tmp_path / "stopped" / "debug").iterdir())
    assert len(kept) == 2 and [name[11:] for name in kept] == ["_rank_0.safetensors", "_rank_1.safetensors"]

    skipping = ["--output_dir", str(tmp_path / "skipped"), "--non_finite", "skip", "--max_skipped", "40"]
    finish(start([*stopping, *skipping]))
    rows = [json.loads(line) for line in (tmp_path / "skipped" / "metrics.jsonl").read_text().splitlines()]
    for rank in (0, 1):
        kept = list((tmp_path / "skipped" / "debug").glob(f"*_rank_{rank}.safetensors"))
        assert rows[-1]["skipped_steps"] == len(kept) > 0
    assert rows[-1]["step"] == 300
