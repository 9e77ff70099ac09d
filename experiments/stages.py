"""What a plan does besides training on activations: harvest them, read the tasks, synthetic worlds, timing."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.examples import EXAMPLES, read_examples
from experiments.plan import Plan, Unit, WorldRun
from experiments.processes import Machine, Progress, launcher, run_process, side_by_side
from experiments.records import HARVEST, Records
from experiments.summaries import TWIN
from experiments.task_files import TASKS, has_tasks, load_facts
from experiments.timing import TIMING
from experiments.world_run import missing_scores
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_manifest import MANIFEST
from hf_selortho.errors import SelOrthoError
from hf_selortho.training.run_folder import write_json
from hf_selortho.utils.files import sha256_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Where a plan's files are."""

    work: Path  # shards, trained SAEs: large
    results: Path  # records, figures: small
    scripts: Path  # train.py, cache_activations.py

    @property
    def shards(self) -> Path:
        return self.work / "shards"

    @property
    def tasks(self) -> Path:
        return self.work / "tasks"

    def unit(self, unit: Unit) -> Path:
        return self.work / "units" / unit.name


def harvest(plan: Plan, places: Places, machine: Machine) -> None:
    """Harvest the activations of all layers of the plan, unless that is done.

    Raises:
        SelOrthoError: the folder holds the activations of another plan or text, or the records are of another one.
    """
    arguments = {"layers": plan.layers, **plan.harvest}
    done = places.work / "harvest.json"
    if done.is_file():
        before = json.loads(done.read_text(encoding="utf-8"))
        if set(before.pop("layers")) >= set(arguments["layers"]) and before == plan.harvest:
            _record_harvest(places)
            return
        raise SelOrthoError(
            f"{places.shards} holds the activations of layers and text that {done} names, not those of this plan: "
            "choose another --work_dir"
        )
    preset = places.work / "harvest_arguments.json"
    write_json(preset, arguments)
    command = [
        *launcher(Machine(1, machine.processes * machine.jobs if torch.cuda.is_available() else 1)),
        str(places.scripts / "cache_activations.py"), "--preset", str(preset), "--output_dir", str(places.shards),
    ]  # fmt: skip
    run_process(command, places.work / "harvest.log", dict(os.environ), "the harvest")
    write_json(done, arguments)
    _record_harvest(places)


def _record_harvest(places: Places) -> None:
    """Keep what language model and text the records are of."""
    records, manifest = Records(places.results), ActivationCache(str(places.shards)).manifest
    content = dataclasses.asdict(manifest)
    text = {**content["text"], "dataset": local_name(manifest.text.dataset)}
    source = {"model": content["model"], "text": text, "contexts": content["contexts"], "rows": manifest.rows}
    if records.has(HARVEST):
        before = records.read(HARVEST)
        for what in ("text", "model"):
            if (known := identity(before[what])) != (own := identity(source[what])):
                raise SelOrthoError(
                    f"the records in {places.results} are of the {what} {known}, not of that of this plan, {own}: "
                    "choose another --results_dir"
                )
        return
    sha256 = sha256_of(places.shards / MANIFEST)
    records.write(HARVEST, {"kind": HARVEST, **source, "manifest_sha256": sha256, "versions": manifest.versions})


def identity(source: Mapping[str, Any]) -> str:
    """What a text or a language model is told from others by: the fingerprint of local files, else name and commit."""
    named = " ".join(str(source[key]) for key in ("dataset", "name", "config", "split", "revision") if source.get(key))
    return str(source.get("fingerprint") or named)


def local_name(dataset: str) -> str:
    """How a text is called in records: one on this machine by its file."""
    return Path(dataset).name if Path(dataset).exists() else dataset


def prepare(plan: Plan, places: Places, machine: Machine) -> None:
    """Let the language model read what the SAEs are measured on, once for each layer."""
    for layer in plan.layers:
        if has_tasks(places.tasks, layer):
            _record_tasks(places, layer)
            continue
        request = places.tasks / f"request_layer{layer}.json"
        places.tasks.mkdir(parents=True, exist_ok=True)
        content = measure_request(plan, places, machine, layer)
        if layer not in plan.measures.get("task_layers", plan.layers):
            content["measures"] = {**plan.measures, "probing_texts": 0, "first_letter_words": 0}
        write_json(request, {**content, "threads": Machine().threads})
        run_measurement(request, places.tasks / "prepare.log", dict(os.environ), f"reading the tasks of layer {layer}")
        _record_tasks(places, layer)


