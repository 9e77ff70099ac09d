"""The style that all pictures share, and how they are saved. Drawn without pyplot: no global state, no display."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import SelOrthoError

# Okabe and Ito's palette: told apart with any colour vision
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5F6368"
STYLE: dict[Any, Any] = {  # for matplotlib's rc_context
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "savefig.facecolor": "white",  # readable on the dark theme of a web page too
}


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG; the same drawing gives the same bytes, as PNG files of matplotlib carry no date.

    Raises:
        SelOrthoError: the file cannot be written.
    """
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise SelOrthoError(
            f"cannot write picture {os.fspath(path)}: {error.strerror or error}; choose a file in a folder that exists "
            "and can be written"
        ) from error
    return Path(path)
