"""Sparse probing: how well a few features of an SAE tell apart the classes of labelled texts.

As in Gurnee et al. 2023 (arXiv:2305.01610) and SAEBench (Karvonen et al. 2025, arXiv:2503.09532): features are averaged
over the tokens of a text, the k whose means differ most between a class and the rest are chosen, and a logistic
regression on them is measured on texts that it has not seen. An SAE whose features are what the classes are about needs
few of them.

Three steps, each usable without the others: labelled activations ([`read_labelled_texts`], [`pool`]), the choice of
features ([`ranked_features`]), a probe and its score ([`probe_scores`]).
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
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ..checks import texts_of, whole_number
from ..data.chats import Chat, Text
from ..data.contexts import Cutter
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..language_models.contexts import Context
from ..modeling_selortho import SelOrthoSAE

logger = logging.getLogger(__name__)

_MIN_TEXTS = 4  # of a class: two to train on, two to test on
_MAX_ITERATIONS = 2000  # of a logistic regression; some dozens are usual


@dataclass(frozen=True)
class LabelledTexts:
    """Activations of labelled texts at one layer of a language model: computed once, used for many SAEs.

    Raises:
        SelOrthoError: fewer than two classes, or a class with fewer than four texts.
    """

    activations: Tensor  # (tokens, d_in) raw activations of the language model, of all texts one after the other
    lengths: Tensor  # (texts,) int64, tokens of each text, at least 1
    labels: Tensor  # (texts,) int64, 0 .. len(classes) - 1
    classes: list[str]  # what the labels are called

    def __post_init__(self) -> None:
        assert int(self.lengths.sum()) == len(self.activations) and len(self.lengths) == len(self.labels)
        _check_classes(Counter(self.classes[label] for label in self.labels.tolist()), self.classes)

    def __len__(self) -> int:
        return len(self.lengths)


def read_labelled_texts(
    capture: ActivationCapture,
    texts: Sequence[Text],
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
        SelOrthoError: not two classes with four texts that can be read each; or a capture of several layers.
    """
    layer = capture.layer  # a single one
    texts = texts if isinstance(texts, list) and all(isinstance(text, Chat) for text in texts) else texts_of(texts)
    values, numbers = np.unique(np.array(labels), return_inverse=True)
    classes = [str(value) for value in values]
    _check_classes(Counter(map(str, labels)), classes)  # before the language model has worked for nothing
    cutter = Cutter(capture.lm.tokenizer, context_length, prepend_bos, min_tokens)
    first: dict[int, Context] = {}
    for context in cutter.cut(list(enumerate(texts))):
        first.setdefault(context.document_id, context)
    captured = capture.capture_all(list(first.values()))
    owners = captured.origins.document_ids
    lengths = torch.bincount(owners, minlength=len(texts))  # (len(texts),)
    read = lengths > 0
    if left_out := int((~read).sum()):
        logger.warning(
            "%d of %d texts left out: too short, or nothing but special and sink tokens", left_out, len(read)
        )
    order = owners.argsort(stable=True)  # captured by length; within a text the order of the tokens is kept
    activations = captured[order].by_layer[layer].cpu()
    return LabelledTexts(activations, lengths[read], torch.from_numpy(numbers)[read], classes)


@torch.no_grad()
def pool(
    texts: LabelledTexts, encode: Callable[[Tensor], Tensor], device: torch.device, batch_tokens: int = 8192
) -> Tensor:
    """Means over the tokens of each text of what `encode` makes of them, (b, d_in) -> (b, d): (texts, d) on the CPU."""
    sums: Tensor | None = None
    owners = torch.repeat_interleave(texts.lengths).to(device)  # (tokens,)
    for x, rows in zip(texts.activations.split(batch_tokens), owners.split(batch_tokens), strict=True):
        encoded = encode(x.to(device).float()).float()
        sums = encoded.new_zeros(len(texts), encoded.shape[1]) if sums is None else sums
        sums.index_add_(0, rows, encoded)
    assert sums is not None
    return (sums / texts.lengths[:, None].to(device)).cpu()


