"""Harvest the activations of a language model once, as verified shards on disk, to train on them many times.

python scripts/cache_activations.py --model gemma-3-270m --layers 3 8 13 --dataset texts.jsonl --output_dir acts
torchrun --nproc_per_node 2 scripts/cache_activations.py --preset gemma2-2b-l12 --output_dir acts

Interrupted, it goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from hf_selortho import SelOrthoError
from hf_selortho.data.activation_cache import STORED_DTYPES
from hf_selortho.data.cache_folder import ShardFolder
from hf_selortho.data.cache_forecast import forecast_words, probe_harvest, refuse_what_cannot_fit
from hf_selortho.data.cache_report import report_table
from hf_selortho.data.cache_statistics import LayerStatistics
from hf_selortho.data.cache_writer import HarvestSettings, ShardHarvest, Speed, assemble_manifest, tokenizer_hash
from hf_selortho.data.contexts import Context, ContextStream, count_tokens, estimate_tokens, held_out_contexts
from hf_selortho.data.texts import Documents, open_documents
from hf_selortho.hub.dataset_card import render_shards_card
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.loading import check_context_length, load_language_model
from hf_selortho.process_group import ProcessGroup, leave_process_group
from hf_selortho.training.arguments import ModelArguments, TextArguments
from hf_selortho.training.cache_arguments import HarvestArguments, parse_harvest_arguments
from hf_selortho.training.run_folder import library_versions
from hf_selortho.utils.command_line import check_launcher, on_cpu, run_script, use_all_cores
from hf_selortho.utils.files import FolderLock
from hf_selortho.utils.memory import existing_folder, free_disk, peak_memory

logger = logging.getLogger("hf_selortho.cache")


def main(argv: Sequence[str] | None = None) -> None:
    """Text in; verified shards of activations out."""
    check_launcher()
    model, text, arguments = parse_harvest_arguments(list(sys.argv[1:] if argv is None else argv))
    accelerator = Accelerator(cpu=on_cpu(arguments.cpu))
    if accelerator.device.type == "cpu":
        use_all_cores(arguments.cpu_threads)
    harvest = Harvest(model, text, arguments, accelerator)
    if arguments.dry_run:
        harvest.dry_run()
        leave_process_group(accelerator)
        return
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(FolderLock(harvest.folder.folder, "harvesting"))
        speed = harvest.run() if harvest.begin() else None
        leave_process_group(accelerator)
        if not accelerator.is_main_process:
            return
        if speed is None:
            sys.stdout.write(f"{harvest.folder.folder} holds this harvest already, complete\n")
        else:
            manifest = harvest.finish()
            memory = peak_memory(accelerator.device)
            sys.stdout.write(closing_words(harvest.folder.folder, manifest, speed, accelerator.num_processes, memory))


class Harvest:
    """The language model and the text of a harvest, loaded, and what is to be done with them."""

    def __init__(
        self, model: ModelArguments, text: TextArguments, arguments: HarvestArguments, accelerator: Accelerator
    ) -> None:
        self.text, self.arguments, self.accelerator = text, arguments, accelerator
        self.documents = open_documents(text.source())
        with accelerator.local_main_process_first():
            lm = load_language_model(model.model or "", model.model_revision, model.lm_dtype, accelerator.device)
        check_context_length(lm, arguments.context_length)
        self.lm = lm
        self.capture = ActivationCapture(lm, sorted(arguments.layers), batch_tokens=model.lm_batch_tokens)
        self.cutting: dict[str, Any] = {
            "context_length": arguments.context_length,
            "prepend_bos": arguments.prepend_bos,
            "min_tokens": text.min_tokens,
        }
        self.held_out: list[Context] = []
        if arguments.eval_samples and text.held_out_fraction:
            limit = arguments.eval_samples
            self.held_out = list(held_out_contexts(self.documents, lm.tokenizer, limit=limit, **self.cutting))
        self.tokens = self._tokens()
        self.disk = disk_bytes(self.capture, arguments, self.tokens)
        self.settings = HarvestSettings(
            arguments.context_length,
            arguments.stored_dtype,
            arguments.max_norm_ratio,
            arguments.shard_tokens,
            arguments.max_tokens,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.folder = ShardFolder(Path(arguments.output_dir))
        self.plan = make_plan(self.capture, self.documents, text, arguments, accelerator.num_processes)

    def dry_run(self) -> None:
        """Say what the harvest would do, need and take.

        Raises:
            SelOrthoError: it cannot fit.
        """
        if not self.accelerator.is_main_process:
            return
        check_disk(self.folder.folder, self.disk)
        stream = ContextStream(self.documents, self.lm.tokenizer, seed=self.arguments.seed, **self.cutting)  # endless
        found = probe_harvest(self.capture, stream, self.settings, self.tokens, self.disk, self.folder.folder)
        sys.stdout.write(forecast_words(found))
        refuse_what_cannot_fit(found)

    def begin(self) -> bool:
        """Prepare the folder in one process; False, in all of them, if it holds this harvest, complete.

        Raises:
            SelOrthoError: the disk is too small, or the folder holds something else or cannot be seen by all processes.
        """
        unfinished = 0
        if self.accelerator.is_main_process:
            check_disk(self.folder.folder, self.disk)
            unfinished = int(self.folder.begin(self.plan, overwrite=self.arguments.overwrite_output_dir))
        total = int(ProcessGroup.of_run().sum(torch.tensor(unfinished, device=self.accelerator.device)))
        if total and not self.folder.work.is_dir():
            raise SelOrthoError(
                f"this process does not see {self.folder.work}, which another one has made: --output_dir has to be on "
                "a file system that all machines share"
            )
        return bool(total)

    def run(self) -> Speed:
        """Harvest this process's part, with a progress bar in the main process."""
        rank, processes = self.settings.rank, self.settings.processes
        stream = ContextStream(
            self.documents,
            self.lm.tokenizer,
            seed=self.arguments.seed,
            rank=rank,
            world_size=processes,
            endless=False,
            **self.cutting,
        )
        harvest = ShardHarvest(self.capture, stream, self.held_out[rank::processes], self.folder, self.settings)
        total, hidden = round(self.tokens / processes), not self.accelerator.is_main_process
        with tqdm(total=total, desc="harvesting", unit="token", disable=hidden) as bar:
            return harvest.run(bar)

    def finish(self) -> dict[str, Any]:
        """Write manifest and card, once all processes are done; returns the manifest."""
        manifest = assemble_manifest(self.folder, self.capture, self.plan, self.settings, library_versions())
        self.folder.finish(manifest, str(render_shards_card(manifest)))
        return manifest

    def _tokens(self) -> float:
        """How many tokens will be read, held-out ones included.

        Raises:
            SelOrthoError: nobody knows, as the text is a stream.
        """
        estimate = estimate_tokens(self.documents, self.lm.tokenizer, **self.cutting)
        if estimate is None and self.arguments.max_tokens is None:
            raise SelOrthoError(
                "--streaming has no end that is known beforehand: say with --max_tokens how much to read"
            )
        for_training = min(value for value in (estimate, self.arguments.max_tokens) if value is not None)
        return for_training + count_tokens(self.held_out)


