"""Prepare the metrics of SAEs for readers: beside the twin, beside other seeds, beside the other SAEs of a run."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..configuration_selortho import score_of_selection
from ..evaluation.metrics import Interval
from .markdown import Markdown, code, number

TWIN = "_twin"  # how the name of a twin ends
_PICTURE = re.compile(r"([\w-][\w.-]*/)*([\w-][\w.-]*)\.png", re.ASCII)


class Metric(NamedTuple):
    """A figure of the evaluation."""

    key: str
    name: str
    kind: str = ""  # see `markdown.number`
    meaning: str = ""


METRICS = (
    Metric("fvu", "FVU", "", "Fraction of variance unexplained: 0 is perfect, 1 no better than the mean activation"),
    Metric("explained_variance", "Explained variance", "", "1 − FVU"),
    Metric("mse", "MSE", "", "Squared L2 norm of the error per token, in the scale of the raw activations"),
    Metric("l0", "L0", "", "Features active on a token"),
    Metric("l1", "L1", "", "Sum of a token's feature activations"),
    Metric("active_features", "Active features", "count", "Features with a mean activation above 10⁻⁶"),
    Metric("dead_features", "Dead features", "count", "Features that fired on none of these tokens"),
    Metric("top_correlation", "Top correlation", "",
           "Mean correlation of the most correlated pairs of a batch"),
    Metric("selected_pairs", "Selected pairs", "count", "Number of them in a batch"),
    Metric("unique_features", "Features in selected pairs", "count", "Different features among them"),
    Metric("peak_correlation", "Peak correlation", "", "Largest correlation between two features of a batch"),
    Metric("mean_correlation", "Mean correlation", "",
           "Mean over all feature pairs that fired often enough in a batch"),
    Metric("max_decoder_cosine", "Max decoder cosine", "",
           "Cosine with the most similar other feature direction"),
    Metric("loss_recovered", "Loss recovered", "percent",
           "(CE zeroed − CE reconstructed) / (CE zeroed − CE untouched)"),
    Metric("kl", "KL divergence", "",
           "Of the predictions with the reconstruction in place from the untouched ones, in nats per token"),
    Metric("top1_agreement", "Top-1 agreement", "percent",
           "Tokens whose likeliest successor stays the same with the reconstruction in place"),
    Metric("ce_clean", "CE, untouched", "", "Cross-entropy of the language model as it is, in nats per token"),
    Metric("ce_reconstruction", "CE, reconstructed", "",
           "Cross-entropy with the reconstruction in place of the activations"),
    Metric("ce_zero_ablation", "CE, zeroed", "", "Cross-entropy with zeros in place of the activations"),
)  # fmt: skip
# Of transcoders of several layers: the language model with the outputs of all of them replaced at once.
ALL_LAYERS = (
    Metric("ce", "CE, untouched", "", "Cross-entropy of the language model as it is, in nats per token"),
    Metric("ce_replaced", "CE, replaced", "", "With every layer's reconstruction of what the layers below have left"),
    Metric("ce_zero", "CE, zeroed", "", "With zeros in the same places"),
    Metric("ce_mean", "CE, means", "", "With the mean activations in the same places"),
    Metric("kl", "KL divergence", "", "Of the replaced model's predictions from the untouched ones, in nats per token"),
    Metric("top1_agreement", "Top-1 agreement", "percent", "Tokens whose likeliest successor stays the same"),
    Metric("loss_recovered", "Loss recovered", "percent", "(CE zeroed − CE replaced) / (CE zeroed − CE untouched)"),
    Metric("loss_recovered_mean", "Loss recovered, of means", "percent",
           "(CE means − CE replaced) / (CE means − CE untouched)"),
)  # fmt: skip
# What `selortho evaluate` measures on request.
TASK_METRICS = (
    Metric("probing_accuracy_k1", "Probing, balanced accuracy of 1 feature"),
    Metric("probing_accuracy_k5", "Probing, of 5 features"),
    Metric("probing_accuracy_all", "Probing, of all features"),
    Metric("probing_accuracy_lm", "Probing, of the activations themselves"),
    Metric("absorption_rate", "First-letter absorption, rate"),
    Metric("absorption_fraction", "First-letter absorption, fraction"),
    Metric("first_letter_f1", "F1 of first-letter features"),
)
# Means over the probe sets that are not trained on, by the number of features of a probe.
_PROBED = {"probe_auc_k1": "1", "probe_auc_k16": "16"}
_BY_KEY = {metric.key: metric for metric in METRICS}
_TRAINING = ("fvu", "l0", "top_correlation", "peak_correlation", "unique_features", "dead_features")
# What stands beside the twin: what the penalty is for first, then what it costs.
_COMPARED = (
    "top_correlation", "peak_correlation", "mean_correlation", "max_decoder_cosine", "fvu", "l0", "dead_features",
    "loss_recovered",
)  # fmt: skip
# Headings of the table of several SAEs.
_COLUMNS = {
    "fvu": "FVU", "l0": "L0", "top_correlation": "top corr.", "peak_correlation": "peak corr.",
    "mean_correlation": "mean corr.", "max_decoder_cosine": "decoder cos.", "unique_features": "in pairs",
    "active_features": "active", "dead_features": "dead", "loss_recovered": "loss rec.",
    "probe_auc_k1": "AUC, k=1", "probe_auc_k16": "AUC, k=16",
}  # fmt: skip
_GROUPS = ("clean", "trained_on")  # of probe sets
_CAPTIONS = {
    "training_curves": "Training: single batches pale, their running mean dark",
    "correlations": "Correlations between features over one batch of held-out tokens, the selected tail marked",
    "feature_density": "How often each feature fires on held-out tokens",
    "decoder_cosine": "For each feature, the cosine of its direction with the most similar other one",
}


@dataclass(frozen=True)
class SaeReport:
    """An SAE, and what was measured of it, of its twin (the same run without the penalty) and of other seeds.

    Metrics are contents of a metrics.json.
    """

    name: str  # its folder within the run or repository, "layer_8"; "" if it is the only one
    config: Mapping[str, Any]  # settings (`SelOrthoConfig.own_settings()`)
    metrics: Mapping[str, Any]
    pictures: Sequence[str] = ()  # paths within the run or repository
    twin: Mapping[str, Any] | None = None
    seeds: Sequence[Mapping[str, Any]] = ()
    twin_seeds: Sequence[Mapping[str, Any]] = ()

    @property
    def layer(self) -> int | None:
        return self.config.get("layer")

    @property
    def variant(self) -> str | None:
        """What the name says beside the layer, such as "twin"."""
        return self.name.removeprefix(f"layer_{self.layer}").strip("_") or None

    def figure(self, key: str) -> float | None:
        """Return a figure of the evaluation on held-out text, or else of the end of the training."""
        figures = self.metrics.get("evaluation") or self.metrics.get("training") or {}
        if key in _PROBED:
            return figures["probes"]["k"][_PROBED[key]]["clean"]["mean"] if figures.get("probes") else None
        return figures.get(key)


def beside_twins(saes: Sequence[SaeReport]) -> list[SaeReport]:
    """Give each SAE the metrics of its twin, where that is among them."""
    metrics = {sae.name: sae.metrics for sae in saes}
    return [replace(sae, twin=metrics.get(f"{sae.name}{TWIN}", sae.twin)) for sae in saes]


def without_twins(saes: Sequence[SaeReport]) -> list[SaeReport]:
    """Return the SAEs that are not there for comparison with another; all of them where there are only twins."""
    names = {sae.name for sae in saes}
    return [sae for sae in saes if not (sae.name.endswith(TWIN) and sae.name.removesuffix(TWIN) in names)] or list(saes)


class Row(NamedTuple):
    """Values of a metric as text, empty where there is none."""

    key: str
    name: str
    value: str
    seeds: str  # mean and standard deviation over the seeds
    twin: str
    twin_seeds: str
    change: str  # from the twin, of the means where there are several seeds
    meaning: str


def results_of(sae: SaeReport) -> dict[str, Any]:
    """Collect what the template of a card is told of the evaluation and the training of an SAE."""
    evaluation = _evaluation(sae.metrics)
    training, start = (_known(sae.metrics.get(key) or {}) for key in ("training", "training_start"))
    rows = {key: _row(metric, sae) for key, metric in _BY_KEY.items() if key in evaluation}
    return {
        "name": sae.name,
        "config": sae.config,
        "evaluation": evaluation,
        "training": training,
        "training_start": start,
        "rows": list(rows.values()),
        "compared": [rows[key] for key in _COMPARED if key in rows and rows[key].twin],
        "moved": [(part, _moved(figures)) for part, figures in (sae.metrics.get("moved") or {}).items()],
        "dead": rows["dead_features"].value if evaluation.get("dead_features") else None,
        "has_twin": any(row.twin for row in rows.values()),
        "probes": probes_of(sae.metrics, sae.twin),
        # How many seeds the means are over, this SAE's included; 0 where there is only the one.
        "seeds": 1 + len(sae.seeds) if sae.seeds else 0,
        "twin_seeds": 1 + len(sae.twin_seeds) if sae.twin and sae.twin_seeds else 0,
        "last_steps": [
            (_name_in_training(key, sae.config), _shown(_BY_KEY[key], training)) for key in _TRAINING if key in training
        ],
        "pictures": [
            (Markdown(_CAPTIONS.get(match[2], code(match[2]))), Markdown(match[0]))
            for match in map(_PICTURE.fullmatch, map(str, sae.pictures))
            if match  # only plain relative paths are taken
        ],
    }


def _moved(figures: Mapping[str, Any]) -> list[Any]:
    """Return median and quantiles of the features' cosines with their start, and the share that is nearly the same."""
    known = _known({**figures, **(figures.get("quantiles") or {})})
    share = known.get("share_above_0.9")
    cells = [known.get(key) for key in ("median_cosine", "0.05", "0.25")]
    return [*cells, "" if share is None else Markdown(number(share, "percent"))]


