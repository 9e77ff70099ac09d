"""The diagnosis of harvested activations: norms, sinks and means by layer, as a table and as a picture.

python -m hf_selortho.data.cache_report FOLDER --output norms.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from ..errors import SelOrthoError
from ..utils.command_line import run_script
from ..utils.plots import BLUE, GREY, STYLE, VERMILION, save_picture
from .activation_cache import MANIFEST, ActivationStore, manifest_bytes

_MAKER = "scripts/cache_activations.py"
_BARS_PER_OCTAVE = 8  # of the drawn histogram; the manifest's bins are finer
_POSITIONS = 5  # the most frequent positions of sinks that the table names
_UPPER = {"0.99": "99%", "0.999": "99.9%", "1": "maximum"}  # quantiles of the norms -> their names in the table


def main(argv: Sequence[str] | None = None) -> None:
    """Folder of activations in; the table on the screen and, if asked for, the picture out."""
    parser = argparse.ArgumentParser(prog="python -m hf_selortho.data.cache_report", description=report_table.__doc__)
    parser.add_argument("folder", help=f"Folder that {_MAKER} has written.")
    parser.add_argument("--output", type=Path, help="PNG file to draw the norms and the positions of the sinks into.")
    arguments = parser.parse_args(argv)
    if arguments.output is not None and arguments.output.suffix.lower() != ".png":
        raise SelOrthoError(
            f"--output {arguments.output}: the picture is a PNG file, expected a name that ends in .png"
        )
    manifest = read_manifest(arguments.folder)
    encoding = sys.stdout.encoding or "utf-8"  # a screen that lacks a token's characters gets their numbers
    sys.stdout.write(report_table(manifest).encode(encoding, "backslashreplace").decode(encoding))
    if arguments.output is not None:
        draw_report(manifest, arguments.output)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder of activations; all that a report needs is there and of the right type.

    Raises:
        SelOrthoError: no such folder, no manifest in it or a damaged one; the message names it.
    """
    hub = os.fspath(folder).startswith("hub:")
    path = ActivationStore(os.fspath(folder)).path_of(MANIFEST) if hub else Path(folder) / MANIFEST
    if not path.is_file():
        raise SelOrthoError(
            f"{path} cannot be read (no such file): expected a folder that {_MAKER} has written; an interrupted "
            "harvest goes on when the same command is run again"
        )
    try:
        content = json.loads(manifest_bytes(path))
    except (ValueError, RecursionError) as error:
        raise SelOrthoError(f"{path} is damaged: not valid JSON ({error}); {_REMEDY}") from error
    _check(content, _CONTENT, "", path)
    for name, layer in content["layers"].items():
        _check(layer, _LAYER, f"layers.{name}", path)
    return content


def report_table(manifest: Mapping[str, Any]) -> str:
    """Show how large harvested activations are, where sinks are, and how far the mean is from zero.

    Args:
        manifest: the content of a `manifest.json`.
    """
    parts = [_head(manifest), _layer_table(manifest), _LEGEND]
    parts += [_extremes(name, layer) for name, layer in _layers(manifest)]
    if len(manifest["layers"]) > 1 and manifest["max_norm_ratio"] is not None:
        parts.append(
            '"kept" and "dropped" go by the layer\'s own limit; a token dropped at one layer is dropped at all.'
        )
    return "\n\n".join(parts) + "\n"


