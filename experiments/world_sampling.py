"""Tokens of a synthetic world: drawn at will, and as SAELens's own functions want them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from experiments.worlds import World


def derived_seed(purpose: str, seed: int) -> int:
    """A seed for one purpose, so that equal seeds of a run draw unrelated numbers.

    Else the weights that an SAE starts from and the directions of a world of the same seed were the same numbers.
    """
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "big")


class SyntheticWorld:
    """A world that can be sampled.

    Args:
        world: what defines it.
        model: SAELens's `SyntheticModel` of it.

    Attributes:
        directions: of the true features, (F, d) float32, norm 1.
        parents: number of each feature's parent, (F,) int64; -1 for a feature without one.
    """

    def __init__(self, world: World, model: Any) -> None:
        self.world, self.model = world, model
        self.directions: Tensor = model.feature_dict.feature_vectors.detach()
        self.parents = torch.full((world.features,), -1)
        nodes = list(model.hierarchy.roots) if model.hierarchy is not None else []
        while nodes:
            node = nodes.pop()
            for child in node.children:
                self.parents[child.feature_index] = node.feature_index
            nodes.extend(node.children)

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw tokens: activations (B, d) and the strengths (B, F) of the true features in them, float32, on the CPU.

        The same state of the generator, which must be one of the CPU, gives the same tokens; the random numbers of the
        process stay as they are.
        """
        with _random_numbers_of(generator):
            strengths = self.model.activation_generator.sample(batch)
            return self.activations_of(strengths), strengths

    @torch.no_grad()
    def activations_of(self, strengths: Tensor) -> Tensor:
        """Activations (B, d) of the strengths (B, F), with noise from the random numbers of the process."""
        activations = self.model.feature_dict(strengths).detach()
        if self.world.noise:
            scale = self.world.noise / math.sqrt(self.world.dimensions)
            activations = activations + scale * torch.randn_like(activations)
        return activations

    def stream(self, seed: int) -> WorldStream:
        """Tokens for SAELens's functions; those that [`sample`] draws with a generator of this seed."""
        return WorldStream(self, torch.Generator().manual_seed(seed))


class WorldStream:
    """What SAELens's functions take as an activation generator, drawing from a generator of its own.

    Its `dictionary` is what they take as a feature dictionary: it turns the strengths that were drawn last into
    activations.
    """

    def __init__(self, world: SyntheticWorld, generator: torch.Generator) -> None:
        self.world, self.generator = world, generator
        self.dictionary = StreamDictionary(self)

    def sample(self, batch: int) -> Tensor:
        """Strengths of the true features, (B, F)."""
        with _random_numbers_of(self.generator):
            return self.world.model.activation_generator.sample(batch)

    __call__ = sample


class StreamDictionary(nn.Module):
    """What SAELens's functions take as a feature dictionary: strengths (B, F) in, activations (B, d) out."""

    def __init__(self, stream: WorldStream) -> None:
        super().__init__()
        self._stream = stream
        self.register_buffer("feature_vectors", stream.world.directions)

    def forward(self, strengths: Tensor) -> Tensor:
        """Activations (B, d), with the noise of the stream."""
        with _random_numbers_of(self._stream.generator):
            return self._stream.world.activations_of(strengths)


@contextmanager
def _random_numbers_of(generator: torch.Generator) -> Iterator[None]:
    """Let what draws from the process's random numbers draw from a generator instead, as SAELens takes none."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.get_rng_state())
