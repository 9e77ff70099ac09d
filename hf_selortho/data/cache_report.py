"""Report on cached activations: norms, sinks and means by layer, as a table and as a picture.

python -m hf_selortho.data.cache_report FOLDER --output norms.png
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from ..errors import SelOrthoError
from ..utils.command_line import run_script
from ..utils.options import OneLineParser
from ..utils.plots import BLUE, GREY, STYLE, VERMILION, save_picture
from .activation_cache import ActivationCache
from .cache_manifest import NORM_BINS, LayerSummary, Manifest

_SHOWN = 5  # positions of sinks


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and, if asked for, draw the picture."""
    parser = OneLineParser(description="Show norms, sinks and means of cached activations.")
    parser.add_argument("folder", help="Folder of selortho cache, or hub:owner/name@revision.")
    parser.add_argument("--output", help="PNG file to draw the norms and the positions of the sinks into.")
    arguments = parser.parse_args(argv)
    if arguments.output is not None and not arguments.output.lower().endswith(".png"):
        raise SelOrthoError(f"--output {arguments.output}: expected the name of a PNG file, ending in .png")
    manifest = ActivationCache(arguments.folder).manifest
    sys.stdout.write(report_table(manifest))
    if arguments.output is not None:
        draw_report(manifest, arguments.output)


def report_table(manifest: Manifest) -> str:
    """Say how large cached activations are, where sinks are, and how far the mean is from zero."""
    counts = manifest.counts
    lines = [
        f"model     {manifest.lm_name} (revision {manifest.lm_revision}, {manifest.lm_dtype})",
        f"dataset   {manifest.dataset} (revision {manifest.dataset_revision}, split {manifest.split})",
        f"contexts  {counts.contexts:,} of up to {manifest.context_length:,} tokens, {counts.documents:,} documents",
        f"rows      {manifest.rows:,} tokens kept",
        f"left out  {counts.dropped_special:,} special tokens, {counts.dropped_sinks:,} sinks, "
        f"{counts.dropped_tails:,} ends of documents shorter than {manifest.min_tokens:,} tokens",
        "",
        "layer  |mean|/scale     scale  median norm       99%     99.9%   maximum     sinks",
    ]
    for number in manifest.layers:
        layer = manifest.layer(number)
        norms = (layer.norm_quantile(0.99), layer.norm_quantile(0.999), layer.largest_norm)
        figures = "".join(f"{value:>10.4g}" for value in norms)
        lines.append(
            f"{number:>5}{np.linalg.norm(layer.mean) / layer.scale:>14.2f}{layer.scale:>10.4g}"
            f"{layer.median_norm:>13.4g}{figures}{sum(layer.sinks_by_position):>10,}"
        )
    lines += [
        "",
        "Norms are those of all tokens but special ones, sinks included; |mean|/scale well above 0: centre first.",
    ]
    for number in manifest.layers:
        layer = manifest.layer(number)
        positions = sorted(enumerate(layer.sinks_by_position), key=lambda pair: -pair[1])
        sinks = ", ".join(f"{position} ({count:,})" for position, count in positions[:_SHOWN] if count)
        lines.append(f"layer {number}: sinks by position: {sinks or 'none'}")
    return "\n".join(lines) + "\n"


def draw_report(manifest: Manifest, path: str | os.PathLike[str]) -> Path:
    """Draw a row of panels a layer: the histogram of the norms, and the sinks by position in the context.

    Raises:
        SelOrthoError: the picture cannot be written.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 0.5 + 2.9 * len(manifest.layers)), layout="constrained")
        panels = figure.subplots(len(manifest.layers), 2, squeeze=False, width_ratios=(1.7, 1))
        for number, (norms, sinks) in zip(manifest.layers, panels, strict=True):
            layer = manifest.layer(number)
            _draw_norms(norms, layer)
            norms.set_title(f"Layer {number}: norms of {sum(layer.norm_histogram):,} tokens")
            _draw_sinks(sinks, layer)
        panels[-1][0].set_xlabel("norm of the activation (log scale)")
        panels[-1][1].set_xlabel("position in the context")
        title = f"Activations of {manifest.lm_name} on {manifest.dataset}"
        figure.suptitle(title[:100], x=0.01, ha="left", fontsize=12, parse_math=False)
        return save_picture(figure, path)


def _draw_norms(axes: Axes, layer: LayerSummary) -> None:
    """Draw the histogram of the norms, those of sinks in another colour, and lines at the median and the limit."""
    counts = np.asarray(layer.norm_histogram)
    edges = np.exp2(NORM_BINS)
    centres, widths = np.sqrt(edges[:-1] * edges[1:]), np.diff(edges)
    limit = layer.max_norm
    colors = np.where(centres > (limit or np.inf), VERMILION, BLUE)
    shown = counts > 0
    axes.bar(edges[:-1][shown], counts[shown], widths[shown], align="edge", color=colors[shown])
    axes.set(xscale="log", yscale="log", ylabel="tokens (log scale)", ylim=(0.7, 20 * max(1, counts.max())))
    lines = (("median", layer.median_norm, "black", "right"), ("sink threshold", limit, VERMILION, "left"))
    for name, norm, color, side in lines:
        if norm:
            axes.axvline(norm, color=color, linewidth=1.5, linestyle="--")
            place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": side, "va": "top"}
            axes.text(norm, 0.97, f" {name} {norm:.3g} ", fontsize=9, color=color, **place)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_locator(NullLocator())


def _draw_sinks(axes: Axes, layer: LayerSummary) -> None:
    """Draw the number of sinks at each position."""
    counts = np.asarray(layer.sinks_by_position)
    axes.set_title(f"Sinks by position: {counts.sum():,}")
    if not counts.any():
        axes.text(0.5, 0.5, "No token is a sink.", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_axis_off()
        return
    axes.bar(np.arange(len(counts)), counts, color=VERMILION, edgecolor=VERMILION)
    axes.set(xlim=(-0.9, max(counts.nonzero()[0].max(), 7) + 0.9), ylabel="sinks")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))


if __name__ == "__main__":
    run_script(main)
