"""Train a selective-orthogonality SAE on the activations of a language model, evaluate it and write its card.

accelerate launch scripts/train.py --preset demo
accelerate launch scripts/train.py --model google/gemma-3-1b-pt --layer 13 --dataset texts.jsonl --output_dir runs/mine
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs, set_seed

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.activations.buffer import ActivationBuffer, ActivationStatistics
from hf_selortho.activations.capture import ActivationCapture
from hf_selortho.activations.lm import LanguageModel, check_context_length, load_language_model
from hf_selortho.activations.texts import Documents, TextSource, open_documents
from hf_selortho.activations.tokens import Context, ContextStream, held_out_contexts
from hf_selortho.command_line import run_script, start_cpu_processes, use_all_cores
from hf_selortho.evaluation.evaluator import Evaluation, evaluate_sae
from hf_selortho.hub.report import metrics_table, write_report
from hf_selortho.training.arguments import TrainingArguments, parse_arguments, sae_config
from hf_selortho.training.checkpoint import Checkpoints, find_checkpoint, is_checkpoint_of
from hf_selortho.training.loop import LAST_STEPS, Trainer
from hf_selortho.training.outputs import (
    METRICS_LOG,
    MetricsLog,
    available_memory,
    check_output_folder,
    hardware,
    library_versions,
    peak_memory_gb,
    prepare_output_folder,
)
from hf_selortho.training.penalty import full_penalty_notice, make_controller

logger = logging.getLogger("hf_selortho.train")


def main(argv: Sequence[str] | None = None) -> None:
    """Text in; trained, evaluated and documented SAE out."""
    started = time.time()
    arguments = parse_arguments(argv)
    run = arguments.run
    accelerator = make_accelerator(arguments)
    checkpoint = find_checkpoint(run.resume_from_checkpoint, run.output_dir)
    resuming = run.resume_from_checkpoint == "auto" or is_checkpoint_of(checkpoint, run.output_dir)
    output = check_output_folder(run.output_dir, overwrite=run.overwrite_output_dir, resuming=resuming)
    checkpoints = Checkpoints(accelerator, output, arguments.flat(), keep=run.keep_checkpoints)
    resume_at = checkpoints.check(checkpoint) if checkpoint else 0
    controller = make_controller(run, arguments.sae.penalty, arguments.sae.ortho_coefficient)
    set_seed(run.seed)

    documents = load_documents(arguments)
    lm = load_lm(arguments, accelerator)
    capture = ActivationCapture(lm, arguments.sae.layer, batch_tokens=arguments.model.lm_batch_tokens)
    held_out = find_held_out(arguments, lm, documents) if accelerator.is_main_process else []
    buffer = make_buffer(arguments, accelerator, capture, documents)
    config = make_config(arguments, capture, documents)
    needed = full_penalty_notice(config, run.batch_size, available_memory(accelerator.device))
    if needed is not None and accelerator.is_main_process:
        logger.warning("%s", needed)
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
        sae = checkpoints.load_sae(checkpoint, config)
    else:
        sae = new_sae(config, buffer.fill(progress=accelerator.is_main_process))

    # only now is it known that the run can start, and an earlier one may be replaced
    if accelerator.is_main_process:
        prepare_output_folder(output, overwrite=run.overwrite_output_dir, resuming=resuming)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, arguments)
    log = MetricsLog(output / METRICS_LOG, resume_at=resume_at) if accelerator.is_main_process else None
    trainer = Trainer(accelerator, sae, buffer, run, log, checkpoints, controller)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    state = trainer.train()
    data = buffer.totals()
    accelerator.end_training()
    if log is None:
        return
    sae.eval().save_pretrained(output)
    trained = time.time()
    evaluation = evaluate(arguments, sae, capture, held_out)
    metrics = {
        "schema_version": 1,
        "evaluation": evaluation.metrics if evaluation else {},
        "training": {**log.mean_of_last(LAST_STEPS), "steps": state.step, "tokens": state.tokens},
        "data": {**data, "held_out_fraction": arguments.data.held_out_fraction},
    }
    run_info = {
        "command": shlex.join(["accelerate", "launch", "scripts/train.py", *(sys.argv[1:] if argv is None else argv)]),
        "preset": arguments.preset,
        "arguments": arguments.flat(),
        "versions": library_versions(),
        "hardware": hardware(accelerator.device, accelerator.num_processes),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "training_seconds": round(trained - started, 1),
        "wall_seconds": round(time.time() - started, 1),
        "peak_memory_gb": round(peak_memory_gb(accelerator.device), 2),
    }
    write_report(output, sae.config, metrics, run_info, log.rows, evaluation.arrays if evaluation else {})
    sys.stdout.write(closing_words(output, metrics, run_info))


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
        use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), arguments.run.cpu_threads)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SelOrthoError("--mixed_precision fp16 needs a GPU: use --mixed_precision bf16 or no on the CPU")
    if arguments.run.batch_size % accelerator.num_processes:
        raise SelOrthoError(
            f"--batch_size {arguments.run.batch_size} is not a multiple of the {accelerator.num_processes} processes"
        )
    return accelerator


def start_trackers(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """Tell the trackers of `--report_to` about the run."""
    if accelerator.log_with:
        accelerator.init_trackers("hf_selortho", config=_tracked(arguments.flat()))


def load_documents(arguments: TrainingArguments) -> Documents:
    """The text, with its held-out documents."""
    data = arguments.data
    return open_documents(
        TextSource(
            dataset=data.dataset,
            config_name=data.dataset_config,
            split=data.split,
            text_column=data.text_column,
            revision=data.dataset_revision,
            streaming=data.streaming,
            held_out_fraction=data.held_out_fraction,
        )
    )


def load_lm(arguments: TrainingArguments, accelerator: Accelerator) -> LanguageModel:
    """The frozen language model on this process's device; one process a machine downloads or converts it first."""
    model = arguments.model
    assert model.model is not None
    with accelerator.local_main_process_first():
        return load_language_model(model.model, model.model_revision, dtype=model.lm_dtype, device=accelerator.device)


