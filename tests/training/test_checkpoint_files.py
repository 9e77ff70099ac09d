"""Large tensors of a checkpoint lie in several files, and come back as they were."""

from pathlib import Path

import pytest
import torch
from hf_selortho.training.checkpoint_files import (
    PART_BYTES,
    TRAINER,
    WEIGHTS,
    DamagedCheckpointError,
    begin_folder,
    checkpoint_path,
    publish,
    read_tensors,
    temporary_path,
    verify,
    write_part,
)

NAME = "process_0.safetensors"


@pytest.fixture
def content():
    rows = 3 * PART_BYTES // (4 * 100) + 7
    return {
        "small": torch.arange(5),
        "activations": torch.randn(rows, 100, dtype=torch.float32),
        "half": torch.randn(rows, 2).to(torch.bfloat16),
        "order": torch.randperm(rows),
        "number": torch.tensor(3.5),
        "one_row": torch.zeros(1, PART_BYTES // 4 + 1),  # which nothing can cut
    }


@pytest.fixture
def checkpoint(tmp_path: Path, content):
    temporary = temporary_path(tmp_path, 7)
    begin_folder(temporary, [""])
    weights = {"W_dec": torch.zeros(PART_BYTES // 400 + 1, 100)}
    write_part(temporary, 0, {NAME: content, WEIGHTS: weights}, {TRAINER: {"step": 7}})
    folder = checkpoint_path(tmp_path, 7)
    publish(temporary, folder, processes=1)
    return folder


def test_large_tensors_are_cut_into_parts_and_come_back(checkpoint, content):
    names = {path.name for path in checkpoint.iterdir()}
    parts = {name for name in names if name.startswith("process_0_part_")}
    assert parts == {f"process_0_part_{number}.safetensors" for number in range(1, len(parts) + 1)}
    assert len(parts) == 5  # small, 4 of activations, with half and order in the last, number and one_row
    assert names == {NAME, WEIGHTS, TRAINER, "manifest.json", *parts}  # the weights are not cut
    verify(checkpoint)
    found = read_tensors(checkpoint, NAME)
    assert found.keys() == content.keys()
    for key, tensor in content.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize("number", [1, 5])
def test_a_part_that_is_missing_is_reported(checkpoint, number):
    (checkpoint / f"process_0_part_{number}.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError, match=f"process_0_part_{number}.safetensors is missing"):
        verify(checkpoint)


def test_a_part_too_many_is_reported(checkpoint):
    (checkpoint / "process_0_part_6.safetensors").write_bytes((checkpoint / NAME).read_bytes())
    with pytest.raises(DamagedCheckpointError, match=r"process_0_part_6.safetensors is not in manifest.json"):
        verify(checkpoint)
