"""Sparse probing: how well a few features of an SAE tell apart the classes of labelled texts.

As in Gurnee et al. 2023 (arXiv:2305.01610) and SAEBench (Karvonen et al. 2025, arXiv:2503.09532): features are averaged
over the tokens of a text, the k whose means differ most between a class and the rest are chosen, and a logistic
regression on them is measured on texts that it has not seen. An SAE whose features are what the classes are about needs
few of them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import Tensor

from ..data.contexts import Context, Cutter
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..modeling_selortho import SelOrthoSAE

logger = logging.getLogger(__name__)

_MIN_TEXTS = 4  # of a class: two to train on, two to test on
_MAX_ITERATIONS = 2000  # of a logistic regression; some dozens are usual


@dataclass(frozen=True)
class LabelledTexts:
    """Activations of labelled texts at one layer of a language model: computed once, used for many SAEs.

    Raises:
        SelOrthoError: fewer than two classes, a class with fewer than four texts, or counts that contradict each other.
    """

    activations: Tensor  # (tokens, d_in) raw activations of the language model, of all texts one after the other
    lengths: Tensor  # (texts,) int64, tokens of each text, at least 1
    labels: Tensor  # (texts,) int64, 0 .. len(classes) - 1
    classes: list[str]  # what the labels are called

    def __post_init__(self) -> None:
        tokens, texts = int(self.lengths.sum()), len(self.lengths)
        if tokens != len(self.activations) or texts != len(self.labels) or (texts and int(self.lengths.min()) < 1):
            raise SelOrthoError(
                f"{len(self.activations)} activations and {len(self.labels)} labels, but {texts} texts of together "
                f"{tokens} tokens: expected an activation for each token, and for each text a label and a token"
            )
        if texts and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise SelOrthoError(
                f"labels from {int(self.labels.min())} to {int(self.labels.max())}, but {len(self.classes)} classes: "
                "expected the numbers of classes, counted from 0"
            )
        counts = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        _check_classes(dict(zip(self.classes, counts, strict=True)))

    def __len__(self) -> int:
        return len(self.lengths)


def read_labelled_texts(
    capture: ActivationCapture,
    texts: Sequence[str],
    labels: Sequence[Any],
    *,
    context_length: int,
    prepend_bos: bool,
    min_tokens: int = 1,
) -> LabelledTexts:
    """Read texts with the language model, one context of each: its beginning.

    BOS, other special tokens and sinks are left out, as in training; a text of which nothing is left is left out.

    Args:
        capture: a language model at a single layer.
        texts: what is read; labels: of each, all integers or all strings.
        context_length: longest context in tokens, BOS included.
        prepend_bos: whether contexts start with the tokenizer's BOS.
        min_tokens: texts of fewer tokens, BOS not counted, are left out.

    Returns:
        The activations, on the CPU and in the dtype of the language model. Classes are in the order of their labels.

    Raises:
        SelOrthoError: as many labels as texts are expected, of at least two classes with four texts that can be read;
            or a capture of several layers.
    """
    layer = capture.layer  # a single one
    values = _values(texts, labels)
    _check_classes(Counter(map(str, labels)))  # before the language model has worked for nothing
    cutter = Cutter(capture.lm.tokenizer, context_length, prepend_bos, min_tokens)
    first: dict[int, Context] = {}
    for context in cutter.cut(list(enumerate(texts))):
        first.setdefault(context.document_id, context)
    captured = capture.capture_all(list(first.values())) if first else None
    owners = torch.empty(0, dtype=torch.int64) if captured is None else captured.origins.document_ids
    lengths = torch.bincount(owners, minlength=len(texts))  # (len(texts),)
    read = lengths > 0
    if left_out := int((~read).sum()):
        logger.warning(
            "%d of %d texts left out: too short, or nothing but special and sink tokens", left_out, len(read)
        )
    numbers = torch.tensor([values.index(label) for label in labels])
    _check_classes({str(value): int((numbers[read] == number).sum()) for number, value in enumerate(values)})
    assert captured is not None
    order = owners.argsort(stable=True)  # captured by length; within a text the order of the tokens is kept
    activations = captured[order].by_layer[layer].cpu()
    return LabelledTexts(activations, lengths[read], numbers[read], [str(value) for value in values])


def pooled_features(sae: SelOrthoSAE, texts: LabelledTexts, batch_tokens: int = 8192) -> Tensor:
    """Mean activation of every feature over the tokens of each text: (texts, d_sae) float32, on the CPU."""

    def encode(x: Tensor) -> Tensor:
        return sae.encode(x.to(sae.device).float()).float()

    return _pool(texts, encode, len(sae.W_dec), sae.device, batch_tokens)


def sparse_probing(
    sae: SelOrthoSAE, texts: LabelledTexts, ks: Sequence[int] = (1, 2, 5), seed: int = 0
) -> dict[str, float]:
    """Probes on the k features of `sae` that tell each class from the others best, and on all features.

    Half of the texts of every class, drawn with `seed`, trains, the other half tests. On the training half the k
    features with the largest difference of the means of class and rest, |mean_class - mean_rest|, are chosen. All
    probes are logistic regressions on standardised features with L2 regularisation (C = 1) and classes of equal
    weight, one for each class against the rest; what is returned are means over the classes.

    Returns:
        `probing_accuracy_k{k}` (balanced accuracy: 0.5 is chance) and `probing_f1_k{k}` for every k;
        `probing_accuracy_all`, of a probe on all features; `probing_texts`, `probing_classes`. For comparison:
        [`dense_probing`].

    Raises:
        SelOrthoError: a k is below 1 or above the number of features.
    """
    for k in ks:
        if not 1 <= k <= len(sae.W_dec):
            raise SelOrthoError(f"k={k}: expected from 1 to d_sae={len(sae.W_dec)} features to probe")
    train, test = _halves(texts, seed)
    features = pooled_features(sae, texts)  # (texts, d_sae)
    scores: dict[str, list[float]] = {f"probing_{what}_k{k}": [] for k in ks for what in ("accuracy", "f1")}
    for number in range(len(texts.classes)):
        is_class = texts.labels == number  # (texts,)
        own, rest = features[train][is_class[train]], features[train][~is_class[train]]
        difference = (own.mean(0) - rest.mean(0)).abs()  # (d_sae,)
        ranked = difference.argsort(descending=True, stable=True)
        for k in ks:
            chosen = features[:, ranked[:k]]
            accuracy, f1 = _probe(*_standardised(chosen[train], chosen[test]), is_class[train], is_class[test])
            scores[f"probing_accuracy_k{k}"].append(accuracy)
            scores[f"probing_f1_k{k}"].append(f1)
    found = {name: float(np.mean(values)) for name, values in scores.items()}
    found["probing_accuracy_all"] = _dense_accuracy(features, texts, train, test)
    return found | {"probing_texts": len(texts), "probing_classes": len(texts.classes)}


def dense_probing(texts: LabelledTexts, seed: int = 0) -> dict[str, float]:
    """`probing_accuracy_lm`: what a probe on the mean raw activations (d_in numbers a text) reaches, without an SAE.

    Texts, halves and probes are those of [`sparse_probing`] with the same seed.
    """
    pooled = _pool(texts, lambda x: x.float(), texts.activations.shape[1], texts.activations.device)
    return {"probing_accuracy_lm": _dense_accuracy(pooled, texts, *_halves(texts, seed))}


def _values(texts: Sequence[str], labels: Sequence[Any]) -> list[Any]:
    """The different labels, in their order."""
    if len(texts) != len(labels):
        raise SelOrthoError(f"{len(labels)} labels for {len(texts)} texts: expected one for each")
    try:
        return sorted(set(labels))
    except TypeError as error:
        kinds = ", ".join(sorted({type(label).__name__ for label in labels}))
        raise SelOrthoError(
            f"labels of kind {kinds}: expected all integers or all strings; leave out others"
        ) from error


def _check_classes(counts: dict[str, int]) -> None:
    if len(counts) < 2:
        raise SelOrthoError(f"{len(counts)} class of texts {list(counts)}: expected at least 2 to tell apart")
    rarest = min(counts, key=lambda name: counts[name])
    if counts[rarest] < _MIN_TEXTS:
        raise SelOrthoError(
            f'class "{rarest}" has {counts[rarest]} texts: expected at least {_MIN_TEXTS}, half of them to test on; '
            "give more texts or leave the class out"
        )


@torch.no_grad()
def _pool(
    texts: LabelledTexts, encode: Callable[[Tensor], Tensor], width: int, device: torch.device, batch_tokens: int = 8192
) -> Tensor:
    """Means over the tokens of each text of what `encode` makes of them, (b, d_in) -> (b, width): (texts, width)."""
    sums = torch.zeros(len(texts), width, device=device)
    owners = torch.repeat_interleave(texts.lengths).to(device)  # (tokens,)
    for x, rows in zip(texts.activations.split(batch_tokens), owners.split(batch_tokens), strict=True):
        sums.index_add_(0, rows, encode(x))
    return (sums / texts.lengths[:, None].to(device)).cpu()


def _halves(texts: LabelledTexts, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the texts to train and to test on, each with half of every class."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for number in range(len(texts.classes)):
        members = (texts.labels == number).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        train.append(members[: len(members) // 2])
        test.append(members[len(members) // 2 :])
    return torch.cat(train), torch.cat(test)


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both (texts, d) in float64 with the means and deviations of `train`; what is constant there becomes 0 in both."""
    train, test = train.double(), test.double()
    mean, varies = train.mean(0), (train != train[0]).any(0)
    scale = torch.where(varies, train.std(0, correction=0), torch.inf)
    return (train - mean) / scale, (test - mean) / scale


