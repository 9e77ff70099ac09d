"""SAEs trained on tiny worlds: ours side by side, and those of SAELens on the same batches."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from experiments.world_peers import PEERS, peer_settings, run_peers
from experiments.world_sampling import SyntheticWorld
from experiments.world_scores import score_sae
from experiments.world_training import (
    WorldSource,
    input_statistics,
    new_variants,
    run_world,
    train_variants,
    training_stream,
)
from experiments.worlds import World, make_world
from hf_selortho import SelOrthoError
from hf_selortho.errors import ConfigError
from hf_selortho.language_models.capture import only
from hf_selortho.training.arguments import RunArguments

SMALL = World("small", features=24, dimensions=16, roots=4, children=2, max_probability=0.3, min_probability=0.05)
RECIPE = {"d_sae": 24, "activation": "topk", "k": 4, "l1_coefficient": 0.04, "pair_fraction": 0.05}


@pytest.fixture(scope="module", autouse=True)
def _sae_lens():
    pytest.importorskip("sae_lens")


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def small() -> SyntheticWorld:
    return make_world(SMALL)


def test_a_source_gives_the_same_batches_and_goes_on_where_it_stopped(small) -> None:
    source, again, stream = WorldSource(small, 32, 4), WorldSource(small, 32, 4), training_stream(small, 4)
    for number in range(3):
        batch = source.next_batch()
        assert torch.equal(only(batch.by_layer), only(again.next_batch().by_layer))
        assert torch.equal(only(batch.by_layer), stream.dictionary(stream.sample(32)))
        assert len(batch.origins) == 32 and batch.origins.document_ids.unique().tolist() == [number]
    resumed = WorldSource(small, 32, 0)
    resumed.load_state_dict(*source.state_dict())
    assert torch.equal(only(resumed.next_batch().by_layer), only(source.next_batch().by_layer))
    assert resumed.totals() == {"tokens_kept": 128} and resumed.memory_bytes() == 0
    assert not torch.equal(only(WorldSource(small, 32, 5).next_batch().by_layer), only(batch.by_layer))


def test_variants_start_alike_and_not_from_the_truth(small) -> None:
    settings = {"plain": {"ortho_coefficient": 0.0}, "raw": {"input_normalization": "none"}}
    saes = new_variants(small, RECIPE, settings, seed=SMALL.seed)
    assert torch.equal(saes["plain"].W_dec, saes["raw"].W_dec)
    assert float((saes["plain"].W_dec.detach() @ small.directions.T).amax()) < 0.95
    mean, scale = input_statistics(small)
    assert torch.equal(saes["plain"].input_mean, mean) and float(saes["plain"].input_scale) == pytest.approx(scale)
    assert float(saes["raw"].input_scale) == 1
    x, _ = small.sample(5000, torch.Generator().manual_seed(8))
    assert float(saes["plain"].normalize_input(x).square().sum(1).mean()) == pytest.approx(1, rel=0.05)
    with pytest.raises(ConfigError, match="variant 'bad': k="):
        new_variants(small, RECIPE, {"bad": {"k": 0}}, seed=0)


def test_variants_train_side_by_side_on_the_same_batches(small) -> None:
    strong = {"penalty_space": "decoder", "ortho_coefficient": 3.0, "selection_interval": 1}
    variants = {"none": {"ortho_coefficient": 0.0}, "same": {"ortho_coefficient": 0.0}, "strong": strong}
    arguments = RunArguments(max_steps=20, batch_size=128, learning_rate=1e-2)
    saes = new_variants(small, RECIPE, variants, 0)
    trained = train_variants(saes, WorldSource(small, 128, 0), arguments, progress=False)
    assert list(trained) == list(variants) and all(one.seconds > 0 for one in trained.values())
    assert torch.equal(trained["none"].sae.W_dec, trained["same"].sae.W_dec)
    alone = new_variants(small, RECIPE, {"strong": strong}, 0)
    train_variants(alone, WorldSource(small, 128, 0), arguments, progress=False)
    assert torch.equal(alone["strong"].W_dec, trained["strong"].sae.W_dec)
    assert not torch.equal(alone["strong"].W_dec, trained["none"].sae.W_dec)


def test_training_explains_more_than_the_start(small) -> None:
    variants = {"none": {"ortho_coefficient": 0.0}, "activation": {"ortho_coefficient": 0.1}}
    start = score_sae(new_variants(small, RECIPE, variants, 0)["none"], small, samples=2000)
    scores = run_world(
        SMALL, RECIPE, variants, steps=150, batch_size=256, learning_rate=1e-2, samples=2000, progress=False
    )
    for own in scores.values():
        assert own["explained_variance"] > start["explained_variance"] + 0.2
        assert own["mcc"] > start["mcc"] and own["l0"] <= 4
        assert own.keys() == {*start, "training_seconds"} and all(isinstance(value, float) for value in own.values())


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_trained_and_scored_alike(name) -> None:
    settings = {"batch_size": 256, "learning_rate": 1e-2, "samples": 2000}
    start = run_peers(SMALL, [name], RECIPE, steps=1, **settings)[name]
    scores = run_peers(SMALL, [name], RECIPE, steps=100, **settings)[name]
    assert scores["explained_variance"] > max(0.3, start["explained_variance"])
    assert scores["mcc"] > start["mcc"] and {"f1", "absorption", "training_seconds"} < scores.keys()


def test_the_settings_of_peers_come_from_the_recipe() -> None:
    assert peer_settings("standard", RECIPE, 2.0) == {"d_sae": 24, "l1_coefficient": 0.08}
    assert peer_settings("topk", RECIPE, 2.0) == {"d_sae": 24, "k": 4}
    assert peer_settings("matryoshka", RECIPE, 2.0)["matryoshka_widths"] == [3, 6, 12, 24]
    own = {**RECIPE, "matryoshka_prefixes": [8, 24]}
    assert peer_settings("matryoshka", own, 2.0)["matryoshka_widths"] == [8, 24]
    with pytest.raises(SelOrthoError, match="peer 'gated': expected one of standard"):
        peer_settings("gated", RECIPE, 1.0)
    with pytest.raises(SelOrthoError, match="peer 'topk' needs k, which the recipe lacks"):
        peer_settings("topk", {"d_sae": 24}, 1.0)
