"""Train a selective-orthogonality SAE on the activations of a language model, evaluate it and write its card.

accelerate launch scripts/train.py --preset demo
accelerate launch scripts/train.py --activations acts --layers 3 8 13 --twin --output_dir runs/layers
accelerate launch scripts/train.py --model google/gemma-3-1b-pt --layer 13 --dataset texts.jsonl --output_dir runs/mine
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs, set_seed

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.buffer import ActivationStatistics
from hf_selortho.evaluation.evaluator import Evaluation, evaluate_saes
from hf_selortho.hub.model_card import Publisher
from hf_selortho.hub.push import push_run
from hf_selortho.hub.report import metrics_table, summary_table, write_report, write_summary
from hf_selortho.hub.repository import Repository, check_repo_id
from hf_selortho.hub.run_folder import read_run, with_others
from hf_selortho.hub.summary import SaeReport
from hf_selortho.training.arguments import HubArguments, RunArguments, TrainingArguments, parse_arguments, sae_config
from hf_selortho.training.checkpoint import Checkpoints, agreed_checkpoint
from hf_selortho.training.checkpoint_files import is_checkpoint_of, set_later_aside, step_of
from hf_selortho.training.data import LiveData, ShardData, TrainingData, open_store
from hf_selortho.training.dry_run import check_memory, forecast, forecast_words, in_small, refuse_what_cannot_fit
from hf_selortho.training.non_finite import NonFiniteGuard
from hf_selortho.training.pair_history import PairHistory
from hf_selortho.training.penalty import full_penalty_notice, make_controller
from hf_selortho.training.run_folder import (
    MetricsLog,
    check_output_folder,
    hardware,
    library_versions,
    prepare_output_folder,
    save_sae,
)
from hf_selortho.training.state import Controller
from hf_selortho.training.stop_signals import StopSignals
from hf_selortho.training.trainer import LAST_STEPS, Trainer, train_together
from hf_selortho.training.variants import Member, all_settings, run_members, with_inputs_of
from hf_selortho.utils.command_line import launch_command, run_script, say, start_cpu_processes, use_all_cores
from hf_selortho.utils.files import FolderLock
from hf_selortho.utils.memory import available_memory, memory_now, peak_memory
from hf_selortho.utils.process_watch import ProcessWatch, leave_process_group

logger = logging.getLogger("hf_selortho.train")


def main(argv: Sequence[str] | None = None) -> None:
    """Activations in; trained, evaluated and documented SAEs out."""
    command = launch_command("scripts/train.py", argv)  # while the process that started this one is there
    arguments = parse_arguments(argv)
    accelerator = make_accelerator(arguments)
    if arguments.run.dry_run:
        Run(arguments, accelerator).dry_run()
        leave_process_group(accelerator)
        return
    with ExitStack() as stack:
        with ProcessWatch(resume_hint(arguments.run)):
            if accelerator.is_main_process:
                check_publishing(arguments.hub)
                stack.enter_context(FolderLock(Path(arguments.run.output_dir), "training"))
            accelerator.wait_for_everyone()
            run = Run(arguments, accelerator)
            exit_code = run.train()
        leave_process_group(accelerator)
        if exit_code is not None:
            if accelerator.is_main_process:
                say(run.words_of_a_stop(command))
            sys.exit(exit_code)
        if accelerator.is_main_process:
            run.report(command)
            if arguments.hub.push_to_hub:
                publish(run.output, arguments.hub)


class Run:
    """A training run whose arguments are known to be possible.

    Raises:
        SelOrthoError: they are not; nothing has been changed.
    """

    def __init__(self, arguments: TrainingArguments, accelerator: Accelerator) -> None:
        self.started = time.time()
        self.accelerator = accelerator
        run = arguments.run
        self.checkpoint = agreed_checkpoint(accelerator, run.resume_from_checkpoint, run.output_dir)
        own = is_checkpoint_of(self.checkpoint, run.output_dir)
        self.resuming = run.resume_from_checkpoint == "auto" or own
        self.output = check_output_folder(run.output_dir, overwrite=run.overwrite_output_dir, resuming=self.resuming)
        self.store = open_store(arguments)
        self.members = run_members(arguments)
        self.arguments = with_inputs_of(self.members, arguments)
        settings = all_settings(self.arguments, self.members)
        self.checkpoints = Checkpoints(accelerator, self.output, settings, run.checkpoint_every, run.keep_checkpoints)
        self.resume_at = self.checkpoints.check(self.checkpoint) if self.checkpoint else 0
        for member in self.members:
            make_member_controller(member)

    def dry_run(self) -> None:
        """Print what the run would do, need and take."""
        dry_run(self.arguments, self.store, self.members, self.accelerator)

    def train(self) -> int | None:
        """Train to the end; the exit code if a signal has stopped it before, once a checkpoint is written."""
        accelerator, run = self.accelerator, self.arguments.run
        rank, processes = accelerator.process_index, accelerator.num_processes
        guard = NonFiniteGuard(self.output, run.non_finite, run.max_skipped, rank, processes)
        self.data = open_data(self.arguments, self.store, self.members, accelerator)
        self.data.watch(guard)
        self.checkpoints.inputs = self.data.identity()
        if self.checkpoint is not None:
            self.checkpoints.check_inputs(self.checkpoint)
        self.saes = make_saes(self.members, self.data, self.checkpoints, self.checkpoint, accelerator)

        # only now is it known that the run can start, and an earlier one may be replaced
        if accelerator.is_main_process:
            prepare_output_folder(
                self.output, overwrite=run.overwrite_output_dir, resuming=self.resuming, since=self.started
            )
            if self.resuming:
                set_later_aside(self.checkpoint)
        accelerator.wait_for_everyone()
        start_trackers(accelerator, self.arguments, self.resume_at)
        self.trainers = [
            make_trainer(member, sae, accelerator, self.output, self.resume_at, guard)
            for member, sae in zip(self.members, self.saes, strict=True)
        ]
        if self.checkpoint is not None:
            self.checkpoints.load(self.checkpoint, self.trainers, self.data.source)
        with StopSignals() as signals:
            signal = train_together(self.trainers, self.data.source, run, self.checkpoints, signals)
        self.totals = self.data.source.totals()
        self.data.source.release()
        for trainer in self.trainers:
            trainer.release()
        return None if signal is None else 128 + signal  # as shells have it of a process that a signal has ended

    def words_of_a_stop(self, command: str) -> str:
        """What a run that a signal has stopped says last."""
        step, latest = self.trainers[0].state.step, self.checkpoints.latest
        of_it = latest is not None and step_of(latest) == step
        safe = "its checkpoint is written" if of_it else f"its latest checkpoint is {latest or 'missing'}"
        return f"\nstopped after step {step}; {safe}. To go on:\n  {command} --resume_from_checkpoint auto\n"

    def report(self, command: str) -> None:
        """Write the SAEs, evaluate them, and leave everything else that a run leaves."""
        for member, sae in zip(self.members, self.saes, strict=True):
            save_sae(sae.eval(), self.output / member.name)
        trained = time.time()
        evaluations = evaluate(self.arguments, self.saes, self.data)
        device = self.accelerator.device
        info = {
            "command": command,
            "preset": self.arguments.preset,
            "versions": library_versions(),
            "hardware": hardware(device, self.accelerator.num_processes),
            "started": datetime.fromtimestamp(self.started, timezone.utc).isoformat(timespec="seconds"),
            "training_seconds": round(trained - self.started, 1),
            "wall_seconds": round(time.time() - self.started, 1),
            "peak_memory_gb": round(peak_memory(device) / 1e9, 2),
        }
        reports = self._write_reports(evaluations, info)
        sys.stdout.write(closing_words(self.output, reports, info))

    def _write_reports(self, evaluations: list[Evaluation] | list[None], run_info: dict[str, Any]) -> list[SaeReport]:
        """Write what the run has to say of each SAE, and of all of them together where there are several.

        Args:
            run_info: what run.json says besides the arguments.
        """
        reports = []
        for member, trainer, evaluation in zip(self.members, self.trainers, evaluations, strict=True):
            assert trainer.log is not None
            metrics = {
                "schema_version": 1,
                "evaluation": evaluation.metrics if evaluation else {},
                "training": {
                    **trainer.log.mean_of_last(LAST_STEPS),
                    "steps": trainer.state.step,
                    "tokens": trainer.state.tokens,
                },
                "training_start": trainer.log.mean_of_first(LAST_STEPS),
                "data": {**self.totals, "held_out_fraction": self.arguments.data.held_out_fraction},
            }
            info = {**run_info, "arguments": {**member.arguments.flat(), "output_dir": str(self.output / member.name)}}
            arrays = evaluation.arrays if evaluation else {}
            reports.append(
                write_report(self.output, member.name, trainer.sae.config, metrics, info, trainer.log.rows, arrays)
            )
        if self.members[0].name:
            write_summary(self.output, reports, {**run_info, "arguments": self.arguments.flat()})
        return reports


def check_publishing(hub: HubArguments) -> None:
    """Raise a SelOrthoError if it is plain before the training that what comes of it cannot be published."""
    if hub.push_to_hub:
        check_repo_id(str(hub.hub_model_id))
        Repository(str(hub.hub_model_id), "model", hub.hub_revision, None).check_account()


def publish(output: Path, hub: HubArguments) -> None:
    """Push the finished run.

    Raises:
        SelOrthoError: the Hub does not let it; the run in its folder is complete.
    """
    repo_id = str(hub.hub_model_id)
    try:
        run = with_others(read_run(output), None, [])
        publisher = Publisher(repo_id, hub.hub_license, saelens=True)
        private, revision = hub.hub_private or None, hub.hub_revision
        pushed = push_run(run, repo_id, publisher=publisher, private=private, revision=revision)
    except SelOrthoError as error:
        again = f"python scripts/push_to_hub.py {shlex.quote(str(output))} --repo_id {repo_id}"
        raise SelOrthoError(f"{error}. The run in {output} is complete; to publish it: {again}") from error
    sys.stdout.write(f"{pushed.in_words}\n")


def resume_hint(run: RunArguments) -> str:
    """What to do when a process of this run is lost."""
    if run.checkpoint_every:
        return "run the same command again with --resume_from_checkpoint auto"
    return "run the same command again; --checkpoint_every N would let it resume"


def open_data(
    arguments: TrainingArguments, store: ActivationCache | None, members: list[Member], accelerator: Accelerator
) -> TrainingData:
    """Batches for all SAEs of the run, from shards or from the language model."""
    layers = list(dict.fromkeys(member.layer for member in members))
    if store is not None:
        return ShardData(store, arguments, layers, accelerator)
    return LiveData(arguments, layers, accelerator)


def count_parameters(member: Member, data: TrainingData) -> int:
    """Weights of this SAE, biases left out."""
    config = sae_config(member.arguments, **data.provenance(member.layer))
    return 2 * (config.d_in or 0) * (config.d_sae or 0)


def make_member_controller(member: Member) -> Controller | None:
    """What steers the penalty of this SAE, if anything does."""
    sae = member.arguments.sae
    return make_controller(member.arguments.run, sae.penalty, sae.ortho_coefficient)


def make_saes(
    members: list[Member],
    data: TrainingData,
    checkpoints: Checkpoints | None,
    checkpoint: Path | None,
    accelerator: Accelerator,
) -> list[SelOrthoSAE]:
    """The SAEs of the run: those of the checkpoint, or fresh ones, which all start from the same random numbers."""
    configs = [sae_config(member.arguments, **data.provenance(member.layer)) for member in members]
    parameters = sum(count_parameters(member, data) for member in members)
    check_memory(members[0].arguments, data, parameters, accelerator.device)
    for config in configs:
        needed = full_penalty_notice(config, members[0].arguments.run.batch_size, available_memory(accelerator.device))
        if needed is not None and accelerator.is_main_process:
            logger.warning("%s", needed)
    if checkpoints is not None and checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
        return [
            checkpoints.load_sae(checkpoint / member.name, config)
            for member, config in zip(members, configs, strict=True)
        ]
    statistics = data.statistics(progress=accelerator.is_main_process)
    saes = []
    for member, config in zip(members, configs, strict=True):
        set_seed(member.arguments.run.seed)
        saes.append(new_sae(config, statistics[member.layer]))
    return saes


def dry_run(
    arguments: TrainingArguments, store: ActivationCache | None, members: list[Member], accelerator: Accelerator
) -> None:
    """Print what the run would do, need and take.

    Raises:
        SelOrthoError: it cannot fit.
    """
    before = memory_now(accelerator.device)
    data = open_data(in_small(arguments), store, members, accelerator)

    def make_trainers(data: TrainingData) -> list[Trainer]:
        saes = make_saes(members, data, None, None, accelerator)
        return [
            Trainer(accelerator, sae, member.arguments.run, None, make_member_controller(member), member.name)
            for member, sae in zip(members, saes, strict=True)
        ]

    def evaluate_few(saes: Sequence[SelOrthoSAE], data: TrainingData, contexts: int, ce_samples: int) -> None:
        for sae in saes:
            sae.eval()
        sizes = {"batch_size": arguments.run.batch_size, "ce_samples": ce_samples}
        batches = data.held_out_batches(arguments.run.batch_size)
        evaluate_saes(
            saes,
            data.evaluation_capture() if ce_samples or batches is None else None,
            data.held_out[:contexts],
            batches=None if batches is None else itertools.islice(batches, 2),
            progress=False,
            **sizes,
        )

    found = forecast(arguments, accelerator, data, make_trainers, evaluate_few, before)
    if accelerator.is_main_process:
        sys.stdout.write(forecast_words(found, len(members)))
    refuse_what_cannot_fit(found)


def make_trainer(
    member: Member, sae: SelOrthoSAE, accelerator: Accelerator, output: Path, resume_at: int, guard: NonFiniteGuard
) -> Trainer:
    """The trainer of one SAE; the main process keeps its log and the history of its pairs."""
    log, history, run, folder = None, None, member.arguments.run, output / member.name
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        log = MetricsLog(folder, resume_at=resume_at)
        history = PairHistory(folder, sae.config, run.max_steps, resume_at=resume_at)
    return Trainer(accelerator, sae, run, log, make_member_controller(member), member.name, guard, history)


def make_accelerator(arguments: TrainingArguments) -> Accelerator:
    """Device, mixed precision and trackers. float16 scales the loss dynamically, doubling or halving (factor 2.0)."""
    trackers = [name for name in arguments.run.report_to if name != "none"]
    try:
        accelerator = Accelerator(
            cpu=arguments.run.cpu or torch.backends.mps.is_available(),  # Apple's GPUs have no float64
            mixed_precision=arguments.run.mixed_precision,
            log_with=trackers or None,
            project_dir=str(Path(arguments.run.output_dir) / "trackers"),
            kwargs_handlers=[GradScalerKwargs(growth_factor=2.0, backoff_factor=0.5)],
        )
    except (ValueError, ImportError) as error:
        raise SelOrthoError(f"accelerate cannot start with these arguments: {error}") from error
    missing = sorted(set(trackers) - {str(tracker) for tracker in accelerator.log_with})
    if missing:
        raise SelOrthoError(
            f"--report_to {' '.join(missing)}: install the tracker with pip install {' '.join(missing)}"
        )
    if accelerator.device.type == "cpu":
        use_all_cores(arguments.run.cpu_threads)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SelOrthoError("--mixed_precision fp16 needs a GPU: use --mixed_precision bf16 or no on the CPU")
    if arguments.run.batch_size % accelerator.num_processes:
        raise SelOrthoError(
            f"--batch_size {arguments.run.batch_size} is not a multiple of the {accelerator.num_processes} processes"
        )
    return accelerator


def start_trackers(accelerator: Accelerator, arguments: TrainingArguments, resume_at: int = 0) -> None:
    """Tell the trackers of `--report_to` about the run; one that goes on from a step replaces what came after it."""
    if accelerator.log_with:
        run = arguments.run
        name = os.path.basename(os.path.abspath(run.output_dir))
        # by the same name and id, so that a resumed run is the same one there too
        identity = hashlib.sha256(os.path.abspath(run.output_dir).encode()).hexdigest()[:12]
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": resume_at + 1} if resume_at else {},
            "wandb": {"id": identity, "name": name, "resume": "allow"} if resume_at else {"id": identity, "name": name},
            "trackio": {"name": f"{name}-{identity}", "resume": "allow"},
        }
        trackers = {str(tracker) for tracker in accelerator.log_with}
        accelerator.init_trackers(
            "hf_selortho",
            config=_tracked(arguments.flat()),
            init_kwargs={key: value for key, value in options.items() if key in trackers},
        )


def new_sae(config: SelOrthoConfig, statistics: ActivationStatistics) -> SelOrthoSAE:
    """A fresh SAE with the input statistics in its buffers."""
    sae = SelOrthoSAE(SelOrthoConfig(**{**config.own_settings(), "max_norm": statistics.max_norm}))
    if config.input_normalization == "standard":
        sae.set_input_statistics(statistics.mean, statistics.scale)
    return sae


def evaluate(
    arguments: TrainingArguments, saes: list[SelOrthoSAE], data: TrainingData
) -> list[Evaluation] | list[None]:
    """Metrics on the held-out contexts, if there are any."""
    if not data.held_out:
        return [None] * len(saes)
    logger.info("evaluating on %d held-out contexts", len(data.held_out))
    return evaluate_saes(
        saes,
        data.evaluation_capture(),
        data.held_out,
        batches=data.held_out_batches(arguments.run.batch_size),
        batch_size=arguments.run.batch_size,
        ce_samples=arguments.evaluation.eval_ce_samples,
    )


def closing_words(output: Path, reports: list[SaeReport], run_info: dict[str, Any]) -> str:
    """The last lines on the screen: a table of the metrics, and what to type next."""
    several = bool(reports[0].name)
    folder = str(output / reports[0].name)
    minutes, seconds = divmod(round(run_info["wall_seconds"]), 60)
    table = summary_table(reports) if several else metrics_table(reports[0].metrics)
    holds = f"{len(reports)} SAEs, each in a folder of its own" if several else "the SAE"
    twin = (
        f"  {run_info['command']} --ortho_coefficient 0 --output_dir {shlex.quote(folder + '-twin')}\n"
        "The last one trains its twin without the penalty; "
    )
    return (
        f"\n{table}\n\n{output}/ holds {holds}, with metrics, pictures and card (README.md); "
        f"{minutes} min {seconds} s, peak memory {run_info['peak_memory_gb']} GB\n\nNext:\n"
        f'  python -c "from hf_selortho import SelOrthoSAE; print(SelOrthoSAE.from_pretrained({folder!r}).config)"\n'
        f"  python scripts/evaluate_sae.py {shlex.quote(folder)}\n"
        f"  python scripts/build_feature_index.py {shlex.quote(str(output))}\n"
        f"  python spaces_app/app.py --sae {shlex.quote(str(output))}\n{'' if several else twin}"
        f"{folder}/README.md has a snippet that goes from a sentence to features.\n"
    )


def _tracked(arguments: dict[str, Any]) -> dict[str, Any]:
    """Trackers take numbers, strings and booleans only."""
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in arguments.items()}


if __name__ == "__main__":
    start_cpu_processes()
    run_script(main)
