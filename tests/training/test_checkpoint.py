"""Checkpoints of a trainer on its own: what is read again, what is refused, and which of them stay."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.data.buffer import ActivationBatch
from hf_selortho.language_models.capture import TokenOrigins
from hf_selortho.training.arguments import RunArguments
from hf_selortho.training.checkpoint import Checkpoints, DamagedCheckpointError, agreed_checkpoint, verify
from hf_selortho.training.sae_trainer import SAETrainer
from hf_selortho.training.trainer import Trainer

D_IN, TOKENS = 8, 64
CONFIG = SelOrthoConfig(
    d_in=D_IN, d_sae=32, activation="batchtopk", k=4, carry_decay=0.5, pair_fraction=0.05, selection_interval=1
)
SETTINGS = {"seed": 0, "max_steps": 4}


class Batches:
    """Numbered batches; the number is all that there is to keep."""

    number = 0

    def next_batch(self) -> ActivationBatch:
        self.number += 1
        rows = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(self.number))
        return ActivationBatch({0: rows}, TokenOrigins.of(*(torch.arange(TOKENS) for _ in range(4))))

    def state_dict(self):
        return {"unused": torch.arange(3)}, {"number": self.number}

    def hold(self, reader: object) -> None:
        pass

    def load_state_dict(self, tensors, rest) -> None:
        assert torch.equal(tensors["unused"], torch.arange(3))
        self.number = rest["number"]


@pytest.fixture(scope="module")
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def train(folder: Path, accelerator: Accelerator, steps: int, checkpoint: Path | None = None) -> None:
    """Two SAEs on the same batches, with a checkpoint after every second step."""
    checkpoints = Checkpoints(accelerator, folder, {**SETTINGS, "max_steps": steps}, every=2, keep=9)
    torch.manual_seed(0)
    arguments = RunArguments(max_steps=steps, checkpoint_every=2, learning_rate=1e-3, ortho_budget="gradient")
    trainers, source = [], Batches()
    for name in ("one", "two"):
        sae = SelOrthoSAE(CONFIG) if checkpoint is None else checkpoints.load_sae(checkpoint, name, CONFIG)
        trainers.append(SAETrainer(accelerator, sae, arguments, None, name))
    if checkpoint is not None:
        assert checkpoints.check(checkpoint) == 2
        checkpoints.load(checkpoint, trainers, source)
    assert Trainer(trainers, source, arguments, checkpoints).fit() is None


@pytest.fixture(scope="module")
def run(accelerator, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder, accelerator, 4)
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda c: flip(c / "one/optimizer.safetensors"), "one/optimizer.safetensors"),
    "cut": (lambda c: os.truncate(c / "process_0.safetensors", 999), "process_0.safetensors"),
    "empty": (lambda c: (c / "trainer.json").write_text(""), "trainer.json"),
    "missing": (lambda c: (c / "two/model.safetensors").unlink(), "two/model.safetensors"),
    "manifest": (lambda c: (c / "manifest.json").write_text('{"form'), "manifest.json"),
    "nested": (lambda c: (c / "manifest.json").write_text("[" * 100_000), "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(damage, accelerator, run, tmp_path, caplog) -> None:
    shutil.copytree(run, tmp_path / "run")
    before, newest = (tmp_path / "run" / "checkpoints" / f"step_00000{step}" for step in (2, 4))
    make, message = DAMAGES[damage]
    make(newest)
    with pytest.raises(
        DamagedCheckpointError, match=f"step_000004: {message} is missing or damaged; resume from an earlier one"
    ):
        verify(newest)
    assert agreed_checkpoint(accelerator, "auto", tmp_path / "run") == before
    assert f"step_000004: {message}" in caplog.text and "going on from the checkpoint before" in caplog.text
    train(tmp_path / "run", accelerator, 4, before)
    assert sorted(path.name for path in newest.parent.iterdir()) == [before.name, newest.name]
    for path in newest.rglob("*.*"):  # it ends as if nothing had happened
        assert path.read_bytes() == (run / path.relative_to(tmp_path / "run")).read_bytes(), path


def test_another_version_is_refused_in_one_line(accelerator, run, tmp_path) -> None:
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_000004"
    (newest / "manifest.json").write_text(json.dumps({"format": "hf_selortho.checkpoint", "version": 2, "files": {}}))
    with pytest.raises(
        SelOrthoError, match="is of version 2, this hf_selortho reads 3: resume with the one that wrote"
    ):
        agreed_checkpoint(accelerator, "auto", tmp_path / "run")


def test_other_settings_are_named(accelerator, run) -> None:
    folder = run / "checkpoints" / "step_000004"
    with pytest.raises(SelOrthoError, match=r"made with other settings \(seed 0 -> 1\); use the same ones"):
        Checkpoints(accelerator, run, {**SETTINGS, "seed": 1}).check(folder)
    with pytest.raises(SelOrthoError, match=r"other settings \(max_steps 4 -> 8; decay_steps None -> 2\)"):
        Checkpoints(accelerator, run, {**SETTINGS, "max_steps": 8, "decay_steps": 2}).check(folder)
    assert Checkpoints(accelerator, run, {**SETTINGS, "max_steps": 8, "cpu_threads": 3}).check(folder) == 4


def test_an_sae_of_a_checkpoint_is_loaded_as_any_other(run) -> None:
    sae = SelOrthoSAE.from_pretrained(run / "checkpoints" / "step_000002", subfolder="one")
    assert sae.config.k == 4 and all(bool(weights.isfinite().all()) for weights in sae.parameters())


def test_the_newest_and_the_best_are_kept(accelerator, tmp_path) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 1.5}
    for step, loss in losses.items():
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(json.dumps({"loss": loss}))
    (tmp_path / "checkpoints" / "damaged_step_000040").mkdir()  # made up for by now
    Checkpoints(accelerator, tmp_path, {}, keep=2)._prune()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_000020", "step_000040", "step_000050"]
