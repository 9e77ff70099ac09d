"""Harvest the activations of a language model once, as verified shards on disk, to train on them many times.

python scripts/cache_activations.py --model gemma-3-270m --layers 3 8 13 --dataset texts.jsonl --output_dir acts
accelerate launch --num_processes 2 scripts/cache_activations.py --preset gemma2-2b-l12 --output_dir acts

Interrupted, it goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from hf_selortho import SelOrthoError
from hf_selortho.activations.capture import ActivationCapture
from hf_selortho.activations.harvest import HarvestSettings, ShardHarvest, Speed, assemble_manifest, tokenizer_hash
from hf_selortho.activations.harvest_plan import forecast_words, probe_harvest, refuse_what_cannot_fit
from hf_selortho.activations.lm import LanguageModel, check_context_length, load_language_model
from hf_selortho.activations.processes import sum_over_processes
from hf_selortho.activations.report import report_table
from hf_selortho.activations.shard_writing import ShardFolder
from hf_selortho.activations.shards import STORED_DTYPES
from hf_selortho.activations.texts import Documents, open_documents
from hf_selortho.activations.tokens import ContextStream, estimate_tokens, held_out_contexts
from hf_selortho.command_line import run_script, start_cpu_processes, use_all_cores
from hf_selortho.memory_use import peak_memory
from hf_selortho.process_watch import ProcessWatch
from hf_selortho.training.arguments import ModelArguments, OneLineParser, TextArguments, argument, preset_defaults
from hf_selortho.training.outputs import library_versions

logger = logging.getLogger("hf_selortho.cache")


@dataclass
class HarvestArguments:
    """What is read, and where it goes."""

    layers: list[int] = argument([], "Decoder layers, counted from 0, whose output is read in one pass.")
    output_dir: str = argument("activations", "Folder for the shards; it can be uploaded as a dataset of the Hub.")
    overwrite_output_dir: bool = argument(False, "Replace the harvest that is in the output folder.")
    context_length: int = argument(128, "Longest context in tokens, BOS included.")
    prepend_bos: bool = argument(True, "Whether each context starts with BOS (left out of the activations).")
    max_norm_ratio: float | None = argument(
        4.0, "Tokens whose norm exceeds this multiple of the median at one of the layers are left out; inf keeps all."
    )
    max_tokens: int | None = argument(None, "Tokens to read, BOS included; default: all of the text, once.")
    eval_samples: int = argument(1000, "Held-out contexts, stored apart for the evaluation.")
    stored_dtype: str = argument("bfloat16", "bfloat16 or float32; never float16, in which Gemma's overflow.")
    shard_tokens: int = argument(65_536, "Tokens whose activations make a shard.")
    seed: int = argument(0, "Seed of the order of the documents.")
    cpu: bool = argument(False, "Use the CPU even where there is an accelerator.")
    cpu_threads: int | None = argument(None, "Threads of each process on a CPU; default: its share of all cores.")
    dry_run: bool = argument(False, "Say what would be done and what it needs, and stop.")


def main(argv: Sequence[str] | None = None) -> None:
    """Text in; verified shards of activations out."""
    model, text, arguments = parse(list(sys.argv[1:] if argv is None else argv))
    accelerator = Accelerator(cpu=arguments.cpu)
    if accelerator.device.type == "cpu":
        use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), arguments.cpu_threads)
    documents = open_documents(text.source())
    with accelerator.local_main_process_first():
        lm = load_language_model(model.model or "", model.model_revision, model.lm_dtype, accelerator.device)
    check_context_length(lm, arguments.context_length)
    capture = ActivationCapture(lm, sorted(arguments.layers), batch_tokens=model.lm_batch_tokens)
    cutting: dict[str, Any] = {
        "context_length": arguments.context_length,
        "prepend_bos": arguments.prepend_bos,
        "min_tokens": text.min_tokens,
    }
    held_out = []
    if arguments.eval_samples and text.held_out_fraction:
        held_out = held_out_contexts(documents, lm.tokenizer, limit=arguments.eval_samples, **cutting)
    tokens = planned_tokens(documents, lm, arguments, cutting)
    held_out_tokens = sum(len(context.input_ids) for context in held_out)
    needed = disk_bytes(capture, arguments, tokens + held_out_tokens)
    settings = harvest_settings(arguments, accelerator)
    if arguments.dry_run:
        if accelerator.is_main_process:
            endless = ContextStream(documents, lm.tokenizer, seed=arguments.seed, **cutting)
            found = probe_harvest(capture, endless, settings, tokens + held_out_tokens, needed)
            sys.stdout.write(forecast_words(found))
            refuse_what_cannot_fit(found)
        check_disk(Path(arguments.output_dir), needed)
        return
    check_disk(Path(arguments.output_dir), needed)
    folder = ShardFolder(Path(arguments.output_dir))
    plan = make_plan(capture, documents, text, arguments, accelerator.num_processes)
    if not begin(folder, plan, arguments, accelerator):
        sys.stdout.write(f"{folder.folder} holds this harvest already, complete\n")
        return
    rank, processes = accelerator.process_index, accelerator.num_processes
    stream = ContextStream(
        documents, lm.tokenizer, seed=arguments.seed, rank=rank, world_size=processes, endless=False, **cutting
    )
    harvest = ShardHarvest(capture, stream, held_out[rank::processes], folder, settings)
    total = round((tokens + held_out_tokens) / processes)
    with (
        ProcessWatch("run the same command again, which goes on with the shards that are there"),
        tqdm(total=total, desc="harvesting", unit="token", disable=not accelerator.is_main_process) as bar,
    ):
        speed = harvest.run(bar)
    if accelerator.is_main_process:
        manifest = assemble_manifest(folder, capture, plan, settings, library_versions())
        folder.finish(manifest, dataset_card(manifest))
        memory = peak_memory(accelerator.device)
        sys.stdout.write(closing_words(folder.folder, manifest, speed, processes, memory))


def harvest_settings(arguments: HarvestArguments, accelerator: Accelerator) -> HarvestSettings:
    """What this process does of the harvest."""
    return HarvestSettings(
        arguments.context_length,
        arguments.stored_dtype,
        arguments.max_norm_ratio,
        arguments.shard_tokens,
        arguments.max_tokens,
        accelerator.process_index,
        accelerator.num_processes,
    )


def parse(argv: list[str]) -> tuple[ModelArguments, TextArguments, HarvestArguments]:
    """The arguments, those of a preset under those of the command line."""
    groups: list[Any] = [ModelArguments, TextArguments, HarvestArguments]
    parser = OneLineParser(groups, allow_abbrev=False)
    parser.add_argument("--preset", help="Language model, text and layer of a preset of scripts/train.py.")
    preset = preset_defaults(argv)
    if "layer" in preset:
        preset["layers"] = [preset["layer"]]
    known = {action.dest for action in parser._actions} - {"output_dir"}
    parser.set_defaults(**{key: value for key, value in preset.items() if key in known})
    model, text, arguments, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    check(model, text, arguments)
    return model, text, arguments


def check(model: ModelArguments, text: TextArguments, arguments: HarvestArguments) -> None:
    """Refuse what no harvest could start with, before anything is loaded."""
    if model.model is None:
        raise SelOrthoError("no language model given: pass --model (a Hub id or a folder), or --preset demo")
    if not arguments.layers:
        raise SelOrthoError("no layers given: pass --layers, the decoder layers (counted from 0) to read after")
    if arguments.max_norm_ratio is not None and arguments.max_norm_ratio == float("inf"):
        arguments.max_norm_ratio = None
    rules = [
        ("context_length", arguments.context_length >= 2, "at least 2"),
        ("max_norm_ratio", arguments.max_norm_ratio is None or arguments.max_norm_ratio > 1, "above 1, or inf"),
        ("max_tokens", arguments.max_tokens is None or arguments.max_tokens >= 1, "at least 1"),
        ("eval_samples", arguments.eval_samples >= 0, "at least 0"),
        ("stored_dtype", arguments.stored_dtype in STORED_DTYPES, " or ".join(STORED_DTYPES)),
        ("shard_tokens", arguments.shard_tokens >= 1, "at least 1"),
        ("seed", 0 <= arguments.seed < 1 << 32, "a number from 0 to 4294967295"),
        ("cpu_threads", arguments.cpu_threads is None or arguments.cpu_threads >= 1, "at least 1"),
    ]
    for name, allowed, expected in rules:
        if not allowed:
            raise SelOrthoError(f"--{name} {getattr(arguments, name)}: expected {expected}")
    if not 0 <= text.held_out_fraction < 1:
        raise SelOrthoError(f"--held_out_fraction {text.held_out_fraction}: expected a share in [0, 1)")
    if model.lm_dtype not in ("auto", "bfloat16", "float32"):
        raise SelOrthoError(f"--lm_dtype {model.lm_dtype}: expected auto, bfloat16 or float32")


def planned_tokens(
    documents: Documents, lm: LanguageModel, arguments: HarvestArguments, cutting: dict[str, Any]
) -> float:
    """How many tokens the harvest will read, beside the held-out ones.

    Raises:
        SelOrthoError: nobody knows, as the text is a stream.
    """
    estimate = estimate_tokens(documents, lm.tokenizer, **cutting)
    if estimate is None and arguments.max_tokens is None:
        raise SelOrthoError("--streaming has no end that is known beforehand: say with --max_tokens how much to read")
    return min(value for value in (estimate, arguments.max_tokens) if value is not None)


def disk_bytes(capture: ActivationCapture, arguments: HarvestArguments, tokens: float) -> float:
    """Bytes on disk of the activations of so many tokens."""
    itemsize = STORED_DTYPES[arguments.stored_dtype].itemsize
    return (len(capture.layers) * capture.lm.d_model * itemsize + 20) * tokens  # 20: what says where a token is from


def check_disk(folder: Path, needed: float) -> None:
    """Say how much room the harvest takes, and refuse it where there is less.

    Raises:
        SelOrthoError: the disk has less room than the shards will take beyond those that are there.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    present = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder.is_dir() else 0
    free = shutil.disk_usage(existing).free
    words = f"the activations need about {needed / 1e9:.2f} GB of disk"
    if needed - present > free:
        raise SelOrthoError(
            f"{words}, but {existing} has {free / 1e9:.2f} GB free: use --max_tokens, fewer --layers or another "
            "--output_dir"
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
            "tokenizer_sha256": tokenizer_hash(lm.tokenizer),
        },
        "text": {
            "dataset": documents.name,
            "revision": documents.revision,
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


def begin(folder: ShardFolder, plan: dict[str, Any], arguments: HarvestArguments, accelerator: Accelerator) -> bool:
    """Prepare the folder in one process; False, in all of them, if the harvest is complete."""
    unfinished = 0
    if accelerator.is_main_process:
        unfinished = int(folder.begin(plan, overwrite=arguments.overwrite_output_dir))
    total = int(sum_over_processes(torch.tensor(unfinished, device=accelerator.device)))
    if total and not folder.work.is_dir():
        raise SelOrthoError(
            f"this process does not see {folder.work}, which another one has made: --output_dir has to be on a file "
            "system that all machines share"
        )
    return bool(total)


def dataset_card(manifest: dict[str, Any]) -> str:
    """README.md of the folder: metadata for the Hub, what the activations are, how to use them."""
    model, text, contexts = manifest["model"], manifest["text"], manifest["contexts"]
    dropped = manifest["counts"]
    layers = " ".join(map(str, manifest["harvested_layers"]))
    return f"""---
tags:
- activations
- sparse-autoencoder
- hf_selortho
---

# Activations of a language model

Residual-stream activations of {code(model["name"])} at revision {code(model["revision"])}, after decoder layers
{layers} (counted from 0), on {code(text["dataset"])}, split {code(text["split"])}: {manifest["rows"]:,} tokens for
training from {dropped["contexts"]:,} contexts of up to {contexts["context_length"]} tokens, and
{manifest["held_out_counts"]["rows"]:,} tokens of documents held out from training, as {manifest["stored_dtype"]}.

Left out: {dropped["dropped_special"]:,} special tokens such as BOS and {dropped["dropped_sinks"]:,} sink tokens. Where
the numbers come from, their statistics and the sha256 of every file are in `manifest.json`.

```bash
accelerate launch scripts/train.py --activations FOLDER --layers {layers} --output_dir runs/sae
python -m hf_selortho.activations.report FOLDER --output norms.png
```

`FOLDER` is this folder, or `hub:owner/name` for a repository of the Hub. The terms of the language model and of the
text apply.
"""


def code(text: Any) -> str:
    """A value as code in Markdown, on one line."""
    return "`" + " ".join(str(text).split()).replace("`", "'") + "`"


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
        f"  python -m hf_selortho.activations.report {name} --output norms.png\n"
    )


if __name__ == "__main__":
    start_cpu_processes()
    run_script(main)
