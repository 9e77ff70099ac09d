"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step_000100/
        trainer.json                   step, loss, settings of the run
        model.safetensors, config.json, optimizer.safetensors
                                       of the SAE; where there are several, in a folder of its own for each
        process_0.safetensors, .json   of a process: its activations and place in the data, random numbers, counters
        manifest.json                  written last: version, number of processes, sha256 of the files above;
                                       manifest_1.json, ... of the files of further processes

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
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..data.buffer import BatchSource
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.files import as_os_error, jsonable, reason, replace_file, sha256_of, sync
from .run_folder import CHECKPOINTS, MetricsLog, holds_unfinished_run
from .sae_trainer import SAETrainer

logger = logging.getLogger(__name__)

VERSION = 3
TRAINER = "trainer.json"
_NAME = re.compile(r"step_(\d{6,12})")
_DAMAGED = "damaged_"
# Arguments that may differ between a checkpoint and the run that resumes from it: they do not change a step.
_FREE_ARGUMENTS = {
    "output_dir", "overwrite_output_dir", "report_to", "checkpoint_every", "keep_checkpoints", "resume_from_checkpoint",
    "eval_samples", "eval_ce_samples", "probes", "cpu", "cpu_threads", "dry_run", "logging_steps", "non_finite",
    "max_skipped",
}  # fmt: skip


class DamagedCheckpointError(SelOrthoError):
    """A checkpoint whose files are not those that were written."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(f"checkpoint {folder}: {name} is missing or damaged; resume from an earlier one")


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
        SelOrthoError: the given folder is no checkpoint or a damaged one, or there is none that could be used.
    """
    answer: list[Any] = [None]
    if accelerator.is_main_process and wanted is not None:
        try:
            answer[0] = _newest_intact(Path(output_dir)) if wanted == "auto" else _given(Path(wanted), output_dir)
        except SelOrthoError as error:
            answer[0] = str(error)
    broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise SelOrthoError(answer[0])
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
    if folders or not holds_unfinished_run(output_dir):
        raise SelOrthoError(
            f"{output_dir} holds no intact checkpoint to resume from, and is not that of a run without any: restore "
            "one from a copy, or start again in another --output_dir, without --resume_from_checkpoint"
        )
    logger.warning("%s holds no checkpoint: starting from the beginning", output_dir)
    return None


