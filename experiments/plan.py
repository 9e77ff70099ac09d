"""A plan of experiments, a JSON file written by hand: which SAEs are trained, on what, with which seeds, and for what.

A *sweep* trains the variants of a recipe side by side, so that all of them see the same batches and start from the same
weights; a *unit* is one sweep at one layer with one seed, and one training process. Sections are what a reader asks
for: a sweep belongs to those that its results are shown in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.summaries import TWIN
from experiments.world_sampling import derived_seed
from hf_selortho.errors import SelOrthoError
from hf_selortho.training.arguments import SETTING_NAMES, read_named

PLANS = Path(__file__).with_name("plans")
SECTIONS = ("table1", "ablations", "layers", "limits", "pareto", "ground_truth")


@dataclass(frozen=True)
class Sweep:
    """Variants of one recipe, trained side by side."""

    name: str
    sections: tuple[str, ...]
    layers: tuple[int, ...]
    arguments: dict[str, Any]  # of scripts/train.py, for all of the variants
    variants: dict[str, dict[str, Any]]  # settings of the SAE by name
    reference: str | None = None  # the sweep and variant whose FVU a budget is measured against, "topk/none"
    compared: tuple[str, ...] = ()  # variants whose seeds are compared with one another
    measures: dict[str, Any] = field(default_factory=dict)  # sizes of its measurements, in place of the plan's

    @property
    def referred(self) -> tuple[str, str] | None:
        """Names of the sweep and of the variant that the reference is."""
        if self.reference is None:
            return None
        sweep, _, variant = self.reference.partition("/")
        return sweep, variant


@dataclass(frozen=True)
class Unit:
    """One training process: a sweep at one layer, with one seed."""

    sweep: Sweep
    layer: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.sweep.name}-layer{self.layer}-seed{self.seed}"

    def record(self, variant: str) -> str:
        """Name of the record of one of its SAEs, without the suffix."""
        return f"{self.sweep.name}/{variant}-layer{self.layer}-seed{self.seed}"


@dataclass(frozen=True)
class WorldRun:
    """Training on synthetic activations whose features are known: one world, one recipe, one seed, several variants."""

    world: dict[str, Any]
    recipe: str
    seed: int
    settings: dict[str, Any]  # of the SAE, for all variants
    variants: dict[str, dict[str, Any]]
    training: dict[str, Any]  # steps, batch_size, learning_rate
    peers: tuple[str, ...] = ()  # trainers of sae-lens

    @property
    def name(self) -> str:
        """Of its record, without the suffix."""
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
    worlds: tuple[WorldRun, ...] = ()
    measures: dict[str, Any] = field(default_factory=dict)  # sizes of the measurements
    timing: dict[str, Any] = field(default_factory=dict)  # arguments of scripts/benchmark.py, for Table 1
    examples: dict[str, str] = field(default_factory=dict)  # sweep, variant beside whose twin pairs are shown, control

    @property
    def layers(self) -> list[int]:
        """Layers whose activations are harvested."""
        return sorted({layer for sweep in self.sweeps for layer in sweep.layers})

    def units(self) -> list[Unit]:
        """Training processes in the order in which they run: the seeds of a sweep one after the other."""
        return [
            Unit(sweep, layer, seed) for sweep in self.sweeps for layer in sweep.layers for seed in range(self.seeds)
        ]

    def only(self, sections: Sequence[str]) -> Plan:
        """The part that these sections show."""
        kept = tuple(sweep for sweep in self.sweeps if set(sweep.sections) & set(sections))
        return replace(
            self,
            sweeps=kept,
            worlds=self.worlds if "ground_truth" in sections else (),
            timing=self.timing if "table1" in sections else {},
            examples=self.examples if "pareto" in sections else {},
        )


def list_plans() -> list[str]:
    """Names of the plans that come with the package."""
    return sorted(path.stem for path in PLANS.glob("*.json"))


def load_plan(name: str, *, quick: bool = False, seeds: int | None = None) -> Plan:
    """A plan by name, or from a JSON file.

    Args:
        name: of a plan that comes with the package, or the path of a .json file.
        quick: with the changes that the plan's `quick` has: the same questions, answered in minutes and badly.
        seeds: number of seeds in place of the plan's.

    Raises:
        SelOrthoError: there is no such plan, or something in it is not allowed; says what and where.
    """
    path, content = read_named("plan", name, PLANS)
    reader = _Reader(path, content)
    return reader.plan(path.stem, quick, seeds)


_SWEEP_KEYS = {"sections", "layers", "recipe", "arguments", "variants", "reference", "compared", "measures"}


class _Reader:
    """Makes a plan of the content of a file, and names the file in every error."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        known = {
            "description", "harvest", "label_column", "seeds", "training", "recipes", "variant_sets", "sweeps",
            "ground_truth", "measures", "timing", "examples", "quick",
        }  # fmt: skip
        self._refuse_unknown("the plan", content, known)

    def plan(self, name: str, quick: bool, seeds: int | None) -> Plan:
        content = merged(self.content, self.content.get("quick", {})) if quick else self.content
        sweeps = tuple(self._sweep(name, one, content) for name, one in content.get("sweeps", {}).items())
        count = seeds if seeds is not None else content.get("seeds", 3)
        if type(count) is not int or count < 1:
            raise SelOrthoError(f"seeds {count!r}: expected a whole number of at least 1")
        for sweep in sweeps:
            self._check_reference(sweep, sweeps)
        self._check_examples(content.get("examples", {}), sweeps)
        return Plan(
            name=f"{name}-quick" if quick else name,
            description=content.get("description", ""),
            harvest=content.get("harvest", {}),
            label_column=content.get("label_column"),
            seeds=count,
            sweeps=sweeps,
            worlds=tuple(self._worlds(content.get("ground_truth", {}), content, count)),
            measures=content.get("measures", {}),
            timing=content.get("timing", {}),
            examples=content.get("examples", {}),
        )

    def _sweep(self, name: str, one: Mapping[str, Any], content: Mapping[str, Any]) -> Sweep:
        where = f"sweep {name!r}"
        self._refuse_unknown(where, one, _SWEEP_KEYS)
        sections = tuple(one.get("sections", ()))
        for section in sections:
            self._one_of(f"{where}: section", section, SECTIONS)
        recipe = self._named("recipe", one.get("recipe"), content.get("recipes", {}), where)
        arguments = {**content.get("training", {}), **recipe, **one.get("arguments", {})}
        layers = tuple(one.get("layers", ()))
        if not layers or any(type(layer) is not int for layer in layers):
            raise SelOrthoError(f"{self.path}, {where}: layers {list(layers)}: expected decoder layers counted from 0")
        variants = self._variants(one.get("variants", ()), content, where)
        compared = tuple(one.get("compared", variants))
        for variant in compared:
            self._one_of(f"{where}: compared", variant, tuple(variants))
        return Sweep(
            name, sections, layers, arguments, variants, one.get("reference"), compared, one.get("measures", {})
        )

    def _variants(self, sets: Any, content: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
        """Settings by variant, of the sets that are named or of an object."""
        if isinstance(sets, dict):
            found = sets
        else:
            known = content.get("variant_sets", {})
            found = {key: value for name in sets for key, value in self._named("variants", name, known, where).items()}
        if not found:
            raise SelOrthoError(f"{self.path}, {where} has no variants: expected settings by name, or names of sets")
        for variant, settings in found.items():
            unknown = sorted(set(settings) - set(SETTING_NAMES))
            if unknown:
                raise SelOrthoError(
                    f"{self.path}, {where}, variant {variant!r}: {unknown[0]!r} is no setting of an SAE"
                )
        return dict(found)

    def _worlds(self, block: Mapping[str, Any], content: Mapping[str, Any], seeds: int) -> Iterable[WorldRun]:
        self._refuse_unknown("ground_truth", block, {"worlds", "recipes", "variants", "training", "peers"})
        recipes = block.get("recipes", {})
        for name, world in block.get("worlds", {}).items():
            for recipe in world.get("recipes", recipes):
                settings = self._named("recipe", recipe, recipes, f"world {name!r}")
                variants = self._variants(block.get("variants", ()), content, "ground_truth")
                peers = tuple(block.get("peers", {}).get(recipe, ()))
                for seed in range(seeds):  # every seed has a world of its own, the same one for each recipe
                    own = {"name": name, "seed": derived_seed(f"world {name}", seed), **world}
                    own.pop("recipes", None)
                    yield WorldRun(own, recipe, seed, settings, variants, block.get("training", {}), peers)

    def _check_reference(self, sweep: Sweep, sweeps: Sequence[Sweep]) -> None:
        if sweep.referred is None:
            return
        referred = next((other for other in sweeps if other.name == sweep.referred[0]), None)
        if referred is None or sweep.referred[1] not in referred.variants:
            raise SelOrthoError(
                f"{self.path}, sweep {sweep.name!r}: reference {sweep.reference!r} is no sweep/variant of this plan"
            )
        for what in ("sections", "layers"):  # or the reference would not be trained where only those are run
            lacking = [one for one in getattr(sweep, what) if one not in getattr(referred, what)]
            if lacking:
                raise SelOrthoError(
                    f"{self.path}, sweep {sweep.name!r}: {what} {lacking[0]!r} is not among those of its reference "
                    f"{sweep.reference!r}: {', '.join(map(str, getattr(referred, what)))}"
                )

    def _check_examples(self, examples: Mapping[str, str], sweeps: Sequence[Sweep]) -> None:
        if not examples:
            return
        self._refuse_unknown("examples", examples, {"sweep", "variant", "control"})
        variants = {sweep.name: tuple(sweep.variants) for sweep in sweeps}
        self._one_of("examples: sweep", examples.get("sweep"), tuple(variants))
        for key in ("variant", *({"control"} & examples.keys())):
            self._one_of(f"examples: {key}", examples.get(key), variants[examples["sweep"]])
        self._one_of(f"examples: sweep {examples['sweep']!r} needs the twin", TWIN, variants[examples["sweep"]])

    def _named(self, kind: str, name: Any, known: Mapping[str, Any], where: str) -> Any:
        self._one_of(f"{where}: {kind}", name, tuple(known))
        return known[name]

    def _one_of(self, what: str, value: Any, allowed: Sequence[str]) -> None:
        if value not in allowed:
            raise SelOrthoError(f"{self.path}, {what} {value!r}: expected one of {', '.join(allowed) or 'none'}")

    def _refuse_unknown(self, where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise SelOrthoError(
                f"{self.path}, {where}: {unknown[0]!r} is not known; expected some of {', '.join(sorted(known))}"
            )


def merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content with some values replaced, objects key by key; null removes a key."""
    result = dict(content)
    for key, value in changes.items():
        old = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(old, dict) and isinstance(value, dict):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result
