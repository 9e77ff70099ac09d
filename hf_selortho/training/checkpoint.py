"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step_000100/
        manifest.json                  format, version, sha256 of every other file
        trainer.json                   step, loss, settings of the run
        process_0.safetensors, .json   of a process: its activations and place in the data, random numbers, counters
        model.safetensors, config.json, optimizer.safetensors
                                       of the SAE; where there are several, in a folder of its own for each

Nothing is pickled. A folder has its name only once all of it is on the disk.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..data.buffer import BatchSource
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.files import reason, replace_file, sha256_of, sync
from .run_folder import CHECKPOINTS, as_os_error, holds_unfinished_run, jsonable

if TYPE_CHECKING:
    from .sae_trainer import SAETrainer

logger = logging.getLogger(__name__)

FORMAT, VERSION = "hf_selortho.checkpoint", 2
MANIFEST, TRAINER = "manifest.json", "trainer.json"
_NAME = re.compile(r"step_(\d{6,12})")
_DAMAGED = "damaged_"
# Arguments that may differ between a checkpoint and the run that resumes from it: they do not change a step.
_FREE_ARGUMENTS = {
    "output_dir", "overwrite_output_dir", "report_to", "checkpoint_every", "keep_checkpoints", "resume_from_checkpoint",
    "eval_samples", "eval_ce_samples", "cpu", "cpu_threads", "dry_run", "logging_steps", "non_finite", "max_skipped",
}  # fmt: skip


class DamagedCheckpointError(SelOrthoError):
    """A checkpoint whose files are not those that were written."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted((p for p in Path(output_dir, CHECKPOINTS).glob("step_*") if _NAME.fullmatch(p.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint, by the name of its folder; -1 if it has another name."""
    match = _NAME.fullmatch(folder.resolve().name)
    return int(match[1]) if match else -1


def is_checkpoint_of(checkpoint: Path | None, output_dir: str | Path) -> bool:
    """Tell whether a checkpoint is one of the run in `output_dir`."""
    return checkpoint is not None and checkpoint.resolve().parent == Path(output_dir, CHECKPOINTS).resolve()


