"""SAEs trained on little synthetic data: ours side by side, and SAELens's baselines on the same batches."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from experiments.plan import SyntheticRun
from experiments.synthetic_data import SyntheticData, TokenStream, World, derived_seed
from experiments.synthetic_scores import score_sae
from experiments.synthetic_training import (
    BASELINES,
    baseline_settings,
    batches,
    new_variants,
    score_baselines,
    score_variants,
    train_variants,
)
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
def small() -> SyntheticData:
    return SyntheticData(SMALL)


def test_the_same_seed_gives_the_same_batches_and_those_of_the_baselines(small) -> None:
    source, again, other = batches(small, 32, 4), batches(small, 32, 4), batches(small, 32, 5)
    stream = TokenStream(small, derived_seed("batches", 4))
    for _ in range(3):
        x = only(next(source).by_layer)
        assert torch.equal(x, only(next(again).by_layer)) and torch.equal(x, stream(stream.sample(32)))
        assert not torch.equal(x, only(next(other).by_layer))


def test_variants_start_alike_and_not_from_the_truth(small) -> None:
    settings = {"plain": {"ortho_coefficient": 0.0}, "raw": {"input_normalization": "none"}}
    saes = new_variants(small, RECIPE, settings, seed=SMALL.seed)
    assert torch.equal(saes["plain"].W_dec, saes["raw"].W_dec)
    assert float((saes["plain"].W_dec.detach() @ small.directions.T).amax()) < 0.95
    mean, scale = small.statistics()
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
    saes, alone = new_variants(small, RECIPE, variants, 0), new_variants(small, RECIPE, {"strong": strong}, 0)
    seconds = train_variants(saes, batches(small, 128, 0), arguments)
    train_variants(alone, batches(small, 128, 0), arguments)
    assert list(seconds) == list(variants) and all(value > 0 for value in seconds.values())
    assert torch.equal(saes["none"].W_dec, saes["same"].W_dec)
    assert torch.equal(alone["strong"].W_dec, saes["strong"].W_dec)
    assert not torch.equal(alone["strong"].W_dec, saes["none"].W_dec)


def run_of(steps: int, **parts: Any) -> SyntheticRun:
    training = {"steps": steps, "batch_size": 256, "learning_rate": 1e-2}
    return SyntheticRun(asdict(SMALL), "topk", 0, RECIPE, **{"variants": {}, "training": training, **parts})


def test_training_explains_more_than_the_start(small) -> None:
    variants = {"none": {"ortho_coefficient": 0.0}, "activation": {"ortho_coefficient": 0.1}}
    start = score_sae(new_variants(small, RECIPE, variants, 0)["none"].eval(), small, samples=2000)
    for own in score_variants(run_of(150, variants=variants), small, 2000).values():
        assert own["explained_variance"] > start["explained_variance"] + 0.2
        assert own["mcc"] > start["mcc"] and own["l0"] <= 4
        assert own.keys() == {*start, "training_seconds"} and all(isinstance(value, float) for value in own.values())


def test_baselines_are_trained_and_scored_alike(small) -> None:
    start, end = (score_baselines(run_of(steps, baselines=tuple(BASELINES)), small, 2000) for steps in (1, 100))
    for name, scores in end.items():
        assert scores["explained_variance"] > max(0.3, start[name]["explained_variance"])
        assert scores["mcc"] > start[name]["mcc"] and {"f1", "absorption", "training_seconds"} < scores.keys()


def test_the_settings_of_baselines_come_from_the_recipe() -> None:
    assert baseline_settings("standard", RECIPE, 2.0) == {"d_sae": 24, "l1_coefficient": 0.08}
    assert baseline_settings("topk", RECIPE, 2.0) == {"d_sae": 24, "k": 4}
    assert baseline_settings("matryoshka", RECIPE, 2.0)["matryoshka_widths"] == [3, 6, 12, 24]
    own = {**RECIPE, "matryoshka_prefixes": [8, 24]}
    assert baseline_settings("matryoshka", own, 2.0)["matryoshka_widths"] == [8, 24]
    with pytest.raises(SelOrthoError, match="baseline 'gated': expected one of standard"):
        baseline_settings("gated", RECIPE, 1.0)
    with pytest.raises(SelOrthoError, match="baseline 'topk' needs k, which the recipe lacks"):
        baseline_settings("topk", {"d_sae": 24}, 1.0)
