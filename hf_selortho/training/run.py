"""A training run: what it may do is checked, then data, SAEs and trainers are made, and trained to the end."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs, set_seed

from ..configuration_selortho import SelOrthoConfig
from ..data.pair_history import PairHistory
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..penalties import full_penalty_bytes
from ..utils.environment import on_cpu, use_all_cores
from ..utils.library_errors import one_line
from ..utils.memory import available_memory, check_fits
from ..utils.privacy import without_paths
from ..utils.progress import expect_stages
from .arguments import TrainingArguments
from .checkpoint import Checkpoints, agreed_checkpoint, is_checkpoint_of, list_checkpoints
from .data import CachedData, LiveData, TrainingData, open_store
from .non_finite import NonFinitePolicy
from .run_folder import TRACKERS, MetricsLog, holds_unfinished_run, prepare_output_folder, replaces_run
from .sae_trainer import SAETrainer
from .stage_costs import stage_costs
from .starting_point import StartingPoint
from .stop_signals import StopSignals
from .trainer import Trainer
from .variants import all_settings, make_variants

logger = logging.getLogger(__name__)

TRAINING_BYTES = 16  # a parameter, its gradient and Adam's two moments, in float32
REMEDY = "lower --buffer_contexts, --d_sae, --batch_size or the number of SAEs"


class TrainingRun:
    """A run whose arguments are known to be possible; nothing has been changed yet.

    Attributes:
        variants: the SAEs that it trains. start: what they start from, unless at random.
        data, saes, trainers: what [`train`] makes, one SAE and trainer a variant.
        totals: what was read in training, over all processes.

    Raises:
        SelOrthoError: the arguments, the output folder or the checkpoint to resume from do not allow it.
    """

    data: TrainingData
    configs: list[SelOrthoConfig]
    saes: list[SelOrthoSAE]
    trainers: list[SAETrainer]
    totals: dict[str, int]

    def __init__(self, arguments: TrainingArguments, accelerator: Accelerator) -> None:
        run, self.arguments, self.accelerator = arguments.run, arguments, accelerator
        self.checkpoint = agreed_checkpoint(accelerator, run.resume_from_checkpoint, run.output_dir)
        self.output = Path(run.output_dir)
        resuming = run.resume_from_checkpoint == "auto" or is_checkpoint_of(self.checkpoint, self.output)
        self._replaces = replaces_run(self.output, overwrite=run.overwrite_output_dir, resuming=resuming)
        if self._replaces and not run.dry_run and accelerator.is_main_process and holds_unfinished_run(self.output):
            for last in list_checkpoints(self.output)[-1:]:
                logger.warning(
                    "--overwrite_output_dir starts again, without %s of the unfinished run; to go on from there, "
                    "interrupt this one now and type --resume_from_checkpoint auto in its place",
                    last,
                )
        self.start = StartingPoint.of(arguments, self.checkpoint)
        if self.start:
            self.start.adopt(arguments)
        self.store = open_store(arguments)
        self.variants = make_variants(arguments)
        settings = all_settings(arguments, self.variants)
        self.checkpoints = Checkpoints(accelerator, self.output, settings, run.checkpoint_every, run.keep_checkpoints)
        self.resume_at = self.checkpoints.check(self.checkpoint) if self.checkpoint else 0

    def train(self) -> int | None:
        """Train to the end; returns the signal that has stopped it before, once a checkpoint is written."""
        accelerator, run = self.accelerator, self.arguments.run
        policy = NonFinitePolicy(self.output, run.non_finite, run.max_skipped)
        self.open_data(policy)
        self.checkpoints.inputs = self.data.identity
        if self.checkpoint:
            logger.info("resuming from %s", self.checkpoint)
            pairs = zip(self.variants, self.configs, strict=True)
            self.saes = [self.checkpoints.load_sae(self.checkpoint, v.name, config) for v, config in pairs]
        else:
            self.saes = self.new_saes()
        if accelerator.is_main_process:  # only now is it known that the run can start
            prepare_output_folder(self.output, replace=self._replaces)
            if self.start:
                self.start.keep(self.output, anew=self.checkpoint is None)
        accelerator.wait_for_everyone()
        start_trackers(accelerator, self.arguments, self.resume_at)
        self.trainers = self.make_trainers(self.saes, policy, logged=accelerator.is_main_process)
        if self.checkpoint:
            self.checkpoints.load(self.checkpoint, self.trainers, self.data.source)
        with StopSignals() as signals:
            signal = Trainer(self.trainers, self.data.source, run, self.checkpoints, signals).fit()
        self.totals = self.data.source.totals()
        self.data.source.release()
        for trainer in self.trainers:
            trainer.release()
        return signal

    def open_data(self, policy: NonFinitePolicy | None = None) -> TrainingData:
        """Open the activations of all SAEs and build the configurations, which depend on them.

        Raises:
            SelOrthoError: what they need does not fit in the memory.
        """
        layers = list(dict.fromkeys(variant.layer for variant in self.variants))
        if self.store is None:
            self.data = LiveData(self.arguments, layers, self.accelerator, policy)
        else:
            self.data = CachedData(self.store, self.arguments, layers, self.accelerator)
        self.configs = [variant.config(**self.data.provenance(variant.layer)) for variant in self.variants]
        if self.start:
            for config in self.configs:
                self.start.check(config)
        check_memory(self.data, self.configs, self.arguments.run.batch_size, self.accelerator.device)
        expect_stages(stage_costs(self.data, self.arguments, self.configs))
        return self.data

    def new_saes(self) -> list[SelOrthoSAE]:
        """Fill the source of batches, and make SAEs that all start from the same random numbers, or from one SAE."""
        statistics = self.data.source.statistics(progress=self.accelerator.is_main_process)
        saes = []
        for variant, config in zip(self.variants, self.configs, strict=True):
            set_seed(self.arguments.run.seed)
            config.max_norm = statistics[variant.layer].max_norm
            if self.start:
                measured = self.arguments.run.input_statistics == "measured"
                saes.append(self.start.new_sae(config, statistics[variant.layer], measured))
                continue
            saes.append(SelOrthoSAE(config))
            if config.input_normalization == "standard":
                saes[-1].set_input_statistics(statistics[variant.layer].mean, statistics[variant.layer].scale)
                if (target_mean := statistics[variant.layer].target_mean) is not None:
                    saes[-1].set_output_statistics(target_mean, statistics[variant.layer].target_scale)
        return saes

    def make_trainers(
        self, saes: list[SelOrthoSAE], policy: NonFinitePolicy | None = None, logged: bool = False
    ) -> list[SAETrainer]:
        """Make the trainers of the SAEs; each has a log and a history of its pairs if it is `logged`."""
        run, trainers = self.arguments.run, []
        for variant, sae in zip(self.variants, saes, strict=True):
            log, history, folder = None, None, self.output / variant.name
            if logged:
                folder.mkdir(exist_ok=True)
                log = MetricsLog(folder, resume_at=self.resume_at)
                history = PairHistory(folder, sae.config, run.max_steps, resume_at=self.resume_at)
            trainers.append(SAETrainer(self.accelerator, sae, run, log, variant.name, policy, history))
        return trainers


def check_memory(data: TrainingData, configs: Sequence[SelOrthoConfig], batch: int, device: torch.device) -> None:
    """Refuse, before anything large is allocated, a run whose activations, SAEs and matrices alone cannot fit."""
    weights = sum(((config.d_in or 0) + config.width_out) * (config.d_sae or 0) for config in configs)
    held = {"activations held": data.source.memory_bytes()}
    needed = {"SAE weights, gradients, Adam": TRAINING_BYTES * weights}
    if full := [full_penalty_bytes(config.d_sae or 0, batch) for config in configs if config.penalty == "full"]:
        needed["d_sae x d_sae matrices of --penalty full"] = max(full)
    if data.source_device.type == device.type:
        needed |= held
    else:
        check_fits("the machine's memory", held, available_memory(data.source_device), "lower --buffer_contexts")
    check_fits("memory", needed, available_memory(device), REMEDY)


def make_accelerator(arguments: TrainingArguments) -> Accelerator:
    """Choose device, mixed precision and trackers.

    Raises:
        SelOrthoError: they are not to be had, or the processes cannot share a batch.
    """
    run = arguments.run
    trackers = [name for name in run.report_to if name != "none"]
    try:
        accelerator = Accelerator(
            cpu=on_cpu(run.cpu),
            mixed_precision=run.mixed_precision,
            log_with=trackers or None,
            project_dir=str(Path(run.output_dir) / TRACKERS),
            kwargs_handlers=[GradScalerKwargs(growth_factor=2.0, backoff_factor=0.5)],  # of float16's dynamic scale
        )
    except (ValueError, ImportError) as error:
        raise SelOrthoError(f"accelerate cannot start with these arguments: {one_line(error)}") from error
    if missing := " ".join(sorted(set(trackers) - {str(tracker) for tracker in accelerator.log_with})):
        raise SelOrthoError(f"--report_to {missing}: install the tracker with pip install {missing}")
    if accelerator.device.type == "cpu":
        use_all_cores(run.cpu_threads)
        if accelerator.mixed_precision == "fp16":
            raise SelOrthoError("--mixed_precision fp16 needs a GPU: use --mixed_precision bf16 or no on the CPU")
    if run.batch_size % accelerator.num_processes:
        raise SelOrthoError(
            f"--batch_size {run.batch_size} is not a multiple of the {accelerator.num_processes} processes"
        )
    return accelerator


def start_trackers(accelerator: Accelerator, arguments: TrainingArguments, resume_at: int) -> None:
    """Tell the trackers of `--report_to` about the run; one that goes on from a step replaces what came after it."""
    output = os.path.abspath(arguments.run.output_dir)
    name = os.path.basename(output)
    settings = without_paths(arguments.flat())  # they may go to a server
    identity = hashlib.sha256(output.encode()).hexdigest()[:12]  # by which a resumed run is the same one there too
    accelerator.init_trackers(
        "hf_selortho",
        config={k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()},
        init_kwargs={
            "tensorboard": {"purge_step": resume_at + 1 if resume_at else None},
            "wandb": {"id": identity, "name": name, "resume": "allow" if resume_at else None},
            "trackio": {"name": f"{name}-{identity}", "resume": "allow"},
        },
    )
