"""What a checkpoint holds: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..data.buffer import BatchSource
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..pair_selection import CoactivationEMA, Pairs
from ..utils.files import reason
from .checkpoint_files import (
    TRAINER,
    WEIGHTS,
    DamagedCheckpointError,
    begin_folder,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    prune,
    publish,
    read_json,
    read_tensors,
    temporary_path,
    write_part,
)
from .run_folder import jsonable
from .state import TrainState

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)

# Arguments that may differ between a checkpoint and the run that resumes from it: they do not change a step.
_FREE_ARGUMENTS = {
    "output_dir", "overwrite_output_dir", "report_to", "checkpoint_every", "keep_checkpoints", "resume_from_checkpoint",
    "eval_samples", "eval_ce_samples", "cpu", "cpu_threads", "dry_run", "logging_steps", "non_finite", "max_skipped",
}  # fmt: skip


def agreed_checkpoint(accelerator: Accelerator, wanted: str | None, output_dir: str | Path) -> Path | None:
    """[`find_checkpoint`] by the main process, for all of them.

    Raises:
        SelOrthoError: as there, in every process.
    """
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = find_checkpoint(wanted, output_dir)
        except SelOrthoError as error:
            told[1] = str(error)
    broadcast_object_list(told)
    if told[1] is not None:
        raise SelOrthoError(told[1])
    return told[0]


class Checkpoints:
    """Writes and reads the checkpoints of one run.

    They are written in the background while the training goes on: the weights from a copy, the activations of the
    buffer as they are, since these stay until the next refresh, which waits. A checkpoint has its name only once all
    processes have it on the disk.

    Args:
        accelerator: of the run; every process calls [`save`], [`settle`] and [`load`] together.
        output_dir: folder of the run.
        arguments: all arguments of the run, by name; a run resumes only from a checkpoint with the same ones.
        every: steps between two checkpoints, 0 for none but the one of a run that is stopped.
        keep: newest checkpoints that are kept, beside the best one.
    """

    inputs: Mapping[str, Any] = {}  # what else has to be the same for the same activations; the run sets it

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, arguments: dict[str, Any], every: int = 0, keep: int = 2
    ) -> None:
        self.accelerator, self.output_dir = accelerator, output_dir
        # what `accelerate launch` was given counts too; as JSON has it, where infinity is null
        self.arguments = jsonable({**arguments, "mixed_precision": accelerator.mixed_precision})
        self.every, self.keep = every, keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._step = 0  # of the checkpoint that is being written

    @property
    def latest(self) -> Path | None:
        """Newest complete checkpoint of the run."""
        found = list_checkpoints(self.output_dir)
        return found[-1] if found else None

    @property
    def writing(self) -> bool:
        """Whether this process is still writing its part."""
        return self._writing is not None and not self._writing.done()

    @property
    def failed(self) -> bool:
        """Whether this process could not write its part."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def save(self, trainers: Sequence[Trainer], source: BatchSource) -> None:
        """Begin to write a checkpoint of the current step; none may be on its way any more ([`settle`])."""
        assert self._writing is None
        self._step = trainers[0].state.step
        temporary = temporary_path(self.output_dir, self._step)
        error: OSError | None = None
        if self.accelerator.is_main_process:
            try:
                begin_folder(temporary, [trainer.name for trainer in trainers])
                for trainer in trainers:
                    if trainer.log is not None:
                        trainer.log.sync()  # its rows are as safe as the checkpoint that counts on them
            except OSError as found:
                error = found
        self.accelerator.wait_for_everyone()
        if error is not None:
            self._writing = Future()
            self._writing.set_exception(error)
            return
        self._writing = self._writer.submit(write_part, temporary, self._rank, *self._content(trainers, source))
        source.hold(self._writing)

    def wait(self) -> None:
        """Wait until this process has written its part, or has failed to."""
        if self._writing is not None:
            self._writing.exception()

    def settle(self, writing: bool, failed: bool) -> None:
        """Let a checkpoint that all processes have written appear, or remove what is left of one that failed.

        Args:
            writing: whether a process is still writing. failed: whether one could not write its part.
        """
        if self._writing is None or writing:
            return
        error, self._writing = self._writing.exception(), None
        if not self.accelerator.is_main_process:
            return
        temporary = temporary_path(self.output_dir, self._step)
        if not failed:
            try:
                publish(temporary, checkpoint_path(self.output_dir, self._step), self.accelerator.num_processes)
                self._writer.submit(prune, self.output_dir, self.keep)
                return
            except (OSError, SelOrthoError) as found:
                error = found
        shutil.rmtree(temporary, ignore_errors=True)
        words = (
            reason(error) if isinstance(error, OSError) else str(error or "another process could not write its part")
        )
        logger.warning(
            "the checkpoint of step %d could not be written: %s. The run goes on; its latest checkpoint: %s",
            self._step,
            words,
            self.latest or "none",
        )

    def close(self) -> None:
        """Wait for what happens in the background."""
        self._writer.shutdown()

    def load(self, folder: Path, trainers: Sequence[Trainer], source: BatchSource) -> None:
        """Restore optimisers, counters, batches and random numbers; the SAEs have been loaded from the folder already.

        Raises:
            DamagedCheckpointError: something is missing in it or does not fit.
        """
        content = read_json(folder, TRAINER)
        name = f"process_{self._rank}"
        tensors, rest = read_tensors(folder, f"{name}.safetensors"), read_json(folder, f"{name}.json")
        try:
            for trainer in trainers:
                trainer.state.step, trainer.state.tokens = content["step"], content["tokens"]
                self._load_trainer(folder / trainer.name, trainer, content["saes"][trainer.name])
            source.load_state_dict(_part_of("source", tensors), rest["source"])
            _set_random_state(_part_of("random", tensors), rest["random"])
            trainers[0].guard.skipped = rest["not_finite"]
        except SelOrthoError:
            raise
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise DamagedCheckpointError(
                f"checkpoint {folder} does not hold what it should ({type(error).__name__}: {error}), though its "
                "hashes are right: move it away to resume from an earlier one"
            ) from error
        for trainer in trainers:
            trainer.resumed()

    def _load_trainer(self, folder: Path, trainer: Trainer, content: dict[str, Any]) -> None:
        trainer.optimizer.load_tensors(read_tensors(folder, "optimizer.safetensors"))
        _load_state(read_tensors(folder, f"state_{self._rank}.safetensors"), trainer.state, trainer.sae.config)
        if trainer.state.controller is not None:
            trainer.state.controller.load_state_dict(content["controller"])
        if trainer.scaler is not None:
            trainer.scaler.load_state_dict(content["scaler"])
        trainer.spikes.load_state_dict(content["spikes"])
        trainer.state.skipped = content["skipped"]
        if trainer.log is not None and len(trainer.log) < content["rows"]:
            logger.warning(
                "%s holds %d steps up to step %d, %d were logged: lines of it are lost",
                trainer.log.folder / "metrics.jsonl",
                len(trainer.log),
                trainer.state.step,
                content["rows"],
            )

    def load_sae(self, folder: Path, expected: SelOrthoConfig) -> SelOrthoSAE:
        """The SAE of a checkpoint, once it is known to read the same activations as this run.

        Raises:
            SelOrthoError: it is damaged, or the language model or the dataset is another one by now (names them).
        """
        try:
            sae = SelOrthoSAE.from_pretrained(folder, dtype=torch.float32)
        except OSError as error:
            raise SelOrthoError(f"checkpoint {folder} is damaged ({error}); resume from an earlier one") from error
        names = ("d_in", "lm_name", "lm_revision", "hook_name", "dataset", "dataset_revision")
        wanted = {name: getattr(expected, name) for name in names}
        if differing := _changes(sae.config.own_settings(), wanted):
            raise _other_activations(folder, differing, "pin the revisions")
        for tensor in (*sae.parameters(), *sae.buffers()):
            tensor.data = tensor.data.clone()  # out of the file, which may go
        return sae

    def check(self, folder: Path) -> int:
        """Step of a checkpoint, once its settings are known to be those of this run.

        Raises:
            SelOrthoError: it was made with other settings (names them) or another number of processes.
        """
        trainer = read_json(folder, TRAINER)
        saved = trainer["arguments"]
        free = set(_FREE_ARGUMENTS)
        if saved.get("saes") != self.arguments.get("saes"):  # then the settings of each one differ as well
            saved, free = {"saes": saved.get("saes")}, {*self.arguments} - {"saes"}
        if not self.arguments.get("decay_steps") and not 0 < self.arguments.get("warmup_steps", 0) < 1:
            free.add("max_steps")  # else it decides the learning rate
        differing = _changes(saved, {key: value for key, value in self.arguments.items() if key not in free})
        if trainer["processes"] != self.accelerator.num_processes:
            differing.append(f"processes {trainer['processes']} -> {self.accelerator.num_processes}")
        if differing:
            raise SelOrthoError(
                f"checkpoint {folder} was made with other settings ({'; '.join(differing)}); use the same ones, or "
                "start a new run in another --output_dir"
            )
        return trainer["step"]

    def check_inputs(self, folder: Path) -> None:
        """Compare the `inputs` of a checkpoint with those of the run.

        Raises:
            SelOrthoError: the texts, the shards or the language model's dtype are others by now (names them).
        """
        if differing := _changes(read_json(folder, TRAINER).get("inputs", {}), self.inputs):
            raise _other_activations(folder, differing, "restore what was there")

    @property
    def _rank(self) -> int:
        return self.accelerator.process_index

    def _content(
        self, trainers: Sequence[Trainer], source: BatchSource
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """This process's files, by name: tensors, none of which changes while they are written, and JSON."""
        held, place = source.state_dict()
        random_tensors, random_rest = _random_state()
        name = f"process_{self._rank}"
        tensors = {f"{name}.safetensors": {**_prefixed("source", held), **_prefixed("random", random_tensors)}}
        texts: dict[str, Any] = {
            f"{name}.json": {"source": place, "random": random_rest, "not_finite": trainers[0].guard.skipped}
        }
        for trainer in trainers:
            prefix = f"{trainer.name}/" if trainer.name else ""
            tensors[f"{prefix}state_{self._rank}.safetensors"] = _state_tensors(trainer.state)
            if self.accelerator.is_main_process:
                tensors[f"{prefix}{WEIGHTS}"] = _copied(trainer.sae.state_dict())
                tensors[f"{prefix}optimizer.safetensors"] = _copied(trainer.optimizer.tensors())
                texts[f"{prefix}config.json"] = _config_of(trainer.sae)
        if self.accelerator.is_main_process:
            texts[TRAINER] = self._summary(trainers)
        return tensors, texts

    def _summary(self, trainers: Sequence[Trainer]) -> dict[str, Any]:
        state = trainers[0].state
        losses = [trainer.log.mean_loss(state.step - max(1, self.every)) for trainer in trainers if trainer.log]
        known = [loss for loss in losses if loss is not None]
        return {
            "step": state.step,
            "tokens": state.tokens,
            "loss": sum(known) / len(known) if known else None,  # by which the best one is known
            "processes": self.accelerator.num_processes,
            "saes": {trainer.name: _steering(trainer) for trainer in trainers},
            "inputs": dict(self.inputs),
            "arguments": {key: value for key, value in self.arguments.items() if key not in _FREE_ARGUMENTS},
        }


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is other now than it was saved, each in words."""
    return [f"{key} {saved.get(key)!r} -> {value!r}" for key, value in now.items() if saved.get(key) != value]


def _other_activations(folder: Path, differing: Sequence[str], remedy: str) -> SelOrthoError:
    return SelOrthoError(
        f"checkpoint {folder} was made on other activations ({'; '.join(differing)}); {remedy}, or start a new run in "
        "another --output_dir"
    )


def _steering(trainer: Trainer) -> dict[str, Any]:
    """What goes with an SAE besides tensors."""
    controller, scaler = trainer.state.controller, trainer.scaler
    return {
        "controller": None if controller is None else controller.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "spikes": trainer.spikes.state_dict(),
        "skipped": trainer.state.skipped,
        "rows": 0 if trainer.log is None else len(trainer.log),
    }


def _config_of(sae: SelOrthoSAE) -> dict[str, Any]:
    """The content of a config.json, as `save_pretrained` would write it."""
    config = copy.deepcopy(sae.config)
    config.architectures, config.dtype = [type(sae).__name__], sae.dtype
    return json.loads(config.to_json_string())


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the memory of the machine."""
    return {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }


def _state_tensors(state: TrainState) -> dict[str, Tensor]:
    """Firing counters, selected pairs and carried co-activations of this process."""
    tensors = {"tokens_since_fired": state.tokens_since_fired}
    if state.pairs is not None:
        pairs = {"i": state.pairs.i, "j": state.pairs.j, "correlation": state.pairs.correlation}
        tensors |= _prefixed("pairs", pairs)
    if state.carried is not None:
        tensors |= _prefixed("carried", state.carried.state_dict())
    return _copied(tensors)


def _load_state(tensors: dict[str, Tensor], state: TrainState, config: SelOrthoConfig) -> None:
    """Take back what [`_state_tensors`] gave."""
    device = state.tokens_since_fired.device
    if tensors["tokens_since_fired"].shape != state.tokens_since_fired.shape:
        raise ValueError(f"tokens_since_fired of {len(tensors['tokens_since_fired'])} features")
    state.tokens_since_fired.copy_(tensors["tokens_since_fired"])
    moved = {key: value.to(device) for key, value in tensors.items()}
    pairs, carried = _part_of("pairs", moved), _part_of("carried", moved)
    if pairs:
        state.pairs = Pairs(pairs["i"], pairs["j"], pairs["correlation"])
    if carried:
        state.carried = CoactivationEMA.of_config(config)
        state.carried.load_state_dict(carried)


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the global random number generators of this process: tensors, and JSON-able rest."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"python": [version, list(numbers), gauss], "numpy": [name, np.asarray(keys).tolist(), *rest]}


def _set_random_state(tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
    version, numbers, gauss = rest["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *others = rest["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *others))


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def _part_of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of [`_prefixed`]."""
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
