"""Plans of experiments, JSON files written by hand: which SAEs are trained, on what, with which seeds, and for what.

A *sweep* trains the variants of a recipe side by side, so that all of them see the same batches and start from the same
weights; a *unit* is one sweep at one layer with one seed, and one training process. Sections are what a reader asks
for: a sweep belongs to those that its results are shown in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.synthetic_data import derived_seed
from hf_selortho.errors import SelOrthoError
from hf_selortho.training.arguments import SETTING_NAMES, read_named

PLANS = Path(__file__).with_name("plans")
SECTIONS = ("table1", "ablations", "layers", "limits", "pareto", "ground_truth")
TWIN = "none"  # the variant without penalty, which every other one of its sweep is compared with

_KEYS = (
    "description", "harvest", "label_column", "seeds", "training", "recipes", "variant_sets", "sweeps", "ground_truth",
    "measures", "timing", "examples", "quick",
)  # fmt: skip
_SWEEP_KEYS = ("sections", "layers", "recipe", "arguments", "variants", "compared", "measures")
_SYNTHETIC_KEYS = ("worlds", "recipes", "variants", "training", "peers")


@dataclass(frozen=True)
class Sweep:
    """Variants of one recipe, trained side by side."""

    name: str
    sections: tuple[str, ...]
    layers: tuple[int, ...]
    arguments: dict[str, Any]  # of scripts/train.py, for all of the variants
    variants: dict[str, dict[str, Any]]  # settings of the SAE by name
    compared: tuple[str, ...] = ()  # variants whose seeds are compared with one another
    measures: dict[str, Any] = field(default_factory=dict)  # sizes of its measurements, in place of the plan's


@dataclass(frozen=True)
class Unit:
    """One training process: a sweep at one layer, with one seed."""

    sweep: Sweep
    layer: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.sweep.name}-layer{self.layer}-seed{self.seed}"

    def record(self, variant: str) -> str:
        """Name of the record of one of its SAEs, without the suffix."""
        return f"{self.sweep.name}/{variant}-layer{self.layer}-seed{self.seed}"


@dataclass(frozen=True)
class SyntheticRun:
    """Training on synthetic data: one world, one recipe, one seed, several variants."""

    world: dict[str, Any]
    recipe: str
    seed: int
    settings: dict[str, Any]  # of the SAE, for all variants
    variants: dict[str, dict[str, Any]]
    training: dict[str, Any]  # steps, batch_size, learning_rate
    baselines: tuple[str, ...] = ()  # trainers of sae-lens

    @property
    def name(self) -> str:
        """Name of its record, without the suffix."""
        return f"ground_truth/{self.world['name']}-{self.recipe}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What a plan's file says."""

    name: str
    description: str
    harvest: dict[str, Any]  # arguments of scripts/cache_activations.py
    label_column: str | None
    seeds: int
    sweeps: tuple[Sweep, ...]
    synthetic: tuple[SyntheticRun, ...] = ()
    measures: dict[str, Any] = field(default_factory=dict)  # sizes of the measurements
    timing: dict[str, Any] = field(default_factory=dict)  # arguments of the benchmark, for Table 1
    examples: dict[str, str] = field(default_factory=dict)  # sweep, variant beside whose twin pairs are shown, control

    @property
    def layers(self) -> list[int]:
        """Layers whose activations are cached."""
        return sorted({layer for sweep in self.sweeps for layer in sweep.layers})

    def units(self) -> list[Unit]:
        """Training processes in the order in which they run: the seeds of a sweep one after the other."""
        return [Unit(sweep, layer, s) for sweep in self.sweeps for layer in sweep.layers for s in range(self.seeds)]

    def only(self, sections: Iterable[str]) -> Plan:
        """The part that these sections show."""
        wanted = set(sections)
        return replace(
            self,
            sweeps=tuple(sweep for sweep in self.sweeps if wanted & set(sweep.sections)),
            synthetic=self.synthetic if "ground_truth" in wanted else (),
            timing=self.timing if "table1" in wanted else {},
            examples=self.examples if "pareto" in wanted else {},
        )


def list_plans() -> list[str]:
    """Names of the plans that come with the study."""
    return sorted(path.stem for path in PLANS.glob("*.json"))