def draw_report(manifest: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw a row of panels a layer: the histogram of the norms, and the sinks by position in the context.

    Raises:
        SelOrthoError: the picture cannot be written.
    """
    layers = _layers(manifest)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 0.5 + 2.9 * len(layers)), layout=ConstrainedLayoutEngine(h_pad=0.09))
        panels = figure.subplots(len(layers), 2, squeeze=False, width_ratios=(1.7, 1))
        for (name, layer), (norms, sinks) in zip(layers, panels, strict=True):
            _draw_norms(norms, layer)
            norms.set_title(f"Layer {name}: norms of {sum(layer['norm_histogram']['counts']):,} tokens")
            _draw_sinks(sinks, layer)
        panels[-1][0].set_xlabel("norm of the activation (log scale)")
        panels[-1][1].set_xlabel("position in the context")
        about = f"Activations of {manifest['model']['name']} on {manifest['text']['dataset']}"
        figure.suptitle(_shortened(about, 100), x=0.01, ha="left", fontsize=12, parse_math=False)
        return save_picture(figure, path)


def _layers(manifest: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(manifest["layers"].items(), key=lambda item: int(item[0]))


def _head(manifest: Mapping[str, Any]) -> str:
    model, text, contexts, counts = (manifest[key] for key in ("model", "text", "contexts", "counts"))
    ratio, bos = manifest["max_norm_ratio"], "with BOS" if contexts["prepend_bos"] else "without BOS"
    sinks = "every token is kept, however large its norm (no max_norm_ratio)"
    if ratio is not None:
        sinks = f"{counts['dropped_sinks']:,} sinks: norm above {ratio:g} times the median at one of the layers"
    lines = [
        ("model", f"{model['name']} (revision {model['revision'] or 'unknown'}, {model['dtype']})"),
        ("dataset", f"{text['dataset']} (revision {text['revision'] or 'unknown'}, split {text['split']})"),
        (
            "contexts",
            f"{counts['contexts']:,} of up to {contexts['context_length']:,} tokens, {bos}, "
            f"from {counts['documents']:,} documents",
        ),
        ("rows", f"{manifest['rows']:,} tokens kept"),
        ("left out", f"{counts['dropped_special']:,} special tokens such as BOS"),
        ("", sinks),
        (
            "",
            f"{counts['dropped_tails']:,} ends of documents shorter than {contexts['min_tokens']} tokens "
            f"({counts['dropped_tail_tokens']:,} tokens)",
        ),
    ]
    return "\n".join(f"{name:<10}{value}" for name, value in lines)


_LEGEND = """\
|mean|/scale: norm of the mean activation over the scale, the root mean squared norm about that mean; well above 0,
  centring matters: an SAE of raw activations would first of all learn the mean.
Norms are those of all tokens but special ones, sinks included; (x) are multiples of the median."""


def _layer_table(manifest: Mapping[str, Any]) -> str:
    tokens = manifest["rows"] + manifest["counts"]["dropped_sinks"]
    header = ["layer", "hook", "|mean|/scale", "scale", "median norm", *_UPPER.values(), "sinks"]
    body = []
    for name, layer in _layers(manifest):
        mean, sinks = float(np.linalg.norm(layer["mean"])), layer["dropped_sinks"]
        upper = [_with_multiple(layer["norm_quantiles"][key], layer["median_norm"]) for key in _UPPER]
        share = f"{sinks:,} ({_quotient(100 * sinks, tokens)}%)" if sinks else "0"
        body.append(
            [name, layer["hook_name"], _quotient(mean, layer["scale"]), _number(layer["scale"])]
            + [_number(layer["median_norm"]), *upper, share]
        )
    return _aligned([header, *body], left=(1,))


def _extremes(name: str, layer: Mapping[str, Any]) -> str:
    """The largest norms of a layer, and where its sinks sit."""
    limit, places, title = layer["max_norm"], _sink_counts(layer), f"Layer {name}: largest norms"
    header = ["norm", "x median", "position", "", "token"]
    body = [
        [
            _number(found["norm"]),
            f"{_quotient(found['norm'], layer['median_norm'])}x",
            f"{found['position']:,}",
            "kept" if found["kept"] else "dropped",
            repr(found["token"]),
        ]
        for found in layer["largest_norms"]
    ]
    if limit is None:
        sinks = "sinks: none, there is no threshold at this layer"
    elif not places:
        sinks = f"sinks: none, no norm is above {_number(limit)}"
    else:
        named = sorted(places.items(), key=lambda item: (-item[1], item[0]))[:_POSITIONS]
        sinks = "sinks by position: " + ", ".join(f"{position:,} ({count:,})" for position, count in named)
        others = sum(places.values()) - sum(count for _, count in named)
        sinks += f", elsewhere ({others:,})" if others else ""
        sinks += f"; norm above {_number(limit)}"
    table = _aligned([header, *body], left=(3, 4)) if body else "none"
    return "\n".join([title, *(f"  {line}" for line in [*table.split("\n"), sinks])])


def _sink_counts(layer: Mapping[str, Any]) -> dict[int, int]:
    """Position in the context -> sinks there, rising."""
    places = {int(position): count for position, count in layer["sinks_by_position"].items() if count}
    return dict(sorted(places.items()))


def _draw_norms(axes: Axes, layer: Mapping[str, Any]) -> None:
    """Histogram of the norms, those above the limit for sinks in another colour."""
    limit, median = layer["max_norm"], layer["median_norm"]
    edges, counts = merged_bins(
        layer["norm_histogram"]["edges"], layer["norm_histogram"]["counts"], limit or median or 1.0
    )
    if not counts.any():
        _say(axes, "no tokens")
        return
    above = np.zeros(len(counts), dtype=bool) if limit is None else np.sqrt(edges[:-1] * edges[1:]) > limit
    for color, chosen in ((BLUE, ~above), (VERMILION, above)):
        axes.bar(edges[:-1][chosen], counts[chosen], np.diff(edges)[chosen], align="edge", color=color)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.7, 20 * counts.max())  # room for the names of the lines
    _draw_lines(axes, edges, {"median": median, "sink threshold": limit})
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 1000 * edges[0] else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: _number(value))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("tokens (log scale)")


def _draw_lines(axes: Axes, edges: np.ndarray, norms: Mapping[str, float | None]) -> None:
    """Vertical lines at the norms that are not None or 0, named on the side that has more room; all are within view."""
    drawn = {name: norm for name, norm in norms.items() if norm}
    shown = [*edges, *drawn.values()]
    low, high = min(shown), max(shown)
    axes.set_xlim(low / 1.15, high * 1.15)
    for number, (name, norm) in enumerate(drawn.items()):
        color, height = ("black", VERMILION)[number % 2], 0.97 - 0.1 * number
        left = norm * norm < low * high
        axes.axvline(norm, color=color, linewidth=1.5, linestyle="--")
        axes.annotate(
            f"{name} {_number(norm)}",
            (norm, height),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4 if left else -4, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="top",
            fontsize=9,
            color=color,
        )


def _draw_sinks(axes: Axes, layer: Mapping[str, Any]) -> None:
    """Sinks by position in the context; a sentence if there are none."""
    axes.set_title(f"Sinks by position: {layer['dropped_sinks']:,}")
    if layer["max_norm"] is None:
        _say(axes, "No threshold at this layer.")
        return
    places = _sink_counts(layer)
    if not places:
        _say(axes, f"No norm is above {_number(layer['max_norm'])}.")
        return
    bars = axes.bar(list(places), list(places.values()), width=0.8, color=VERMILION)
    for bar in bars:
        bar.set_edgecolor(VERMILION)  # visible among a thousand positions
    axes.set_xlim(-0.9, max(max(places), 7) + 0.9)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    most = max(places.values())
    if most > 20 * min(places.values()):
        axes.set_yscale("log")
        axes.set_ylim(0.7, 2 * most)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("sinks (log scale)")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel("sinks")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="x", visible=False)


def _say(axes: Axes, sentence: str) -> None:
    axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_axis_off()


def merged_bins(edges: Sequence[float], counts: Sequence[int], boundary: float) -> tuple[np.ndarray, np.ndarray]:
    """Coarser bins of a fine histogram with logarithmically spaced edges, fit to be looked at.

    Args:
        edges, counts: n + 1 edges and n counts.
        boundary: a norm that no coarse bin straddles; it is moved to the nearest fine edge.

    Returns:
        Edges (m + 1,) and counts (m,); the outer bins reach beyond the fine ones, so that all are equally wide.
    """
    if not len(counts):
        return np.array([]), np.array([])
    step = (math.log2(edges[-1]) - math.log2(edges[0])) / len(counts)  # octaves a fine bin
    size = max(1, round(1 / step / _BARS_PER_OCTAVE))
    offset = round((math.log2(boundary) - math.log2(edges[0])) / step) % size  # fine bins before a coarse edge
    before = (size - offset) % size
    after = -(before + len(counts)) % size
    padded = np.concatenate([np.zeros(before, int), np.asarray(counts), np.zeros(after, int)])
    merged = padded.reshape(-1, size).sum(1)
    exponents = math.log2(edges[0]) + step * (np.arange(len(merged) + 1) * size - before)
    return np.exp2(exponents), merged


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Cells in columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(t.ljust(w) if n in left else t.rjust(w) for n, (t, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _with_multiple(norm: float, median: float) -> str:
    return f"{_number(norm)} ({_quotient(norm, median)}x)"


def _quotient(value: float, by: float) -> str:
    """Two decimals, more for small quotients; a question mark if there is nothing to divide by."""
    if by <= 0:
        return "?"
    return f"{value / by:.2f}" if value / by >= 0.1 or value == 0 else f"{value / by:.2g}"


def _number(value: float) -> str:
    """Thousands with commas, small numbers with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"


@dataclass(frozen=True)
class _Rule:
    """What a value of a manifest has to be."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold: a whole number of JSON may have hundreds of digits."""
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_histogram(value: Any) -> bool:
    """Of norms: positive rising edges, one more than counts."""
    if not (isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("edges", "counts"))):
        return False
    edges, counts = value["edges"], value["counts"]
    return (
        len(edges) == len(counts) + 1
        and all(_is_number(edge) and edge > 0 for edge in edges)
        and all(left < right for left, right in pairwise(edges))
        and all(map(_is_count, counts))
    )