def agreed_checkpoint(accelerator: Accelerator, wanted: str | None, output_dir: str | Path) -> Path | None:
    """Return the checkpoint to resume from: None, the newest of the output folder ("auto"), or a given folder.

    "auto" passes over damaged checkpoints, which it names, and in a folder without any starts from the beginning. The
    main process looks, for all of them.

    Raises:
        SelOrthoError: the given folder is no checkpoint or a damaged one, or all are damaged.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process and wanted is not None:
        try:
            answer[0] = _newest_intact(Path(output_dir)) if wanted == "auto" else _given(Path(wanted), output_dir)
        except SelOrthoError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise SelOrthoError(answer[1])
    return answer[0]


def _newest_intact(output_dir: Path) -> Path | None:
    folders = list_checkpoints(output_dir)
    for folder in reversed(folders):
        try:
            verify(folder)
        except DamagedCheckpointError as error:
            logger.warning("%s", error)
            continue
        if folder != folders[-1]:
            logger.warning("going on from the checkpoint before, %s", folder)
        return folder
    if folders:
        raise SelOrthoError(
            f"all checkpoints in {output_dir / CHECKPOINTS} are damaged: restore one from a copy, or start again with "
            "--overwrite_output_dir and without --resume_from_checkpoint"
        )
    if not holds_unfinished_run(output_dir):
        raise SelOrthoError(
            f"{output_dir} holds no checkpoint to resume from (see --checkpoint_every), but a finished run or "
            "other files: choose another --output_dir"
        )
    logger.warning("%s holds no checkpoint: starting from the beginning", output_dir)
    return None


def _given(folder: Path, output_dir: str | Path) -> Path:
    existing = list_checkpoints(output_dir)
    if not (folder / MANIFEST).is_file():
        available = ", ".join(map(str, existing)) or "none"
        raise SelOrthoError(
            f"{folder} is not a checkpoint (it has no {MANIFEST}); checkpoints of this run: {available}"
        )
    verify(folder)
    if is_checkpoint_of(folder, output_dir) and existing and step_of(existing[-1]) > step_of(folder):
        raise SelOrthoError(
            f"{existing[-1]} is later than {folder}: resume with auto, move it away, or go on from the earlier one in "
            "another --output_dir"
        )
    return folder


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DamagedCheckpointError: a file is missing, added or changed; the message names it.
        SelOrthoError: it is of another version.
    """
    manifest = _read_json(folder, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(folder, MANIFEST)
    if manifest.get("version") != VERSION:
        raise SelOrthoError(
            f"checkpoint {folder} is of version {manifest.get('version')!r}, this hf_selortho reads {VERSION}: resume "
            "with the one that wrote it"
        )
    expected = manifest.get("files")
    if not isinstance(expected, dict):
        raise _damaged(folder, MANIFEST)
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    for name in sorted((paths.keys() | expected.keys()) - {MANIFEST}):
        try:
            if paths[name].is_symlink() or sha256_of(paths[name]) != expected[name]:
                raise _damaged(folder, name)
        except (KeyError, OSError) as error:
            raise _damaged(folder, name) from error


class Checkpoints:
    """Writes and reads the checkpoints of one run.

    They are written in the background while the training goes on: the weights from a copy, the activations of the
    buffer as they are, since these stay until the next refresh, which waits.

    Args:
        accelerator: of the run; every process calls [`save`], [`settle`] and [`load`] together.
        output_dir: folder of the run.
        arguments: all arguments of the run, by name; a run resumes only from a checkpoint with the same ones.
        every: steps between two checkpoints, 0 for none but the one of a run that is stopped.
        keep: newest checkpoints that are kept, beside the one with the lowest mean loss over the steps before it.
    """

    inputs: Mapping[str, Any] = {}  # what else has to be the same for the same activations; the run sets it

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, arguments: dict[str, Any], every: int = 0, keep: int = 2
    ) -> None:
        self.accelerator, self.output_dir = accelerator, output_dir
        # what `accelerate launch` was given counts too; as JSON has it, where infinity is null
        self.arguments = jsonable({**arguments, "mixed_precision": accelerator.mixed_precision})
        self.every, self.keep = every, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Any] | None = None
        self._step = 0  # of the checkpoint that is being written

    @property
    def latest(self) -> Path | None:
        """Newest complete checkpoint of the run."""
        return next(reversed(list_checkpoints(self.output_dir)), None)

    def progress(self) -> tuple[bool, bool]:
        """Tell whether this process is still writing its files, and whether it could not."""
        writing = self._writing is not None and not self._writing.done()
        return writing, self._writing is not None and not writing and self._writing.exception() is not None

    def save(self, trainers: Sequence[SAETrainer], source: BatchSource) -> None:
        """Begin to write a checkpoint of the current step; none may be on its way any more ([`settle`])."""
        assert self._writing is None
        self._step = trainers[0].state.step
        if self.accelerator.is_main_process:
            for unfinished in self._temporary.parent.glob(".step_*.tmp"):  # of runs that were killed
                shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        writing: Future[Any] = self._thread.submit(
            self._write, self._temporary, self._files(trainers, source), trainers
        )
        self._writing = writing
        source.hold(writing)

    def wait(self) -> None:
        """Wait until this process has written its files, or has failed to."""
        if self._writing is not None:
            self._writing.exception()

    def settle(self, writing: bool, failed: bool) -> None:
        """Give a checkpoint that all processes have written its name, or remove what is left of one that failed.

        Args:
            writing: whether a process is still writing. failed: whether one could not write its files.
        """
        if self._writing is None or writing:
            return
        future, self._writing = self._writing, None
        error = future.exception()
        hashes = gather_object([{} if failed else future.result()])
        if not self.accelerator.is_main_process:
            return
        try:
            if failed:
                raise error or OSError("another process could not write its files")
            self._publish({name: sha256 for part in hashes for name, sha256 in part.items()})
            self._thread.submit(self._prune)
        except OSError as problem:
            shutil.rmtree(self._temporary, ignore_errors=True)
            logger.warning(
                "the checkpoint of step %d could not be written: %s. The run goes on; its latest checkpoint: %s",
                *(self._step, reason(problem), self.latest or "none"),
            )

    def close(self) -> None:
        """Wait for what happens in the background; several processes have to [`settle`] before."""
        if self.accelerator.num_processes == 1:
            self.wait()
            self.settle(*self.progress())
        self._thread.shutdown()

    def check(self, folder: Path) -> int:
        """Return the step of a checkpoint, once its settings are known to be those of this run.

        Raises:
            SelOrthoError: it was made with other settings (names them) or another number of processes.
        """
        content, free = _read_json(folder, TRAINER), set(_FREE_ARGUMENTS)
        if not self.arguments.get("decay_steps") and not 0 < self.arguments.get("warmup_steps", 0) < 1:
            free.add("max_steps")  # else it decides the learning rate
        now = {"processes": self.accelerator.num_processes, **self.arguments}
        saved = {"processes": content["processes"], **content["arguments"]}
        if saved.get("saes") != now.get("saes"):  # then the settings of each one differ as well
            now = {"saes": now.get("saes")}
        if changes := _changes(saved, {key: value for key, value in now.items() if key not in free}):
            raise SelOrthoError(
                f"checkpoint {folder} was made with other settings ({changes}); use the same ones, or start a new run "
                "in another --output_dir"
            )
        return content["step"]

    def load_sae(self, folder: Path, name: str, expected: SelOrthoConfig) -> SelOrthoSAE:
        """Load an SAE of a checkpoint, once it is known to read the same activations as this run.

        Raises:
            SelOrthoError: it is damaged, or its language model, texts or shards are others by now (names them).
        """
        try:
            sae = SelOrthoSAE.from_pretrained(folder / name, dtype=torch.float32)
        except OSError as error:
            raise SelOrthoError(f"checkpoint {folder} is damaged ({error}); resume from an earlier one") from error
        origin = ("d_in", "lm_name", "lm_revision", "hook_name", "dataset", "dataset_revision")
        saved = {**sae.config.own_settings(), **_read_json(folder, TRAINER)["inputs"]}
        if changes := _changes(saved, {**{key: getattr(expected, key) for key in origin}, **self.inputs}):
            raise SelOrthoError(
                f"checkpoint {folder} was made on other activations ({changes}); pin the revisions, restore what was "
                "there, or start a new run in another --output_dir"
            )
        for tensor in (*sae.parameters(), *sae.buffers()):
            tensor.data = tensor.data.clone()  # out of the file, which may go
        return sae

    def load(self, folder: Path, trainers: Sequence[SAETrainer], source: BatchSource) -> None:
        """Restore optimisers, counters, batches and random numbers, once [`load_sae`] has loaded the SAEs.

        Later checkpoints of this run, which are damaged, are moved out of the way.

        Raises:
            DamagedCheckpointError: something is missing in it or does not fit.
        """
        tensors = _read_tensors(folder, f"{self._process}.safetensors")
        content = _read_json(folder, f"{self._process}.json")
        try:
            for trainer in trainers:
                optimizer = _read_tensors(folder / trainer.name, "optimizer.safetensors")
                trainer.load_state_dict(_part_of(f"sae.{trainer.name}", tensors), content["saes"][trainer.name])
                trainer.optimizer.load_tensors(optimizer)
            trainers[0].policy.skipped = content["not_finite"]
            source.load_state_dict(_part_of("source", tensors), content["source"])
            torch.set_rng_state(tensors["random.torch"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["random.cuda"])
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise DamagedCheckpointError(
                f"checkpoint {folder} does not hold what it should ({type(error).__name__}: {error}), though its "
                "hashes are right: move it away to resume from an earlier one"
            ) from error
        if self.accelerator.is_main_process and is_checkpoint_of(folder, self.output_dir):
            for later in list_checkpoints(self.output_dir):
                if step_of(later) > step_of(folder):
                    logger.warning("the damaged checkpoint is %s from now on", _set_aside(later))

    @property
    def _temporary(self) -> Path:
        return self.output_dir / CHECKPOINTS / f".step_{self._step:06d}.tmp"

    @property
    def _process(self) -> str:
        return f"process_{self.accelerator.process_index}"

    def _files(self, trainers: Sequence[SAETrainer], source: BatchSource) -> dict[str, Any]:
        """Return this process's files: tensors, none of which changes while they are written, and JSON."""
        held, place = source.state_dict()
        tensors = {f"source.{name}": tensor for name, tensor in held.items()}
        tensors["random.torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        counters: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for trainer in trainers:
            own, counters[trainer.name] = trainer.state_dict()
            tensors |= {f"sae.{trainer.name}.{name}": tensor for name, tensor in _copied(own).items()}
            if self.accelerator.is_main_process:
                prefix = f"{trainer.name}/" if trainer.name else ""
                files[f"{prefix}model.safetensors"] = _copied(trainer.sae.state_dict())
                files[f"{prefix}config.json"] = _config_of(trainer.sae)
                files[f"{prefix}optimizer.safetensors"] = _copied(trainer.optimizer.tensors())
        if self.accelerator.is_main_process:
            files[TRAINER] = self._summary(trainers)
        content = {"source": place, "saes": counters, "not_finite": trainers[0].policy.skipped}
        return {f"{self._process}.safetensors": tensors, f"{self._process}.json": content, **files}

    def _summary(self, trainers: Sequence[SAETrainer]) -> dict[str, Any]:
        losses = [trainer.log.mean_loss(self._step - max(1, self.every)) for trainer in trainers if trainer.log]
        known = [loss for loss in losses if loss is not None]
        return {
            "step": self._step,
            "loss": sum(known) / len(known) if known else None,  # by which the best one is known
            "processes": self.accelerator.num_processes,
            "inputs": dict(self.inputs),
            "arguments": {key: value for key, value in self.arguments.items() if key not in _FREE_ARGUMENTS},
        }

    def _write(self, temporary: Path, files: Mapping[str, Any], trainers: Sequence[SAETrainer]) -> dict[str, str]:
        """Write this process's files and flush them to the disk, in the background; returns their hashes.

        Raises:
            OSError: there is no room, or the folder cannot be written.
        """
        try:
            for trainer in trainers:
                if trainer.log is not None:
                    trainer.log.sync()  # its rows are as safe as the checkpoint that counts on them
            for name, content in files.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".json":
                    path.write_text(json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
                else:
                    save_file(content, path, metadata={"format": "pt"})
                sync(path)
            return {name: sha256_of(temporary / name) for name in files}
        except (OSError, SafetensorError) as error:
            for name in files:  # room for what the run writes until somebody looks
                (temporary / name).unlink(missing_ok=True)
            raise as_os_error(error) from error

    def _publish(self, hashes: Mapping[str, str]) -> None:
        temporary, folder = self._temporary, self.output_dir / CHECKPOINTS / f"step_{self._step:06d}"
        manifest = {"format": FORMAT, "version": VERSION, "files": dict(sorted(hashes.items()))}
        replace_file(temporary / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        for inner in {(temporary / name).parent for name in hashes}:
            sync(inner)
        if folder.exists():  # a damaged one of this step
            _set_aside(folder)
        temporary.rename(folder)
        sync(folder.parent)

    def _prune(self) -> None:
        """Remove all checkpoints but the newest and the best one, and damaged ones that were made up for."""
        folders = list_checkpoints(self.output_dir)
        losses = {_loss_of(folder): folder for folder in reversed(folders)}
        best = losses[min(losses)] if min(losses) < float("inf") else None
        aside = (self.output_dir / CHECKPOINTS).glob(f"{_DAMAGED}step_*")
        made_up_for = [path for path in aside if int(path.name.rpartition("_")[2]) <= step_of(folders[-1])]
        for folder in [*folders[: -self.keep], *made_up_for]:
            if folder != best:
                shutil.rmtree(folder, ignore_errors=True)


def _loss_of(folder: Path) -> float:
    """Return the mean training loss before a checkpoint; infinity if it is not known."""
    try:
        return float(_read_json(folder, TRAINER)["loss"])
    except (DamagedCheckpointError, KeyError, TypeError, ValueError):
        return float("inf")


def _set_aside(folder: Path) -> Path:
    """Take a damaged checkpoint out of the way, under a name by which it is no checkpoint any more."""
    aside = folder.with_name(f"{_DAMAGED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what is other now than it was saved."""
    return "; ".join(f"{key} {saved.get(key)!r} -> {value!r}" for key, value in now.items() if saved.get(key) != value)


def _config_of(sae: SelOrthoSAE) -> dict[str, Any]:
    """Return the content of a config.json, as `save_pretrained` would write it."""
    config = copy.deepcopy(sae.config)
    config.architectures, config.dtype = [type(sae).__name__], sae.dtype
    return json.loads(config.to_json_string())


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the memory of the machine."""
    form = torch.contiguous_format
    return {name: tensor.detach().to("cpu", copy=True, memory_format=form) for name, tensor in tensors.items()}


def _part_of(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, name) from error


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read tensors into memory of their own: none keeps the file open."""
    try:
        with safe_open(folder / name, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, name) from error


def _damaged(folder: Path, name: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {folder}: {name} is missing or damaged; resume from an earlier one")
