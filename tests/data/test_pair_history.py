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


def test_a_selection_without_pairs(tmp_path) -> None:
    write(tmp_path).write_bytes(snapshot_bytes(120, LOWER[:0], UPPER[:0], CORRELATION[:0]))
    [snapshot] = read_pair_history(tmp_path)
    assert (snapshot.selected, len(snapshot)) == (0, 0)


def changed(metadata: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> Callable[[Path], object]:
    """Writes the file again with other tensors (None: without it) or metadata."""
    whole = {"i": LOWER.int(), "j": UPPER.int(), "correlation": CORRELATION, **tensors}
    said = {"step": "120", "selected": "3"} if metadata is None else metadata
    return lambda path: save_file({key: value for key, value in whole.items() if value is not None}, path, said)


def replaced_by_a_link(path: Path) -> None:
    outside = path.parents[2] / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), ""),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 4), ""),
    "header": (lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), ""),
    "large": (lambda path: os.truncate(path, (1 << 24) + 1), "expected a file of at most 16,777,216 bytes"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "expected a file"),
    "link": (replaced_by_a_link, "leads out of"),
    "renamed": (lambda path: path.rename(path.with_name("step_000121.safetensors")), "of step 120, not of the one"),
    "foreign": (lambda path: save_file({"W_enc": torch.ones(2, 2)}, path), ""),
    "dtype": (changed(i=LOWER), "expected a column of each of .*int32"),
    "shorter": (changed(correlation=CORRELATION[:2].clone()), "expected a column of each"),
    "no step": (changed(metadata={"selected": "3"}), "'step'"),
    "fewer": (changed(metadata={"step": "120", "selected": "2"}), "expected at most 2 pairs"),
    "negative": (
        changed(i=torch.tensor([3, -1, 1]).int()),
        "expected at most 3 pairs 0 <= i < j < 10, none twice, by falling",
    ),
    "feature": (
        changed(j=torch.tensor([9, 1, 10]).int()),
        "expected at most 3 pairs 0 <= i < j < 10, none twice, by falling",
    ),
    "nan": (
        changed(correlation=torch.tensor([-0.9, torch.nan, 0.25])),
        "expected at most 3 pairs 0 <= i < j < 10, none twice, by falling",
    ),
    "order": (
        changed(correlation=CORRELATION.flip(0)),
        "expected at most 3 pairs 0 <= i < j < 10, none twice, by falling",
    ),
    "twice": (
        changed(i=torch.tensor([3, 3, 1]).int(), j=torch.tensor([9, 9, 4]).int()),
        "expected at most 3 pairs 0 <= i < j < 10, none twice, by falling",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_snapshot_is_refused_by_name(damage, tmp_path) -> None:
    sae = tmp_path / "sae"
    sae.mkdir()
    write(sae, 7)
    make, message = DAMAGES[damage]
    make(write(sae))
    with pytest.raises(SelOrthoError, match=f"is not a valid snapshot: .*{message}") as caught:
        read_pair_history(sae, d_sae=10)
    assert f"{sae / PAIR_HISTORY}/step_0" in str(caught.value)
    assert str(caught.value).endswith("; copy it from the training's folder again, or remove it")


def test_a_file_in_place_of_the_folder(tmp_path) -> None:
    (tmp_path / PAIR_HISTORY).write_text("")
    with pytest.raises(SelOrthoError, match="pair_history cannot be read .*expected a folder of snapshots"):
        read_pair_history(tmp_path)
