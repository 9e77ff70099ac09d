"""When a training leaves a snapshot of its pairs, and what becomes of those that are there when it starts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from hf_selortho import SelOrthoConfig, SelOrthoError
from hf_selortho.data.pair_history import MOST, PAIR_HISTORY, PairHistory, read_pair_history
from hf_selortho.pair_selection import Pairs


def config(interval: int = 1, penalty: str = "selective") -> SelOrthoConfig:
    return SelOrthoConfig(d_in=8, d_sae=4096, selection_interval=interval, penalty=penalty)


def pairs(step: int, count: int = 3) -> Pairs:
    i = torch.arange(count)
    return Pairs(i, i + step, torch.linspace(-1, -0.25, count))


def train(folder: Path, max_steps: int, interval: int, *, first: int = 1, until: int | None = None) -> None:
    """What a training from a step on does with its selections."""
    history = PairHistory(folder, config(interval), max_steps, resume_at=first - 1)
    for step in range(first, (until or max_steps) + 1):
        if (step - 1) % interval == 0:
            history.add(step, pairs(step))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / PAIR_HISTORY).iterdir()}


def steps(folder: Path) -> list[int]:
    return [snapshot.step for snapshot in read_pair_history(folder)]


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("max_steps", [1, 33, 1000, 122_070])
def test_the_grid_is_even_holds_the_last_selection_and_has_few_steps(max_steps, interval, tmp_path) -> None:
    history = PairHistory(tmp_path, config(interval), max_steps)
    selections = range(1, max_steps + 1, interval)
    due = [step for step in range(1, max_steps + 1) if history.is_due(step)]
    assert min(len(selections), MOST // 2) <= len(due) <= MOST + 1
    assert set(due) <= set(selections) and due[0] == 1 and due[-1] == selections[-1]
    assert len({after - before for before, after in zip(due, due[1:-1], strict=False)}) <= 1
    assert due == list(selections) or len(selections) > MOST


@pytest.mark.parametrize("first_end", [500, 70])
def test_resumed_it_leaves_the_same_bytes_also_if_it_was_to_end_earlier(first_end, tmp_path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    whole.mkdir(), run.mkdir()
    train(whole, 500, 3)
    train(run, first_end, 3, until=min(first_end, 431))
    (run / PAIR_HISTORY / ".step_000433.safetensors.tmp").write_bytes(b"killed")
    (run / PAIR_HISTORY / "step_000444.safetensors").write_bytes(b"of steps that are taken again")
    train(run, 500, 3, first=62, until=300)
    train(run, 500, 3, first=202)
    assert contents(run) == contents(whole)


def test_what_was_there_goes_at_a_new_start_but_for_what_others_put_there(tmp_path) -> None:
    train(tmp_path, 40, 2)
    PairHistory(tmp_path, config(penalty="none"), 40)
    assert not (tmp_path / PAIR_HISTORY).exists()
    train(tmp_path, 40, 2)
    (tmp_path / PAIR_HISTORY / "notes.txt").write_text("mine")
    PairHistory(tmp_path, config(), 40)
    assert list(contents(tmp_path)) == ["notes.txt"]


def test_a_snapshot_waits_for_room_and_is_whole_or_not_there(small_disks) -> None:
    disk = small_disks("256k")
    if not disk.mounted:
        pytest.skip("no file system may be mounted here")
    history, filler = PairHistory(disk.folder, config(), 20), disk.folder / "filler"
    history.add(1, pairs(1, count=4000))
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 1000)
    with pytest.raises(SelOrthoError, match="cannot write .*step_000002.safetensors: the disk is full; make room"):
        history.add(2, pairs(2, count=4000))
    assert list(contents(disk.folder)) == ["step_000001.safetensors"]
    threading.Timer(1.5, filler.unlink).start()
    history.add(3, pairs(3, count=4000))
    assert steps(disk.folder) == [1, 3]
