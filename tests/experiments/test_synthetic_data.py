"""Synthetic data of known features, and what SAEs score on it whose faults are known too."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import Tensor, nn

from experiments.synthetic_data import SyntheticData, TokenStream, World, derived_seed
from experiments.synthetic_scores import match_features, score_sae
from hf_selortho import SelOrthoError

TREES = World(  # 4 roots, 8 children, 16 grandchildren, and 2 features that stand alone
    "trees", features=30, dimensions=48, roots=4, children=2, depth=2, compensate=False, firing="constant",
    max_probability=0.4, bias=0.5, orthogonal_steps=200,
)  # fmt: skip


@pytest.fixture(scope="module")
def sae_lens():
    return pytest.importorskip("sae_lens")


@pytest.fixture(scope="module")
def trees(sae_lens) -> SyntheticData:
    return SyntheticData(TREES)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Reader:
    """An SAE that reads off the true features exactly: the directions are linearly independent.

    Args:
        world: to read.
        silenced: share of the tokens on which a parent stays silent if a child of it is active.
        merged: whether children then have the parent's direction in their decoder rows.
        missed: share of the tokens on which any feature stays silent.
    """

    def __init__(self, data: SyntheticData, silenced: float = 0.0, merged: bool = False, missed: float = 0.0) -> None:
        self.data, self.silenced, self.missed = data, silenced, missed
        self.bias = data.model.feature_dict.bias.detach()
        self.children = (data.parents >= 0).nonzero()[:, 0]
        self.W_dec = data.directions.clone()
        if merged:
            self.W_dec[self.children] += data.directions[data.parents[self.children]]
            self.W_dec = nn.functional.normalize(self.W_dec, dim=1)

    def encode(self, activations: Tensor) -> Tensor:
        strengths = (activations - self.bias) @ torch.linalg.pinv(self.data.directions)
        h = torch.where(strengths > 0.5, strengths, 0)
        for child in self.children.tolist():
            tokens = (strengths[:, child] > 0.5) & (torch.rand(len(h), generator=generator()) < self.silenced)
            h[tokens, self.data.parents[child]] = 0
        return torch.where(torch.rand(h.shape, generator=generator(2)) < self.missed, 0, h)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec + self.bias

    def eval(self) -> None:
        pass


def test_the_same_world_and_seed_give_the_same_tokens(trees) -> None:
    x, strengths = trees.sample(64, generator())
    assert x.shape == (64, 48) and strengths.shape == (64, 30) and x.dtype == strengths.dtype == torch.float32
    again = SyntheticData(TREES)
    assert torch.equal(again.directions, trees.directions)
    assert all(torch.equal(a, b) for a, b in zip(again.sample(64, generator()), (x, strengths), strict=True))
    source = generator()
    trees.sample(64, source)
    assert not torch.equal(trees.sample(64, source)[0], x)
    assert not torch.equal(trees.sample(64, generator(2))[0], x)
    assert not torch.equal(SyntheticData(dataclasses.replace(TREES, seed=1)).directions, trees.directions)


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_a_stream_has_the_tokens_of_sample_and_the_random_numbers_of_the_process_stay(noise, sae_lens) -> None:
    before = torch.get_rng_state()
    data = SyntheticData(dataclasses.replace(TREES, noise=noise))
    stream, own = TokenStream(data, 5), generator(5)
    for _ in range(2):
        x, strengths = data.sample(500, own)
        drawn = stream.sample(500)
        assert torch.equal(drawn, strengths)
        assert torch.equal(stream(drawn), x)
    clean = data.model.feature_dict(strengths).detach()
    assert float((x - clean).square().sum(1).mean().sqrt()) == pytest.approx(noise, rel=0.05)
    assert torch.equal(torch.get_rng_state(), before)


def test_children_never_fire_without_their_parent(trees) -> None:
    parents = trees.parents.tolist()
    assert parents[:4] == [-1] * 4 and parents[28:] == [-1] * 2
    assert sorted(parents[4:28]) == sorted([*range(12)] * 2)
    active = trees.sample(4000, generator())[1] > 0
    child = (trees.parents >= 0).nonzero()[:, 0]
    assert not (active[:, child] & ~active[:, trees.parents[child]]).any()
    rates = active.float().mean(0)
    torch.testing.assert_close(rates[:4].mean(), torch.tensor(0.4), atol=0.02, rtol=0)
    torch.testing.assert_close(rates[12:28].mean(), torch.tensor(0.4**3), atol=0.02, rtol=0)


def test_a_flat_world_has_no_parents(sae_lens) -> None:
    for firing in ("zipfian", "constant"):
        data = SyntheticData(World("flat", 20, 40, structure="flat", firing=firing, orthogonal_steps=100))
        assert (data.parents == -1).all()
        scores = score_sae(Reader(data), data, samples=2000)
        assert scores["f1"] == 1 and "absorption" not in scores and "merged" not in scores


def test_a_perfect_sae_is_perfect(trees) -> None:
    scores = score_sae(Reader(trees), trees, samples=4000)
    for name in ("mcc", "uniqueness", "precision", "recall", "f1", "explained_variance", "shrinkage"):
        assert scores[name] == pytest.approx(1, abs=1e-4), name
    assert scores["recovered"] == scores["recovered_parents"] == scores["recovered_children"] == 1
    assert scores["l0"] == scores["true_l0"] > 0 and scores["dead_features"] == 0
    assert scores["absorption"] == scores["silent_with_child"] == scores["silent_alone"] == 0
    assert scores["absorption_pairs"] == 24
    assert scores["merged"] == pytest.approx(0, abs=1e-6) and scores["max_decoder_cosine"] < 0.1
    assert 0.3 < scores["top_correlation"] <= 1  # of a parent with its child, as it has to be


def test_planted_absorption_is_found(trees) -> None:
    scores = score_sae(Reader(trees, silenced=1.0, merged=True), trees, samples=4000)
    assert (scores["absorption"], scores["silent_with_child"], scores["silent_alone"]) == (1, 1, 0)
    assert scores["merged"] == pytest.approx(0.5**0.5, abs=0.05)
    assert scores["recovered_children"] == 0 and 0 < scores["recovered_parents"] < 1  # the roots' rows are untouched
    half = score_sae(Reader(trees, silenced=0.5), trees, samples=8000)
    assert half["absorption"] == pytest.approx(0.5, abs=0.03) and half["recall"] < 1


def test_what_a_feature_misses_anyway_is_no_absorption(trees) -> None:
    scores = score_sae(Reader(trees, missed=0.3), trees, samples=8000)
    assert scores["silent_alone"] == pytest.approx(0.3, abs=0.03)
    assert scores["absorption"] == pytest.approx(0, abs=0.03)


def test_pairs_without_support_or_match_do_not_count(trees) -> None:
    few = score_sae(Reader(trees), trees, samples=30)
    assert few["absorption_pairs"] < 24
    reader = Reader(trees)
    reader.W_dec = torch.randn(30, 48, generator=generator())
    scores = score_sae(reader, trees, samples=1000)
    assert scores["absorption_pairs"] == 0 and scores["absorption"] != scores["absorption"]
    matches = match_features(trees.directions[:3], trees.directions)
    assert matches.feature.tolist() == [0, 1, 2, *[-1] * 27]


def test_impossible_worlds_are_named(sae_lens) -> None:
    with pytest.raises(SelOrthoError, match="a world has no trunks; expected some of name,"):
        World.from_json({"name": "x", "trunks": 3})
    for changes, fault in [
        ({"structure": "round"}, "structure='round' is not possible"),
        ({"roots": 30}, "roots=30 is not possible"),
        ({"max_probability": 0.0}, "max_probability=0.0 is not possible"),
        ({"min_probability": 0.4, "firing": "linear"}, "min_probability=0.4 is not possible"),
        ({"noise": float("nan")}, "noise=nan is not possible"),
        ({"firing": "often"}, "SAELens refuses it: 'often'"),
        ({"children": 1}, "SAELens refuses it: branching_factor"),
    ]:
        with pytest.raises(SelOrthoError, match=f"world 'trees': {fault}"):
            SyntheticData(dataclasses.replace(TREES, **changes))


def test_without_sae_lens_the_remedy_is_said(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens.synthetic", None)
    with pytest.raises(SelOrthoError, match=r"pip install 'hf_selortho\[interop\]'"):
        SyntheticData(TREES)


def test_seeds_of_different_purposes_differ() -> None:
    seeds = {derived_seed(purpose, seed) for purpose in ("world", "batches") for seed in range(100)}
    assert len(seeds) == 200 and all(0 <= seed < 1 << 32 for seed in seeds)