def sparse_probing(
    sae: SelOrthoSAE, texts: LabelledTexts, ks: Sequence[int] = (1, 2, 5), seed: int = 0
) -> dict[str, float]:
    """Probes on the k features of `sae` that tell each class from the others best, and on all features.

    Half of the texts of every class, drawn with `seed`, trains, the other half tests. All probes are logistic
    regressions on standardised features with L2 regularisation (C = 1) and classes of equal weight, one for each class
    against the rest; what is returned are means over the classes.

    Returns:
        `probing_accuracy_k{k}` (balanced accuracy: 0.5 is chance) and `probing_f1_k{k}` for every k;
        `probing_accuracy_all`, of a probe on all features; `probing_texts`, `probing_classes`. For comparison:
        [`dense_probing`].

    Raises:
        SelOrthoError: a k is below 1 or above the number of features.
    """
    SelOrthoSAE.checked(sae)
    for k in ks:
        if not 1 <= whole_number(k, "k") <= len(sae.W_dec):
            raise SelOrthoError(f"k={k}: expected from 1 to d_sae={len(sae.W_dec)} features to probe")
    train = split_by_class(texts.labels, lambda size: size // 2, seed)
    features = pool(texts, sae.encode, sae.device)  # (texts, d_sae)
    scores: dict[str, list[float]] = {f"probing_{what}_k{k}": [] for k in ks for what in ("accuracy", "f1")}
    for number in range(len(texts.classes)):
        is_class = texts.labels == number  # (texts,)
        ranked = ranked_features(features[train], is_class[train])
        for k in ks:
            accuracy, f1 = probe_scores(features[:, ranked[:k]], is_class, train)
            scores[f"probing_accuracy_k{k}"].append(accuracy)
            scores[f"probing_f1_k{k}"].append(f1)
    found = {name: float(np.mean(values)) for name, values in scores.items()}
    found["probing_accuracy_all"] = _dense_accuracy(features, texts, train)
    return found | {"probing_texts": len(texts), "probing_classes": len(texts.classes)}


def dense_probing(texts: LabelledTexts, seed: int = 0) -> dict[str, float]:
    """`probing_accuracy_lm`: what a probe on the mean raw activations (d_in numbers a text) reaches, without an SAE.

    Texts, halves and probes are those of [`sparse_probing`] with the same seed.
    """
    pooled = pool(texts, lambda x: x, texts.activations.device)
    train = split_by_class(texts.labels, lambda size: size // 2, seed)
    return {"probing_accuracy_lm": _dense_accuracy(pooled, texts, train)}


def split_by_class(labels: Tensor, train_size: Callable[[int], int], seed: int) -> Tensor:
    """Draw the train rows: of each class of `labels` (n,), as many of its rows as `train_size` says; (n,) bool."""
    generator = torch.Generator().manual_seed(seed)
    train = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        train[rows[torch.randperm(len(rows), generator=generator)[: train_size(len(rows))]]] = True
    return train


def ranked_features(features: Tensor, is_class: Tensor) -> Tensor:
    """Rank features (texts, d) by |mean_class - mean_rest|, the largest first: (d,) int64."""
    difference = (features[is_class].mean(0) - features[~is_class].mean(0)).abs()
    return difference.argsort(descending=True, stable=True)


def probe_scores(features: Tensor, is_class: Tensor, train: Tensor) -> tuple[float, float]:
    """Balanced accuracy and F1 on the other texts of a logistic regression on the train texts.

    Args:
        features: (texts, d). is_class, train: (texts,) bool.
    """
    return _scores(*_standardised(features, train), is_class[train], is_class[~train])


def _standardised(features: Tensor, train: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The train texts and the others, in float64 with the means and deviations of the train texts."""
    x, y = features[train].double().numpy(), features[~train].double().numpy()
    scaler = StandardScaler().fit(x)
    return scaler.transform(x), scaler.transform(y)


def _scores(x: np.ndarray, y: np.ndarray, is_class_x: Tensor, is_class_y: Tensor) -> tuple[float, float]:
    """Balanced accuracy and F1 on `y` (texts, d) of a logistic regression on `x` (texts, d)."""
    probe = LogisticRegression(max_iter=_MAX_ITERATIONS, class_weight="balanced").fit(x, is_class_x.numpy())
    truth, predicted = is_class_y.numpy(), probe.predict(y)
    return float(balanced_accuracy_score(truth, predicted)), float(f1_score(truth, predicted, zero_division=0))


def _dense_accuracy(features: Tensor, texts: LabelledTexts, train: Tensor) -> float:
    """Mean balanced accuracy over the classes of probes on all columns of `features` (texts, d)."""
    x, y = _standardised(features, train)
    if x.shape[1] > len(x):
        # The weights of an L2-regularised regression lie in the span of the training texts: the same probe, in as many
        # dimensions as there are texts. With 16,384 features that is far fewer.
        basis = np.linalg.qr(x.T).Q  # (d, texts)
        x, y = x @ basis, y @ basis
    classes = [texts.labels == number for number in range(len(texts.classes))]
    return float(np.mean([_scores(x, y, is_class[train], is_class[~train])[0] for is_class in classes]))


def _check_classes(counts: Counter[str], classes: Sequence[str]) -> None:
    if len(classes) < 2:
        raise SelOrthoError(f"{len(classes)} class of texts {list(classes)}: expected at least 2 to tell apart")
    rarest = min(classes, key=lambda name: counts[name])
    if counts[rarest] < _MIN_TEXTS:
        raise SelOrthoError(
            f'class "{rarest}" has {counts[rarest]} texts: expected at least {_MIN_TEXTS}, half of them to test on; '
            "give more texts or leave the class out"
        )
