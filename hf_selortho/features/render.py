"""Features as HTML: shaded tokens, histograms, curves. Whatever a text, a label or an index holds is escaped here."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from .records import BINS_PER_DOUBLING, bin_edges

_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_WIDTH, _HEIGHT = 320, 96  # of the charts, in units of their own


def escape(text: object) -> str:
    """Text for HTML, also within attributes."""
    return html.escape(str(text), quote=True)


def visible(text: str) -> str:
    """A token with its invisible characters shown: line ends as arrows, control and direction characters by number.

    A text cannot turn round what stands beside it then.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return f"‹{ord(character):04X}›"
    return character


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, "–" for what is not defined."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:#.{digits}g}".rstrip(".")
        return f"{value:.0f}" if "e" in text else text
    return f"{value:.{max(digits - 1, 0)}e}"


def percent(share: float | None) -> str:
    """A share as a percentage of two or three significant digits."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.2g}%" if share < 0.0995 else f"{100 * share:.1f}".removesuffix(".0") + "%"


def label_html(label: str) -> str:
    """A label, which is data of others: isolated from the direction of the text around it."""
    return f"<bdi>{escape(visible(label))}</bdi>" if label else '<span class="so-none">no label</span>'


def token_html(token: str, shade: float, title: str, mark: str = "", button: str = "") -> str:
    """A token with a background of strength `shade` in [0, 1].

    Args:
        token: its text.
        shade: 0 leaves it without.
        title: shown when the pointer rests on it.
        mark: further classes, e.g. "so-peak".
        button: what a click sets in the page's address ("token=5"); the token is a button then.
    """
    text = escape(visible(token)) or "∅"
    classes = " ".join(part for part in ("so-tok", mark) if part)
    style = f' style="--s:{min(max(shade, 0.0), 1.0):.3f}"' if shade > 0 else ""
    inner = f'class="{classes}"{style} title="{escape(title)}"'
    if button:
        return f'<button type="button" {inner} data-set="{escape(button)}">{text}</button>'
    return f"<span {inner}>{text}</span>"


def line_break(token: str) -> str:
    """What follows a token where the lines of a text are kept."""
    return "<br>" if "\n" in token else ""


def tokens_html(tokens: Sequence[str], values: Sequence[float], scale: float, peak: int | None = None) -> str:
    """A piece of text shaded by the activations of a feature.

    Args:
        tokens: in order.
        values: one a token.
        scale: the activation that is shaded fully.
        peak: the token that the text is shown for.
    """
    parts = [
        token_html(
            token,
            value / scale if scale > 0 else 0.0,
            f"{token!r}: {number(value)}",
            "so-peak" if place == peak else "",
        )
        for place, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]
    return f'<span class="so-text">{"".join(parts)}</span>'


def pair_tokens_html(
    tokens: Sequence[str], a: Sequence[float], b: Sequence[float], scales: tuple[float, float], peak: int | None = None
) -> str:
    """A piece of text with the activations of two features: a as the background, b as a line below."""
    parts = []
    for place, (token, of_a, of_b) in enumerate(zip(tokens, a, b, strict=True)):
        shades = [
            min(max(value / scale, 0.0), 1.0) if scale > 0 else 0.0
            for value, scale in zip((of_a, of_b), scales, strict=True)
        ]
        style = f' style="--s:{shades[0]:.3f};--b:{shades[1]:.3f}"' if any(shades) else ""
        classes = "so-tok so-two" + (" so-peak" if place == peak else "")
        title = escape(f"{token!r}: A {number(of_a)}, B {number(of_b)}")
        parts.append(f'<span class="{classes}"{style} title="{title}">{escape(visible(token)) or "∅"}</span>')
    return f'<span class="so-text">{"".join(parts)}</span>'


def legend_html(scale: float, what: str) -> str:
    """What the shading means: a ramp from 0 to the activation that is shaded fully."""
    return (
        f'<div class="so-legend"><span>{escape(what)}</span><span>0</span><span class="so-ramp" role="img" '
        f'aria-label="shading from 0 to {number(scale)}"></span><span>{number(scale)}</span></div>'
    )


def bar_html(share: float) -> str:
    """A bar of a share of the whole width, beside a number that says the same."""
    return (
        f'<span class="so-bar" aria-hidden="true"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>'
    )


def histogram_html(counts: Sequence[int]) -> str:
    """The histogram of a feature's activations, over the tokens on which it fires; the axis is logarithmic."""
    filled = [place for place, count in enumerate(counts) if count > 0]
    if not filled:
        return '<p class="so-empty">It never fired on the text of the index.</p>'
    edges = bin_edges()
    first, last = max(0, filled[0] - 1), min(len(counts), filled[-1] + 2)
    width, most = _WIDTH / (last - first), max(counts)
    bars = "".join(
        f'<rect x="{(place - first) * width + 0.5:.2f}" y="{_HEIGHT - max(1.0, _HEIGHT * counts[place] / most):.2f}" '
        f'width="{max(width - 1, 0.5):.2f}" height="{max(1.0, _HEIGHT * counts[place] / most):.2f}">'
        f"<title>{number(edges[place])} to {number(edges[place + 1])}: {counts[place]:,} tokens</title></rect>"
        for place in range(first, last)
        if counts[place]
    )
    ticks = "".join(
        f'<span style="left:{100 * (place - first) / (last - first):.2f}%">{number(edges[place], 2)}</span>'
        for place in range(first, last + 1)
        if place % (BINS_PER_DOUBLING * (1 if last - first < 24 else 3)) == 0
    )
    return (
        f'<div class="so-chart"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="histogram of activations, most often {number(edges[list(counts).index(most)])}">{bars}</svg>'
        f'<div class="so-ticks" aria-hidden="true">{ticks}</div>'
        '<div class="so-axis">activation (logarithmic), tokens on which it fires</div></div>'
    )


