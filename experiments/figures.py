"""Figures of a plan: methods against one another at equal L0, and the paper's curves of a training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator

from ..utils.plots import BLUE, GREEN, GREY, STYLE, VERMILION, save_picture
from .comparison import BOUGHT, Comparison
from .summaries import NAMES, TWIN, Figure, Summary
from .world_gains import SCORES, gain_over_twin, rules

_NUMBER = re.compile(r"^(?P<family>[a-z][a-z-]*?)(-(?P<number>[a-z]?\d+(\.\d+)?|adaptive))?$")
ORANGE, SKY, PURPLE, YELLOW, BLACK = "#E69F00", "#56B4E9", "#CC79A7", "#B8A800", "#000000"  # the rest of the palette
BROWN, MINT, MAGENTA = "#8C510A", "#66C2A5", "#AA3377"
LOOKS = {  # by family of variants: colour, marker, words
    "none": (BLACK, "o", "no penalty"),
    "activation": (VERMILION, "s", "selective, activations"),
    "activation-seldom": ("#E78AC3", "H", "selective, activations, every 12 steps"),
    "activation-wide": (BROWN, ">", "selective, activations, 1% of pairs"),
    "decoder": (BLUE, "^", "selective, decoder"),
    "decoder-wide": (SKY, "<", "selective, decoder, 1% of pairs"),
    "exclusion": (YELLOW, "*", "selective, exclusion"),
    "exclusion-wide": ("#66A61E", "h", "selective, exclusion, 1% of pairs"),
    "both": (GREEN, "D", "selective, both"),
    "both-nearest": (MINT, "d", "selective and nearest"),
    "both-nearest-wide": (MAGENTA, "p", "selective and nearest, 1% of pairs"),
    "redundancy": (PURPLE, "v", "selective, redundancy"),
    "full": (ORANGE, "P", "full"),
    "ortsae": (GREY, "X", "OrtSAE"),
}
PANELS = {  # figure of the evaluation: title, and whether lower is better
    "top_correlation": ("Mean of the top 0.1% correlations", True),
    "peak_correlation": ("Peak correlation", True),
    "max_decoder_cosine": ("Mean maximum decoder cosine", True),
    "dead_features": ("Dead features", True),
    "loss_recovered": ("Loss recovered", False),
    "absorption_rate": ("First-letter absorption rate", True),
}


def family(variant: str) -> str:
    """What a variant is a strength of: "activation" of "activation-0.1"."""
    match = _NUMBER.match(variant)
    return match.group("family") if match else variant


def pareto_figure(found: Sequence[Comparison], path: Path, title: str) -> Path:
    """Every figure against FVU at the twin's L0, a line for each family, error bars of one standard deviation.

    Figures that are zero for all of them are left out.

    Args:
        found: comparisons with one twin, at least one.
    """
    twin = found[0].twin
    prices, points = _at_twins_l0(found, "fvu"), {key: _at_twins_l0(found, key) for key in PANELS}
    shown = [key for key, figures in points.items() if any(any(figure.values) for figure in figures.values())]
    with rc_context(STYLE):
        columns = 2 if len(shown) in (2, 4) else 3
        lines = math.ceil(len(shown) / columns)
        picture = Picture(figsize=(4.3 * columns, 3.4 * lines), layout="constrained")
        picture.suptitle(title, x=0.01, ha="left")
        for number, key in enumerate(shown):
            axes = picture.add_subplot(lines, columns, number + 1)
            _panel(axes, [twin, *(one.summary for one in found)], prices, points[key])
            _from_zero(axes, key)
            axes.set_title(PANELS[key][0] + (" (lower is better)" if PANELS[key][1] else " (higher is better)"))
            if number >= len(shown) - columns:
                axes.set_xlabel("FVU (unexplained variance) at the twin's L0")
        handles, labels = picture.axes[0].get_legend_handles_labels()
        beside = {2: 2, 3: 4}[columns]  # names that fit beside one another
        picture.set_figheight(picture.get_figheight() + 0.25 * math.ceil(len(labels) / beside))
        picture.legend(handles, labels, loc="outside lower center", ncols=beside)
        return save_picture(picture, path)


def _at_twins_l0(found: Sequence[Comparison], key: str) -> dict[str, Figure]:
    """A figure by variant, the twin's among them."""
    figures = {TWIN: found[0].twin.figure(key)} | {one.summary.variant: one.at_twins_l0(key) for one in found}
    return {variant: figure for variant, figure in figures.items() if figure is not None}


