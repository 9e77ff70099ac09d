"""Evaluate a trained SAE, of ours or of SAELens, sparsify or Gemma Scope, on held-out text of its dataset or another.

python scripts/evaluate_sae.py runs/demo
python scripts/evaluate_sae.py org/gemma2b-l12 --dataset path/to/texts.jsonl --eval_samples 200
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_selortho import SelOrthoConfig, SelOrthoError
from hf_selortho.activations.capture import ActivationCapture
from hf_selortho.activations.lm import load_language_model
from hf_selortho.activations.texts import TextSource, open_documents
from hf_selortho.activations.tokens import held_out_contexts
from hf_selortho.command_line import run_script
from hf_selortho.evaluation.evaluator import evaluate_sae
from hf_selortho.features import warn_of_other_lm
from hf_selortho.hub.interop import load_sae
from hf_selortho.hub.report import metrics_table
from hf_selortho.training.arguments import OneLineParser, argument
from hf_selortho.training.outputs import write_json

logger = logging.getLogger("hf_selortho.evaluate")


@dataclass
class EvaluateArguments:
    """What to evaluate, and on what; whatever is not given is taken from the SAE's config."""

    revision: str | None = argument(None, "Branch, tag or commit of the SAE.")
    subfolder: str | None = argument(None, "Folder of the SAE within its repository.")
    model: str | None = argument(None, "Language model; default: the one that the SAE was trained on.")
    model_revision: str | None = argument(None, "Its branch, tag or commit; default: that of the training.")
    lm_dtype: str = argument("auto", "auto (bfloat16 where it is fast, else float32), bfloat16 or float32.")
    dataset: str | None = argument(None, "Hub id, local file or folder, or python-docs; default: that of the training.")
    dataset_config: str | None = argument(None, "Configuration of the dataset, where it has several.")
    split: str | None = argument(None, "Split of the dataset; default: that of the training.")
    text_column: str | None = argument(None, "Column that holds the text; default: text, or the only text column.")
    streaming: bool = argument(False, "Read the dataset as a stream.")
    held_out_fraction: float | None = argument(
        None, "Share of the documents to draw from; default: those held out in training; 1: all, for other text."
    )
    min_tokens: int | None = argument(None, "Contexts with fewer tokens are left out; default: as in training.")
    batch_size: int = argument(4096, "Tokens of the batches that correlations are measured on.")
    eval_samples: int = argument(1000, "Held-out contexts.")
    eval_ce_samples: int = argument(64, "Of these, contexts on which the language model's own loss is measured.")
    output: str | None = argument(None, "JSON file to write the metrics to.")
    cpu: bool = argument(False, "Use the CPU even where there is a GPU.")


def main(argv: Sequence[str] | None = None) -> None:
    """Load an SAE and the language model it reads, measure, print a table."""
    groups: list[Any] = [EvaluateArguments]
    parser = OneLineParser(groups, allow_abbrev=False)
    parser.add_argument("sae", help="Folder or Hub id of the SAE.")
    arguments, rest, unknown = parser.parse_args_into_dataclasses(
        list(sys.argv[1:] if argv is None else argv), return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    check(arguments)
    metrics = evaluate(rest.sae, arguments)
    sys.stdout.write(metrics_table({"evaluation": metrics}) + "\n")
    if arguments.output:
        write_json(Path(arguments.output), {"schema_version": 1, "sae": rest.sae, "evaluation": metrics})


def check(arguments: EvaluateArguments) -> None:
    """Refuse what cannot work before anything is loaded."""
    for name, least in (("eval_samples", 1), ("eval_ce_samples", 0), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            raise SelOrthoError(f"--{name} {getattr(arguments, name)}: expected at least {least}")
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise SelOrthoError(f"--output {arguments.output}: there is no folder {Path(arguments.output).parent}")


def evaluate(name: str, arguments: EvaluateArguments) -> dict[str, Any]:
    """Metrics of the SAE by name."""
    device = "cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu"
    lookup = {key: getattr(arguments, key) for key in ("revision", "subfolder") if getattr(arguments, key)}
    sae: Any = load_sae(name, **lookup)
    sae = sae.to(device)
    config = sae.config
    documents = open_documents(text_source(config, arguments))
    same_model = arguments.model is None
    lm = load_language_model(
        required(arguments.model or config.lm_name, "--model"),
        arguments.model_revision or (config.lm_revision if same_model else None),
        dtype=arguments.lm_dtype,
        device=device,
    )
    warn_of_other_lm(config, lm)
    capture = ActivationCapture(lm, required(config.layer, "a layer in the SAE's config"), config.max_norm)
    contexts = held_out_contexts(
        documents,
        lm.tokenizer,
        limit=arguments.eval_samples,
        context_length=config.context_length,
        prepend_bos=config.prepend_bos,
        min_tokens=arguments.min_tokens or config.min_tokens or 8,
    )
    evaluation = evaluate_sae(
        sae, capture, contexts, batch_size=arguments.batch_size, ce_samples=arguments.eval_ce_samples
    )
    return evaluation.metrics


def text_source(config: SelOrthoConfig, arguments: EvaluateArguments) -> TextSource:
    """The dataset of the command line, else that of the training with the same documents held out."""
    same = arguments.dataset is None
    fraction = arguments.held_out_fraction
    if fraction is None:
        fraction = config.held_out_fraction if same and config.held_out_fraction is not None else 0.1
    if not 0 < fraction <= 1:
        raise SelOrthoError(
            f"held-out fraction {fraction}: expected a share in (0, 1]; an SAE whose training held nothing out needs "
            "another --dataset"
        )
    return TextSource(
        dataset=required(arguments.dataset or config.dataset, "--dataset"),
        config_name=arguments.dataset_config or (config.dataset_config if same else None),
        split=arguments.split or (config.dataset_split if same else None) or "train",
        text_column=arguments.text_column or (config.text_column if same else None),
        revision=config.dataset_revision if same else None,
        streaming=arguments.streaming,
        held_out_fraction=fraction,
    )


def required(value: Any, name: str) -> Any:
    """The value, or an error that says what to give."""
    if value is None:
        raise SelOrthoError(f"the SAE's config does not say what it was trained on: {name} is needed")
    return value


if __name__ == "__main__":
    run_script(main)
