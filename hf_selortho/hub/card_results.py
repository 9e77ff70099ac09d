"""What a model card says of an SAE's evaluation, ready for the template; same rules as `card_facts`."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..configuration_selortho import score_of_selection
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
    """Values of a metric as text, empty where there is none."""

    name: str
    value: str
    seeds: str  # mean and standard deviation over the seeds
    twin: str
    twin_seeds: str
    change: str  # from the twin, of the means where there are several seeds
    meaning: str


class Measured(NamedTuple):
    """The metrics of an SAE, and of whatever stands beside it."""

    metrics: Mapping[str, Any]  # content of metrics.json
    twin: Mapping[str, Any] | None = None  # the same run with ortho_coefficient = 0
    seeds: Sequence[Mapping[str, Any]] = ()  # the same run with other seeds
    twin_seeds: Sequence[Mapping[str, Any]] = ()  # their twins


def evaluation_facts(beside: Measured) -> dict[str, Any]:
    """The held-out evaluation, beside those of other seeds and of the twins trained without penalty."""
    metrics = beside.metrics
    measured, other = _evaluation(metrics), _evaluation(beside.twin or {})
    counts = {
        key: number(measured[key], "count")
        for key in ("samples", "tokens", "ce_samples", "ce_tokens")
        if key in measured
    }
    return {
        "rows": [_row(m, beside) for m in METRICS if m.key in measured],
        "has_twin": any(m.key in other for m in METRICS),
        **_seed_counts(beside),
        "dead": _shown(_BY_KEY["dead_features"], measured) if measured.get("dead_features") else None,
        **{key: counts.get(key) for key in ("samples", "tokens", "ce_samples", "ce_tokens")},
        "last_steps": _last_steps(metrics),
        "headline": {key: number(measured[key], kind) for key, kind in _HEADLINE.items() if key in measured},
    }


def penalty_facts(config: Mapping[str, Any], beside: Measured) -> dict[str, Any]:
    """What the penalty acted on, and what it changed against the twin."""
    metrics = beside.metrics
    measured, other = _evaluation(metrics), _evaluation(beside.twin or {})
    training, start = metrics.get("training") or {}, metrics.get("training_start") or {}
    n = config.get("d_sae")
    active = config.get("penalty") in ("selective", "full", "ortsae") and config.get("ortho_coefficient", 0) > 0
    pairs = n * (n - 1) // 2 if n else None
    share = config.get("pair_fraction")
    squares = config.get("penalty_space", "activation")
    return {
        "kind": config["penalty"] if active else "none" if config.get("penalty") else None,
        "pairs": number(pairs) if pairs else None,
        "wanted": number(math.ceil(share * pairs)) if share and pairs else None,
        "percent": number(100 * share, "exact") if share else None,
        "min_support": number(config["min_support"]) if config.get("min_support") else None,
        "space": "centred (Pearson) correlation" if config.get("correlation") == "pearson" else "cosine",
        "squares": squares,
        "companion": config.get("decoder_pairs", "alike") if config.get("decoder_ratio", 0) > 0 else None,
        "companion_weight": number(config["decoder_ratio"], "exact") if config.get("decoder_ratio", 0) > 0 else None,
        "selects": score_of_selection(squares, config.get("selection_space", "same")),
        "churn": number(training["pair_churn"], "percent") if _known(training.get("pair_churn")) else None,
        "before": number(start["top_correlation"]) if _known(start.get("top_correlation")) else None,
        "after": number(training["top_correlation"]) if _known(training.get("top_correlation")) else None,
        "unique": number(measured["unique_features"], "count") if "unique_features" in measured else None,
        "d_sae": number(n) if n else None,
        "rows": [_row(_BY_KEY[key], beside) for key in _COMPARED if key in measured and key in other],
        **_seed_counts(beside),
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
    found = metrics.get("evaluation") or {}
    wrong = [key for key in _BY_KEY.keys() & found.keys() if not isinstance(found[key], int | float | None)]
    if wrong:
        raise TypeError(f"{min(wrong)} is {found[min(wrong)]!r:.50}")
    return {key: value for key, value in found.items() if _known(value)}


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _seed_counts(beside: Measured) -> dict[str, int]:
    """How many seeds the means are over, this SAE's included; 0 where there is only the one."""
    return {
        "seeds": 1 + len(beside.seeds) if beside.seeds else 0,
        "twin_seeds": 1 + len(beside.twin_seeds) if beside.twin and beside.twin_seeds else 0,
    }


def _row(metric: Metric, beside: Measured) -> Row:
    own = _values(metric, beside.metrics, beside.seeds)
    others = _values(metric, beside.twin, beside.twin_seeds)
    after, before = statistics.fmean(own), statistics.fmean(others) if others else 0
    change = f"{100 * (after / before - 1):+.1f}%" if before else ""
    value, twin = (_shown(metric, _evaluation(metrics or {})) for metrics in (beside.metrics, beside.twin))
    return Row(metric.name, value, _spread(metric, own), twin, _spread(metric, others), change, metric.meaning)


def _values(metric: Metric, first: Mapping[str, Any] | None, seeds: Sequence[Mapping[str, Any]]) -> list[float]:
    """The metric of an SAE and of the same with other seeds; none where the SAE itself has none."""
    measured = [_evaluation(metrics or {}).get(metric.key) for metrics in (first, *seeds)]
    return [] if measured[0] is None else [value for value in measured if value is not None]


def _spread(metric: Metric, values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    kind = "" if metric.kind == "count" else metric.kind  # a mean of numbers of features is no whole number
    return f"{number(statistics.fmean(values), kind)} ± {number(statistics.stdev(values), kind)}"


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
