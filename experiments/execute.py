"""Executes a plan: harvests once, trains what has no record yet, measures it, compares the seeds.

Every training and every measurement is a process of its own, so that one that is killed costs itself alone, memory is
given back, and several run side by side: one a GPU, or a share of the cores each. A plan that is started again skips
what has a record; a training that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.compare_seeds import compare_seeds
from experiments.examples import EXAMPLES
from experiments.plan import Plan, Sweep, Unit
from experiments.processes import Machine, Progress, launcher, run_process, side_by_side
from experiments.records import Records
from experiments.stages import Places, find_examples, measure_request, run_measurement
from experiments.summaries import TWIN
from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.training.run_folder import CHECKPOINTS, METRICS_LOG, RUN, read_rows, write_json

logger = logging.getLogger(__name__)

EXAMPLE_SEED = 0  # of the SAEs whose pairs are shown
MEASURE_SHARE = 0.25  # of the time of a training that measuring its SAEs takes, for the time left


def run_trainings(plan: Plan, places: Places, machine: Machine) -> None:
    """Train and measure every SAE of the plan that has no record, then compare the seeds of every sweep.

    Raises:
        SelOrthoError: a record is of other settings than the plan's; or a process has failed: says which, where its log
            is, and that the plan goes on from there.
    """
    records = Records(places.results)
    for unit in plan.units():
        check_settings(unit, records)
    left = [(unit, missing(unit, records, places, plan)) for unit in plan.units()]
    # budgets on FVU have been removed: what was measured of them is shown, and not trained again
    left = [(unit, variants) for unit, variants in left if unit.sweep.arguments.get("ortho_budget") != "fvu"]
    units = [unit for unit, variants in left if variants]
    cost = sum(_cost(unit, variants) for unit, variants in left)
    progress, comparing = Progress(cost, "trainings", "SAE step"), threading.Lock()

    def work(unit: Unit, slot: int) -> None:
        _Job(plan, places, machine, unit, slot, progress).run(records)
        with comparing:  # seeds that end together would compare themselves twice
            compare_sweep(plan, places, unit.sweep, unit.layer)

    try:
        side_by_side(units, work, machine.jobs)
    finally:
        progress.close()


def missing(unit: Unit, records: Records, places: Places, plan: Plan) -> list[str]:
    """Variants of the unit to be trained: without a record, or whose weights are gone and still needed."""
    return [
        variant
        for variant in unit.sweep.variants
        if not records.has(unit.record(variant))
        or (weights_needed(unit, variant, records, plan) and sae_folder(places, unit, variant) is None)
    ]


def check_settings(unit: Unit, records: Records) -> None:
    """Refuse records of other settings than those that the plan gives the unit's variants.

    Raises:
        SelOrthoError: names the record, the setting and both values.
    """
    for variant, settings in unit.sweep.variants.items():
        if records.has(name := unit.record(variant)):
            wanted = {**unit.sweep.arguments, **settings, "seed": unit.seed}
            arguments = records.read(name).get("arguments", {})
            records.refuse_other(name, ((key, arguments.get(key, value), value) for key, value in wanted.items()))


def weights_needed(unit: Unit, variant: str, records: Records, plan: Plan) -> bool:
    """Whether something is still to be found out that its record does not say."""
    compared = variant in unit.sweep.compared and plan.seeds > 1
    if compared and not _are_compared(records, plan, unit.sweep, variant, unit.layer):
        return True
    shown = (unit.sweep.name, unit.seed) == (plan.examples.get("sweep"), EXAMPLE_SEED)
    return shown and variant in (TWIN, *example_variants(plan)) and not _has_examples(records, plan)


def run_examples(plan: Plan, places: Places) -> None:
    """Keep pairs to read, of a twin and its SAE."""
    if not plan.examples or _has_examples(Records(places.results), plan):
        return
    sweep = next(sweep for sweep in plan.sweeps if sweep.name == plan.examples["sweep"])
    unit = Unit(sweep, sweep.layers[0], EXAMPLE_SEED)
    folders = {}
    for variant in (TWIN, *example_variants(plan)):
        folder = sae_folder(places, unit, variant)
        assert folder is not None  # it counts as missing until it is there
        folders[variant] = folder
    find_examples(plan, places, folders, EXAMPLE_SEED)


def _has_examples(records: Records, plan: Plan) -> bool:
    """Whether there are examples, of those SAEs that the plan names."""
    known = records.read(EXAMPLES) if records.has(EXAMPLES) else {}
    return bool(known) and all(known.get(key) == plan.examples.get(key) for key in ("sweep", "variant", "control"))


def example_variants(plan: Plan) -> list[str]:
    """Whose pairs are shown beside the twin's, and the one without penalty that says what means nothing."""
    return [plan.examples[key] for key in ("variant", "control") if key in plan.examples]


def seeds_record(sweep: Sweep, variant: str, layer: int) -> str:
    """Name of the record that compares the seeds of a variant."""
    return f"{sweep.name}/{variant}-layer{layer}-seeds"


def _are_compared(records: Records, plan: Plan, sweep: Sweep, variant: str, layer: int) -> bool:
    """Whether the record that compares the seeds is there and has all that the plan asks for."""
    name = seeds_record(sweep, variant, layer)
    return records.has(name) and records.read(name)["seeds"] >= plan.seeds


def sae_folder(places: Places, unit: Unit, variant: str) -> Path | None:
    """Folder of a trained SAE of the unit; None if it is not there (any more)."""
    for attempt in sorted(places.unit(unit).glob("*/wanted.json")):
        folder = members_of(attempt.parent, unit.layer).get(variant)
        if folder is not None and (folder / RUN).is_file():
            return folder
    return None