def _dense_accuracy(pooled: Tensor, texts: LabelledTexts, train: Tensor, test: Tensor) -> float:
    """Mean balanced accuracy over the classes of probes on all columns of `pooled` (texts, d)."""
    x, y = _standardised(pooled[train], pooled[test])
    if x.shape[1] > len(x):
        # The weights of an L2-regularised regression lie in the span of the training texts: the same probe, in as many
        # dimensions as there are texts. With 16,384 features that is far fewer.
        basis = torch.linalg.qr(x.T).Q  # (d, texts)
        x, y = x @ basis, y @ basis
    classes = [texts.labels == number for number in range(len(texts.classes))]
    return float(np.mean([_probe(x, y, own[train], own[test])[0] for own in classes]))


def _probe(train: Tensor, test: Tensor, is_train: Tensor, is_test: Tensor) -> tuple[float, float]:
    """Balanced accuracy and F1 on `test` (texts, d) of a logistic regression on `train`; the others (texts,) bool."""
    model = LogisticRegression(max_iter=_MAX_ITERATIONS, class_weight="balanced")
    predicted = model.fit(train.numpy(), is_train.numpy()).predict(test.numpy())
    truth = is_test.numpy()
    return float(balanced_accuracy_score(truth, predicted)), float(f1_score(truth, predicted, zero_division=0))
