"""Evaluate a trained SAE, of ours or of SAELens, sparsify or Gemma Scope, on held-out text of its dataset or another.

selortho evaluate runs/demo
selortho evaluate org/gemma2b-l12 --dataset path/to/texts.jsonl --eval_samples 200
selortho evaluate runs/demo --probes --sets all
selortho evaluate runs/demo --label_column label --first_letter_words 2000 --compare_with runs/demo-seed1
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import SelOrthoError
from ..evaluation.probe_scores import check_probes, check_widths
from ..evaluation.tasks import evaluate_on_text
from ..hub.report import metrics_table
from ..utils.files import write_json
from ..utils.memory import where_memory_ends
from .arguments import parse_evaluate
from .reading import capture_of, least_tokens, load, load_lm_of, text_source
from .reading_arguments import EvaluateArguments


@where_memory_ends("lower --batch_size or --eval_samples")
def main(argv: Sequence[str] | None = None) -> None:
    """Load an SAE and the language model it reads, measure, print a table."""
    arguments, rest = parse_evaluate(argv)
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise SelOrthoError(f"--output {arguments.output}: there is no folder {Path(arguments.output).parent}")
    metrics = evaluate(rest.sae, arguments)
    sys.stdout.write(metrics_table({"evaluation": metrics}) + "\n")
    if arguments.output:
        write_json(Path(arguments.output), {"schema_version": 1, "sae": rest.sae, "evaluation": metrics})


def evaluate(name: str, arguments: EvaluateArguments) -> dict[str, Any]:
    """Metrics of the SAE by name."""
    sets = arguments.sets if arguments.probes else "none"
    check_probes(sets)
    sae = load(name, arguments.lookup, arguments.device)
    config = sae.config
    check_widths(sets, config.d_sae)
    others = {other: load_other(other, sae) for other in arguments.compare_with}
    source = text_source(config, arguments)
    capture = capture_of(config, load_lm_of(config, arguments), arguments)
    cutting = {
        "context_length": config.context_length,
        "prepend_bos": config.prepend_bos,
        "min_tokens": least_tokens(config, arguments),
    }
    return evaluate_on_text(
        sae,
        capture,
        source,
        arguments.label_column,
        cutting,
        {"probing_texts": arguments.probing_texts, "first_letter_words": arguments.first_letter_words},
        others=others,
        probes=sets,
        samples=arguments.eval_samples,
        ce_samples=arguments.eval_ce_samples,
        batch_size=arguments.batch_size,
    )


def load_other(name: str, sae: Any) -> Tensor:
    """Decoder directions (d_sae, d_out) of an SAE to compare with.

    Raises:
        SelOrthoError: it cannot be loaded, or its directions lie at another site or have another width.
    """
    other = load(name, {}, "cpu")
    theirs, own = (f"{c.written_site} of width {c.width_out}" for c in (other.config, sae.config))
    if theirs != own:
        raise SelOrthoError(
            f"--compare_with {name}: its directions are of {theirs}, those of the SAE of {own}; expected one of the "
            "same language model, layer and site"
        )
    return other.W_dec.detach().float()