def members_of(folder: Path, layer: int) -> dict[str, Path]:
    """Folders of the SAEs of one training by variant: the first one is the run's own, the others are its variants."""
    wanted = json.loads((folder / "wanted.json").read_text(encoding="utf-8"))
    own, *others = wanted
    run = folder / "run"
    return {own: run / f"layer_{layer}"} | {name: run / f"layer_{layer}_{folder_name(name)}" for name in others}


def beside(sweep: Sweep, own: str, variant: str) -> dict[str, Any]:
    """Settings of a variant in the training of another one, whose own settings are not the variant's."""
    defaults = SelOrthoConfig.default_settings()
    undone = {key: sweep.arguments.get(key, defaults[key]) for key in sweep.variants[own]}
    return {**undone, **sweep.variants[variant]}


def folder_name(variant: str) -> str:
    """A variant's name as a training takes it: small letters, digits and hyphens."""
    return variant.replace(".", "-")


def compare_sweep(plan: Plan, places: Places, sweep: Sweep, layer: int) -> None:
    """Write how alike the seeds of each variant are, where all of them are there."""
    records = Records(places.results)
    units = [Unit(sweep, layer, seed) for seed in range(plan.seeds)]
    for variant in sweep.compared:
        folders = [sae_folder(places, unit, variant) for unit in units]
        if plan.seeds > 1 and not _are_compared(records, plan, sweep, variant, layer) and all(folders):
            found = compare_seeds([folder for folder in folders if folder is not None])
            facts = {"kind": "seeds", "sweep": sweep.name, "variant": variant, "layer": layer, "seeds": plan.seeds}
            records.write(seeds_record(sweep, variant, layer), {**facts, **found})


class _Job:
    """The training and the measurement of one unit."""

    def __init__(self, plan: Plan, places: Places, machine: Machine, unit: Unit, slot: int, progress: Progress) -> None:
        self.plan, self.places, self.machine, self.unit = plan, places, machine, unit
        self.environment, self.progress = machine.environment(slot), progress

    def run(self, records: Records) -> None:
        """Finish what was begun, then what is still missing."""
        begun = [path.parent for path in sorted(self.places.unit(self.unit).glob("*/wanted.json"))]
        for attempt in begun:
            self._finish(attempt, records)
        variants = missing(self.unit, records, self.places, self.plan)
        if variants:
            attempt = self.places.unit(self.unit) / f"{len(begun):02d}"
            attempt.mkdir(parents=True, exist_ok=True)
            write_json(attempt / "wanted.json", variants)
            self._finish(attempt, records)

    def _finish(self, attempt: Path, records: Records) -> None:
        """Train what is not trained to the end, measure what is not measured."""
        if any(not (folder / RUN).is_file() for folder in members_of(attempt, self.unit.layer).values()):
            self._train(attempt)
        self._measure(attempt, records)

    def _train(self, attempt: Path) -> None:
        unit, sweep = self.unit, self.unit.sweep
        own, *others = json.loads((attempt / "wanted.json").read_text(encoding="utf-8"))
        variants = attempt / "variants.json"
        write_json(variants, {folder_name(name): beside(sweep, own, name) for name in others})
        preset = {
            "checkpoint_every": 200, "keep_checkpoints": 1, **sweep.arguments, **sweep.variants[own],
            "eval_samples": 0, "seed": unit.seed, "layers": [unit.layer],
        }  # fmt: skip
        write_json(attempt / "preset.json", preset)
        command = [
            *launcher(self.machine), str(self.places.scripts / "train.py"), "--preset", str(attempt / "preset.json"),
            "--activations", str(self.places.shards), "--output_dir", str(attempt / "run"),
            "--cpu_threads", str(self.machine.threads), "--resume_from_checkpoint", "auto",
        ]  # fmt: skip
        if others:
            command += ["--variants", str(variants)]
        log = next(iter(members_of(attempt, unit.layer).values())) / METRICS_LOG
        count, seen = len(others) + 1, 0

        def look() -> None:
            nonlocal seen
            rows = read_rows(log)
            step = rows[-1]["step"] if rows else 0
            self.progress.advance((step - seen) * count * (1 - MEASURE_SHARE), unit.name)
            seen = step

        run_process(command, attempt / "train.log", self.environment, f"the training of {unit.name}", look)
        shutil.rmtree(attempt / "run" / CHECKPOINTS, ignore_errors=True)

    def _measure(self, attempt: Path, records: Records) -> None:
        unit = self.unit
        folders = members_of(attempt, unit.layer)
        left = {variant: folder for variant, folder in folders.items() if not records.has(unit.record(variant))}
        if not left:
            return
        request = measure_request(self.plan, self.places, self.machine, unit.layer) | {
            "unit": {
                "sweep": unit.sweep.name, "sections": list(unit.sweep.sections), "layer": unit.layer, "seed": unit.seed,
            },
            "members": {unit.record(variant): str(folder) for variant, folder in left.items()},
            "measures": {**self.plan.measures, **unit.sweep.measures},
            "variants": {unit.record(variant): variant for variant in left},
        }  # fmt: skip
        write_json(attempt / "request.json", request)
        what = f"the measurement of {unit.name}"
        run_measurement(attempt / "request.json", attempt / "measure.log", self.environment, what)
        steps = unit.sweep.arguments.get("max_steps", 1000)
        self.progress.advance(steps * len(left) * MEASURE_SHARE, unit.name)


def _cost(unit: Unit, variants: Sequence[str]) -> float:
    """Steps of SAEs that a unit takes."""
    return float(unit.sweep.arguments.get("max_steps", 1000) * len(variants))
