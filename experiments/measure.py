"""Measures the SAEs that a unit of a plan has trained, and writes a record for each.

`python -m experiments.measure request.json`, a process of its own: the language model is loaded once
for all SAEs of the unit, and its memory is gone when the next training starts. What depends on the language model alone
(the activations of the labelled texts and of the words) is computed once for a plan and kept beside the shards.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.records import Records, training_facts
from experiments.task_files import has_tasks, load_tasks, save_tasks
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_batches import held_out_batches
from hf_selortho.data.texts import TextSource
from hf_selortho.evaluation.evaluator import evaluate_saes
from hf_selortho.evaluation.tasks import prepare_tasks
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.loading import load_language_model
from hf_selortho.modeling_selortho import SelOrthoSAE
from hf_selortho.utils.command_line import run_script, use_all_cores

logger = logging.getLogger(__name__)

# Correlations of all SAEs are measured on the same pairs, whatever an SAE was trained with.
PAIR_SETTINGS = {"pair_fraction": 0.001, "min_support": 4, "correlation": "cosine", "correlation_threshold": 0.0}


@dataclass(frozen=True)
class Request:
    """What is to be measured."""

    unit: dict[str, Any]  # sweep, sections, layer, seed: copied into the records
    members: dict[str, str]  # folder of the SAE by the name of its record
    variants: dict[str, str]  # variant by the name of its record
    shards: str
    tasks: str
    model: str
    model_revision: str | None
    model_dtype: str  # that of the harvest, whatever this machine computes fastest in
    results: str
    measures: dict[str, Any]
    dataset: str | None = None  # as it was given, where its name alone does not say where it is
    label_column: str | None = None
    threads: int | None = None


def measure(request: Request) -> None:
    """Evaluate every SAE of the request and write its record; without any, prepare the tasks of the layer."""
    store = ActivationCache(request.shards)
    layer, sizes = request.unit["layer"], request.measures
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the job's own GPU
    saes = {name: load_for_measuring(folder, device) for name, folder in request.members.items()}
    contexts = store.held_out_contexts()[: sizes.get("eval_samples", 1000)]
    lm = load_language_model(request.model, request.model_revision, request.model_dtype, device)
    capture = ActivationCapture(lm, [layer], [store.manifest.layer(layer).max_norm])
    if not saes:
        prepare(request, store, capture)
        return
    batch = sizes.get("batch_size", 4096)
    started = time.perf_counter()
    evaluations = evaluate_saes(
        list(saes.values()),
        capture,
        contexts,
        batches=held_out_batches(store, [layer], batch, contexts=len(contexts)),
        batch_size=batch,
        ce_samples=sizes.get("ce_samples", 64),
        progress=False,
    )
    each = (time.perf_counter() - started) / len(saes)
    tasks = load_tasks(Path(request.tasks), layer)
    records = Records(Path(request.results))
    for (name, sae), evaluation in zip(saes.items(), evaluations, strict=True):
        started = time.perf_counter()
        metrics = evaluation.metrics | tasks.measure(sae)
        seconds = each + time.perf_counter() - started
        records.write(
            name,
            {
                "kind": "sae",
                **request.unit,
                "variant": request.variants[name],
                "evaluation": metrics,
                "measured_with": PAIR_SETTINGS | dict(sizes),
                "measuring_seconds": round(seconds, 1),
                **training_facts(Path(request.members[name])),
            },
        )


def prepare(request: Request, store: ActivationCache, capture: ActivationCapture) -> None:
    """Compute the tasks of the layer, unless they are there."""
    layer, folder = request.unit["layer"], Path(request.tasks)
    if has_tasks(folder, layer):
        return
    text = store.manifest.text
    source = TextSource(
        request.dataset or text.dataset, text.config, text.split, text.text_column, text.revision,
        held_out_fraction=request.measures.get("probing_fraction", text.held_out_fraction),
    )  # fmt: skip
    save_tasks(
        prepare_tasks(capture, source, request.label_column, asdict(store.manifest.contexts), request.measures),
        folder,
        layer,
    )


def load_for_measuring(folder: str, device: str) -> SelOrthoSAE:
    """An SAE with the pairs that all SAEs are compared by."""
    loaded: Any = SelOrthoSAE.from_pretrained(folder, **PAIR_SETTINGS)
    sae: SelOrthoSAE = loaded.to(device).eval()
    return sae


def request_from(content: Mapping[str, Any]) -> Request:
    """A request from JSON."""
    return Request(**content)


def main() -> None:
    """Measure what the file that is named says."""
    request = request_from(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    use_all_cores(request.threads)
    measure(request)


if __name__ == "__main__":
    run_script(main)
