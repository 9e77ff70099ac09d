"""Labelled texts of sae-probes as a language model represents them, split into train and test rows.

The benchmark is that of Kantamneni et al. 2025, "Are Sparse Autoencoders Useful?" (arXiv:2502.16681): a text of one of
two classes is represented by the activation of its last token. [`last_token_activations`] reads them once for all SAEs
of a layer, [`split_rows`] divides them, [`single_feature_aucs`] tells how well each feature alone separates them;
`probe_scores` has the probes on several features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import constants
from torch import Tensor

from ..data.sae_probes import ProbeSet, read_probe_set
from ..language_models.capture import ActivationCapture
from ..modeling_selortho import SelOrthoSAE
from ..sparse_ops import active_features
from .last_tokens import read_last_tokens

SEED = 42  # of every draw, as in sae-probes
ENCODED_ROWS = 128  # that an SAE encodes at once, as in sae-probes
_TRAIN_ROWS = 1024  # at most


class Cap(NamedTuple):
    """How much of each probe set is read."""

    texts: int | None  # of both classes together, as many of each; None: all
    tokens: int  # the last ones of a text, BOS included


FULL = Cap(None, 1024)  # as sae-probes reads
QUICK = Cap(400, 48)  # with `QUICK_SETS`, 113,000 tokens of Gemma: a minute on two cores
# The first six are never trained on, see `data.sae_probes`.
QUICK_SETS = (
    "87_glue_cola", "92_glue_sst2", "95_toxic_is", "96_spam_is", "105_click_bait", "125_world_country_Italy",
    "54_cs_tf", "65_high-school", "110_aimade_humangpt3", "140_news_class_Technology", "149_twt_emotion_happiness",
    "159_code_Python",
)  # fmt: skip


class Split(NamedTuple):
    """Row numbers of the train and the test rows, both shuffled."""

    train: np.ndarray  # (n_train,) int64
    test: np.ndarray  # (n_test,) int64


@dataclass(frozen=True)
class ProbeTexts:
    """Texts of a probe set that a language model reads, each once.

    The first `len(labels)` are those of the figures that we report: one row a text, as many of each class, none that
    occurs with both labels.
    """

    name: str
    trained_on: bool
    texts: list[str]
    labels: np.ndarray  # (n,) int64, 0 or 1, of the first n texts
    leak: float  # share of the test rows of sae-probes whose text is among its train rows
    # Where all texts are read, the rows of sae-probes:
    rows: np.ndarray | None  # (rows,) int64, number of the text of each
    row_labels: np.ndarray  # (rows,) int64


class FeatureAucs(NamedTuple):
    """How well each feature alone tells apart two classes: areas under the ROC curve."""

    train: Tensor  # (d_sae,) float64, at least 0.5, on the train rows: choose features by it
    test: Tensor  # (d_sae,) float64, on the test rows, in the direction that the train rows say
    negated: Tensor  # (d_sae,) bool, whether the feature marks class 0


def cache_folder() -> Path:
    """Return where activations of last tokens are kept, unless a caller says otherwise."""
    return Path(constants.HF_HOME) / "hf_selortho" / "probes"


def last_token_activations(
    capture: ActivationCapture,
    names: Sequence[str],
    *,
    prepend_bos: bool,
    cache: Path | None = None,
    progress: bool = True,
    cap: Cap = QUICK,
) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Read the last token of each distinct text of some probe sets with a language model at a single layer.

    Args:
        capture: its limit on norms plays no role.
        names: of the sets, see `data.sae_probes.probe_set_names`.
        prepend_bos: whether texts start with the tokenizer's BOS.
        cache: folder in which the activations of each set are kept; None: nowhere.
        progress: whether to show a bar.
        cap: how much of each set; of longer texts the end is read.

    Returns:
        By set, activations (texts, d_in) in float32 on the CPU, and labels (texts,), 0 or 1, as many of each; texts
        with both labels are left out.

    Raises:
        SelOrthoError: there is no such set; the package sae-probes is missing, of another version or damaged; or as
            [`read_last_tokens`].
    """
    layer = capture.layer
    sets = {name: probe_texts(read_probe_set(name), cap) for name in names}
    texts = {name: probes.texts for name, probes in sets.items()}
    labels = {name: probes.labels for name, probes in sets.items()}
    read = read_last_tokens(capture, texts, cap.tokens, prepend_bos=prepend_bos, cache=cache, progress=progress)
    return {name: (by_layer[layer][: len(labels[name])], labels[name]) for name, by_layer in read}