def load_plan(name: str, *, quick: bool = False, seeds: int | None = None) -> Plan:
    """Load a plan by name, or from a JSON file.

    Args:
        name: of a plan that comes with the study, or the path of a .json file.
        quick: with the changes that the plan's `quick` has: the same questions, answered in minutes and badly.
        seeds: number of seeds in place of the plan's.

    Raises:
        SelOrthoError: there is no such plan, or something in it is not allowed; says what and where.
    """
    path, content = read_named("plan", name, PLANS)
    try:
        _check_names("the plan", content, _KEYS)
        content = merged(content, content.get("quick", {})) if quick else content
        count = seeds if seeds is not None else content.get("seeds", 3)
        if type(count) is not int or count < 1:
            raise SelOrthoError(f"seeds {count!r}: expected a whole number of at least 1")
        sweeps = tuple(_sweep(name, sweep, content) for name, sweep in content.get("sweeps", {}).items())
        _check_examples(content.get("examples", {}), {sweep.name: sweep for sweep in sweeps})
        synthetic = tuple(_synthetic(content.get("ground_truth", {}), content, count))
    except SelOrthoError as error:
        raise SelOrthoError(f"{path}, {error}") from error
    return Plan(
        name=f"{path.stem}-quick" if quick else path.stem,
        description=content.get("description", ""),
        harvest=content.get("harvest", {}),
        label_column=content.get("label_column"),
        seeds=count,
        sweeps=sweeps,
        synthetic=synthetic,
        **{key: content.get(key, {}) for key in ("measures", "timing", "examples")},
    )


def merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace some values of an object, objects within it key by key; null removes a key."""
    result = {key: value for key, value in content.items() if changes.get(key, value) is not None}
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        elif value is not None:
            result[key] = value
    return result


def _sweep(name: str, block: Mapping[str, Any], content: Mapping[str, Any]) -> Sweep:
    where = f"sweep {name!r}"
    _check_names(where, block, _SWEEP_KEYS)
    _check_names(f"{where}: sections", block.get("sections", ()), SECTIONS)
    layers = tuple(block.get("layers", ()))
    if not layers or any(type(layer) is not int for layer in layers):
        raise SelOrthoError(f"{where}: layers {list(layers)}: expected decoder layers counted from 0")
    recipe = _named(f"{where}: recipe", block.get("recipe"), content.get("recipes", {}))
    variants = _variants(block.get("variants", ()), content, where)
    compared = tuple(block.get("compared", variants))
    _check_names(f"{where}: compared", compared, variants)
    return Sweep(
        name=name,
        sections=tuple(block.get("sections", ())),
        layers=layers,
        arguments={**content.get("training", {}), **recipe, **block.get("arguments", {})},
        variants=variants,
        compared=compared,
        measures=block.get("measures", {}),
    )


def _variants(block: Any, content: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Settings by variant, of the sets that are named or of an object."""
    sets = content.get("variant_sets", {})
    blocks = [block] if isinstance(block, dict) else [_named(f"{where}: variants", name, sets) for name in block]
    variants = {name: settings for part in blocks for name, settings in part.items()}
    if not variants:
        raise SelOrthoError(f"{where} has no variants: expected settings by name, or names of sets")
    for variant, settings in variants.items():
        _check_names(f"{where}, variant {variant!r}", settings, SETTING_NAMES)
    return variants


def _synthetic(block: Mapping[str, Any], content: Mapping[str, Any], seeds: int) -> Iterable[SyntheticRun]:
    _check_names("ground_truth", block, _SYNTHETIC_KEYS)
    recipes = block.get("recipes", {})
    for name, world in block.get("worlds", {}).items():
        for recipe in world.get("recipes", recipes):
            settings = _named(f"world {name!r}: recipe", recipe, recipes)
            variants = _variants(block.get("variants", ()), content, "ground_truth")
            for seed in range(seeds):  # every seed has a world of its own, the same one for each recipe
                own = {"name": name, "seed": derived_seed(f"world {name}", seed), **world}
                own.pop("recipes", None)
                baselines = tuple(block.get("peers", {}).get(recipe, ()))
                yield SyntheticRun(own, recipe, seed, settings, variants, block.get("training", {}), baselines)


def _check_examples(examples: Mapping[str, str], sweeps: Mapping[str, Sweep]) -> None:
    if examples:
        _check_names("examples", examples, ("sweep", "variant", "control"))
        sweep = _named("examples: sweep", examples.get("sweep"), sweeps)
        shown = [TWIN, *(name for key, name in examples.items() if key != "sweep")]
        _check_names(f"examples: variants of sweep {sweep.name!r}", shown, sweep.variants)


def _named(what: str, name: Any, known: Mapping[str, Any]) -> Any:
    _check_names(what, [name], known)
    return known[name]


def _check_names(what: str, names: Iterable[Any], known: Iterable[str]) -> None:
    """Refuse a name that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            raise SelOrthoError(f"{what}: {name!r} is not known; expected one of {', '.join(known) or 'none'}")
