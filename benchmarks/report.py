"""The table of a benchmark as Markdown, and its picture: seconds a step against the number of features."""

from __future__ import annotations

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
_HEADER = (
    "features", "activation", "L0", "case", "s/step", "least", "tokens/s", "x encoder", "x no penalty", "selection",
    "memory",
)  # fmt: skip


def report(content: Mapping[str, Any]) -> str:
    """Write the benchmark as Markdown: what it ran on, the timings, what was left out."""
    lines = [
        f"{content['hardware']}, {content['threads']} threads, torch {content['versions']['torch']}, {content['date']}",
        f"batch {content['batch']} tokens, d_in {content['d_in']}, {content['steps']} rounds; cases take turns, "
        "ratios are taken within a round and their median is given; *selection*: seconds a step of it by itself",
        f"activations: {content['source']}",
        *content["notes"],
    ]
    if (supply := content["supply"]) is not None:
        lines.append(
            f"language model {supply['model']} up to layer {supply['layer']}: {supply['lm_tokens_per_second']:,.0f} "
            f"tokens/s, shuffle buffer {supply['buffer_tokens_per_second']:,.0f} tokens/s"
        )
    lines += [
        f"not measured: {row['width']:,} features, {row['activation']}, {row['label']}: {row['skipped']}"
        for row in content["rows"]
        if row["skipped"]
    ]
    return "\n".join(f"- {line}" for line in lines) + f"\n\n{times_table(content['rows'])}\n"


def times_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write seconds a step of every case, with the ratios to the two yardsticks."""
    lines = [_HEADER, [":--" if name in ("activation", "case") else "--:" for name in _HEADER]]
    for row in rows:
        if "seconds_per_step" not in row:
            continue
        lines.append([
            f"{row['width']:,}", ACTIVATIONS.get(row["activation"], row["activation"]),
            "" if row["l0"] is None else f"{row['l0']:,.0f}", row["label"],
            _seconds(row["seconds_per_step"]), _seconds(row["seconds_per_step_min"]),
            f"{row['tokens_per_second']:,.0f}", f"{row['ratio_to_encoder']:.2f}", f"{row['ratio_to_no_penalty']:.2f}",
            _seconds(row["seconds_by_phase"]["selection"]) if row["pairs"] else "", _bytes(row["memory_bytes"]),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")  # three significant digits


def _bytes(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def plot_times(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw seconds a step against features, both logarithmic: a panel an activation function, a line a case."""
    measured = [row for row in rows if "seconds_per_step" in row]
    activations = list(dict.fromkeys(row["activation"] for row in measured))
    widths = sorted({row["width"] for row in measured})
    with rc_context(STYLE):
        figure = Figure(figsize=(2.4 + 3.7 * len(activations), 4.6), layout="constrained")
        panels = figure.subplots(1, len(activations), sharey=True, squeeze=False)[0]
        for axes, activation in zip(panels, activations, strict=True):
            _draw(axes, [row for row in measured if row["activation"] == activation])
            axes.set_title(ACTIVATIONS.get(activation, activation))
            _number_axes(axes, widths)
        panels[0].set_ylabel("seconds a training step")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
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
