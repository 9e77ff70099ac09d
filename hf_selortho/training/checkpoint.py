"""Checkpoints: safetensors and JSON in a folder that appears under its name only when it is complete."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..activations.buffer import BatchSource
from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..pair_selection import Pairs
from .outputs import CHECKPOINTS, holds_unfinished_run, write_json
from .state import TrainState, new_carried

if TYPE_CHECKING:
    from .loop import Trainer

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)")
# Arguments that may differ between a checkpoint and the run that resumes from it: they do not change a step.
_FREE_ARGUMENTS = {
    "output_dir", "overwrite_output_dir", "report_to", "logging_steps", "checkpoint_every",
    "keep_checkpoints", "resume_from_checkpoint", "eval_samples", "eval_ce_samples", "cpu", "cpu_threads",
}  # fmt: skip


def find_checkpoint(wanted: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from: None, the newest complete one of the output folder ("auto"), or a given folder.

    "auto" in a folder without a checkpoint starts from the beginning.

    Raises:
        SelOrthoError: the given folder is not a checkpoint.
    """
    if wanted is None:
        return None
    if wanted == "auto":
        found = list_checkpoints(Path(output_dir))
        if found:
            return found[-1]
        if not holds_unfinished_run(Path(output_dir)):
            raise SelOrthoError(
                f"{output_dir} holds no checkpoint to resume from (see --checkpoint_every), but a finished run or "
                "other files: choose another --output_dir"
            )
        logger.warning("%s holds no checkpoint: starting from the beginning", output_dir)
        return None
    folder = Path(wanted)
    if not (folder / "trainer.json").is_file():
        available = ", ".join(str(path) for path in list_checkpoints(Path(output_dir))) or "none"
        raise SelOrthoError(
            f"{folder} is not a checkpoint (it has no trainer.json); checkpoints of this run: {available}"
        )
    later = [path for path in list_checkpoints(Path(output_dir)) if _is_later(path, folder)]
    if later:
        raise SelOrthoError(
            f"{later[-1]} is later than {folder}: resume from it, or go on from the earlier one in another --output_dir"
        )
    return folder


def is_checkpoint_of(checkpoint: Path | None, output_dir: str | Path) -> bool:
    """Whether a checkpoint is one of the run in `output_dir`."""
    return checkpoint is not None and checkpoint.resolve().parent == (Path(output_dir) / CHECKPOINTS).resolve()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path for path in (output_dir / CHECKPOINTS).glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=_step_of)