def _is_positions(value: Any) -> bool:
    return isinstance(value, dict) and all(key.isdecimal() and _is_count(count) for key, count in value.items())


def _is_layers(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(str.isdecimal, value))


_TEXT = _Rule("a text", lambda value: isinstance(value, str))
_OPTIONAL_TEXT = _Rule("a text or null", lambda value: value is None or isinstance(value, str))
_FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
_COUNT = _Rule("a whole number of at least 0", _is_count)
_SIZE = _Rule("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_LIMIT = _Rule("a number above 0 or null", lambda value: value is None or (_is_number(value) and value > 0))
_VECTOR = _Rule("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value)))
_LARGEST = {"norm": _SIZE, "position": _COUNT, "token": _TEXT, "kept": _FLAG}
_LAYER = {
    "hook_name": _TEXT,
    "mean": _VECTOR,
    "scale": _SIZE,
    "median_norm": _SIZE,
    "max_norm": _LIMIT,
    "dropped_sinks": _COUNT,
    "norm_quantiles": dict.fromkeys(_UPPER, _SIZE),
    "norm_histogram": _Rule("n + 1 positive rising edges and n counts", _is_histogram),
    "sinks_by_position": _Rule("positions and their counts", _is_positions),
    "largest_norms": [_LARGEST],
}
_COUNTS = ("documents", "contexts", "dropped_special", "dropped_sinks", "dropped_tails", "dropped_tail_tokens")
_CONTENT = {
    "model": {"name": _TEXT, "revision": _OPTIONAL_TEXT, "dtype": _TEXT},
    "text": {"dataset": _TEXT, "revision": _OPTIONAL_TEXT, "split": _OPTIONAL_TEXT},
    "contexts": {"context_length": _COUNT, "prepend_bos": _FLAG, "min_tokens": _COUNT},
    "max_norm_ratio": _LIMIT,
    "rows": _COUNT,
    "counts": dict.fromkeys(_COUNTS, _COUNT),
    "layers": _Rule("an object of layers by number, at least one", _is_layers),
}
_REMEDY = "harvest the activations again, or restore the file from a copy"


def _check(value: Any, expected: Any, where: str, path: Path) -> None:
    """Compare a part of a manifest with what is expected: a rule, a list of one kind of thing, or an object's keys.

    Raises:
        SelOrthoError: it differs; the message names the file, and the first difference.
    """
    parts: list[tuple[Any, Any, str]] = []
    fault = None
    if isinstance(expected, _Rule):
        fault = None if expected.holds(value) else expected.words
    elif isinstance(expected, list):
        if isinstance(value, list):
            parts = [(one, expected[0], f"{where}[{number}]") for number, one in enumerate(value)]
        else:
            fault = "a list"
    elif isinstance(value, dict):
        parts = [(value.get(key, _MISSING), kind, f"{where}.{key}".lstrip(".")) for key, kind in expected.items()]
    else:
        fault = "an object"
    if fault is not None:
        found = "missing" if value is _MISSING else _shortened(repr(value), 60)
        name = where or "the whole of it"
        raise SelOrthoError(f"{path} is damaged: {name} is {found}, expected {fault}; {_REMEDY}")
    for part in parts:
        _check(*part, path)


_MISSING = object()


if __name__ == "__main__":
    run_script(main)
