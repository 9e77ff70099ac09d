"""Synthetic activations whose features are known, made by SAELens's synthetic models.

There are `F` features, each a direction of norm 1 in `d` dimensions. On each token a few of them fire; its activation
is the sum of their directions times how strongly they fire, plus a bias and, if wanted, noise. In a hierarchy a child
fires only where its parent does. Needs sae-lens, of the extra `interop`.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_selortho.errors import SelOrthoError

_STATISTICS_TOKENS = 16384  # that the input normalisation is estimated on


@dataclass(frozen=True)
class World:
    """Everything that defines a synthetic data set, as records have it.

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
    structure: Literal["flat", "hierarchical"] = "hierarchical"
    roots: int = 64  # trees; features beyond those that the trees have room for stand alone
    children: int = 4  # of each parent, at least 2
    depth: int = 2  # levels below the roots
    exclusive: float = 0.0  # share of the parents of which at most one child fires on a token
    scale_with_parent: bool = False  # whether a child fires in proportion to how strongly its parent does
    compensate: bool = True  # whether probabilities hold after children have been silenced with their parents
    firing: Literal["zipfian", "linear", "random", "constant"] = "zipfian"
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
        possible = {  # SAELens checks the rest, or trains on what it makes of it
            "structure": self.structure in ("flat", "hierarchical"),
            "roots": self.structure == "flat" or self.roots < self.features,
            "max_probability": 0 < self.max_probability <= 1,
            "min_probability": self.firing == "constant" or 0 < self.min_probability < self.max_probability,
            "noise": 0 <= self.noise < math.inf,
        }
        if wrong := [name for name, holds in possible.items() if not holds]:
            raise SelOrthoError(f"world {self.name!r}: {wrong[0]}={getattr(self, wrong[0])!r} is not possible")

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> World:
        """Return the world that a plan or a record describes.

        Raises:
            SelOrthoError: there is a field that no world has.
        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(content) - set(known)):
            raise SelOrthoError(f"a world has no {', '.join(unknown)}; expected some of {', '.join(known)}")
        return cls(**content)


class SyntheticData:
    """Draws the tokens of a world; the same world always has the same features.

    Attributes:
        directions: of the true features, (F, d) float32, norm 1.
        parents: number of each feature's parent, (F,) int64; -1 for a feature without one.

    Raises:
        SelOrthoError: SAELens refuses the world, or is not installed.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        try:
            self.model = _make_model(world)
        except (TypeError, ValueError, KeyError) as error:
            raise SelOrthoError(f"world {world.name!r}: SAELens refuses it: {error}") from error
        self.directions: Tensor = self.model.feature_dict.feature_vectors.detach()
        self.parents = torch.full((world.features,), -1)
        nodes = list(self.model.hierarchy.roots) if self.model.hierarchy is not None else []
        while nodes:
            node = nodes.pop()
            for child in node.children:
                self.parents[child.feature_index] = node.feature_index
            nodes.extend(node.children)

    @property
    def children(self) -> Tensor:
        """Return the numbers of the features that have a parent."""
        return (self.parents >= 0).nonzero()[:, 0]

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw tokens: activations (B, d) and the strengths (B, F) of the true features in them, float32, on the CPU.

        The same state of the generator, one of the CPU, gives the same tokens.
        """
        with _random_numbers_of(generator):
            strengths = self.model.activation_generator.sample(batch)
            return self.activations_of(strengths), strengths

    @torch.no_grad()
    def activations_of(self, strengths: Tensor) -> Tensor:
        """Return activations (B, d) of the strengths (B, F), with noise from the random numbers of the process."""
        activations: Tensor = self.model.feature_dict(strengths).detach()
        if self.world.noise:
            scale = self.world.noise / math.sqrt(self.world.dimensions)
            activations = activations + scale * torch.randn_like(activations)
        return activations

    def statistics(self) -> tuple[Tensor, float]:
        """Return the mean (d,) of the activations and their root mean squared norm about it, from 16,384 tokens."""
        generator = torch.Generator().manual_seed(derived_seed("statistics", 0))
        activations = self.sample(_STATISTICS_TOKENS, generator)[0].double()
        mean = activations.mean(0)
        return mean.float(), float((activations - mean).square().sum(1).mean().sqrt())


class TokenStream(nn.Module):
    """What SAELens's functions take as activation generator and as feature dictionary.

    Its tokens are those that [`SyntheticData.sample`] draws with a generator of this seed: `sample` draws the strengths
    of a batch, a call turns them into activations.
    """

    def __init__(self, data: SyntheticData, seed: int) -> None:
        super().__init__()
        self.data, self.generator = data, torch.Generator().manual_seed(seed)
        self.register_buffer("feature_vectors", data.directions)

    def sample(self, batch: int) -> Tensor:
        """Draw strengths of the true features, (B, F)."""
        with _random_numbers_of(self.generator):
            strengths: Tensor = self.data.model.activation_generator.sample(batch)
            return strengths

    def forward(self, strengths: Tensor) -> Tensor:
        """Return activations (B, d) of the strengths (B, F), with noise."""
        with _random_numbers_of(self.generator):
            return self.data.activations_of(strengths)


def derived_seed(purpose: str, seed: int) -> int:
    """Return a seed for one purpose, so that equal seeds of a run draw unrelated numbers.

    Else the weights that an SAE starts from and the directions of a world of the same seed were the same numbers.
    """
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "big")


def sae_lens(module: str = "sae_lens") -> Any:
    """Import a module of sae-lens, which takes seconds.

    Raises:
        SelOrthoError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SelOrthoError(
            f"{error.name} is missing: synthetic data needs it; pip install 'hf_selortho[interop]'"
        ) from error


def _make_model(world: World) -> Any:
    """Return SAELens's synthetic model of a world."""
    lens, seed = sae_lens("sae_lens.synthetic"), derived_seed("world", world.seed)
    limits = {"max_prob": world.max_probability, "min_prob": world.min_probability}
    firing = {
        "constant": lambda: lens.ConstantFiringProbabilityConfig(world.max_probability),
        "zipfian": lambda: lens.ZipfianFiringProbabilityConfig(exponent=world.exponent, **limits),
        "linear": lambda: lens.LinearFiringProbabilityConfig(**limits),
        "random": lambda: lens.RandomFiringProbabilityConfig(**limits),
    }[world.firing]
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
        firing_probability=firing(),
        hierarchy=hierarchy,
        std_firing_magnitudes=world.magnitude_std,
        mean_firing_magnitudes=world.magnitude,
        bias=bias,
        seed=seed,
    )
    spread = lens.orthogonal_initializer(num_steps=world.orthogonal_steps) if world.orthogonal_steps else None
    with torch.random.fork_rng(devices=[]):
        directions = lens.FeatureDictionary(world.features, world.dimensions, bias=bias, initializer=spread, seed=seed)
        return lens.SyntheticModel(config, feature_dict=directions)


@contextmanager
def _random_numbers_of(generator: torch.Generator) -> Iterator[None]:
    """Let what draws from the process's random numbers draw from a generator instead, as SAELens takes none."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.get_rng_state())