class Checkpoints:
    """Writes and reads the checkpoints of one run.

    Args:
        accelerator: of the run; every process calls [`save`] and [`load`] together.
        output_dir: folder of the run.
        arguments: all arguments of the run, by name; a run resumes only from a checkpoint with the same ones.
        keep: newest checkpoints that are kept.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, arguments: dict[str, Any], keep: int = 2) -> None:
        self.accelerator = accelerator
        self.output_dir = output_dir
        # what `accelerate launch` was given counts too
        self.arguments = {**arguments, "mixed_precision": accelerator.mixed_precision}
        self.keep = keep

    @property
    def latest(self) -> Path | None:
        """Newest complete checkpoint of the run."""
        found = list_checkpoints(self.output_dir)
        return found[-1] if found else None

    def save(self, trainers: Sequence[Trainer], source: BatchSource) -> Path:
        """Write a checkpoint of the current step; its folder gets its name when all processes have written."""
        step = trainers[0].state.step
        folder = self.output_dir / CHECKPOINTS / f"step_{step:06d}"
        temporary = folder.with_name(f".{folder.name}.tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            for trainer in trainers:
                (temporary / trainer.name).mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        tensors, rest = source.state_dict()
        _save_tensors(tensors, temporary / f"buffer_{self._rank}.safetensors")
        write_json(temporary / f"buffer_{self._rank}.json", rest)
        for trainer in trainers:
            _save_tensors(_state_tensors(trainer.state), temporary / trainer.name / f"state_{self._rank}.safetensors")
        if self.accelerator.is_main_process:
            for trainer in trainers:
                trainer.sae.save_pretrained(temporary / trainer.name)
                _save_tensors(trainer.optimizer.tensors(), temporary / trainer.name / "optimizer.safetensors")
            write_json(temporary / "trainer.json", self._summary(trainers))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            for old in list_checkpoints(self.output_dir)[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return folder

    def load(self, folder: Path, trainers: Sequence[Trainer], source: BatchSource) -> None:
        """Restore optimisers, counters and batches; the SAEs themselves have been loaded from the folder already."""
        content = self._read(folder / "trainer.json")
        try:
            for trainer in trainers:
                trainer.optimizer.load_tensors(load_file(folder / trainer.name / "optimizer.safetensors"))
                tensors = load_file(folder / trainer.name / f"state_{self._rank}.safetensors")
                _load_state(tensors, trainer.state, trainer.sae.config)
                controller = content["controllers"][trainer.name]
                if trainer.state.controller is not None and controller:
                    trainer.state.controller.load_state_dict(controller)
                if trainer.scaler is not None and content["scalers"][trainer.name]:
                    trainer.scaler.load_state_dict(content["scalers"][trainer.name])
            tensors = load_file(folder / f"buffer_{self._rank}.safetensors")
            source.load_state_dict(tensors, self._read(folder / f"buffer_{self._rank}.json"))
        except (SafetensorError, OSError, KeyError) as error:
            raise SelOrthoError(f"checkpoint {folder} is damaged ({error}); resume from an earlier one") from error
        for trainer in trainers:
            trainer.state.step, trainer.state.tokens = content["step"], content["tokens"]
            trainer.resumed()

    def load_sae(self, folder: Path, expected: SelOrthoConfig) -> SelOrthoSAE:
        """The SAE of a checkpoint, once it is known to read the same activations as this run.

        Raises:
            SelOrthoError: it is damaged, or the language model or the dataset is another one by now (names them).
        """
        try:
            sae = SelOrthoSAE.from_pretrained(folder, dtype=torch.float32)
        except OSError as error:
            raise SelOrthoError(f"checkpoint {folder} is damaged ({error}); resume from an earlier one") from error
        differing = [
            f"{name} {getattr(sae.config, name)!r} -> {getattr(expected, name)!r}"
            for name in ("d_in", "lm_name", "lm_revision", "hook_name", "dataset", "dataset_revision")
            if getattr(sae.config, name) != getattr(expected, name)
        ]
        if differing:
            raise SelOrthoError(
                f"checkpoint {folder} was made on other activations ({'; '.join(differing)}); pin the revisions, or "
                "start a new run in another --output_dir"
            )
        return sae

    def check(self, folder: Path) -> int:
        """Step of a checkpoint, once its settings are known to be those of this run.

        Raises:
            SelOrthoError: it was made with other settings (names them) or another number of processes.
        """
        trainer = self._read(folder / "trainer.json")
        saved = trainer["arguments"]
        free = set(_FREE_ARGUMENTS)
        if saved.get("saes") != self.arguments.get("saes"):  # then the settings of each one differ as well
            saved, free = {"saes": saved.get("saes")}, {*self.arguments} - {"saes"}
        if not self.arguments.get("decay_steps") and not 0 < self.arguments.get("warmup_steps", 0) < 1:
            free.add("max_steps")  # else it decides the learning rate
        differing = [
            f"{key} {saved.get(key)!r} -> {value!r}"
            for key, value in self.arguments.items()
            if key not in free and saved.get(key) != value
        ]
        if trainer["processes"] != self.accelerator.num_processes:
            differing.append(f"processes {trainer['processes']} -> {self.accelerator.num_processes}")
        if differing:
            raise SelOrthoError(
                f"checkpoint {folder} was made with other settings ({'; '.join(differing)}); use the same ones, or "
                "start a new run in another --output_dir"
            )
        return trainer["step"]

    @property
    def _rank(self) -> int:
        return self.accelerator.process_index

    def _summary(self, trainers: Sequence[Trainer]) -> dict[str, Any]:
        state = trainers[0].state
        controllers = {trainer.name: trainer.state.controller for trainer in trainers}
        return {
            "step": state.step,
            "tokens": state.tokens,
            "processes": self.accelerator.num_processes,
            "scalers": {t.name: None if t.scaler is None else t.scaler.state_dict() for t in trainers},
            "controllers": {name: None if c is None else c.state_dict() for name, c in controllers.items()},
            "arguments": self.arguments,
        }

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SelOrthoError(
                f"checkpoint {path.parent} is damaged: {path.name}: {error}; resume from an earlier one"
            ) from error


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def _state_tensors(state: TrainState) -> dict[str, Tensor]:
    """Firing counters, selected pairs and carried co-activations of this process."""
    tensors = {"tokens_since_fired": state.tokens_since_fired.cpu()}
    if state.pairs is not None:
        pairs = {"i": state.pairs.i, "j": state.pairs.j, "correlation": state.pairs.correlation}
        tensors |= {f"pairs.{name}": value.cpu() for name, value in pairs.items()}
    if state.carried is not None:
        tensors |= {f"carried.{name}": value.cpu() for name, value in state.carried.state_dict().items()}
    return tensors


def _load_state(tensors: dict[str, Tensor], state: TrainState, config: SelOrthoConfig) -> None:
    """Take back what [`_state_tensors`] gave."""
    device = state.tokens_since_fired.device
    state.tokens_since_fired.copy_(tensors["tokens_since_fired"])
    pairs, carried = (
        {key: tensors[f"{name}.{key}"].to(device) for key in _keys_of(name, tensors)} for name in ("pairs", "carried")
    )
    if pairs:
        state.pairs = Pairs(pairs["i"], pairs["j"], pairs["correlation"])
    if carried:
        state.carried = new_carried(config)
        state.carried.load_state_dict(carried)


def _keys_of(name: str, tensors: Iterable[str]) -> list[str]:
    prefix = f"{name}."
    return [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]


def _is_later(path: Path, other: Path) -> bool:
    """Whether a checkpoint comes after another one of the same run."""
    return path.parent.resolve() == other.resolve().parent and _step_of(path) > _step_of(other.resolve())


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match.group(1))