def _record_tasks(places: Places, layer: int) -> None:
    """Keep what the language model itself reaches on the tasks of a layer."""
    facts = load_facts(places.tasks, layer)
    Records(places.results).write(f"{TASKS}-layer{layer}", {"kind": TASKS, "layer": layer, **facts})


def measure_request(plan: Plan, places: Places, machine: Machine, layer: int) -> dict[str, Any]:
    """What a measurement at a layer is told, but for its SAEs."""
    model = ActivationCache(str(places.shards)).manifest.model
    return {
        "unit": {"layer": layer}, "members": {}, "variants": {},
        "shards": str(places.shards), "tasks": str(places.tasks),
        "model": model.name, "model_revision": model.revision, "model_dtype": model.dtype,
        "dataset": plan.harvest.get("dataset"), "label_column": plan.label_column,
        "results": str(places.results), "measures": plan.measures, "threads": machine.threads,
    }  # fmt: skip


def run_measurement(request: Path, log: Path, environment: dict[str, str], what: str) -> None:
    """Run the measuring process on a request."""
    run_process([sys.executable, "-m", "experiments.measure", str(request)], log, environment, what)


def run_worlds(plan: Plan, places: Places, machine: Machine) -> None:
    """Train and score on the synthetic worlds what has no record."""
    records = Records(places.results)
    runs = [run for run in plan.worlds if any(missing_scores(run, records))]
    progress = Progress(sum(map(len, (sum(missing_scores(run, records), []) for run in runs))), "ground truth", "SAE")

    def work(run: WorldRun, slot: int) -> None:
        count = len(sum(missing_scores(run, records), []))
        folder = places.work / "worlds"
        folder.mkdir(parents=True, exist_ok=True)
        name = run.name.replace("/", "-")
        content = {
            "run": dataclasses.asdict(run), "results": str(places.results), "threads": machine.threads,
            "samples": plan.measures.get("world_samples", 50_000),
        }  # fmt: skip
        write_json(folder / f"{name}.json", content)
        command = [sys.executable, "-m", "experiments.world_run", str(folder / f"{name}.json")]
        run_process(command, folder / f"{name}.log", machine.environment(slot), f"the world of {name}")
        progress.advance(count, name)

    try:
        side_by_side(runs, work, machine.jobs)
    finally:
        progress.close()


def time_steps(plan: Plan, places: Places) -> None:
    """Time the steps of Table 1, while nothing else runs."""
    if not plan.timing or Records(places.results).has(TIMING):
        return
    settings = dict(plan.timing)
    layer = settings.pop("layer")
    request = places.work / "timing.json"
    write_json(
        request, {"shards": str(places.shards), "layer": layer, "settings": settings, "results": str(places.results)}
    )
    command = [sys.executable, "-m", "experiments.timing", str(request)]
    run_process(command, places.work / "timing.log", dict(os.environ), "the timing of steps")


def find_examples(plan: Plan, places: Places, folders: dict[str, Path], seed: int) -> None:
    """Keep what pairs of a twin became in its SAE, and as a control in another one without penalty.

    Args:
        folders: of the trained SAEs by variant.
        seed: of their training.
    """
    variant, control = plan.examples["variant"], plan.examples.get("control")
    found = read_examples(_pair_index(plan, places, folders[TWIN], folders[variant], variant))
    if control is not None:
        beside = read_examples(_pair_index(plan, places, folders[TWIN], folders[control], control))
        found["control_classes"] = beside["classes"]
    Records(places.results).write(EXAMPLES, {"kind": "examples", **plan.examples, "seed": seed, **found})


def _pair_index(plan: Plan, places: Places, twin: Path, sae: Path, name: str) -> Path:
    """Build the index of a twin with an SAE beside it."""
    index = places.work / f"examples-{name}"
    command = [
        sys.executable, str(places.scripts / "build_feature_index.py"), str(twin), "--twin",
        str(sae), "--output", str(index), "--overwrite", "--tokens", "200000",
    ]  # fmt: skip
    if "dataset" in plan.harvest:
        command += ["--dataset", str(plan.harvest["dataset"])]
    run_process(command, places.work / "examples.log", dict(os.environ), "the index of the examples")
    return index
