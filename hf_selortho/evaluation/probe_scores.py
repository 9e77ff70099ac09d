"""Sparse probing as the field reports it: test AUC of probes on k features of an SAE, over the sets of sae-probes.

As in Kantamneni et al. 2025 (arXiv:2502.16681), setting "normal": features are ranked by the difference of their means
between the classes, each divided by its own mean where it fires; an L2-regularised logistic regression on the first k,
whose C is chosen on validation rows, is scored by the area under the ROC curve on test rows. The dense baseline is the
same regression on the raw activations, without an SAE.

What is reported differs from the benchmark in its rows: a text is one row however often it is repeated (in the
benchmark, a fifth of the test rows on average repeat a text of the train rows), and half of the rows test. With all
sets, the figures of the benchmark's own rows stand beside.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ..data.sae_probes import probe_set_names, read_probe_set
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..modeling_selortho import SelOrthoSAE
from .evaluator import Evaluation
from .last_tokens import cache_folder, read_last_tokens
from .metrics import Interval
from .probe_sets import (
    ENCODED_ROWS,
    FULL,
    QUICK,
    QUICK_SETS,
    SEED,
    Cap,
    ProbeTexts,
    Split,
    benchmark_split,
    probe_texts,
    split_rows,
)
from .probing import ranked_features
from .replacement import layer_of

logger = logging.getLogger(__name__)

KS = (1, 2, 5, 16)  # features of a probe
_C = np.logspace(5, -5, 10)
_VALIDATION_ROWS = 100  # at most, and at most a fifth of the train rows


def probe_sets_of(sets: str) -> tuple[tuple[str, ...], Cap]:
    """Return the names of the sets that "quick" or "all" stands for, and how much of each is read."""
    return (QUICK_SETS, QUICK) if sets == "quick" else (probe_set_names(), FULL)


def check_probes(sets: str) -> None:
    """Refuse probes on texts that cannot be read, before anything is computed.

    Args:
        sets: "quick", "all" or "none".

    Raises:
        SelOrthoError: the package sae-probes is missing, of another version or damaged.
    """
    for name in () if sets == "none" else probe_sets_of(sets)[0]:
        read_probe_set(name)


def check_widths(sets: str, *features: int | None) -> None:
    """Refuse probes of SAEs that have too few features.

    Args:
        sets: "quick", "all" or "none".
        features: how many each SAE has; None: unknown as yet.

    Raises:
        SelOrthoError: an SAE has fewer than a probe reads.
    """
    if sets == "none":
        return
    if few := [d_sae for d_sae in features if d_sae is not None and d_sae < KS[-1]]:
        raise SelOrthoError(
            f"d_sae={few[0]}: expected at least {KS[-1]} features, which a probe reads; leave --probes out"
        )


def measure_probes(
    saes: Sequence[SelOrthoSAE],
    capture: ActivationCapture,
    sets: str,
    *,
    prepend_bos: bool,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Probe SAEs of the layers of `capture` on one reading of the texts: "probes" of docs/metrics.md for each.

    Args:
        saes: each with its `layer` in its config, where `capture` reads several.
        sets: "quick" or "all".
        prepend_bos, progress: as of [`read_last_tokens`], whose results are kept in [`cache_folder`].

    Raises:
        SelOrthoError: as [`check_probes`], [`check_widths`] and [`read_last_tokens`].
    """
    names, cap = probe_sets_of(sets)
    texts = {name: probe_texts(read_probe_set(name), cap) for name in names}
    rows: list[list[dict[str, Any]]] = [[] for _ in saes]
    read = read_last_tokens(
        capture,
        {name: probes.texts for name, probes in texts.items()},
        cap.tokens,
        prepend_bos=prepend_bos,
        cache=cache_folder(),
        progress=progress,
    )
    for name, by_layer in read:
        dense = {layer: dict(_dense_figures(texts[name], activations)) for layer, activations in by_layer.items()}
        for sae, measured in zip(saes, rows, strict=True):
            layer = layer_of(sae, capture.layers)
            measured.append(_figures(sae, texts[name], by_layer[layer], dense[layer]))
    return [{"sets": sets, **cap._asdict(), **summary(measured), "per_set": measured} for measured in rows]


def add_probes(
    evaluations: Sequence[Evaluation],
    saes: Sequence[SelOrthoSAE],
    capture: ActivationCapture,
    sets: str,
    *,
    prepend_bos: bool,
) -> None:
    """Probe SAEs that were trained and evaluated, which is not lost where probing fails: a warning says why."""
    try:
        probes = measure_probes(saes, capture, sets, prepend_bos=prepend_bos)
    except SelOrthoError as error:
        logger.warning("nothing was probed: %s", error)
        return
    for evaluation, measured in zip(evaluations, probes, strict=True):
        evaluation.metrics["probes"] = measured