def curves_html(
    curves: Mapping[str, Iterable[tuple[float, float | None]]], x_name: str, title: str, low: float | None = None
) -> str:
    """Curves over the same axis; a None interrupts a curve.

    Args:
        curves: points (x, y) by name; at most four are told apart.
        x_name: of the axis.
        title: of the chart.
        low: the least y of the axis; by default the least of the points.
    """
    lines = {name: [(x, y) for x, y in points] for name, points in curves.items()}
    known = [(x, y) for points in lines.values() for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return ""
    x_low, x_high = min(x for x, _ in known), max(x for x, _ in known)
    y_low = min(y for _, y in known) if low is None else low
    y_high = max(y for _, y in known)
    spans = ((x_high - x_low) or 1.0, (y_high - y_low) or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - x_low) / spans[0] * _WIDTH, _HEIGHT - (y - y_low) / spans[1] * (_HEIGHT - 4) - 2

    drawn = "".join(
        _curve(f"so-curve{order}", [None if y is None or not math.isfinite(y) else place(x, y) for x, y in points])
        for order, points in enumerate(lines.values())
    )
    names = "".join(f'<span class="so-key so-curve{n}">{escape(name)}</span>' for n, name in enumerate(lines))
    return (
        f'<figure class="so-chart"><figcaption>{escape(title)} {names if len(lines) > 1 else ""}</figcaption>'
        f'<div class="so-plot"><div class="so-y" aria-hidden="true"><span>{number(y_high)}</span><span>{number(y_low)}'
        f'</span></div><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}: from {number(y_low)} to {number(y_high)}">{drawn}</svg></div>'
        f'<div class="so-axis">{escape(x_name)} {x_low:g} to {x_high:g}</div></figure>'
    )


def _curve(name: str, points: Sequence[tuple[float, float] | None]) -> str:
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    drawn = []
    for piece in pieces:
        if len(piece) == 1:  # between two gaps: a line of no length would not be seen
            ((x, y),) = piece
            piece = [(x - 1, y), (x + 1, y)]
        if piece:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
            drawn.append(f'<polyline class="{name}" points="{path}" vector-effect="non-scaling-stroke"/>')
    return "".join(drawn)