def disk_bytes(capture: ActivationCapture, arguments: HarvestArguments, tokens: float) -> float:
    """Bytes on disk of the activations of so many tokens, and of the statistics of each shard until the end."""
    itemsize = STORED_DTYPES[arguments.stored_dtype].itemsize
    layers = len(capture.layers)
    statistics = LayerStatistics(capture.lm.d_model, arguments.context_length).state_dict().values()
    records = layers * sum(tensor.nbytes for tensor in statistics) * (1 + tokens / arguments.shard_tokens)
    return (layers * capture.lm.d_model * itemsize + 20) * tokens + records  # 20: what says where a token is from


def check_disk(folder: Path, needed: float) -> None:
    """Say how much room the harvest takes, and refuse it where there is less.

    Raises:
        SelOrthoError: the disk has less room than the shards will take beyond those that are there.
    """
    present = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder.is_dir() else 0
    free, words = free_disk(folder), f"the activations need about {needed / 1e9:.2f} GB of disk"
    if needed - present > free:
        raise SelOrthoError(
            f"{words}, but {existing_folder(folder)} has {free / 1e9:.2f} GB free: use --max_tokens, fewer --layers or "
            "another --output_dir"
        )
    logger.info("%s, %.1f GB are free", words, free / 1e9)


def make_plan(
    capture: ActivationCapture,
    documents: Documents,
    text: TextArguments,
    arguments: HarvestArguments,
    processes: int,
) -> dict[str, Any]:
    """Everything that decides what the shards hold: the head of the manifest."""
    lm = capture.lm
    return {
        "model": {
            "name": lm.name,
            "revision": lm.revision,
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "batch_tokens": capture.batch_tokens,
            "device": capture.device.type,
            "tokenizer_sha256": tokenizer_hash(lm.tokenizer),
        },
        "text": {
            "dataset": documents.name,
            "revision": documents.revision,
            "fingerprint": documents.fingerprint,
            "rows": documents.count,
            "config": text.dataset_config,
            "split": documents.split,
            "text_column": text.text_column,
            "streaming": text.streaming,
            "held_out_fraction": text.held_out_fraction,
            "seed": arguments.seed,
        },
        "contexts": {
            "context_length": arguments.context_length,
            "prepend_bos": arguments.prepend_bos,
            "min_tokens": text.min_tokens,
        },
        "harvested_layers": list(capture.layers),
        "stored_dtype": arguments.stored_dtype,
        "max_norm_ratio": arguments.max_norm_ratio,
        "max_tokens": arguments.max_tokens,
        "held_out_contexts": arguments.eval_samples,
        "shard_tokens": arguments.shard_tokens,
        "processes": processes,
    }


def closing_words(folder: Path, manifest: dict[str, Any], speed: Speed, processes: int, memory: int) -> str:
    """The last lines on the screen: the diagnosis, the speed, and what to type next."""
    name, layers = shlex.quote(str(folder)), " ".join(map(str, manifest["harvested_layers"]))
    fast = ""
    if speed.tokens:
        fast = (
            f"{speed.tokens_per_second * processes:,.0f} tokens/s; the language model's own forward took "
            f"{speed.forward_share:.0%} of the time; peak memory {memory / 1e9:.2f} GB\n"
        )
    return (
        f"\n{report_table(manifest)}\n\n{folder}/ holds {len(manifest['shards'])} shards of {manifest['rows']:,} "
        f"tokens and {manifest['held_out_counts']['rows']:,} held-out ones\n{fast}\nNext:\n"
        f"  accelerate launch scripts/train.py --activations {name} --layers {layers} --twin --output_dir runs/sae\n"
        f"  python -m hf_selortho.data.cache_report {name} --output norms.png\n"
    )


if __name__ == "__main__":
    run_script(main)
