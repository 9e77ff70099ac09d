"""Caches written by processes of their own: killed at random, and over ten times as much text."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 5


@pytest.fixture
def command(tiny_lm_dir, sample_documents, tmp_path) -> Callable[..., list[str]]:
    """`command(folder, repeat, shard_tokens)`: the command line that caches the sample text, so many times over."""

    def build(folder: Path, repeat: int, shard_tokens: int) -> list[str]:
        texts = tmp_path / f"{repeat}.jsonl"
        documents = [f"{text} {number}" for number in range(repeat) for text in sample_documents]
        if not texts.exists():  # a file written anew is converted anew
            texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return [
            *(sys.executable, "scripts/cache_activations.py", "--model", str(tiny_lm_dir("llama"))),
            *("--layers", "1", "3", "--dataset", str(texts), "--shard_tokens", str(shard_tokens)),
            *("--eval_samples", "40", "--output_dir", str(folder), "--cpu", "--cpu_threads", "1"),
        ]

    return build


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it has printed, once it has ended well."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def files_of(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*.safetensors"))


@pytest.mark.slow
def test_killed_at_random_the_files_are_the_same(command, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(command(whole, repeat=7, shard_tokens=300)))
    generator = random.Random(7)
    before = 0
    for _ in range(KILLS):
        process = start(command(killed, repeat=7, shard_tokens=300))
        wanted = before + generator.randint(0, 12)  # files beyond those of the process before it
        while files_of(killed) <= wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert process.returncode == -9  # it was not done
        before = files_of(killed)
    assert (killed / ".unfinished").is_dir()
    finish(start(command(killed, repeat=7, shard_tokens=300)))
    assert contents(killed) == contents(whole)
    assert len(contents(whole)) > 10 * KILLS


@pytest.mark.slow
def test_ten_times_the_text_takes_no_more_memory(command, tmp_path) -> None:
    """What the process has allocated: the text itself is a file mapped into memory, which the kernel lets go of.

    In float32: for bfloat16, some CPUs keep a kernel for each shape of a batch, of which more text has more.
    """
    peaks, rows = [], []
    for repeat in (8, 80):
        converting = command(tmp_path / f"first{repeat}", repeat=repeat, shard_tokens=4096)
        finish(start([*converting, "--max_tokens", "4096"]))  # by `datasets`, which takes memory of its own
        caching = command(tmp_path / f"acts{repeat}", repeat=repeat, shard_tokens=4096)
        process = start([*caching, "--lm_dtype", "float32"])
        allocated = []
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            allocated.append(int(found[1]) if found else 0)  # none once it has ended
            time.sleep(0.02)
        finish(process)
        peaks.append(max(allocated))
        rows.append(json.loads((tmp_path / f"acts{repeat}" / "manifest.json").read_text())["counts"]["rows"])
    assert rows[1] > 9 * rows[0] > 100_000
    assert peaks[1] < 1.05 * peaks[0], peaks
