"""The files of a pair history: what is written is read again, and whatever else is there is refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_selortho import SelOrthoError
from hf_selortho.data.pair_history import KEPT, PAIR_HISTORY, read_pair_history, snapshot_bytes, snapshot_name

LOWER, UPPER = torch.tensor([3, 0, 1]), torch.tensor([9, 1, 4])
CORRELATION = torch.tensor([-0.9, 0.5, 0.25])


def write(folder: Path, step: int = 120) -> Path:
    path = folder / PAIR_HISTORY / snapshot_name(step)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(snapshot_bytes(step, LOWER, UPPER, CORRELATION))
    return path


def test_snapshots_are_read_as_they_were_written(tmp_path) -> None:
    assert read_pair_history(tmp_path) == []
    for step in (1_000_000, 120, 7):
        write(tmp_path, step)
    (tmp_path / PAIR_HISTORY / ".step_000200.safetensors.tmp").write_bytes(b"cut off by a kill")
    (tmp_path / PAIR_HISTORY / "notes.txt").write_text("somebody else's")
    found = read_pair_history(str(tmp_path), d_sae=10)
    assert [(snapshot.step, snapshot.selected, len(snapshot)) for snapshot in found] == [
        (7, 3, 3), (120, 3, 3), (1_000_000, 3, 3)
    ]  # fmt: skip
    for snapshot in found:
        assert torch.equal(snapshot.i, LOWER) and torch.equal(snapshot.j, UPPER)
        assert torch.equal(snapshot.correlation, CORRELATION)


def test_the_file_is_the_documented_one_and_the_same_each_time(tmp_path) -> None:
    path = write(tmp_path)
    tensors = load_file(path)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "i": torch.int32, "j": torch.int32, "correlation": torch.float32
    }  # fmt: skip
    # safetensors writes metadata in another order from call to call
    assert {snapshot_bytes(120, LOWER, UPPER, CORRELATION) for _ in range(40)} == {path.read_bytes()}


def test_the_strongest_pairs_are_kept_and_all_counted(tmp_path) -> None:
    count = KEPT + 5
    path = write(tmp_path)
    i, correlation = torch.arange(count), torch.linspace(1, 0, count, dtype=torch.float64)
    path.write_bytes(snapshot_bytes(120, i, i + 1, correlation))
    [snapshot] = read_pair_history(tmp_path)
    assert (snapshot.selected, len(snapshot)) == (count, KEPT)
    assert torch.equal(snapshot.i, i[:KEPT]) and torch.equal(snapshot.correlation, correlation[:KEPT].float())


def changed(metadata: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> Callable[[Path], object]:
    """Writes the file again with other tensors or metadata."""
    whole = {"i": LOWER.int(), "j": UPPER.int(), "correlation": CORRELATION, **tensors}
    return lambda path: save_file(whole, path, metadata or {"step": "120", "selected": "3"})


def replaced_by_a_link(path: Path) -> None:
    outside = path.parents[2] / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


PAIRS = "expected at most 3 pairs 0 <= i < j < 10, none twice, by falling absolute correlation"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 4), ""),
    "link": (replaced_by_a_link, "leads out of"),
    "renamed": (lambda path: path.rename(path.with_name("step_000121.safetensors")), "of the step in its name"),
    "foreign": (lambda path: save_file({"W_enc": torch.ones(2, 2)}, path), ""),
    "dtype": (changed(i=LOWER), "expected the columns .*int32"),
    "shorter": (changed(correlation=CORRELATION[:2].clone()), PAIRS),
    "no step": (changed(metadata={"selected": "3"}), "'step'"),
    "fewer": (changed(metadata={"step": "120", "selected": "2"}), "expected at most 2 pairs"),
    "negative": (changed(i=torch.tensor([3, -1, 1]).int()), PAIRS),
    "feature": (changed(j=torch.tensor([9, 1, 10]).int()), PAIRS),
    "nan": (changed(correlation=torch.tensor([-0.9, torch.nan, 0.25])), PAIRS),
    "order": (changed(correlation=CORRELATION.flip(0)), PAIRS),
    "twice": (changed(i=torch.tensor([3, 3, 1]).int(), j=torch.tensor([9, 9, 4]).int()), PAIRS),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_snapshot_is_refused_by_name(damage, tmp_path) -> None:
    sae = tmp_path / "sae"
    sae.mkdir()
    write(sae, 7)
    make, message = DAMAGES[damage]
    make(write(sae))
    with pytest.raises(SelOrthoError, match=f"step_0.* is not a valid snapshot: .*{message}.*copy it from"):
        read_pair_history(sae, d_sae=10)
