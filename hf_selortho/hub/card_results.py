"""What a model card says of an SAE's evaluation, ready for the template; same rules as `card_facts`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .markdown import code, number

_PICTURE = re.compile(r"([\w-][\w.-]*/)*([\w-][\w.-]*)\.png", re.ASCII)


class Metric(NamedTuple):
    """A row of the evaluation table."""

    key: str
    name: str
    kind: str  # see `markdown.number`
    meaning: str


METRICS = (
    Metric("fvu", "FVU", "", "Fraction of variance unexplained: 0 is perfect, 1 no better than the mean activation"),
    Metric("explained_variance", "Explained variance", "", "1 − FVU"),
    Metric("mse", "MSE", "", "Squared L2 norm of the error per token, in the scale of the raw activations"),
    Metric("l0", "L0", "", "Features active on a token"),
    Metric("l1", "L1", "", "Sum of a token's feature activations"),
    Metric("active_features", "Active features", "count", "Features with a mean activation above 10⁻⁶"),
    Metric("dead_features", "Dead features", "count", "Features that fired on none of these tokens"),
    Metric(
        "top_correlation",
        "Top correlation",
        "",
        "Mean correlation of the selected pairs, the most correlated ones of a batch",
    ),
    Metric("selected_pairs", "Selected pairs", "count", "Number of them in a batch"),
    Metric("unique_features", "Features in selected pairs", "count", "Different features among them"),
    Metric("peak_correlation", "Peak correlation", "", "Largest correlation between two features of a batch"),
    Metric(
        "mean_correlation", "Mean correlation", "", "Mean over all feature pairs that fired often enough in a batch"
    ),
    Metric("max_decoder_cosine", "Max decoder cosine", "", "Cosine with the most similar other feature direction"),
    Metric(
        "loss_recovered", "Loss recovered", "percent", "(CE zeroed − CE reconstructed) / (CE zeroed − CE untouched)"
    ),
    Metric("ce_clean", "CE, untouched", "", "Cross-entropy of the language model as it is, in nats per token"),
    Metric(
        "ce_reconstruction", "CE, reconstructed", "", "The same with the reconstruction in place of the activations"
    ),
    Metric("ce_zero_ablation", "CE, zeroed", "", "The same with zeros in place of the activations"),
)
_BY_KEY = {metric.key: metric for metric in METRICS}

_HEADLINE = {"fvu": "percent", "l0": "", "loss_recovered": "percent"}
_TRAINING = ("fvu", "l0", "top_correlation", "peak_correlation", "unique_features", "dead_features")
# What stands beside the twin: what the penalty is for first, then what it costs.
_COMPARED = (
    "top_correlation", "peak_correlation", "mean_correlation", "max_decoder_cosine",
    "fvu", "l0", "dead_features", "loss_recovered",
)  # fmt: skip

_CAPTIONS = {
    "training_curves": "Training: single batches pale, their running mean dark",
    "correlations": "Correlations between features over one batch of held-out tokens, the selected tail marked",
    "feature_density": "How often each feature fires on held-out tokens",
    "decoder_cosine": "For each feature, the cosine of its direction with the most similar other one",
}


class Row(NamedTuple):
    """Values of a metric as text; `twin` and `change` are empty where there is no twin."""

    name: str
    value: str
    twin: str
    change: str
    meaning: str


def evaluation_facts(metrics: Mapping[str, Any], twin: Mapping[str, Any] | None) -> dict[str, Any]:
    """The held-out evaluation, beside that of the twin trained without penalty where there is one."""
    measured, other = _evaluation(metrics), _evaluation(twin or {})
    counts = {
        key: number(measured[key], "count")
        for key in ("samples", "tokens", "ce_samples", "ce_tokens")
        if key in measured
    }
    return {
        "rows": [_row(m, measured, other) for m in METRICS if m.key in measured],
        "has_twin": any(m.key in other for m in METRICS),
        **{key: counts.get(key) for key in ("samples", "tokens", "ce_samples", "ce_tokens")},
        "last_steps": _last_steps(metrics),
        "headline": {key: number(measured[key], kind) for key, kind in _HEADLINE.items() if key in measured},
    }


def penalty_facts(
    config: Mapping[str, Any], metrics: Mapping[str, Any], twin: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the penalty acted on, and what it changed against the twin."""
    measured, other = _evaluation(metrics), _evaluation(twin or {})
    training = metrics.get("training") or {}
    n = config["d_sae"]
    active = config.get("penalty") in ("selective", "full") and config.get("ortho_coefficient", 0) > 0
    pairs = n * (n - 1) // 2
    return {
        "kind": config["penalty"] if active else "none" if config.get("penalty") else None,
        "pairs": number(pairs),
        "wanted": number(math.ceil(config["pair_fraction"] * pairs)) if config.get("pair_fraction") else None,
        "percent": number(100 * config["pair_fraction"], "exact") if config.get("pair_fraction") else None,
        "min_support": number(config["min_support"]) if config.get("min_support") else None,
        "space": "centred (Pearson) correlation" if config.get("correlation") == "pearson" else "cosine",
        "churn": number(training["pair_churn"], "percent") if _known(training.get("pair_churn")) else None,
        "unique": number(measured["unique_features"], "count") if "unique_features" in measured else None,
        "d_sae": number(n),
        "rows": [_row(_BY_KEY[key], measured, other) for key in _COMPARED if key in measured and key in other],
    }


def picture_facts(pictures: Sequence[str]) -> list[tuple[str, str]]:
    """Caption and path of each picture; only plain relative paths of PNG files are taken."""
    found = []
    for path in map(str, pictures):
        match = _PICTURE.fullmatch(path)
        if match:
            found.append((_CAPTIONS.get(match[2], code(match[2])), path))
    return found


def _evaluation(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (metrics.get("evaluation") or {}).items() if _known(value)}


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _row(metric: Metric, measured: Mapping[str, Any], other: Mapping[str, Any]) -> Row:
    value, before = measured[metric.key], other.get(metric.key)
    change = f"{100 * (value / before - 1):+.1f}%" if before else ""
    return Row(metric.name, _shown(metric, measured), _shown(metric, other), change, metric.meaning)


def _shown(metric: Metric, measured: Mapping[str, Any]) -> str:
    """The value, for a number of features with its share of all features; empty if unknown."""
    if metric.key not in measured:
        return ""
    share = measured.get(metric.key.replace("_features", "_fraction"))
    suffix = f" ({number(share, 'percent')})" if metric.key.endswith("_features") and share is not None else ""
    return number(measured[metric.key], metric.kind) + suffix


def _last_steps(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Means over the last 100 training steps, which the paper reports."""
    training = metrics.get("training") or {}
    known = [_BY_KEY[key] for key in _TRAINING if _known(training.get(key))]
    return [(metric.name, number(training[metric.key], metric.kind)) for metric in known]
