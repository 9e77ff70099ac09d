"""Train a selective-orthogonality SAE on the activations of a language model, evaluate it and write its card.

selortho train --preset demo
selortho train --model google/gemma-3-1b-pt --layer 13 --dataset texts.jsonl --output_dir runs/mine
torchrun --nproc_per_node 2 scripts/train.py --preset demo --cpu
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import SelOrthoError
from ..evaluation.evaluator import Evaluation, evaluate_saes
from ..evaluation.probe_scores import add_probes, check_probes, check_widths
from ..evaluation.replacement import replace_by_variant
from ..hub.card_results import SaeReport
from ..hub.public_names import check_ids
from ..hub.push import push_run
from ..hub.report import metrics_table, report_run, summary_table
from ..hub.repository import Repository
from ..hub.run_folder import read_run, with_others
from ..process_group import leave_process_group
from ..training.arguments import HubArguments, parse_arguments
from ..training.dry_run import dry_run
from ..training.run import TrainingRun, make_accelerator
from ..training.run_folder import save_sae
from ..utils.command_line import check_launcher, launch_command, say
from ..utils.environment import hardware, library_versions
from ..utils.files import FolderLock
from ..utils.memory import peak_memory, where_memory_ends
from ..utils.progress import stages
from .advice import after_training, to_go_on, to_publish

logger = logging.getLogger("hf_selortho.train")


@where_memory_ends("lower --buffer_contexts, --d_sae, --batch_size, --lm_batch_tokens or the number of SAEs")
def main(argv: Sequence[str] | None = None) -> None:
    """Activations in; trained, evaluated and documented SAEs out."""
    started = time.time()
    check_launcher()
    command = launch_command("train", argv)
    arguments = parse_arguments(argv)
    accelerator = make_accelerator(arguments)
    is_main = accelerator.is_main_process
    check_probes(arguments.evaluation.probes)
    if arguments.run.dry_run:
        forecast = dry_run(TrainingRun(arguments, accelerator))
        leave_process_group(accelerator)
        if is_main:
            sys.stdout.write(forecast)
        return
    with ExitStack() as stack:
        if is_main:
            if arguments.hub.push_to_hub:  # to fail early
                Repository(str(arguments.hub.hub_model_id), "model", arguments.hub.hub_revision, None).check_account()
                check_ids(arguments.hub)
            stack.enter_context(FolderLock(Path(arguments.run.output_dir), "training"))
            stack.enter_context(stages())
        accelerator.wait_for_everyone()
        run = TrainingRun(arguments, accelerator)
        check_widths(arguments.evaluation.probes, *(variant.arguments.sae.d_sae for variant in run.variants))
        signal = run.train()
        leave_process_group(accelerator)
        if signal is not None:
            if is_main:
                step, latest = run.trainers[0].state.step, run.checkpoints.latest
                say(
                    f"\nstopped after step {step}; latest checkpoint: {latest or 'none'}. To go on:\n"
                    f"  {to_go_on(command)}\n"
                )
            sys.exit(128 + signal)  # as shells have it of a process that a signal has ended
        if is_main:
            save_and_report(run, command, started)
            if arguments.hub.push_to_hub:
                publish(run.output, arguments.hub)


def save_and_report(run: TrainingRun, command: str, started: float) -> None:
    """Save the SAEs, evaluate them, and write metrics, pictures and cards."""
    for variant, sae in zip(run.variants, run.saes, strict=True):
        save_sae(sae.eval(), run.output / variant.name)
    trained, device = time.time(), run.accelerator.device
    evaluations, all_layers = evaluate(run)
    info = {
        "command": command,
        "preset": run.arguments.preset,
        "versions": library_versions(),
        "hardware": hardware(device, run.accelerator.num_processes),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "training_seconds": round(trained - started, 1),
        "wall_seconds": round(time.time() - started, 1),
        "peak_memory_gb": round(peak_memory(device) / 1e9, 2),
    }
    reports = report_run(run, evaluations, info, all_layers)
    sys.stdout.write(closing_words(run, reports, info))


def evaluate(run: TrainingRun) -> tuple[list[Evaluation] | list[None], dict[str, Any]]:
    """Measure the SAEs on the held-out contexts, if there are any, and transcoders of several layers together."""
    data, batch_size = run.data, run.arguments.run.batch_size
    if not data.held_out:
        return [None] * len(run.saes), {}
    logger.info("evaluating on %d held-out contexts", len(data.held_out))
    settings, (capture, batches) = run.arguments.evaluation, data.evaluation_inputs(batch_size)
    sizes: dict[str, Any] = {"batch_size": batch_size, "ce_samples": settings.eval_ce_samples}
    evaluations = evaluate_saes(run.saes, capture, data.held_out, batches=batches, **sizes)
    if settings.probes != "none" and capture is not None:
        add_probes(evaluations, run.saes, capture, settings.probes, prepend_bos=run.arguments.sae.prepend_bos)
    if capture is None or not settings.eval_ce_samples:
        return evaluations, {}
    names = [variant.name for variant in run.variants]
    return evaluations, replace_by_variant(names, run.saes, capture, data.held_out[: settings.eval_ce_samples])


def publish(output: Path, hub: HubArguments) -> None:
    """Push a finished run to the Hub.

    Raises:
        SelOrthoError: the Hub does not let it; the run in its folder is complete.
    """
    repo_id = str(hub.hub_model_id)
    ids = {name: getattr(hub, name) for name in ("model_id", "dataset_id") if getattr(hub, name)}
    try:
        run = with_others(read_run(output), None, [])
        private, revision = hub.hub_private or None, hub.hub_revision
        pushed = push_run(run, repo_id, license=hub.hub_license, private=private, revision=revision, **ids)
    except SelOrthoError as error:
        again = to_publish(output, hub)
        raise SelOrthoError(f"{error}. The run in {output} is complete; to publish it: {again}") from error
    sys.stdout.write(f"{pushed}\n")


def closing_words(run: TrainingRun, reports: list[SaeReport], info: dict[str, Any]) -> str:
    """Say last what the metrics are, and what to type next."""
    several, output = bool(reports[0].name), run.output
    table = summary_table(reports) if several else metrics_table(reports[0].metrics)
    return (
        f"\n{table}\n\n{output}/ holds {'a folder for each SAE' if several else 'the SAE'}, with metrics, pictures and "
        f"card (README.md); {info['wall_seconds']:.0f} s, peak memory {info['peak_memory_gb']} GB\n\nNext:\n"
        f"{after_training(run, info['command'])}"
        f"{output / reports[0].name}/README.md has a snippet that goes from a sentence to features.\n"
    )
