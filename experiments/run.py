"""Runs a plan: caches activations once, trains what has no record yet, measures it, compares the seeds.

Every training and every measurement is a process of its own, so that one that is killed costs itself alone, memory is
given back, and several run side by side: one a GPU, or a share of the cores each. A plan that is started again skips
what has a record; a training that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.examples import EXAMPLES, read_examples
from experiments.jobs import environment_of, run_process, side_by_side
from experiments.measure import compare_seeds
from experiments.plan import TWIN, Plan, SyntheticRun, Unit
from experiments.plan_run import PlanRun, saes_of
from experiments.records import Records
from experiments.synthetic_training import missing_scores
from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_manifest import MANIFEST, TRAIN, shard_path
from hf_selortho.errors import SelOrthoError
from hf_selortho.training.run_folder import CHECKPOINTS, RUN
from hf_selortho.utils.files import write_json

SCRIPTS = Path(__file__).parents[1] / "scripts"
HARVEST, TIMING = "harvest", "timing"  # names and kinds of records
EXAMPLE_SEED = 0  # of the SAEs whose pairs are shown
MORE_PAIRS = 0.005  # the paper's 0.5%, against its 0.1%, in the comparison of memory


def cache_activations(run: PlanRun) -> None:
    """Cache the activations of all layers of the plan, unless that is done, and keep what they are of.

    Raises:
        SelOrthoError: the folder holds the activations of another plan or text, or the records are of another one.
    """
    preset, arguments = run.work / "cache.json", {"layers": run.plan.layers, **run.plan.harvest}
    if preset.is_file() and json.loads(preset.read_text(encoding="utf-8")) != arguments:
        raise SelOrthoError(
            f"{run.activations} holds what {preset} names, not the activations of this plan: choose another --work_dir"
        )
    write_json(preset, arguments)
    if not (run.activations / MANIFEST).is_file():
        command = [str(SCRIPTS / "cache_activations.py"), "--preset", str(preset), "--output_dir", str(run.activations)]
        run_process(command, run.work / "cache.log", "caching the activations")
    cache = ActivationCache(str(run.activations))
    manifest = cache.manifest
    text: dict[str, Any] = {
        "dataset": local_name(manifest.dataset), "config": manifest.dataset_config, "split": manifest.split,
        "revision": manifest.dataset_revision, "fingerprint": manifest.text_fingerprint,
        "held_out_fraction": manifest.held_out_fraction, "seed": manifest.seed,
    }  # fmt: skip
    model: dict[str, Any] = {"name": manifest.lm_name, "revision": manifest.lm_revision, "dtype": manifest.lm_dtype}
    contexts = {name: getattr(manifest, name) for name in ("context_length", "prepend_bos", "min_tokens")}
    if run.records.has(HARVEST):
        before = run.records.read(HARVEST)
        named = {"text": (before["text"], text), "model": (before["model"], model)}
        run.records.refuse_other(HARVEST, ((f"the {key}", identity(a), identity(b)) for key, (a, b) in named.items()))
        return
    source: dict[str, Any] = {"model": model, "text": text, "contexts": contexts, "rows": manifest.rows}
    run.records.write(
        HARVEST, {"kind": HARVEST, **source, "manifest_sha256": cache.sha256, "versions": manifest.versions}
    )


def identity(source: Mapping[str, Any]) -> str:
    """Say what a text or a language model is told from others by: the fingerprint of files, else name and commit."""
    named = " ".join(str(source[key]) for key in ("dataset", "name", "config", "split", "revision") if source.get(key))
    return str(source.get("fingerprint") or named)


def local_name(dataset: str) -> str:
    """Say how a text is called in records: one on this machine by its file."""
    return Path(dataset).name if Path(dataset).exists() else dataset


def time_steps(run: PlanRun) -> None:
    """Time a training step with each penalty for Table 1, while nothing else runs."""
    settings = run.plan.timing
    if not settings or run.records.has(TIMING):
        return
    found = benchmark(run, "timing", ["selective", "full"], settings["rounds"])
    more_pairs = benchmark(run, "timing-of-more-pairs", ["selective"], 1, MORE_PAIRS)
    usual, more = (
        next(row["memory_bytes"] for row in content["rows"] if row["mode"] == "selective")
        for content in (found, more_pairs)
    )
    facts = {key: found[key] for key in ("rows", "d_in", "hardware", "versions", "date")}
    facts |= {"memory_of_more_pairs": more / usual if more and usual else None, "more_pairs": MORE_PAIRS}
    of_plan = {key: settings[key] for key in ("layer", "batch_size")}
    run.records.write(TIMING, {"kind": TIMING, **of_plan, **facts})


def benchmark(run: PlanRun, name: str, only: list[str], rounds: int, pair_fraction: float = 0.001) -> dict[str, Any]:
    """Run the benchmark on cached activations; returns the content of its benchmark.json."""
    settings, output = run.plan.timing, run.work / name
    first = ActivationCache(str(run.activations)).manifest.shards[0]
    activations = run.activations / shard_path(TRAIN, f"layer_{settings['layer']}", first.number)
    command = [
        "-m", "benchmarks.benchmark", "--activations", str(activations), "--activation", "relu", "--memory",
        "--widths", str(settings["d_sae"]), "--batch", str(settings["batch_size"]), "--l0", str(settings["l0"]),
        "--selection_interval", "1", "--pair_fraction", str(pair_fraction), "--steps", str(rounds),
        "--only", *only, "--output", str(output),
    ]  # fmt: skip
    run_process(command, run.work / f"{name}.log", "the timing of steps")
    content: dict[str, Any] = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    return content


def run_trainings(run: PlanRun) -> None:
    """Train and measure every SAE of the plan that has no record, then compare the seeds of every sweep.

    Raises:
        SelOrthoError: a record is of other settings than the plan's; or a process has failed: says which, where its log
            is, and that the plan goes on from there.
    """
    units = run.plan.units()
    for unit in units:
        check_settings(unit, run.records)
    left = [unit for unit in units if missing(run, unit)]
    side_by_side(left, lambda unit, slot: finish(run, unit, slot), run.jobs, "trainings")
    compare_sweeps(run)
    find_examples(run)


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


def missing(run: PlanRun, unit: Unit) -> list[str]:
    """List the variants of a unit without a record, or whose weights are needed for what no record says."""
    return [
        variant
        for variant in unit.sweep.variants
        if not run.records.has(unit.record(variant))
        or (weights_needed(run, unit, variant) and run.trained_folder(unit, variant) is None)
    ]


def weights_needed(run: PlanRun, unit: Unit, variant: str) -> bool:
    """Tell whether something is still to be found out that the record of an SAE does not say."""
    compared = variant in unit.sweep.compared and not is_compared(run, unit, variant)
    shown = (unit.sweep.name, unit.seed) == (run.plan.examples.get("sweep"), EXAMPLE_SEED)
    return compared or (shown and variant in example_variants(run.plan) and not has_examples(run))


def finish(run: PlanRun, unit: Unit, slot: int) -> None:
    """Train and measure what is missing of a unit, after what was begun before."""
    while wanted := [name for name in missing(run, unit) if run.trained_folder(unit, name) is None]:
        attempts = sorted(path.parent for path in run.folder(unit).glob("*/saes.json"))
        begun = [attempt for attempt in attempts if not is_trained(attempt)]
        attempt = begun[0] if begun else begin(run, unit, wanted, len(attempts))
        train(run, unit, attempt, slot)
    left = [name for name in unit.sweep.variants if not run.records.has(unit.record(name))]
    if left:
        log, environment = run.folder(unit) / "measure.log", environment_of(slot, run.threads)
        run_process(["-m", "experiments.measure", unit.name, *run.argv], log, f"measuring {unit.name}", environment)


def begin(run: PlanRun, unit: Unit, wanted: list[str], number: int) -> Path:
    """Write the settings of a training: those of the first variant are the run's own, the others stand beside it."""
    sweep, (own, *others) = unit.sweep, wanted
    attempt = run.folder(unit) / f"{number:02d}"
    attempt.mkdir(parents=True, exist_ok=True)
    preset = {
        "checkpoint_every": 200, "keep_checkpoints": 1, **sweep.arguments, **sweep.variants[own],
        "eval_samples": 0, "seed": unit.seed, "layers": [unit.layer],
    }  # fmt: skip
    undone = {**SelOrthoConfig.default_settings(), **sweep.arguments}  # for settings of the first that others lack
    undone = {key: undone[key] for key in sweep.variants[own]}
    names = {name: name.replace(".", "-") for name in others}  # as a training takes them
    write_json(attempt / "preset.json", preset)
    write_json(attempt / "variants.json", {names[name]: {**undone, **sweep.variants[name]} for name in others})
    saes = {own: f"run/layer_{unit.layer}"} | {name: f"run/layer_{unit.layer}_{names[name]}" for name in others}
    write_json(attempt / "saes.json", saes)
    return attempt


