"""Probes on planted features, on noise, and against plain scikit-learn; texts read against one forward pass each."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation.probing import (
    LabelledTexts,
    dense_probing,
    pool,
    read_labelled_texts,
    sparse_probing,
    split_by_class,
)
from hf_selortho.language_models.capture import ActivationCapture

LAYER = 1


def identity_sae(width: int, dead: int = 0) -> SelOrthoSAE:
    """Features relu(x), then relu(-x), then some that never fire."""
    sae = SelOrthoSAE(SelOrthoConfig(d_in=width, d_sae=2 * width + dead)).eval()
    eye, zeros = torch.eye(width), torch.zeros(dead, width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye, zeros]).T)
        sae.W_dec.copy_(torch.cat([eye, -eye, zeros]))
        sae.b_enc.copy_(torch.tensor([0.0] * 2 * width + [-1.0] * dead))
        sae.b_dec.zero_()
    return sae


def texts_of(means: Tensor, labels: Tensor) -> LabelledTexts:
    """Texts of 1 to 5 equal tokens, whose mean activations (texts, d_in) are the given ones."""
    lengths = 1 + torch.arange(len(means)) % 5
    classes = [f"class {number}" for number in range(int(labels.max()) + 1)]
    return LabelledTexts(means.repeat_interleave(lengths, 0), lengths, labels, classes)


def train_half(texts: LabelledTexts, seed: int = 0) -> Tensor:
    return split_by_class(texts.labels, lambda size: size // 2, seed)


def test_one_planted_feature_a_class_is_all_it_takes():
    labels = torch.arange(60) % 3
    means = torch.rand(60, 8) * 0.1
    means[torch.arange(60), 2 + labels] += 1
    texts = texts_of(means, labels)
    found = sparse_probing(identity_sae(8, dead=4), texts, ks=(1, 3))
    assert found == {
        "probing_accuracy_k1": 1, "probing_f1_k1": 1, "probing_accuracy_k3": 1, "probing_f1_k3": 1,
        "probing_accuracy_all": 1, "probing_texts": 60, "probing_classes": 3,
    }  # fmt: skip
    assert dense_probing(texts) == {"probing_accuracy_lm": 1}


def test_random_labels_are_a_toss_of_a_coin():
    """Also where one class is rare: its texts weigh more."""
    for share in (0.5, 0.1):
        labels = (torch.rand(1000) < share).long()
        texts = texts_of(torch.randn(1000, 10), labels)
        found = sparse_probing(identity_sae(10), texts) | dense_probing(texts)
        accuracies = {name: value for name, value in found.items() if "accuracy" in name}
        assert set(accuracies) == {f"probing_accuracy_{what}" for what in ("k1", "k2", "k5", "all", "lm")}
        assert accuracies == pytest.approx(dict.fromkeys(accuracies, 0.5), abs=0.1)


def test_a_class_of_two_features_needs_both():
    """Class 1 fires feature 0 or feature 1, class 0 neither: one feature finds the texts that fire it, no others."""
    labels = torch.arange(80) % 2
    means = torch.zeros(80, 4)
    means[1::4, 0], means[3::4, 1] = 2.0, 1.0
    texts = texts_of(means, labels)
    found = sparse_probing(identity_sae(4), texts, ks=(1, 2))
    test = ~train_half(texts)
    recall = (means[test, 0] > 0).sum().item() / labels[test].sum().item()
    others = (labels[test] == 0).sum().item()
    missed = (means[test, 1] > 0).sum().item()
    assert 0 < recall < 1
    assert found["probing_accuracy_k1"] == pytest.approx((1 + recall) / 2)
    f1_own, f1_rest = 2 * recall / (1 + recall), 2 * others / (2 * others + missed)
    assert found["probing_f1_k1"] == pytest.approx((f1_own + f1_rest) / 2)
    assert found["probing_accuracy_k2"] == found["probing_f1_k2"] == found["probing_accuracy_all"] == 1


@pytest.mark.parametrize("width", [6, 60])  # fewer and more features than texts to train on
def test_figures_are_those_of_plain_scikit_learn(width):
    labels = torch.randint(3, (90,))
    texts = texts_of(torch.randn(90, width) + 0.4 * torch.nn.functional.one_hot(labels, width), labels)
    sae = identity_sae(width, dead=3)
    train = train_half(texts, seed=5).numpy()
    test = ~train
    x = pool(texts, sae.encode, sae.device).double().numpy()
    expected: dict[str, list[float]] = {}
    for number in range(3):
        y = labels.numpy() == number
        difference = x[train][y[train]].mean(0) - x[train][~y[train]].mean(0)
        for k in (1, 2, 5, x.shape[1]):
            chosen = np.argsort(-np.abs(difference))[:k]
            probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
            guess = probe.fit(x[train][:, chosen], y[train]).predict(x[test][:, chosen])
            name = "all" if k == x.shape[1] else f"k{k}"
            expected.setdefault(f"probing_accuracy_{name}", []).append(balanced_accuracy_score(y[test], guess))
            expected.setdefault(f"probing_f1_{name}", []).append(f1_score(y[test], guess))
    del expected["probing_f1_all"]
    found = sparse_probing(sae, texts, seed=5)
    assert {name: found[name] for name in expected} == pytest.approx({n: np.mean(v) for n, v in expected.items()})
    assert 0.5 < found["probing_accuracy_all"] < 1


def test_features_are_averaged_over_the_tokens_of_a_text():
    torch.manual_seed(3)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=6, d_sae=9)).eval()
    lengths = torch.tensor([3, 1, 7, 2, 5, 1, 4, 2])
    texts = LabelledTexts(torch.randn(25, 6).bfloat16(), lengths, torch.arange(8) % 2, ["a", "b"])
    with torch.no_grad():
        parts = [sae.encode(x.float()).mean(0) for x in texts.activations.split(lengths.tolist())]
    for batch_tokens in (1, 4, 25, 100):
        pooled = pool(texts, sae.encode, sae.device, batch_tokens)
        assert pooled.shape == (8, 9) and not pooled.requires_grad
        assert torch.allclose(pooled, torch.stack(parts), atol=1e-6)


@pytest.mark.parametrize(("planted", "accuracy"), [(0.0, 0.5), (1.0, 1.0)])
def test_dead_and_constant_features_are_harmless(planted, accuracy):
    labels = torch.arange(16) % 2
    texts = texts_of(torch.stack([torch.zeros(16), torch.full((16,), 0.7), planted * labels], 1), labels)
    found = sparse_probing(identity_sae(3, dead=2), texts, ks=(1, 8)) | dense_probing(texts)
    assert {value for name, value in found.items() if "accuracy" in name} == {accuracy}


def test_the_train_texts_are_half_of_every_class_and_depend_on_the_seed():
    labels = torch.tensor([0] * 11 + [1] * 4 + [2] * 20)
    texts = texts_of(torch.randn(35, 4), labels)
    train = train_half(texts, seed=1)
    assert labels[train].bincount().tolist() == [5, 2, 10]
    assert torch.equal(train_half(texts, seed=1), train) and not torch.equal(train_half(texts, seed=2), train)
    sae = identity_sae(4)
    first, again, other = (sparse_probing(sae, texts, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("arch", ["gemma3", "gpt2"])
def test_texts_are_read_as_one_by_one(arch, prepend_bos, tiny_lm, sample_documents):
    lm = tiny_lm(arch)
    texts = [sample_documents[n][: 20 + 13 * n] for n in range(12)]
    labels = [["b", "c", "a"][n % 3] for n in range(12)]
    capture = ActivationCapture(lm, LAYER, batch_tokens=60)
    read = read_labelled_texts(capture, texts, labels, context_length=24, prepend_bos=prepend_bos)
    assert read.classes == ["a", "b", "c"] and read.labels.tolist() == [1, 2, 0] * 4
    bos = [lm.tokenizer.bos_token_id] * prepend_bos
    assert len(read) == 12 and read.lengths.max() == 24 - len(bos) > read.lengths.min()
    for text, found in zip(texts, read.activations.split(read.lengths.tolist()), strict=True):
        ids = torch.tensor([bos + lm.tokenizer(text, add_special_tokens=False).input_ids])[:, :24]
        expected = capture.hidden_states(ids, torch.ones_like(ids))[LAYER][0, len(bos) :]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_sinks_and_texts_without_tokens_are_left_out(tiny_lm, sample_documents, caplog):
    texts = [*sample_documents[:2], "", *sample_documents[2:10], sample_documents[10][:3]]
    labels = [7, 3, 3, 3, 7, 7, 3, 3, 7, 3, 7, 7]
    how = {"context_length": 32, "prepend_bos": True, "min_tokens": 4}
    lm = tiny_lm("gemma3")
    with caplog.at_level(logging.WARNING):
        read = read_labelled_texts(ActivationCapture(lm, LAYER), texts, labels, **how)
    assert len(read) == 10 and "2 of 12 texts left out" in caplog.text
    assert read.classes == ["3", "7"] and read.labels.tolist() == [1, 0, 0, 1, 1, 0, 0, 1, 0, 1]
    norms = read.activations.norm(dim=1)
    limit = norms.median().item()
    without = read_labelled_texts(ActivationCapture(lm, LAYER, max_norm=limit), texts, labels, **how)
    assert torch.allclose(without.activations, read.activations[norms <= limit], atol=1e-5)
    assert without.lengths.tolist() == [int((n <= limit).sum()) for n in norms.split(read.lengths.tolist())]


def test_errors(tiny_lm, sample_documents):
    capture, how = ActivationCapture(tiny_lm("gpt2"), LAYER), {"context_length": 16, "prepend_bos": True}
    texts = sample_documents[:8]
    with pytest.raises(SelOrthoError, match=r"1 class of texts \['a'\]: expected at least 2"):
        read_labelled_texts(capture, texts, ["a"] * 8, **how)
    with pytest.raises(SelOrthoError, match='class "b" has 3 texts: expected at least 4'):
        read_labelled_texts(capture, texts, ["a"] * 5 + ["b"] * 3, **how)
    with pytest.raises(SelOrthoError, match='class "1" has 3 texts'):  # once the empty one is left out
        read_labelled_texts(capture, [*texts[:7], ""], [0, 0, 0, 0, 1, 1, 1, 1], **how)
    with pytest.raises(SelOrthoError, match="no contexts to read"):
        read_labelled_texts(capture, [""] * 8, [0, 1] * 4, **how)
    with pytest.raises(SelOrthoError, match=r"layers \[0, 1\]: expected a single one"):
        read_labelled_texts(ActivationCapture(capture.lm, [0, 1]), texts, [0, 1] * 4, **how)
    whole = texts_of(torch.randn(8, 3), torch.arange(8) % 2)
    for k in (0, 7):
        with pytest.raises(SelOrthoError, match=f"k={k}: expected from 1 to d_sae=6"):
            sparse_probing(identity_sae(3), whole, ks=(1, k))
