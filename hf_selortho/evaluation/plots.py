"""The pictures of a run, PNG files for its model card."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, PercentFormatter

from ..errors import SelOrthoError
from ..utils.plots import BLUE, GREEN, GREY, STYLE, VERMILION, save_picture

_COLORS = (BLUE, VERMILION, GREEN)


@dataclass(frozen=True)
class _Panel:
    title: str
    series: dict[str, str]  # key of a metrics.jsonl row -> its name in the legend
    log: bool = False
    percent: bool = False


_PANELS = (
    _Panel("Fraction of variance unexplained", {"fvu": ""}, log=True),
    _Panel(
        "Loss terms (weighted)", {"reconstruction": "reconstruction", "l1": "L1", "ortho": "decorrelation"}, log=True
    ),
    _Panel(
        "Feature correlation in the batch", {"peak_correlation": "peak", "top_correlation": "mean of selected pairs"}
    ),
    _Panel("Active features per token (L0)", {"l0": ""}),
    _Panel("Dead features", {"dead_features": ""}),
    _Panel("Share of selected pairs that are new", {"pair_churn": ""}, percent=True),
)


def plot_training_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draw the rows of `metrics.jsonl` over the steps: raw values pale, their running mean in front.

    Figures that no row holds get no panel. Raises SelOrthoError if there is nothing to draw.
    """
    panels = [p for p in _PANELS if any(len(_series(rows, key)[0]) for key in p.series)]
    if not panels:
        raise SelOrthoError("no training curves to draw: the rows hold none of the figures of metrics.jsonl")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.1 * columns, 2.9 * lines), layout="constrained")
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(lines, columns, number + 1)
            _draw_panel(axes, panel, rows)
            if number >= len(panels) - columns:
                axes.set_xlabel("step")
        return save_picture(figure, path)


def plot_correlation_histogram(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> Path:
    """Draw how the correlations of the feature pairs are distributed, the selected tail marked.

    `arrays` are those of `evaluate_saes`: `correlation_counts`, `correlation_edges`, `correlation_threshold` and
    `correlation_features`.
    """
    counts, edges = arrays["correlation_counts"], arrays["correlation_edges"]
    threshold = float(arrays["correlation_threshold"])
    features, eligible = arrays["correlation_features"]
    with _picture(path, "Correlations between features") as axes:
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, label="pairs of features")
        if math.isfinite(threshold):
            _mark_tail(axes, counts, edges, threshold)
        if counts.any():
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.7)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("correlation of two features over one batch of held-out tokens")
        axes.set_ylabel("pairs (log scale)")
        if features < eligible:
            axes.set_title(f"{axes.get_title(loc='left')} (a sample of {features:,} of {eligible:,})")
        axes.legend(loc="upper right")
    return Path(path)


def plot_feature_density(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> Path:
    """Draw on which share of the tokens each feature fires (`arrays["feature_density"]`), on a logarithmic axis."""
    density = arrays["feature_density"]
    alive = density[density > 0]  # a logarithmic axis has no zero: the others are named in the title
    dead = len(density) - len(alive)
    with _picture(path, "How often features fire" + f" ({dead:,} of {len(density):,} never did)" * (dead > 0)) as axes:
        if len(alive):
            low = math.floor(math.log10(alive.min()) - 1e-9)
            median = float(np.median(alive))
            _draw_histogram(
                axes, alive, np.logspace(low, 0, max(60, 10 * -low) + 1), median, f"median {_share(median)}"
            )
            axes.legend(loc="upper left")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: _share(value))
        axes.set_xlabel("share of held-out tokens on which the feature fires (log scale)")
    return Path(path)


def plot_decoder_cosine(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> Path:
    """Draw every feature's largest decoder cosine with another feature (`arrays["max_decoder_cosine"]`)."""
    cosine = arrays["max_decoder_cosine"]
    mean, low = float(cosine.mean()), min(0.0, math.floor(float(cosine.min()) * 10) / 10)
    with _picture(path, "Nearest neighbours among the decoder directions") as axes:
        _draw_histogram(axes, cosine, np.linspace(low, 1, 61), mean, f"mean {mean:.2f}")
        axes.legend(loc="upper right")
        axes.set_xlabel("cosine with the most similar other decoder direction (1: a duplicate)")
    return Path(path)


@contextmanager
def _picture(path: str | os.PathLike[str], title: str) -> Iterator[Axes]:
    """One pair of axes, saved at the end."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.7), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        yield axes
        save_picture(figure, path)


def _draw_histogram(axes: Axes, values: np.ndarray, bins: np.ndarray, middle: float, label: str) -> None:
    """How many features have which value, and a line at the middle one."""
    axes.hist(values, bins=bins.tolist(), color=BLUE)
    axes.axvline(middle, color=VERMILION, linewidth=1.8, linestyle="--", label=label)
    axes.set_xlim(bins[0], bins[-1])
    axes.set_ylabel("features")


def _draw_panel(axes: Axes, panel: _Panel, rows: Sequence[Mapping[str, Any]]) -> None:
    drawn = {key: _series(rows, key) for key in panel.series}
    drawn = {key: (steps, values) for key, (steps, values) in drawn.items() if len(steps)}
    for color, (key, (steps, values)) in zip(_COLORS, drawn.items(), strict=False):
        smooth = _running_mean(values, max(1, len(values) // 50))
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=color, linewidth=1.8, label=panel.series[key])
    everything = np.concatenate([values for _, values in drawn.values()])
    if panel.log and (everything > 0).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=min(0.0, float(everything.min())))
        if not everything.any():
            axes.set_ylim(0, 1)  # all zero: matplotlib would number twentieths of a feature
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(panel.title)
    if len(panel.series) > 1:
        axes.legend(fontsize=9)


def _mark_tail(axes: Axes, counts: np.ndarray, edges: np.ndarray, threshold: float) -> None:
    """Colour the pairs of |correlation| above the threshold, splitting the bin it falls into."""
    label = f"selected: |c| ≥ {threshold:.2f}" if edges[0] < 0 else f"selected: c ≥ {threshold:.2f}"
    left, right = np.maximum(edges[:-1], threshold), np.minimum(edges[1:], -threshold)
    above, below = left < edges[1:], edges[:-1] < right
    axes.bar(left[above], counts[above], (edges[1:] - left)[above], align="edge", color=VERMILION, label=label)
    axes.bar(edges[:-1][below], counts[below], (right - edges[:-1])[below], align="edge", color=VERMILION)
    for position in (threshold, -threshold) if edges[0] < 0 else (threshold,):
        axes.axvline(position, color=GREY, linewidth=1, linestyle="--")


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one figure; rows that lack it are passed over."""
    found = [(row["step"], row[key]) for row in rows if "step" in row and isinstance(row.get(key), int | float)]
    points = np.array([p for p in found if math.isfinite(p[1])], dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the window up to each point, shorter at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _share(value: float) -> str:
    return f"{value * 100:.2g}%" if value < 0.0995 else f"{value * 100:.0f}%"