def train(run: PlanRun, unit: Unit, attempt: Path, slot: int) -> None:
    """Train the variants of an attempt side by side, from its latest checkpoint on."""
    command = [
        str(SCRIPTS / "train.py"), "--preset", str(attempt / "preset.json"), "--activations", str(run.activations),
        "--output_dir", str(attempt / "run"), "--cpu_threads", str(run.threads),
        "--resume_from_checkpoint", "auto",
    ]  # fmt: skip
    if len(saes_of(attempt)) > 1:
        command += ["--variants", str(attempt / "variants.json")]
    environment = environment_of(slot, run.threads)
    run_process(command, attempt / "train.log", f"the training of {unit.name}", environment)
    assert is_trained(attempt), "a training that ends well leaves all of its SAEs"
    shutil.rmtree(attempt / "run" / CHECKPOINTS, ignore_errors=True)


def is_trained(attempt: Path) -> bool:
    """Tell whether all SAEs of a training are trained to its end."""
    return all((folder / RUN).is_file() for folder in saes_of(attempt).values())


def seeds_record(unit: Unit, variant: str) -> str:
    """Return the name of the record that compares the seeds of a variant."""
    return f"{unit.sweep.name}/{variant}-layer{unit.layer}-seeds"


def is_compared(run: PlanRun, unit: Unit, variant: str) -> bool:
    """Tell whether as many seeds as the plan has have been compared, or there is nothing to compare."""
    name = seeds_record(unit, variant)
    return run.plan.seeds == 1 or (run.records.has(name) and run.records.read(name)["seeds"] >= run.plan.seeds)