def make_buffer(
    arguments: TrainingArguments, accelerator: Accelerator, capture: ActivationCapture, documents: Documents
) -> ActivationBuffer:
    """This process's part of the buffer, over documents that no other process reads."""
    data, run, processes, rank = arguments.data, arguments.run, accelerator.num_processes, accelerator.process_index
    check_context_length(capture.lm, arguments.sae.context_length)
    stream = ContextStream(
        documents,
        capture.lm.tokenizer,
        context_length=arguments.sae.context_length,
        prepend_bos=arguments.sae.prepend_bos,
        seed=run.seed,
        rank=rank,
        world_size=processes,
        min_tokens=data.min_tokens,
    )
    return ActivationBuffer(
        capture,
        stream,
        contexts=-(-data.buffer_contexts // processes),
        context_length=arguments.sae.context_length,
        batch_size=run.batch_size // processes,
        refresh_every=data.refresh_every,
        reuse=data.buffer_reuse,
        max_norm_ratio=arguments.sae.max_norm_ratio,
        seed=run.seed * processes + rank,
    )


def make_config(arguments: TrainingArguments, capture: ActivationCapture, documents: Documents) -> SelOrthoConfig:
    """The SAE's settings, and where its activations come from."""
    return sae_config(
        arguments,
        d_in=capture.lm.d_model,
        lm_name=capture.lm.name,
        lm_revision=capture.lm.revision,
        hook_name=capture.hook_name,
        dataset=documents.name,
        dataset_revision=documents.revision,
        dataset_split=documents.split,
        dataset_config=arguments.data.dataset_config,
        text_column=arguments.data.text_column,
        min_tokens=arguments.data.min_tokens,
        held_out_fraction=arguments.data.held_out_fraction,
    )


def new_sae(config: SelOrthoConfig, statistics: ActivationStatistics) -> SelOrthoSAE:
    """A fresh SAE with the input statistics in its buffers."""
    sae = SelOrthoSAE(SelOrthoConfig(**{**config.own_settings(), "max_norm": statistics.max_norm}))
    if config.input_normalization == "standard":
        sae.set_input_statistics(statistics.mean, statistics.scale)
    return sae


def find_held_out(arguments: TrainingArguments, lm: LanguageModel, documents: Documents) -> list[Context]:
    """Contexts to evaluate on, of documents that training never sees; found before the training to fail early."""
    samples = arguments.evaluation.eval_samples
    if samples == 0 or arguments.data.held_out_fraction == 0:
        return []
    return held_out_contexts(
        documents,
        lm.tokenizer,
        limit=samples,
        context_length=arguments.sae.context_length,
        prepend_bos=arguments.sae.prepend_bos,
        min_tokens=arguments.data.min_tokens,
    )


def evaluate(
    arguments: TrainingArguments, sae: SelOrthoSAE, capture: ActivationCapture, contexts: list[Context]
) -> Evaluation | None:
    """Metrics on the held-out contexts, if there are any."""
    if not contexts:
        return None
    logger.info("evaluating on %d held-out contexts", len(contexts))
    return evaluate_sae(
        sae,
        capture,
        contexts,
        batch_size=arguments.run.batch_size,
        ce_samples=arguments.evaluation.eval_ce_samples,
    )


def closing_words(output: Path, metrics: dict[str, Any], run_info: dict[str, Any]) -> str:
    """The last lines on the screen: a table of the metrics, and what to type next."""
    folder = str(output)
    minutes, seconds = divmod(round(run_info["wall_seconds"]), 60)
    return (
        f"\n{metrics_table(metrics)}\n\n{output}/ holds the SAE, its metrics, pictures and card (README.md); "
        f"{minutes} min {seconds} s, peak memory {run_info['peak_memory_gb']} GB\n\nNext:\n"
        f'  python -c "from hf_selortho import SelOrthoSAE; print(SelOrthoSAE.from_pretrained({folder!r}).config)"\n'
        f"  python scripts/evaluate_sae.py {shlex.quote(folder)}\n"
        f"  {run_info['command']} --ortho_coefficient 0 --output_dir {shlex.quote(folder + '-twin')}\n"
        f"The last one trains its twin without the penalty; {folder}/README.md has a snippet that goes from a sentence "
        "to features.\n"
    )


def _tracked(arguments: dict[str, Any]) -> dict[str, Any]:
    """Trackers take numbers, strings and booleans only."""
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in arguments.items()}


if __name__ == "__main__":
    start_cpu_processes()
    run_script(main)
