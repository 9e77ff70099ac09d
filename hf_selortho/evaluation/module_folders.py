"""Our metrics as folders that `evaluate.load` takes, here or on the Hub, each with a card."""

from __future__ import annotations

from pathlib import Path

from ..errors import SelOrthoError

_FOLDER = Path(__file__).with_name("modules")

METRIC_MODULES = ("correlation", "cross_entropy", "loss_recovered", "reconstruction", "sparsity")


def metric_path(name: str) -> str:
    """The folder of a metric, for `evaluate.load(metric_path("reconstruction"))`.

    Raises:
        SelOrthoError: there is no such metric; the message names them all.
    """
    if name not in METRIC_MODULES:
        raise SelOrthoError(f"metric {name!r}: expected one of {', '.join(METRIC_MODULES)}")
    return str(_FOLDER / name)
