"""The run of an SAE: what was measured beside its twin, and the curves of the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..features.render import curves_html, escape, number
from . import parts
from .shelf import Shown

MEASURED = {
    "fvu": ("FVU", "unexplained variance, less is better"),
    "l0": ("L0", "features that fire on a token"),
    "loss_recovered": ("loss recovered", "of the language model, 1 is perfect"),
    "top_correlation": ("mean of the top pairs", "correlation of the most correlated 0.1% of pairs"),
    "peak_correlation": ("peak correlation", "of any pair"),
    "max_decoder_cosine": ("mean maximum decoder cosine", "of each feature with its nearest"),
    "dead_features": ("dead features", "that never fired on the evaluation's text"),
}
CURVES = {
    "fvu": "FVU",
    "l0": "L0",
    "top_correlation": "Mean of the top pairs' correlations",
    "dead_features": "Dead features",
}


def run_page(shown: Shown, twin: Shown | None) -> str:
    """The figures of an SAE and of its twin, and their training curves."""
    sides = [shown] + ([twin] if twin is not None else [])
    measured = [_evaluation(side) for side in sides]
    heads = ["", *(escape(side.title) for side in sides)]
    rows = [
        [f'{name} <small class="so-where">{meaning}</small>', *(number(values.get(key)) for values in measured)]
        for key, (name, meaning) in MEASURED.items()
        if any(values.get(key) is not None for values in measured)
    ]
    body = parts.table(heads, rows, "On held-out text") if rows else parts.note("No evaluation of this SAE is known.")
    charts = "".join(_chart(sides, key, title) for key, title in CURVES.items())
    curves = f'<h3>Training</h3><div class="so-cols">{charts}</div>' if charts else ""
    return f"{_settings(shown)}{body}{curves}"


def _chart(sides: Sequence[Shown], key: str, title: str) -> str:
    curves = {side.title: [(row["step"], row.get(key)) for row in side.rows] for side in sides if side.rows}
    chart = curves_html(curves, "step", title)
    return f"<div>{chart}</div>" if chart else ""


def _evaluation(shown: Shown) -> dict[str, Any]:
    found = shown.metrics.get("evaluation")
    return found if isinstance(found, dict) else {}


def _settings(shown: Shown) -> str:
    config = shown.config
    if config is None:
        return parts.note("The settings of this SAE are in the format of another library.")
    penalty: str = config.penalty
    if config.penalty != "none":
        penalty = f"{config.penalty}, coefficient {number(config.ortho_coefficient)}, {config.penalty_space} space"
    return parts.facts(
        [
            ("language model", escape(without_folders(config.lm_name or "not said"))),
            ("layer", escape(config.layer if config.layer is not None else "not said")),
            ("features", f"{config.d_sae:,} <small>of {config.d_in:,} dimensions</small>"),
            ("activation function", escape(config.activation)),
            ("penalty", escape(penalty)),
            ("trained on", escape(without_folders(config.dataset or "not said"))),
        ]
    )


def without_folders(name: str) -> str:
    """A Hub id as it is; of a path of the owner's machine, which is nobody's business, the last part."""
    return Path(name).name if name.startswith(("/", "~", ".")) or "\\" in name else name
