"""Measures the SAEs that a unit of a plan has trained, and writes a record for each.

`python -m experiments.measure UNIT` and the arguments of `experiments.reproduce`, a process of its own: the language
model is loaded once for all SAEs of the unit, and its memory is gone when the next training starts.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from experiments.plan import Unit
from experiments.plan_run import PlanRun, parse_run
from experiments.records import training_facts
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_batches import held_out_batches
from hf_selortho.data.texts import TextSource
from hf_selortho.evaluation.evaluator import evaluate_saes
from hf_selortho.evaluation.first_letter import FirstLetterTask
from hf_selortho.evaluation.probing import LabelledTexts
from hf_selortho.evaluation.stability import stability, unique_features
from hf_selortho.evaluation.tasks import Tasks, prepare_tasks
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.loading import load_language_model
from hf_selortho.modeling_selortho import SelOrthoSAE
from hf_selortho.utils.command_line import run_script
from hf_selortho.utils.environment import use_all_cores

# Correlations of all SAEs are measured on the same pairs, whatever an SAE was trained with.
PAIR_SETTINGS = {"pair_fraction": 0.001, "min_support": 4, "correlation": "cosine", "correlation_threshold": 0.0}
SAME_FEATURE = 0.7  # decoder cosine from which two features count as the same one (Paulo & Belrose 2025)


def measure(run: PlanRun, unit: Unit) -> None:
    """Evaluate every trained SAE of the unit that has no record, and write it."""
    cache, sizes = ActivationCache(str(run.activations)), {**run.plan.measures, **unit.sweep.measures}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the job's own GPU
    manifest = cache.manifest
    lm = load_language_model(manifest.lm_name, manifest.lm_revision, manifest.lm_dtype, device)
    capture = ActivationCapture(lm, [unit.layer], [cache.manifest.layer(unit.layer).max_norm])
    tasks = layer_tasks(run, unit.layer, cache, capture)
    folders = {
        variant: folder
        for variant in unit.sweep.variants
        if not run.records.has(unit.record(variant)) and (folder := run.trained_folder(unit, variant)) is not None
    }
    saes: list[Any] = [SelOrthoSAE.from_pretrained(str(folder), **PAIR_SETTINGS) for folder in folders.values()]
    saes = [sae.to(device).eval() for sae in saes]
    contexts = cache.held_out_contexts()[: sizes.get("eval_samples", 1000)]
    batch = sizes.get("batch_size", 4096)
    started = time.perf_counter()
    evaluations = evaluate_saes(
        saes,
        capture,
        contexts,
        batches=held_out_batches(cache, [unit.layer], batch, contexts=len(contexts)),
        batch_size=batch,
        ce_samples=sizes.get("ce_samples", 64),
        progress=False,
    )
    each = (time.perf_counter() - started) / len(saes)
    for (variant, folder), sae, evaluation in zip(folders.items(), saes, evaluations, strict=True):
        started = time.perf_counter()
        metrics = evaluation.metrics | tasks.measure(sae)
        content = {
            "kind": "sae", "sweep": unit.sweep.name, "sections": unit.sweep.sections, "layer": unit.layer,
            "seed": unit.seed, "variant": variant, "evaluation": metrics, "measured_with": PAIR_SETTINGS | sizes,
            "measuring_seconds": round(each + time.perf_counter() - started, 1), **training_facts(folder),
        }  # fmt: skip
        run.records.write(unit.record(variant), content)


def layer_tasks(run: PlanRun, layer: int, cache: ActivationCache, capture: ActivationCapture) -> Tasks:
    """Return the tasks of a layer; the language model reads them once for a plan.

    What the language model itself reaches on them becomes a record.
    """
    sizes, path = run.plan.measures, run.work / "tasks" / f"layer{layer}.pt"
    if layer not in sizes.get("task_layers", [layer]):
        sizes = {**sizes, "probing_texts": 0, "first_letter_words": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            text = cache.manifest
            source = TextSource(
                run.plan.harvest.get("dataset") or text.dataset,  # as it was given: its name may not say where it is
                text.dataset_config, text.dataset_revision, text.split, text.text_column,
                held_out_fraction=sizes.get("probing_fraction", text.held_out_fraction),
            )  # fmt: skip
            contexts = {name: getattr(text, name) for name in ("context_length", "prepend_bos", "min_tokens")}
            save_tasks(prepare_tasks(capture, source, run.plan.label_column, contexts, sizes), path)
        tasks = load_tasks(path)
        run.records.write(f"tasks-layer{layer}", {"kind": "tasks", "layer": layer, **tasks.facts})
    return tasks


def save_tasks(tasks: Tasks, path: Path) -> None:
    """Write the tasks of a layer; the file is whole or not there."""
    content: dict[str, Any] = {"facts": tasks.facts}
    for name, task in (("probing", tasks.probing), ("first_letter", tasks.first_letter)):
        content[name] = None if task is None else {f.name: getattr(task, f.name) for f in fields(task)}
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def load_tasks(path: Path) -> Tasks:
    """Read the tasks that [`save_tasks`] has written."""
    content = torch.load(path, weights_only=True)
    probing, first_letter = content["probing"], content["first_letter"]
    return Tasks(
        None if probing is None else LabelledTexts(**probing),
        None if first_letter is None else FirstLetterTask(**first_letter),
        content["facts"],
    )


def compare_seeds(folders: Sequence[Path]) -> dict[str, float]:
    """Compare the decoders of SAEs that differ in nothing but their seed.

    Returns:
        The means over the pairs of [`stability`]'s figures; `unique_features`, and `unique_per_feature`, the same over
        the number of features of one SAE: 1 if all seeds find the same features, the number of seeds if none do.
    """
    with torch.inference_mode():
        decoders = [SelOrthoSAE.from_pretrained(str(folder)).W_dec.float() for folder in folders]
        pairs = [stability(a, b, SAME_FEATURE) for a, b in itertools.combinations(decoders, 2)]
        means = {key: statistics.fmean(pair[key] for pair in pairs) for key in pairs[0]}
        return {**means, **unique_features(decoders, SAME_FEATURE)}


def main() -> None:
    """Measure the unit that is named."""
    name, *argv = sys.argv[1:]
    run = parse_run(argv)
    use_all_cores(run.threads)
    measure(run, next(unit for unit in run.plan.units() if unit.name == name))


if __name__ == "__main__":
    run_script(main)