def _given(folder: Path, output_dir: str | Path) -> Path:
    verify(folder)
    if is_checkpoint_of(folder, output_dir) and step_of(newest := list_checkpoints(output_dir)[-1]) > step_of(folder):
        raise SelOrthoError(
            f"{newest} is later than {folder}: resume with auto, move it away, or go on from the earlier one in "
            "another --output_dir"
        )
    return folder


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifests.

    Raises:
        DamagedCheckpointError: a file is missing or changed; the message names it.
        SelOrthoError: it is of another version.
    """
    rank, processes, hashes = 0, 1, dict[str, str]()
    while rank < processes:
        name = _manifest_of(rank)
        try:
            content = _read_json(folder / name)
            version, processes = content["version"], int(content.get("processes", 1))
            hashes |= content["files"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(folder, name) from error
        if version != VERSION:
            raise SelOrthoError(
                f"checkpoint {folder} is of version {version!r}, this hf_selortho reads {VERSION}: resume with the "
                "one that wrote it"
            )
        rank += 1
    for name, expected in hashes.items():
        try:
            intact = sha256_of(folder / name) == expected
        except OSError:
            intact = False
        if not intact:
            raise DamagedCheckpointError(folder, name)


class Checkpoints:
    """Writes and reads the checkpoints of one run.

    They are written in the background while the training goes on, each process its part: the weights from a copy, the
    activations of the buffer as they are, since these stay until the next refresh, which waits.

    Args:
        accelerator: of the run; every process calls [`save`], [`wait`] and [`load`] together.
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
        self._writing: Future[None] | None = None

    @property
    def latest(self) -> Path | None:
        """Newest complete checkpoint of the run."""
        return next(reversed(list_checkpoints(self.output_dir)), None)

    def save(self, trainers: Sequence[SAETrainer], source: BatchSource) -> None:
        """Begin to write a checkpoint of the current step, once the one before is done."""
        self.wait()
        self._writing = self._thread.submit(
            self._write, trainers[0].state.step, self._files(trainers, source), [trainer.log for trainer in trainers]
        )
        source.hold(self._writing)

    def wait(self) -> None:
        """Wait until no process is writing any more, and remove what a run that was killed or a full disk has left."""
        if self._writing is not None:
            self._writing.result()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for unfinished in (self.output_dir / CHECKPOINTS).glob(".step_*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """End the thread that writes, once it is done."""
        self._thread.shutdown()

    def check(self, folder: Path) -> int:
        """Return the step of a checkpoint, once its settings are known to be those of this run.

        Raises:
            SelOrthoError: it was made with other settings (names them) or another number of processes.
        """
        content, free = _read_json(folder / TRAINER), set(_FREE_ARGUMENTS)
        if not self.arguments.get("decay_steps") and not 0 < self.arguments.get("warmup_steps", 0) < 1:
            free.add("max_steps")  # else it decides the learning rate
        now = {"processes": self.accelerator.num_processes, **self.arguments}
        saved = {"processes": content["processes"], **content["arguments"]}
        if changes := _changes(saved, {key: value for key, value in now.items() if key not in free}):
            raise SelOrthoError(
                f"checkpoint {folder} was made with other settings ({changes}); use the same ones, or start a new run "
                "in another --output_dir"
            )
        return content["step"]

    def load_sae(self, folder: Path, name: str, expected: SelOrthoConfig) -> SelOrthoSAE:
        """Load an SAE of a checkpoint, once it is known to read the same activations as this run.

        Raises:
            SelOrthoError: it does not fit, or its language model, texts or shards are others by now (names them).
        """
        sae = SelOrthoSAE.from_pretrained(folder / name, dtype=torch.float32)
        origin = (
            "d_in", "d_out", "lm_name", "lm_revision", "hook_name", "hook_side", "target_hook_name",
            "target_hook_side", "dataset", "dataset_revision",
        )  # fmt: skip
        saved = {**sae.config.own_settings(), **_read_json(folder / TRAINER)["inputs"]}
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

        Later checkpoints of this run, which are damaged, are moved out of the way until there is a new one.
        """
        tensors = _read_tensors(folder / f"{self._process}.safetensors")
        content = _read_json(folder / f"{self._process}.json")
        for trainer in trainers:
            trainer.load_state_dict(_part_of(f"sae.{trainer.name}", tensors), content["saes"][trainer.name])
            trainer.optimizer.load_tensors(_read_tensors(folder / trainer.name / "optimizer.safetensors"))
        trainers[0].policy.skipped = content["not_finite"]
        source.load_state_dict(_part_of("source", tensors), content["source"])
        torch.set_rng_state(tensors["random.torch"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        if self.accelerator.is_main_process and is_checkpoint_of(folder, self.output_dir):
            for later in list_checkpoints(self.output_dir):
                if step_of(later) > step_of(folder):
                    aside = later.with_name(f"{_DAMAGED}{later.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    logger.warning("the damaged checkpoint is %s from now on", later.rename(aside))

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
        for trainer in trainers:
            state, counters[trainer.name] = trainer.state_dict()
            tensors |= {f"sae.{trainer.name}.{name}": tensor for name, tensor in _copied(state).items()}
        content = {"source": place, "saes": counters, "not_finite": trainers[0].policy.skipped}
        files: dict[str, Any] = {f"{self._process}.safetensors": tensors, f"{self._process}.json": content}
        if self.accelerator.is_main_process:
            for trainer in trainers:
                prefix = f"{trainer.name}/" if trainer.name else ""
                files[f"{prefix}model.safetensors"] = _copied(trainer.sae.state_dict())
                files[f"{prefix}config.json"] = _config_of(trainer.sae)
                files[f"{prefix}optimizer.safetensors"] = _copied(trainer.optimizer.tensors())
            files[TRAINER] = self._summary(trainers)
        return files

    def _summary(self, trainers: Sequence[SAETrainer]) -> dict[str, Any]:
        means = [trainer.log.mean_of_last(max(1, self.every)) for trainer in trainers if trainer.log is not None]
        losses = [mean["loss"] for mean in means if "loss" in mean]
        return {
            "step": trainers[0].state.step,
            "loss": sum(losses) / len(losses) if losses else None,  # by which the best one is known
            "processes": self.accelerator.num_processes,
            "inputs": dict(self.inputs),
            "arguments": {key: value for key, value in self.arguments.items() if key not in _FREE_ARGUMENTS},
        }

    def _write(self, step: int, files: Mapping[str, Any], logs: Sequence[MetricsLog | None]) -> None:
        """Write this process's files, in the background; the last of all processes to do so gives them their name."""
        folder = self.output_dir / CHECKPOINTS / f"step_{step:06d}"
        temporary = folder.with_name(f".{folder.name}.tmp")
        manifest, processes = _manifest_of(self.accelerator.process_index), self.accelerator.num_processes
        try:
            for log in logs:
                if log is not None:
                    log.sync()  # its rows are as safe as the checkpoint that counts on them
            for name, content in files.items():
                _write_file(temporary / name, content)
            for inner in {(temporary / name).parent for name in files}:
                sync(inner)
            hashes = {name: sha256_of(temporary / name) for name in sorted(files)}
            content = {"version": VERSION, "processes": processes, "files": hashes}
            with suppress(FileNotFoundError):  # another process has found all manifests, and the folder has its name
                replace_file(temporary / manifest, (json.dumps(content, indent=2) + "\n").encode())
                if all((temporary / _manifest_of(rank)).exists() for rank in range(processes)):
                    sync(temporary)
                    temporary.rename(folder)
                    sync(folder.parent)
                    self._prune()
        except (OSError, SafetensorError) as error:
            for name in (*files, manifest):  # room for what the run writes until somebody looks
                (temporary / name).unlink(missing_ok=True)
            logger.warning(
                "the checkpoint of step %d could not be written: %s. The run goes on; its latest checkpoint: %s",
                *(step, reason(as_os_error(error)), self.latest or "none"),
            )

    def _prune(self) -> None:
        """Remove all checkpoints but the newest and the best one."""
        folders = list_checkpoints(self.output_dir)
        best = min(folders, key=_loss_of)
        for folder in [*folders[: -self.keep], *best.parent.glob(f"{_DAMAGED}step_*")]:
            if folder != best:
                shutil.rmtree(folder, ignore_errors=True)


def _manifest_of(rank: int) -> str:
    return f"manifest_{rank}.json" if rank else "manifest.json"


def _write_file(path: Path, content: Any) -> None:
    """Write tensors by name, or JSON, and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    else:
        save_file(content, path, metadata={"format": "pt"})
    sync(path)


_DEFAULTS = {**SelOrthoConfig.default_settings(), "side": "output", "module": None}


def _loss_of(folder: Path) -> float:
    """Return the mean training loss before a checkpoint; infinity if it is not known."""
    try:
        return float(_read_json(folder / TRAINER)["loss"])
    except (OSError, KeyError, TypeError, ValueError):
        return float("inf")


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what is other now than it was saved."""
    known = {**_DEFAULTS, **saved}  # what there was no setting for is as by default
    return "; ".join(f"{key} {known.get(key)!r} -> {value!r}" for key, value in now.items() if known.get(key) != value)


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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors into memory of their own: none keeps the file open."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}
