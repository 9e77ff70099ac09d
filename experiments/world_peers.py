"""SAELens's own SAEs, trained by SAELens on the batches that ours are trained on: what ours are compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments.world_sampling import SyntheticWorld
from experiments.world_training import TrainedSAE, input_statistics, scored, training_stream
from experiments.worlds import BATCH_SIZE, LEARNING_RATE, World, library, make_world
from hf_selortho.errors import SelOrthoError

# by the names of this module, what SAELens calls them
PEERS = {
    "standard": "standard",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka": "matryoshka_batchtopk",
}


def peer_settings(name: str, recipe: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """SAELens's settings of the peer of a recipe for ours.

    SAELens trains on activations as they are, ours on centred ones of mean squared norm 1. Times `scale`, our L1
    coefficient weighs the same against the reconstruction there.

    Args:
        name: "standard" (ReLU), "topk", "batchtopk" or "matryoshka" (batchtopk).
        recipe: settings of `SelOrthoConfig`, of which d_sae, k, l1_coefficient and matryoshka_prefixes are read;
            without prefixes these are an eighth, a quarter, a half and all of the features.
        scale: root mean squared norm of the centred activations.

    Raises:
        SelOrthoError: there is no such peer, or the recipe lacks what it needs.
    """
    if name not in PEERS:
        raise SelOrthoError(f"peer {name!r}: expected one of {', '.join(PEERS)}")
    needed = {"d_sae", "l1_coefficient" if name == "standard" else "k"}
    if missing := sorted(key for key in needed if recipe.get(key) is None):
        raise SelOrthoError(f"peer {name!r} needs {' and '.join(missing)}, which the recipe lacks: add it")
    d_sae = recipe["d_sae"]
    if name == "standard":
        return {"d_sae": d_sae, "l1_coefficient": recipe["l1_coefficient"] * scale}
    if name != "matryoshka":
        return {"d_sae": d_sae, "k": recipe["k"]}
    prefixes = recipe.get("matryoshka_prefixes") or [d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    return {"d_sae": d_sae, "k": recipe["k"], "matryoshka_widths": sorted({size for size in prefixes if size > 0})}


def train_peer(
    world: SyntheticWorld,
    name: str,
    settings: Mapping[str, Any],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> TrainedSAE:
    """Train an SAE of SAELens with its `train_toy_sae`, and turn it into the one that it would save for use.

    Its decoder bias starts at the mean of the activations, which ours take off beforehand: from zero, SAELens's topk
    reached an MCC of 0.69 where it reaches 0.84 from the mean.

    Args:
        world: what to learn.
        name: one of `PEERS`.
        settings: of SAELens's training configuration, such as those of [`peer_settings`].
        steps, batch_size, learning_rate: of Adam; the rate is constant.
        seed: of the initial weights, and of the batches, which are those of a [`WorldSource`] of this seed.

    Raises:
        SelOrthoError: SAELens refuses the settings, or is missing.
    """
    model, config = library("sae_lens.registry").get_sae_training_class(PEERS[name])
    stream = training_stream(world, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            sae = model(config(**{**settings, "d_in": world.world.dimensions}))
        except (TypeError, ValueError) as error:
            raise SelOrthoError(f"peer {name!r}: SAELens refuses the settings {dict(settings)}: {error}") from error
        with torch.no_grad():
            sae.b_dec.copy_(input_statistics(world)[0])
        started = time.perf_counter()
        library("sae_lens.synthetic").train_toy_sae(
            sae, stream.dictionary, stream, training_samples=steps * batch_size, batch_size=batch_size, lr=learning_rate
        )
        seconds = time.perf_counter() - started
        with TemporaryDirectory() as folder:
            sae.save_inference_model(Path(folder))
            return TrainedSAE(library("sae_lens").SAE.load_from_disk(folder), seconds)


def run_peers(
    world: World,
    names: Sequence[str],
    recipe: Mapping[str, Any],
    *,
    steps: int,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    samples: int = 50_000,
) -> dict[str, dict[str, float]]:
    """Train SAEs of SAELens on a world, one after the other, and score them as [`run_world`] does ours.

    Args:
        world: what to learn.
        names: some of "standard", "topk", "batchtopk" and "matryoshka".
        recipe: that of ours, as for [`peer_settings`].
        steps, batch_size, learning_rate, seed, samples: as for [`run_world`].

    Returns:
        The figures of [`score_sae`] and `training_seconds`, by name; the latter with the drawing of the tokens.

    Raises:
        SelOrthoError: as [`peer_settings`] and [`train_peer`].
    """
    made = make_world(world)
    _, scale = input_statistics(made)
    settings = {name: peer_settings(name, recipe, scale) for name in names}
    schedule: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    return {name: scored(train_peer(made, name, own, **schedule), made, samples) for name, own in settings.items()}