def summary(per_set: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the figures of sets over those trained on and the others apart, with intervals of the mean."""

    def means(values: Sequence[float]) -> dict[str, Any]:
        groups = {}
        for group, trained in (("clean", False), ("trained_on", True)):
            own = [v for v, row in zip(values, per_set, strict=True) if row["trained_on"] == trained]
            mean, low, high = Interval.of(own)
            bounds = {"low": low and max(low, 0.0), "high": high and min(high, 1.0)}  # an AUC is within them
            groups[group] = {"mean": mean, **bounds, "sets": len(own)}
        return groups

    figures: dict[str, Any] = {
        "k": {str(k): means([row["auc"][str(k)] for row in per_set]) for k in KS},
        "dense": means([row["dense"] for row in per_set]),
    }
    if all("benchmark" in row for row in per_set):
        rows = [row["benchmark"] for row in per_set]
        figures["benchmark"] = {
            "k": {str(k): float(np.mean([row["auc"][str(k)] for row in rows])) for k in KS},
            "dense": float(np.mean([row["dense"] for row in rows])),
            "sets": len(rows),
        }
    return figures


@torch.no_grad()
def sparse_aucs(
    sae: SelOrthoSAE, activations: Tensor, labels: np.ndarray, split: Split, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return the test AUC of a probe on the first k features, by k as text.

    Args:
        activations: (texts, d_in), raw. labels: (texts,), 0 or 1. split: see [`split_rows`]. ks: rising.
    """

    def encode(rows: np.ndarray) -> Iterator[Tensor]:
        for batch in activations[rows].split(ENCODED_ROWS):
            yield sae.encode(batch.to(sae.device)).float().cpu()

    train = torch.cat(list(encode(split.train)))  # (n_train, d_sae)
    y_train, y_test = labels[split.train], labels[split.test]
    chosen = ranked(train, y_train)[: ks[-1]]
    train, test = train[:, chosen], torch.cat([h[:, chosen] for h in encode(split.test)])
    return {str(k): probe_auc(train[:, :k], y_train, test[:, :k], y_test) for k in ks}


def dense_auc(activations: Tensor, labels: np.ndarray, split: Split) -> float:
    """Return the test AUC of a probe on raw activations (texts, d_in)."""
    return probe_auc(activations[split.train], labels[split.train], activations[split.test], labels[split.test])


def probe_auc(x_train: Tensor, y_train: np.ndarray, x_test: Tensor, y_test: np.ndarray) -> float:
    """Return the test AUC of a logistic regression, C chosen by its AUC on the last of the (shuffled) train rows.

    Of values of C that are equally good, the largest is taken.
    """
    x, validation = x_train.double().numpy(), min(len(x_train) // 5, _VALIDATION_ROWS)
    fitted, held = slice(0, len(x) - validation), slice(len(x) - validation, len(x))

    def probe(c: float, rows: Any) -> LogisticRegression:
        return LogisticRegression(C=c, random_state=SEED, max_iter=1000).fit(x[rows], y_train[rows])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = [roc_auc_score(y_train[held], probe(c, fitted).predict_proba(x[held])[:, 1]) for c in _C]
        best = probe(_C[int(np.argmax(scores))], np.random.RandomState(SEED).permutation(len(x)))
    return float(roc_auc_score(y_test, best.predict_proba(x_test.double().numpy())[:, 1]))


def ranked(h: Tensor, labels: np.ndarray) -> Tensor:
    """Rank features (n, d_sae) by the difference of their means between classes, each over its mean where it fires."""
    mean = h.abs().sum(0) / ((h != 0).sum(0) + 1e-6)
    return ranked_features(h / (mean + 1e-6), torch.from_numpy(labels == 1))


def _rows(texts: ProbeTexts) -> Iterator[tuple[bool, np.ndarray | slice, np.ndarray, Split]]:
    """Yield the rows that we report on and, of all texts, those of the benchmark: whether so, texts, labels, split."""
    yield False, slice(0, len(texts.labels)), texts.labels, split_rows(texts.labels)
    if texts.rows is not None:
        yield True, texts.rows, texts.row_labels, benchmark_split(texts.row_labels)


def _dense_figures(texts: ProbeTexts, activations: Tensor) -> Iterator[tuple[bool, float]]:
    for benchmark, numbers, labels, split in _rows(texts):
        yield benchmark, dense_auc(activations[numbers], labels, split)


def _figures(sae: SelOrthoSAE, texts: ProbeTexts, activations: Tensor, dense: Mapping[bool, float]) -> dict[str, Any]:
    figures: dict[str, Any] = {"name": texts.name, "trained_on": texts.trained_on, "leak": texts.leak}
    for benchmark, numbers, labels, split in _rows(texts):
        measured = {"auc": sparse_aucs(sae, activations[numbers], labels, split), "dense": dense[benchmark]}
        figures |= {"benchmark": measured} if benchmark else measured
    return figures