def _panel(axes: Axes, summaries: Sequence[Summary], x: Mapping[str, Figure], y: Mapping[str, Figure]) -> None:
    for name, group in by_family(summaries).items():
        known = sorted(((x[s.variant], y[s.variant]) for s in group if s.variant in y), key=lambda point: point[0].mean)
        if known:
            color, marker, words = LOOKS.get(name, (GREY, ".", name))
            _errorbar(axes, [one for one, _ in known], [one for _, one in known], color, marker, words)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # more numbers would run into one another


def _from_zero(axes: Axes, key: str) -> None:
    """Counts and rates are not negative; numbers of features are whole, and an axis of zeros needs no fractions."""
    if key in ("dead_features", "absorption_rate"):
        top = axes.get_ylim()[1]
        if key == "dead_features":
            top = max(1.0, top)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(-0.03 * top, top)


def _errorbar(axes: Axes, x: Sequence[Figure], y: Sequence[Figure], color: str, marker: str, words: str) -> None:
    axes.errorbar(
        [one.mean for one in x], [one.mean for one in y],
        xerr=[one.std or 0.0 for one in x], yerr=[one.std or 0.0 for one in y],
        color=color, marker=marker, markersize=5, linewidth=1.2, elinewidth=0.8, capsize=2, label=words,
    )  # fmt: skip


