"""Geometry of the charts, which the templates draw as SVG: histograms of activations, curves of a training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from ..features.records import BINS_PER_DOUBLING, bin_edges

WIDTH, HEIGHT = 320, 96  # of every chart, in units of its own
Point = tuple[float, float]


class Bar(NamedTuple):
    """A bin of a histogram that is not empty."""

    x: float
    width: float
    height: float
    low: float  # activations of the bin
    high: float
    tokens: int


class Histogram(NamedTuple):
    """The histogram of a feature's activations; the axis is logarithmic."""

    bars: list[Bar]
    ticks: list[Point]  # place on the axis from 0 to 1, activation
    mode: float  # the lower edge of the fullest bin


def histogram(counts: Sequence[int]) -> Histogram | None:
    """Lay out the counts of a feature's bins; None if it never fired."""
    filled = [bin for bin, count in enumerate(counts) if count > 0]
    if not filled:
        return None
    edges, most = bin_edges(), max(counts)
    first, last = max(0, filled[0] - 1), min(len(counts), filled[-1] + 2)
    width = WIDTH / (last - first)
    bars = [
        Bar(
            x=(bin - first) * width + 0.5,
            width=max(width - 1, 0.5),
            height=max(1.0, HEIGHT * counts[bin] / most),
            low=edges[bin],
            high=edges[bin + 1],
            tokens=counts[bin],
        )
        for bin in filled
    ]
    bins_per_tick = BINS_PER_DOUBLING * (1 if last - first < 24 else 3)
    ticks = [
        ((edge - first) / (last - first), edges[edge]) for edge in range(first, last + 1) if edge % bins_per_tick == 0
    ]
    return Histogram(bars, ticks, edges[list(counts).index(most)])


class Curves(NamedTuple):
    """Curves over the same axes."""

    lines: dict[str, list[list[Point]]]  # by name: pieces between gaps, in units of the chart
    x: Point  # ends of the axis
    y: Point


def curves(points: Mapping[str, Iterable[tuple[float, float | None]]], low: float | None = None) -> Curves | None:
    """Lay out curves; None if there is no point.

    Args:
        points: (x, y) by the name of the curve; y = None interrupts it. At most four curves are told apart.
        low: the least y of the axis; by default the least of the points.
    """
    lines = {
        name: [(x, y if y is None or math.isfinite(y) else None) for x, y in line] for name, line in points.items()
    }
    known = [(x, y) for line in lines.values() for x, y in line if y is not None]
    if not known:
        return None
    xs, ys = zip(*known, strict=True)
    x_axis, y_axis = (min(xs), max(xs)), (min(ys) if low is None else low, max(ys))
    x_unit = WIDTH / ((x_axis[1] - x_axis[0]) or 1.0)
    y_unit = (HEIGHT - 4) / ((y_axis[1] - y_axis[0]) or 1.0)

    def pieces(line: list[tuple[float, float | None]]) -> list[list[Point]]:
        found = []
        for is_gap, group in groupby(line, key=lambda point: point[1] is None):
            piece = [
                ((x - x_axis[0]) * x_unit, HEIGHT - 2 - (y - y_axis[0]) * y_unit) for x, y in group if y is not None
            ]
            if len(piece) == 1:  # a line of no length would not be seen
                ((x, y),) = piece
                piece = [(x - 1, y), (x + 1, y)]
            if not is_gap:
                found.append(piece)
        return found

    return Curves({name: pieces(line) for name, line in lines.items()}, x_axis, y_axis)
