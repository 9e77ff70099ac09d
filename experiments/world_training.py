"""Training on synthetic worlds: variants of our SAE, side by side on the same batches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from experiments.world_sampling import SyntheticWorld, WorldStream, derived_seed
from experiments.world_scores import Scored, score_sae
from experiments.worlds import BATCH_SIZE, LEARNING_RATE, World, make_world
from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.data.buffer import ActivationBatch
from hf_selortho.errors import ConfigError
from hf_selortho.language_models.capture import TokenOrigins
from hf_selortho.modeling_selortho import SelOrthoSAE
from hf_selortho.training.arguments import RunArguments
from hf_selortho.training.sae_trainer import SAETrainer

_STATISTICS_TOKENS = 16384  # that the input normalisation is estimated on


@dataclass(frozen=True)
class TrainedSAE:
    """An SAE after its training, on the CPU."""

    sae: Scored
    seconds: float  # that its own steps took; for those of SAELens, with the drawing of the tokens


class WorldSource:
    """Batches of a world, as a `BatchSource` of the training loop.

    Args:
        world: where the tokens are drawn.
        batch_size: tokens of a batch.
        seed: the same one gives the same batches, those of [`training_stream`].
    """

    def __init__(self, world: SyntheticWorld, batch_size: int, seed: int) -> None:
        self.world, self.batch_size = world, batch_size
        self._generator = torch.Generator().manual_seed(derived_seed("batches", seed))
        self._served = 0

    def next_batch(self) -> ActivationBatch:
        """Fresh tokens (batch_size, d); the number of the batch, counted from 0, is their document."""
        activations, _ = self.world.sample(self.batch_size, self._generator)
        zeros, rows = torch.zeros(self.batch_size, dtype=torch.int64), torch.arange(self.batch_size)
        origins = TokenOrigins(document_ids=zeros + self._served, positions=rows, token_ids=zeros, context_ids=zeros)
        self._served += 1
        return ActivationBatch({0: activations}, origins)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The random numbers to come, and how many batches there were."""
        return {"generator": self._generator.get_state()}, {"served": self._served}

    def hold(self, reader: Future[None]) -> None:
        """Nothing that [`state_dict`] gave ever changes."""

    def load_state_dict(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Go on exactly where the saved source stopped."""
        self._generator.set_state(tensors["generator"])
        self._served = rest["served"]

    def totals(self) -> dict[str, int]:
        """Tokens that were drawn."""
        return {"tokens_kept": self._served * self.batch_size}

    def memory_bytes(self) -> int:
        """Nothing is held."""
        return 0

    def release(self) -> None:
        """There is nothing to let go of."""


def training_stream(world: SyntheticWorld, seed: int) -> WorldStream:
    """The tokens of a [`WorldSource`] of this seed, as SAELens's functions want them."""
    return world.stream(derived_seed("batches", seed))


def input_statistics(world: SyntheticWorld) -> tuple[Tensor, float]:
    """Mean (d,) of a world's activations and root mean squared norm about it, from 16,384 tokens in float64."""
    generator = torch.Generator().manual_seed(derived_seed("statistics", 0))
    activations = world.sample(_STATISTICS_TOKENS, generator)[0].double()
    mean = activations.mean(0)
    return mean.float(), float((activations - mean).square().sum(1).mean().sqrt())


def new_variants(
    world: SyntheticWorld, recipe: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, SelOrthoSAE]:
    """Fresh SAEs by name, all from the same random numbers, with the world's mean and scale in their buffers.

    Args:
        world: that they are to read; its number of dimensions is their `d_in`.
        recipe: settings of `SelOrthoConfig` that all of them share, such as d_sae, activation and k.
        variants: those that each of them has of its own, by name.
        seed: of the initial weights.

    Raises:
        ConfigError: a setting is not allowed; names the variant.
    """
    mean, scale = input_statistics(world)
    saes = {}
    for name, settings in variants.items():
        try:
            config = SelOrthoConfig(**{**recipe, **settings, "d_in": world.world.dimensions})
        except ConfigError as error:
            raise ConfigError(f"variant {name!r}: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            saes[name] = SelOrthoSAE(config)
        if config.input_normalization == "standard":
            saes[name].set_input_statistics(mean, scale)
    return saes


def train_variants(
    saes: Mapping[str, SelOrthoSAE], source: WorldSource, arguments: RunArguments, progress: bool = True
) -> dict[str, TrainedSAE]:
    """Train SAEs side by side on the same batches, each with a [`SAETrainer`] of its own, on the CPU.

    Args:
        saes: fresh ones by name; they are changed.
        source: of the batches.
        arguments: of the optimisation; what they say of files, evaluation and variants has no effect.
        progress: show a bar.

    Raises:
        NonFiniteError: names the step, and where NaN or infinity first appeared.
    """
    accelerator = Accelerator(cpu=True)
    trainers = {name: SAETrainer(accelerator, sae.train(), arguments, None, name=name) for name, sae in saes.items()}
    seconds = dict.fromkeys(saes, 0.0)
    for _ in tqdm(range(arguments.max_steps), desc="training", unit="step", disable=not progress):
        batch = source.next_batch()
        for name, trainer in trainers.items():
            started = time.perf_counter()
            trainer.train_step(batch)
            seconds[name] += time.perf_counter() - started
    return {name: TrainedSAE(sae.eval(), seconds[name]) for name, sae in saes.items()}


def run_world(
    world: World,
    recipe: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    *,
    steps: int,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    samples: int = 50_000,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Train variants of our SAE on a world and score them.

    Args:
        world: what to learn.
        recipe, variants: settings of `SelOrthoConfig`, as for [`new_variants`].
        steps, batch_size, learning_rate: of Adam; the rate is constant.
        seed: of the initial weights and of the batches. The tokens of the scores are the same for every seed.
        samples: tokens that the SAEs are scored on.
        progress: show a bar.

    Returns:
        The figures of [`score_sae`] and `training_seconds`, by variant.

    Raises:
        SelOrthoError: a setting is not allowed, something became NaN or infinity, or sae-lens is missing.
    """
    made = make_world(world)
    saes = new_variants(made, recipe, variants, seed)
    arguments = RunArguments(max_steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    trained = train_variants(saes, WorldSource(made, batch_size, seed), arguments, progress)
    return {name: scored(one, made, samples) for name, one in trained.items()}


def scored(trained: TrainedSAE, world: SyntheticWorld, samples: int) -> dict[str, float]:
    """The figures of [`score_sae`], and how long the training took."""
    return {**score_sae(trained.sae, world, samples=samples), "training_seconds": trained.seconds}