def compare_sweeps(run: PlanRun) -> None:
    """Write how alike the seeds of each variant are."""
    seeds = range(run.plan.seeds)
    for unit in (unit for unit in run.plan.units() if unit.seed == 0):
        for variant in unit.sweep.compared:
            folders = [run.trained_folder(dataclasses.replace(unit, seed=seed), variant) for seed in seeds]
            known = [folder for folder in folders if folder is not None]
            if not is_compared(run, unit, variant) and len(known) == len(seeds):
                facts = {"sweep": unit.sweep.name, "variant": variant, "layer": unit.layer, "seeds": len(seeds)}
                run.records.write(seeds_record(unit, variant), {"kind": "seeds", **facts, **compare_seeds(known)})


def example_variants(plan: Plan) -> list[str]:
    """List the twin, the variant whose pairs are shown beside the twin's, and the control without penalty."""
    return [TWIN, *(plan.examples[key] for key in ("variant", "control") if key in plan.examples)]


def has_examples(run: PlanRun) -> bool:
    """Tell whether there are examples, of those SAEs that the plan names."""
    known = run.records.read(EXAMPLES) if run.records.has(EXAMPLES) else {}
    return bool(known) and all(known.get(key) == run.plan.examples.get(key) for key in ("sweep", "variant", "control"))


def find_examples(run: PlanRun) -> None:
    """Keep what pairs of a twin became in its SAE, and as a control in another one without penalty."""
    plan = run.plan
    if not plan.examples or has_examples(run):
        return
    sweep = next(sweep for sweep in plan.sweeps if sweep.name == plan.examples["sweep"])
    unit = Unit(sweep, sweep.layers[0], EXAMPLE_SEED)
    twin, *others = (str(run.trained_folder(unit, variant)) for variant in example_variants(plan))
    found = []
    for number, other in enumerate(others):
        index = run.work / f"examples-{number}"
        command = [
            str(SCRIPTS / "build_feature_index.py"), twin, "--twin", other, "--output", str(index), "--overwrite",
            "--tokens", "200000",
        ]  # fmt: skip
        if "dataset" in plan.harvest:
            command += ["--dataset", str(plan.harvest["dataset"])]
        run_process(command, run.work / "examples.log", "the index of the examples")
        found.append(read_examples(index))
    control = {"control_classes": found[1]["classes"]} if len(found) > 1 else {}
    run.records.write(EXAMPLES, {"kind": EXAMPLES, **plan.examples, "seed": EXAMPLE_SEED, **found[0], **control})


def run_synthetic(run: PlanRun) -> None:
    """Train and score on synthetic data what has no record."""

    def work(synthetic: SyntheticRun, slot: int) -> None:
        log = run.work / "synthetic" / f"{Path(synthetic.name).name}.log"
        command = ["-m", "experiments.synthetic_training", synthetic.name, *run.argv]
        run_process(command, log, synthetic.name, environment_of(slot, run.threads))

    left = [synthetic for synthetic in run.plan.synthetic if any(missing_scores(synthetic, run.records))]
    side_by_side(left, work, run.jobs, "synthetic data")