def selects_by(config: Mapping[str, Any]) -> str:
    """Return by which score the training of an SAE has selected pairs, "activation" or "decoder"."""
    space, selection = config.get("penalty_space", "activation"), config.get("selection_space", "same")
    acts = config.get("penalty") == "selective" and config.get("ortho_coefficient", 0) > 0
    return score_of_selection(space, selection) if acts else "activation"


def _name_in_training(key: str, config: Mapping[str, Any]) -> str:
    name = _BY_KEY[key].name  # the figures are of the selected pairs, by what they were selected by
    return name.replace("correlation", "decoder cosine") if selects_by(config) == "decoder" else name


def probes_of(metrics: Mapping[str, Any], twin: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Prepare the probes of a metrics.json for readers, beside those of a twin that were made on the same texts.

    Returns:
        None where there are none; else "clean" and "trained_on", how many sets there are of each, "texts" and "tokens",
        what was read at most of a set and of a text, "twin", whether there is one, "benchmark", the means over all rows
        of the sets, and "rows", each a name and by group of sets a cell, the twin's and the difference from it.
    """
    probes = ((metrics or {}).get("evaluation") or {}).get("probes")
    if not probes:
        return None
    other = ((twin or {}).get("evaluation") or {}).get("probes") or {}
    same = [[row["name"] for row in made.get("per_set", ())] for made in (probes, other)]
    beside = same[0] == same[1] and all(probes[key] == other[key] for key in ("texts", "tokens"))
    rows = [(_features(k), k) for k in probes["k"]]
    return {
        **{group: probes["dense"][group]["sets"] for group in _GROUPS},
        **{key: probes[key] for key in ("texts", "tokens")},
        "twin": beside,
        "benchmark": _benchmark(probes.get("benchmark")),
        "rows": [
            (Markdown(name), [_probe_cells(probes, other if beside else None, k, group) for group in _GROUPS])
            for name, k in (*rows, ("the activations (dense)", None))
        ],
    }


def _probe_cells(
    probes: Mapping[str, Any], twin: Mapping[str, Any] | None, k: str | None, group: str
) -> tuple[Markdown, Markdown, Markdown]:
    """Return a mean with its interval, the twin's mean, and the mean difference from it over the same sets."""
    if k is None:  # which an SAE plays no part in
        return _with_interval(probes["dense"][group]), Markdown(), Markdown()
    own = _with_interval(probes["k"][k][group])
    if twin is None:
        return own, Markdown(), Markdown()
    pairs = zip(probes["per_set"], twin["per_set"], strict=True)
    changes = [a["auc"][k] - b["auc"][k] for a, b in pairs if bool(a["trained_on"]) == (group == "trained_on")]
    return own, _with_interval(twin["k"][k][group]), _with_interval(Interval.of(changes)._asdict(), "+")


def _features(k: str) -> str:
    return "1 feature" if k == "1" else f"{int(k)} features"


def _with_interval(figures: Mapping[str, Any], sign: str = "") -> Markdown:
    mean, low, high = (figures[key] for key in ("mean", "low", "high"))
    if mean is None:
        return Markdown("-")
    return Markdown(f"{mean:{sign}.3f}" + ("" if low is None else f" ({low:{sign}.3f} to {high:{sign}.3f})"))


def _benchmark(figures: Mapping[str, Any] | None) -> Markdown | None:
    if not figures:
        return None
    words = [f"{auc:.3f} with {_features(k)}" for k, auc in figures["k"].items()]
    return Markdown(f"{', '.join(words)}, {figures['dense']:.3f} with the activations, over {figures['sets']:d} sets")


def all_layers_of(by_variant: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare what was measured with all layers replaced at once: "layers", "variants" and "rows" of a table.

    Each row has name, meaning and a value by variant; the first variant is that of the SAEs themselves.
    """
    measured = {variant: _known(figures) for variant, figures in by_variant.items() if figures}
    rows = [
        (metric.name, metric.meaning, [_shown(metric, figures) or "-" for figures in measured.values()])
        for metric in ALL_LAYERS
        if any(metric.key in figures for figures in measured.values())
    ]
    layers = max((figures.get("layers", 0) for figures in measured.values()), default=0)
    return {"layers": layers, "variants": list(measured), "rows": rows}


def summary_rows(saes: Sequence[SaeReport]) -> list[list[str]]:
    """Put the SAEs of a run side by side, headings first; where there are several layers, their mean by variant too."""
    known = [key for key in _COLUMNS if any(sae.figure(key) is not None for sae in saes)]
    metrics = [_BY_KEY.get(key, Metric(key, _COLUMNS[key])) for key in known]
    rows = [["layer", "variant", *(_COLUMNS[metric.key] for metric in metrics)]]
    for sae in saes:
        layer = "-" if sae.layer is None else str(sae.layer)
        rows.append([layer, sae.variant or "-", *(_mean_text(metric, [sae]) for metric in metrics)])
    if len({sae.layer for sae in saes}) > 1:
        for variant in dict.fromkeys(sae.variant for sae in saes):
            same = [sae for sae in saes if sae.variant == variant]
            rows.append(["mean", variant or "-", *(_mean_text(metric, same) for metric in metrics)])
    return rows


def _mean_text(metric: Metric, saes: Sequence[SaeReport]) -> str:
    figures = [figure for sae in saes if (figure := sae.figure(metric.key)) is not None]
    return number(statistics.fmean(figures), metric.kind) if len(figures) == len(saes) else "-"


def _evaluation(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    figures = (metrics or {}).get("evaluation") or {}
    for key in _BY_KEY.keys() & figures.keys():
        if not isinstance(figures[key], int | float | None):
            raise TypeError(f"{key} is {figures[key]!r:.50}")
    return _known(figures)


def _known(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)}


def _row(metric: Metric, sae: SaeReport) -> Row:
    own = _values(metric, (sae.metrics, *sae.seeds))
    others = _values(metric, (sae.twin, *sae.twin_seeds))
    after, before = statistics.fmean(own), statistics.fmean(others) if others else 0
    return Row(
        key=metric.key,
        name=metric.name,
        value=_shown(metric, _evaluation(sae.metrics)),
        seeds=_spread(metric, own),
        twin=_shown(metric, _evaluation(sae.twin)),
        twin_seeds=_spread(metric, others),
        change=f"{100 * (after / before - 1):+.1f}%" if before else "",
        meaning=metric.meaning,
    )


def _values(metric: Metric, measured: Sequence[Mapping[str, Any] | None]) -> list[float]:
    """Return the metric of an SAE and of the same with other seeds; nothing where the SAE itself has none."""
    values = [_evaluation(metrics).get(metric.key) for metrics in measured]
    return [] if values[0] is None else [value for value in values if value is not None]


def _spread(metric: Metric, values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    kind = "" if metric.kind == "count" else metric.kind  # a mean of numbers of features is no whole number
    return f"{number(statistics.fmean(values), kind)} ± {number(statistics.stdev(values), kind)}"


def _shown(metric: Metric, figures: Mapping[str, Any]) -> str:
    """Return the value, for a number of features with its share of all features; "" if unknown."""
    if metric.key not in figures:
        return ""
    share = figures.get(metric.key.replace("_features", "_fraction"))
    suffix = f" ({number(share, 'percent')})" if metric.key.endswith("_features") and share is not None else ""
    return number(figures[metric.key], metric.kind) + suffix
