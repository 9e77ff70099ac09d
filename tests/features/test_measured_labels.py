"""Labels that are measured: on made texts where it is known on what features fire."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.data import sae_probes
from hf_selortho.errors import SelOrthoError
from hf_selortho.features import concept_labels
from hf_selortho.features.concept_labels import Concepts, concept_titles, measure_concepts
from hf_selortho.features.firings import NOTHING, Firings, FiringSample, FiringTokens
from hf_selortho.features.gallery import DENSE, LARGEST, Gallery
from hf_selortho.features.labels import THRESHOLD, choose_label
from hf_selortho.features.measured_labels import TokenLabels, label_score
from hf_selortho.features.records import Label
from hf_selortho.features.top_contexts import Batch
from hf_selortho.features.words import kind_of, name_of, words_of
from tests.features.test_index import feature_record

TEXTS = [
    " Where",
    " where",
    "\n",
    " light",
    "ing",
    ".",
    " 7",
    " place",
    " because",
    " rain",
    " it",
    ",",
    " thing",
    "((",
]
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, len(TEXTS), 4000).astype(np.int32)
TOKENS = FiringTokens(
    IDS,
    np.concatenate([[NOTHING], IDS[:-1]]).astype(np.int32),
    np.concatenate([IDS[1:], [NOTHING]]).astype(np.int32),
    np.arange(4000) // 40 % 2 == 1,
)
WORDS = words_of(TOKENS, types.SimpleNamespace(token=TEXTS.__getitem__))  # type: ignore[arg-type]
LABELS = TokenLabels(TOKENS, WORDS)


def best(fires: np.ndarray) -> Label:
    places = np.flatnonzero(fires)
    ones = np.ones(len(places), dtype=np.float32)
    return LABELS.of(Firings(places, ones, ones))[0]


def on(*words: str) -> np.ndarray:
    return np.isin(IDS, [TEXTS.index(word) for word in words])


@pytest.mark.parametrize(
    ("fires", "source", "text"),
    [
        (on(" Where", " where"), "token", "where"),
        (on(" where", " place"), "token", "place, where"),
        (on("\n"), "token", "line break"),
        (on("."), "token", "full stop"),
        (on("(("), "token", "punctuation (("),
        (np.roll(on(" because"), 1), "context", "after “because”"),
        (np.roll(on(","), -1), "context", "before comma"),
        (on("ing") & ~np.roll(on("\n", ".", ",", "((", " 7"), 1), "token", "-ing"),
    ],
)
def test_a_label_says_on_what_a_feature_fires(fires, source, text) -> None:
    label = best(fires)
    assert label.source == source and label.text.casefold() == text
    assert label.score > 0.9


def test_the_score_is_that_of_the_documents_on_which_the_label_was_not_chosen() -> None:
    held_out = TOKENS.held_out
    word = on(" rain")
    fires = (word & (~held_out | (RNG.random(len(IDS)) < 0.5))) | (held_out & (RNG.random(len(IDS)) < 0.02))
    both, fired, every = (int((part & held_out).sum()) for part in (word & fires, fires, word))
    n = int(held_out.sum())
    expected = label_score(both / fired, both / every, ((every - both) / (n - fired), (fired - both) / (n - every)))
    label = best(fires)
    assert label.text == "rain" and label.score == pytest.approx(expected) and label.score < 0.9
    assert label.detail.startswith(f"{100 * both / fired:.0f}% of its strong activation is there")


def test_the_score_is_a_half_by_chance_and_of_matthews_with_equal_shares() -> None:
    assert label_score(1, 1) == 1 and label_score(0.3, 0.3, (0.3, 0.3)) == label_score(0.2, 1, (0.5, 0)) == 0.5
    assert label_score(0.49, 0.49) == pytest.approx((1 + 0.49) / 2)
    assert LABELS.of(Firings(np.arange(8), np.ones(8, np.float32), np.ones(8, np.float32))) == []  # of one half alone


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("\n\n", "line break", "line break"), ("    ", "space", "indentation"), ("\t", "space", "tab"),
        (" 2019", "number", "2019"), ("?", "sentence end", "question mark"), (" NASA", "capitals", "NASA"),
        (" Paris", "capitalised", "Paris"), (" мир", "other script", "мир"),
        ("\u202e", "punctuation", "punctuation ‹202E›"),
        (" " + "x" * 60, "word", "x" * 39 + "…"), ("<b>", "word", "<b>"),
    ],
)  # fmt: skip
def test_tokens_are_named_in_words(text, kind, name) -> None:
    assert kind_of(text) == kind and name_of(text, kind) == name


def batch_of(h: torch.Tensor, number: int) -> Batch:
    """A context of BOS and tokens 1, 2, ... on which features (d_sae, t - 1) fire."""
    width = h.shape[1] + 1
    read = torch.ones(1, width, dtype=torch.bool)
    read[0, 0] = False
    h = torch.nn.functional.pad(h, (1, 0))[:, None]
    ids, one = torch.arange(width)[None], torch.tensor([number])
    return Batch(h, read, torch.zeros(width - 1, 1), ids, torch.tensor([width]), one, one)


def test_firings_are_all_kept_up_to_a_limit_and_then_stand_for_the_others() -> None:
    torch.manual_seed(0)
    sample, parts = FiringSample(2, limit=100), []
    for number in range(60):
        h = torch.rand(2, 50) * (torch.rand(2, 50) < torch.tensor([[0.01], [0.9]]))
        batch = batch_of(h, number)
        features, places = batch.flat.nonzero(as_tuple=True)
        sample.add(batch, features, places, batch.flat[features, places], torch.rand(len(places)))
        parts.append(h)
    tokens, (rare, frequent), h = sample.tokens(), sample.by_feature(), torch.cat(parts, 1)
    assert len(tokens.token_ids) == 3000 and tokens.token_ids[:3].tolist() == [1, 2, 3]
    assert tokens.before[:3].tolist() == [NOTHING, 1, 2] and tokens.after[48:50].tolist() == [50, NOTHING]
    assert 0.2 < tokens.held_out.mean() < 0.8
    assert rare.tokens.tolist() == h[0].nonzero()[:, 0].tolist() and set(rare.weights) == {1.0}
    np.testing.assert_array_equal(frequent.activations, h[1][frequent.tokens].numpy())
    assert 100 < len(frequent.tokens) < 700  # 100 * (1 + log 27) = 430
    assert (frequent.weights * frequent.activations).sum() == pytest.approx(h[1].sum().item(), rel=0.15)


def test_a_concept_is_chosen_on_training_texts_and_scored_on_others() -> None:
    sae = SelOrthoSAE(SelOrthoConfig(d_in=4, d_sae=4)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.b_enc.fill_(-0.5)
        sae.set_input_statistics(torch.zeros(4), 1.0)
    labels = np.arange(200) % 2
    x = torch.zeros(200, 4)
    x[labels == 1, 0] = 10.0  # marks class 1, feature 1 class 0; feature 2 fires on all
    x[labels == 0, 1] = 10.0
    x[:, 2] = 10.0
    concepts = Concepts(["159_code_Python"])
    concept_labels._add(concepts, "159_code_Python", sae, x, labels)
    found = {(row.feature, row.title, row.auc, row.negated) for row in concepts.rows[:2]}
    titles = concept_titles()["159_code_Python"]
    assert found == {(0, titles[0], 1.0, False), (1, titles[1], 1.0, True)} and concepts.rows[0].trained_on
    assert [row.rank for row in concepts.rows] == [0, 1, 2, 3]
    assert {f: [label.text for _, label in of] for f, of in concepts.labels.items()} == {0: titles[:1], 1: titles[1:]}
    share, label = concepts.labels[1][0]
    assert share == 1.0 and label.detail == "AUC 1.00 on test texts; it fires at the end of 100%, of others 0%"


def test_every_probe_set_has_a_title_for_both_classes() -> None:
    assert set(concept_titles()) == set(sae_probes.probe_set_names())
    assert all(len(of) == 2 and of[0] != of[1] and all(of) for of in concept_titles().values())


def test_without_the_texts_a_line_says_so_and_nothing_is_measured(monkeypatch, caplog, tiny_lm) -> None:
    def missing() -> None:
        raise SelOrthoError(f"the texts of sae-probes are not installed: run `{sae_probes.INSTALL}`")

    monkeypatch.setattr(sae_probes, "_package", missing)
    assert measure_concepts(None, types.SimpleNamespace(layer=2), "quick", True) == Concepts()  # type: ignore[arg-type]
    assert "the index has no concepts" in caplog.text and sae_probes.INSTALL in caplog.text


def test_the_label_shown_is_the_best_above_the_threshold() -> None:
    good, poor = Label("token", "where", 0.9, ""), Label("context", "after “of”", THRESHOLD - 0.01, "")
    assert choose_label([good, poor]) == ("where", "token", 0.9)
    assert choose_label([poor]) == ("after “of”", "unclear", poor.score)
    concept, explained = Label("concept", "Python code", 0.95, ""), Label("model", "loops", THRESHOLD + 0.01, "")
    assert choose_label([concept, good]) == ("where", "token", 0.9), "a word says more than the ends of texts"
    assert choose_label([concept, explained, poor])[1] == "concept"
    assert choose_label([explained, poor])[1] == "unclear", "few texts have scored it"
    assert choose_label([], "where, light") == ("where, light", "unclear", None)


def test_a_gallery_holds_the_best_of_every_kind_and_none_that_is_dense() -> None:
    gallery = Gallery()
    for number in range(60):
        record = feature_record(number)
        source = "concept" if number < 3 else "context" if number < 6 else "token" if number < 55 else "unclear"
        vars(record).update(
            label_source=source, label=f"{number % 40}", label_score=0.75 + number / 400, frequency=0.01
        )
        if number == 54:
            vars(record).update(frequency=DENSE * 1.01)
        gallery.add(record)
    items = gallery.items()
    assert len(items) == LARGEST and {item["feature"] for item in items[:5]} >= {0, 1, 2, 5, 53}
    assert not {54, 55, 59} & {item["feature"] for item in items}
    assert all(item["activations"][item["peak"]] is not None and item["peak"] < len(item["tokens"]) for item in items)
    assert len({item["label"] for item in items if item["source"] == "token"}) == 24 - 6
