"""Synthetic activations whose features are known, made by SAELens's synthetic models.

A world has `F` features, each a direction of norm 1 in `d` dimensions. On each token a few of them fire; its activation
is the sum of their directions times how strongly they fire, plus a bias and, if wanted, noise. In a hierarchical world
a child fires only where its parent does.

Needs the package sae-lens, of the extra `interop`; it is imported when a world is made, since that takes seconds.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from experiments.world_sampling import SyntheticWorld, derived_seed
from hf_selortho.errors import SelOrthoError

BATCH_SIZE, LEARNING_RATE = 1024, 1e-3  # tokens of a step and rate of Adam, where a training does not say its own

Structure = Literal["flat", "hierarchical"]
Firing = Literal["zipfian", "linear", "random", "constant"]


@dataclass(frozen=True)
class World:
    """Everything that defines a synthetic world, as JSON has it.

    Firing probabilities are those of SAELens: falling with the number of the feature from `max_probability` to
    `min_probability` (zipfian: as a power law; linear), drawn between the two (random) or all `max_probability`
    (constant). Features are numbered level by level, so in a falling order parents fire more often than children.

    With `compensate`, a child fires on the share p(child) / p(parent) of its parent's tokens. At the defaults that is
    0.6 below the roots and 0.87 below their children, whose parents are hardly ever seen alone: [`absorption_scores`]
    then has support for 136 of the 960 pairs at most. With probabilities from 0.9 to 0.0005 it is 0.16 and 0.17, and
    all 960 have.

    Raises:
        SelOrthoError: a value is not possible; names it.
    """

    name: str
    features: int = 1024
    dimensions: int = 256
    structure: Structure = "hierarchical"
    roots: int = 64  # trees; features beyond those that the trees have room for stand alone
    children: int = 4  # of each parent, at least 2
    depth: int = 2  # levels below the roots
    exclusive: float = 0.0  # share of the parents of which at most one child fires on a token
    scale_with_parent: bool = False  # whether a child fires in proportion to how strongly its parent does
    compensate: bool = True  # whether probabilities hold after children have been silenced with their parents
    firing: Firing = "zipfian"
    max_probability: float = 0.3
    min_probability: float = 0.01
    exponent: float = 1.0  # of the power law
    magnitude: float = 1.0  # mean strength of a feature that fires
    magnitude_std: float = 0.0
    bias: float = 1.0  # norm of the constant part of all activations
    noise: float = 0.0  # root mean squared norm of the Gaussian noise on each activation
    orthogonal_steps: int = 0  # that SAELens spreads the directions with; 0: as they are drawn
    seed: int = 0  # of the directions, the hierarchy and the probabilities

    def __post_init__(self) -> None:
        for name, (allowed, expected) in _RULES.items():
            if not allowed(value := getattr(self, name)):
                raise SelOrthoError(f"world {self.name!r}: {name}={value!r}, expected {expected}")
        if self.firing != "constant" and not 0 < self.min_probability < self.max_probability:
            raise SelOrthoError(
                f"world {self.name!r}: min_probability={self.min_probability}, expected a number between 0 and "
                f"max_probability={self.max_probability}; for equal ones, firing='constant'"
            )
        if self.structure == "hierarchical" and self.roots >= self.features:
            raise SelOrthoError(
                f"world {self.name!r}: roots={self.roots} leave no children among features={self.features}; lower them"
            )

    @property
    def superposition(self) -> float:
        """Features per dimension."""
        return self.features / self.dimensions

    def to_json(self) -> dict[str, Any]:
        """All fields by name, for [`from_json`]."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> World:
        """The world that [`to_json`] described.

        Raises:
            SelOrthoError: there is a field that no world has, or a value is not possible.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(content) - known):
            raise SelOrthoError(f"a world has no {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
        return cls(**content)


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


def _is_size(value: float) -> bool:
    return value >= 0 and math.isfinite(value)


_RULES: dict[str, tuple[Any, str]] = {
    "features": (lambda v: v >= 2, "at least 2"),
    "dimensions": (lambda v: v >= 2, "at least 2"),
    "structure": (lambda v: v in get_args(Structure), f"one of {', '.join(get_args(Structure))}"),
    "roots": (lambda v: v >= 1, "at least 1"),
    "children": (lambda v: v >= 2, "at least 2"),
    "depth": (lambda v: v >= 1, "at least 1"),
    "exclusive": (_is_share, "a share in [0, 1]"),
    "firing": (lambda v: v in get_args(Firing), f"one of {', '.join(get_args(Firing))}"),
    "max_probability": (lambda v: 0 < v <= 1, "a probability above 0"),
    "exponent": (lambda v: v > 0 and math.isfinite(v), "a finite number above 0"),
    "magnitude": (lambda v: v > 0 and math.isfinite(v), "a finite number above 0"),
    "magnitude_std": (_is_size, "a finite number of at least 0"),
    "bias": (_is_size, "a finite number of at least 0"),
    "noise": (_is_size, "a finite number of at least 0"),
    "orthogonal_steps": (lambda v: v >= 0, "at least 0"),
    "seed": (lambda v: 0 <= v < 1 << 32, "a number from 0 to 4294967295"),
}


def make_world(world: World) -> SyntheticWorld:
    """Build the synthetic model of a world with SAELens; the same world always has the same features.

    Raises:
        SelOrthoError: sae-lens is not installed.
    """
    lens = library("sae_lens.synthetic")
    seed = derived_seed("world", world.seed)
    initializer = lens.orthogonal_initializer(num_steps=world.orthogonal_steps) if world.orthogonal_steps else None
    hierarchy = None
    if world.structure == "hierarchical":
        hierarchy = lens.HierarchyConfig(
            total_root_nodes=world.roots,
            branching_factor=world.children,
            max_depth=world.depth,
            mutually_exclusive_portion=world.exclusive,
            compensate_probabilities=world.compensate,
            scale_children_by_parent=world.scale_with_parent,
        )
    bias: float | bool = world.bias or False  # 0 is no bias there either
    config = lens.SyntheticModelConfig(
        num_features=world.features,
        hidden_dim=world.dimensions,
        firing_probability=_firing(world, lens),
        hierarchy=hierarchy,
        std_firing_magnitudes=world.magnitude_std,
        mean_firing_magnitudes=world.magnitude,
        bias=bias,
        seed=seed,
    )
    with torch.random.fork_rng(devices=[]):
        dictionary = lens.FeatureDictionary(
            world.features, world.dimensions, bias=bias, initializer=initializer, seed=seed
        )
        return SyntheticWorld(world, lens.SyntheticModel(config, feature_dict=dictionary))


def _firing(world: World, lens: Any) -> Any:
    """SAELens's configuration of the firing probabilities."""
    if world.firing == "constant":
        return lens.ConstantFiringProbabilityConfig(world.max_probability)
    limits = {"max_prob": world.max_probability, "min_prob": world.min_probability}
    if world.firing == "zipfian":
        return lens.ZipfianFiringProbabilityConfig(exponent=world.exponent, **limits)
    kinds = {"linear": lens.LinearFiringProbabilityConfig, "random": lens.RandomFiringProbabilityConfig}
    return kinds[world.firing](**limits)


def library(name: str) -> Any:
    """A module of sae-lens, or of what comes with it.

    Raises:
        SelOrthoError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SelOrthoError(
            f"{error.name} is missing: worlds of known features need it; pip install 'hf_selortho[interop]'"
        ) from error
