"""Cache the activations of a language model once, as verified shards on disk, to train on them many times.

selortho cache --model gemma-3-270m --layers 3 8 13 --dataset texts.jsonl --output_dir acts
torchrun --nproc_per_node 2 scripts/cache_activations.py --preset gemma2-2b-l12 --output_dir acts

Interrupted, it goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ..data.cache_folder import CacheFolder, check_disk
from ..data.cache_manifest import CacheSettings, Manifest
from ..data.cache_report import report_table
from ..data.cache_writer import CacheWriter, disk_bytes, forecast, shard_memory
from ..data.contexts import ContextStream, Cutter, count_tokens, estimate_tokens, held_out_contexts
from ..data.texts import open_documents
from ..errors import SelOrthoError
from ..hub.dataset_card import render_shards_card
from ..language_models.capture import ActivationCapture
from ..language_models.contexts import Context
from ..language_models.loading import check_context_length, load_language_model
from ..process_group import ProcessGroup, leave_process_group
from ..training.cache_arguments import cache_settings, parse_cache_arguments
from ..utils.command_line import check_launcher
from ..utils.environment import library_versions, on_cpu, use_all_cores
from ..utils.files import FolderLock
from ..utils.memory import gigabytes, peak_memory, where_memory_ends
from ..utils.progress import EstimatedBar
from .advice import after_caching

logger = logging.getLogger("hf_selortho.cache")


@where_memory_ends("lower --shard_tokens or --lm_batch_tokens, or read fewer --layers")
def main(argv: Sequence[str] | None = None) -> None:
    """Read text, write verified shards of activations."""
    check_launcher()
    model, text, arguments = parse_cache_arguments(list(sys.argv[1:] if argv is None else argv))
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # who is done first waits for the others
    accelerator = Accelerator(cpu=on_cpu(arguments.cpu), kwargs_handlers=[patient])
    if accelerator.device.type == "cpu":
        use_all_cores(arguments.cpu_threads)
    documents = open_documents(text)
    with accelerator.local_main_process_first():
        lm = load_language_model(model.model or "", model.model_revision, model.lm_dtype, accelerator.device)
    check_context_length(lm, arguments.context_length)
    places: dict[str, Any] = {"site": arguments.site, "target": arguments.target}
    capture = ActivationCapture(lm, sorted(arguments.layers), batch_tokens=model.lm_batch_tokens, **places)
    group = ProcessGroup.of_run()
    settings = cache_settings(capture, documents, text, arguments, group.size)
    cutter = Cutter(lm.tokenizer, arguments.context_length, arguments.prepend_bos, text.min_tokens)
    held_out: list[Context] = []
    if arguments.eval_samples and text.held_out_fraction:
        held_out = list(held_out_contexts(documents, cutter, arguments.eval_samples))
    tokens = training_tokens(estimate_tokens(documents, cutter), arguments.max_tokens)
    tokens += count_tokens(held_out)
    stream = ContextStream(
        documents,
        cutter,
        seed=arguments.seed,
        rank=group.rank,
        world_size=group.size,
        endless=arguments.dry_run,
    )
    folder = CacheFolder(Path(arguments.output_dir))
    if accelerator.is_main_process:
        check_disk(folder.folder, disk_bytes(capture, settings, tokens))
    shard_memory(capture, settings, tokens / group.size)
    if arguments.dry_run:
        if accelerator.is_main_process:
            sys.stdout.write(forecast(capture, stream, settings, tokens))
        leave_process_group(accelerator)
        return
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(FolderLock(folder.folder, "caching activations"))
        begun = begin(folder, settings, arguments.overwrite_output_dir, group, accelerator.device)
        if begun:
            writer = CacheWriter(capture, stream, held_out[group.rank :: group.size], folder, settings, group)
            started, total = time.perf_counter(), round(tokens / group.size)
            with EstimatedBar(
                total=total, desc="caching", unit="token", disable=not accelerator.is_main_process
            ) as bar:
                writer.run(bar)
            speed = writer.tokens / (time.perf_counter() - started) * group.size
        leave_process_group(accelerator)
        if accelerator.is_main_process and begun:
            manifest = writer.manifest(library_versions())
            folder.finish(manifest, str(render_shards_card(manifest)))
            sys.stdout.write(
                closing_words(folder.folder, manifest, speed, peak_memory(accelerator.device), arguments.cpu)
            )
        elif accelerator.is_main_process:
            sys.stdout.write(f"{folder.folder} holds this cache already, complete\n")


def begin(
    folder: CacheFolder, settings: CacheSettings, overwrite: bool, group: ProcessGroup, device: torch.device
) -> bool:
    """Prepare the folder in one process; return False, in all of them, if it holds this cache, complete.

    Raises:
        SelOrthoError: the folder holds something else, or cannot be seen by all processes.
    """
    unfinished = group.rank == 0 and folder.begin(settings, overwrite=overwrite)
    begun = bool(group.sum(torch.tensor(int(unfinished), device=device)))
    if begun and not folder.work.is_dir():
        raise SelOrthoError(
            f"this process does not see {folder.work}, which another one has made: --output_dir has to be on a file "
            "system that all machines share"
        )
    return begun


def training_tokens(estimate: float | None, max_tokens: int | None) -> float:
    """Say how many tokens will be read for training; the text is estimated unless it is a stream."""
    if estimate is not None and max_tokens is not None and max_tokens > 1.1 * estimate:
        logger.warning("the text holds about %d tokens, fewer than --max_tokens %d", estimate, max_tokens)
    return min(value for value in (estimate, max_tokens) if value is not None)


def closing_words(folder: Path, manifest: Manifest, speed: float, memory: int, cpu: bool) -> str:
    """Write the last lines on the screen: the report, the speed, and what to type next."""
    shards = f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) != 1)}"
    return (
        f"\n{report_table(manifest)}\n{folder}/ holds {manifest.rows:,} tokens in {shards}, and "
        f"{manifest.held_out_rows:,} held-out ones\n"
        f"{speed:,.0f} tokens/s; peak memory {gigabytes(memory)}\n\nNext:\n{after_caching(folder, manifest, cpu)}"
    )