def probe_texts(probes: ProbeSet, cap: Cap) -> ProbeTexts:
    """Merge repeated texts of a set and balance its classes; without a limit on texts, the others follow after them."""
    seen: dict[str, set[int]] = {}
    for text, label in zip(probes.texts, probes.labels.tolist(), strict=True):
        seen.setdefault(text, set()).add(label)
    label_of = {text: min(labels) for text, labels in seen.items() if len(labels) == 1}
    of_class: tuple[list[str], list[str]] = ([], [])
    for text, label in label_of.items():
        of_class[label].append(text)
    size = min(len(of_class[0]), len(of_class[1]), (cap.texts or len(seen)) // 2)
    random = np.random.RandomState(SEED)
    chosen = {texts[n] for texts in of_class for n in random.choice(len(texts), size, replace=False)}
    merged = [text for text in label_of if text in chosen]
    texts = merged if cap.texts else merged + [text for text in seen if text not in chosen]
    number = {text: n for n, text in enumerate(texts)}
    train, test = benchmark_split(probes.labels)
    trained = {probes.texts[n] for n in train}
    return ProbeTexts(
        probes.name,
        probes.trained_on,
        texts,
        labels=np.array([label_of[text] for text in merged]),
        leak=float(np.mean([probes.texts[n] in trained for n in test])),
        rows=None if cap.texts else np.array([number[text] for text in probes.texts]),
        row_labels=probes.labels,
    )


def split_rows(labels: np.ndarray, train_rows: int | None = None) -> Split:
    """Draw balanced train and test rows as sae-probes does, which leaves one row out.

    Args:
        labels: (n,), 0 or 1, about as many of each.
        train_rows: their number; default: half, at most 1,024.
    """
    n_train = min(len(labels) // 2, _TRAIN_ROWS) if train_rows is None else train_rows
    n_test = len(labels) - n_train - 1
    random = np.random.RandomState(SEED)
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    train_positive = random.choice(positive, -(-n_train // 2), replace=False)
    train_negative = random.choice(negative, n_train // 2, replace=False)
    test_positive = random.choice(np.setdiff1d(positive, train_positive), -(-n_test // 2), replace=False)
    test_negative = random.choice(np.setdiff1d(negative, train_negative), n_test // 2, replace=False)
    return Split(
        random.permutation(np.concatenate([train_positive, train_negative])),
        random.permutation(np.concatenate([test_positive, test_negative])),
    )


def benchmark_split(labels: np.ndarray) -> Split:
    """Draw the train and test rows of sae-probes: all but 100 rows train, at most 1,024."""
    return split_rows(labels, min(len(labels) - 100, _TRAIN_ROWS))


@torch.no_grad()
def single_feature_aucs(sae: SelOrthoSAE, activations: Tensor, labels: np.ndarray, split: Split) -> FeatureAucs:
    """Measure how well the activation of each feature alone tells apart two classes, without a fit.

    Args:
        activations: (texts, d_in), raw. labels: (texts,), 0 or 1. split: see [`split_rows`].
    """
    train, test = (_aucs(sae, activations[rows], torch.from_numpy(labels[rows] == 1)) for rows in split)
    negated = train < 0.5
    return FeatureAucs(torch.where(negated, 1 - train, train), torch.where(negated, 1 - test, test), negated)


def _aucs(sae: SelOrthoSAE, x: Tensor, is_one: Tensor) -> Tensor:
    """Area under the ROC curve of each feature (d_sae,), from the ranks of the few rows (n, d_in) on which it fires.

    The sum of the ranks of class 1, less its least value, counts the pairs of rows in the right order. Features never
    are negative: where one is 0, the rows share the lowest ranks.
    """
    parts = [active_features(sae.encode(rows.to(sae.device)).float().cpu()) for rows in x.split(ENCODED_ROWS)]
    d_sae, n, n_one = len(sae.W_dec), len(x), int(is_one.sum())
    start = torch.arange(len(parts)) * ENCODED_ROWS
    row = torch.cat([part.rows + first for part, first in zip(parts, start, strict=True)])
    feature, value = (torch.cat([getattr(part, what) for part in parts]) for what in ("cols", "values"))
    order = value.argsort(stable=True)
    order = order[feature[order].argsort(stable=True)]  # by feature, then by activation
    row, feature, value = row[order], feature[order], value[order]
    fired = torch.bincount(feature, minlength=d_sae)  # (d_sae,) rows
    rank = torch.arange(len(feature)) - (fired.cumsum(0) - fired)[feature] + 1.0  # among the rows on which it fires
    tied = torch.ones(len(feature), dtype=torch.bool)
    tied[1:] = (feature[1:] != feature[:-1]) | (value[1:] != value[:-1])
    group = tied.cumsum(0) - 1  # equal activations share the mean of their ranks
    rank = (_sums(group, rank, len(feature)) / torch.bincount(group, minlength=len(feature)).clamp(min=1))[group]
    silent, one = n - fired, is_one[row].double()
    ranks_of_one = _sums(feature, (rank + silent[feature]) * one, d_sae)
    ranks_of_one += (n_one - _sums(feature, one, d_sae)) * (silent + 1) / 2
    return (ranks_of_one - n_one * (n_one + 1) / 2) / (n_one * (n - n_one))


def _sums(group: Tensor, values: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values.double())