def by_family(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Summaries by the family of their variant, the twin's first."""
    groups: dict[str, list[Summary]] = {}
    for summary in sorted(summaries, key=lambda s: (family(s.variant) != TWIN,)):
        groups.setdefault(family(summary.variant), []).append(summary)
    return groups


# Families of the headline figure.
HEADLINE = ("activation", "activation-wide", "decoder", "decoder-wide", "both-nearest-wide", "full", "ortsae")
HEADLINE_ROOM = 0.12  # of the twin's FVU; beyond that nobody wants a setting, and the others would be a dot


def drawn_in_headline(one: Comparison) -> bool:
    """Whether the price of a variant is one that the figure has room for, and its family among those drawn."""
    return one.relative_excess.mean <= HEADLINE_ROOM and family(one.summary.variant) in HEADLINE


def headline_figure(found: Mapping[str, Sequence[Comparison]], path: Path) -> Path:
    """What is bought against what it costs, both in percent of the twin's: a row for each kind of SAE.

    Args:
        found: comparisons by the name of the SAEs.
    """
    with rc_context(STYLE):
        picture = Picture(figsize=(9.2, 0.9 + 3.0 * len(found)), layout="constrained")
        title = "What each penalty buys, and what it costs"
        picture.suptitle(f"{title} (up to {HEADLINE_ROOM:.0%} more FVU; error bars: seeds)", x=0.01, ha="left")
        for row, (name, comparisons) in enumerate(found.items()):
            for column, (key, words) in enumerate(BOUGHT.items()):
                axes = picture.add_subplot(len(found), 2, 2 * row + column + 1)
                _headline_panel(axes, comparisons, key)
                axes.set_title(f"{name}: {words}")
                axes.set_ylabel("change, %")
                if row == len(found) - 1:
                    axes.set_xlabel("more unexplained variance (FVU), % of the twin's")
        handles, labels = picture.axes[0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside lower center", ncols=3)
        return save_picture(picture, path)


def _headline_panel(axes: Axes, comparisons: Sequence[Comparison], key: str) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    for name in HEADLINE:
        color, marker, words = LOOKS[name]
        group = [one for one in comparisons if drawn_in_headline(one) and family(one.summary.variant) == name]
        points = [(one.relative_excess, getattr(one, key)) for one in group]
        ordered = sorted(points, key=lambda point: point[0].mean)
        x, y = [_percent(a) for a, _ in ordered], [_percent(b) for _, b in ordered]
        if ordered:
            _errorbar(axes, x, y, color, marker, words)


def _percent(figure: Figure) -> Figure:
    return Figure(tuple(100 * value for value in figure.values))


def curves_figure(
    curves: Mapping[str, Sequence[Mapping[str, Sequence[float | None]]]],
    panels: Mapping[str, str],
    path: Path,
    title: str,
) -> Path:
    """Figures of trainings over their steps, a line for each kind of run, its band the range over the seeds.

    Args:
        curves: by kind of run, the columns of each seed's record ("step" among them).
        panels: title by column.
    """
    with rc_context(STYLE):
        columns = min(3, len(panels))
        lines = math.ceil(len(panels) / columns)
        picture = Picture(figsize=(4.3 * columns, 3.1 * lines + 0.6), layout="constrained")
        picture.suptitle(title, x=0.01, ha="left")
        for number, (key, words) in enumerate(panels.items()):
            axes = picture.add_subplot(lines, columns, number + 1)
            for color, (name, seeds) in zip((BLACK, VERMILION, BLUE, GREEN), curves.items(), strict=False):
                _band(axes, seeds, key, color, name)
            _from_zero(axes, key)
            axes.set_title(words)
            axes.set_xlabel("step")
        handles, labels = picture.axes[0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside lower center", ncols=len(labels) or 1)
        return save_picture(picture, path)


def _band(axes: Axes, seeds: Sequence[Mapping[str, Sequence[float | None]]], key: str, color: str, name: str) -> None:
    rows: dict[float, list[float]] = {}
    for columns in seeds:
        for step, value in zip(columns["step"], columns.get(key, ()), strict=False):
            if step is not None and value is not None:
                rows.setdefault(step, []).append(value)
    if not rows:
        return
    steps = sorted(rows)
    axes.plot(steps, [sum(rows[s]) / len(rows[s]) for s in steps], color=color, linewidth=1.5, label=name)
    axes.fill_between(
        steps, [min(rows[s]) for s in steps], [max(rows[s]) for s in steps], color=color, alpha=0.2, linewidth=0
    )


def recovery_figure(recipes: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path | None:
    """Every score of every rule as differences from the twin, a dot for each training; None if there are no rules.

    Args:
        recipes: records of worlds by the name of their recipe.
    """
    names = list(dict.fromkeys(name for records in recipes.values() for name in rules(records)))
    if not names:
        return None
    with rc_context(STYLE):
        picture = Picture(figsize=(3.4 * len(SCORES), 1.5 + 0.34 * len(names)), layout="constrained")
        title = "Recovery of known features, difference from the twin (dots: trainings; bars: means)"
        picture.suptitle(title, x=0.01, ha="left")
        for number, (key, words) in enumerate(SCORES.items()):
            axes = picture.add_subplot(1, len(SCORES), number + 1)
            axes.axvline(0, color=BLACK, linewidth=0.8)
            for color, (at, (recipe, records)) in zip(_RECIPE_COLORS, enumerate(recipes.items()), strict=False):
                shift = 0.34 * (at - (len(recipes) - 1) / 2)
                gains = {row: gain_over_twin(records, name, key) for row, name in enumerate(names)}
                known = {row + shift: gain for row, gain in gains.items() if gain is not None}
                points = [(value, row) for row, gain in known.items() for value in gain.values]
                axes.plot([x for x, _ in points], [y for _, y in points], "o", color=color, markersize=3, alpha=0.45)
                axes.plot(
                    [gain.mean for gain in known.values()], list(known), "|", color=color, markersize=11,
                    markeredgewidth=2.2, label=NAMES.get(recipe, recipe),
                )  # fmt: skip
            axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
            axes.invert_yaxis()
            axes.xaxis.set_major_locator(MaxNLocator(5))  # more numbers would run into one another
            axes.set_title(words)
        handles, labels = picture.axes[0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside lower center", ncols=3)
        return save_picture(picture, path)


_RECIPE_COLORS = (BLUE, VERMILION, GREEN, PURPLE)
