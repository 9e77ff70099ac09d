"""The picture of a benchmark: seconds a step against the number of features."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from benchmarks.cases import ACTIVATIONS
from hf_selortho.utils.plots import BLUE, GREEN, GREY, STYLE, VERMILION, save_picture

# Okabe and Ito's palette again: one colour a mode; longer intervals are dashed
_COLORS = {
    "encoder": GREY, "none": "#000000", "selective": BLUE, "every-step": "#56B4E9", "decoder": GREEN,
    "ortsae": "#E69F00", "full": VERMILION,
}  # fmt: skip
_MARKERS = dict(zip(_COLORS, "osD^PX*", strict=True))


def plot_times(
    rows: Sequence[Mapping[str, Any]], peers: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]
) -> Path:
    """Draw seconds a step against features, both logarithmic: a panel an activation function, a line a case."""
    measured = [row for row in rows if row.get("seconds_per_step")]
    activations = list(dict.fromkeys(row["activation"] for row in measured))
    widths = sorted({row["width"] for row in measured})
    with rc_context(STYLE):
        figure = Figure(figsize=(2.4 + 3.7 * len(activations), 4.6), layout="constrained")
        panels = figure.subplots(1, len(activations), sharey=True, squeeze=False)[0]
        for axes, activation in zip(panels, activations, strict=True):
            _draw(axes, [row for row in measured if row["activation"] == activation])
            _draw_peers(axes, peers, widths)
            axes.set_title(ACTIVATIONS.get(activation, activation))
            _number_axes(axes, widths)
        panels[0].set_ylabel("seconds a training step")
        named: dict[Any, Any] = {}
        for axes in panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(label, handle)
        figure.legend(list(named.values()), list(named), loc="outside right upper", fontsize=9)
        return save_picture(figure, path)


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for label in dict.fromkeys(row["label"] for row in rows):
        points = sorted((row["width"], row["seconds_per_step"]) for row in rows if row["label"] == label)
        mode, interval = next((row["mode"], row["interval"]) for row in rows if row["label"] == label)
        axes.plot(
            *zip(*points, strict=True),
            color=_COLORS[mode], linestyle="-" if interval == 1 else "--", marker=_MARKERS[mode], markersize=5,
            markerfacecolor=_COLORS[mode] if interval == 1 else "white", linewidth=1.6, label=label,
        )  # fmt: skip


def _draw_peers(axes: Axes, peers: Sequence[Mapping[str, Any]], widths: Sequence[int]) -> None:
    """Peers of known width as points, the others as horizontal lines."""
    for number, name in enumerate(dict.fromkeys(peer["peer"] for peer in peers)):
        own = [peer for peer in peers if peer["peer"] == name]
        style: dict[str, Any] = {"color": GREY, "marker": "1234x+"[number % 6], "linestyle": ":", "markersize": 8}
        points = sorted((p["width"], p["seconds_per_step"]) for p in own if p["width"] is not None)
        if not points:
            points = [(widths[0], own[0]["seconds_per_step"]), (widths[-1], own[0]["seconds_per_step"])]
        axes.plot(*zip(*points, strict=True), label=f"{name} (peer)", **style)


def _number_axes(axes: Axes, widths: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(widths[0] / 1.25, widths[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(list(widths)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="minor", axis="y", linewidth=0.4)
    axes.set_xlabel("features n")
