"""Several SAEs side by side: one row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .card_results import Measured

TWIN = "_twin"  # how the name of a twin ends

# Columns of the table of several SAEs: metric, its heading, its format.
_SUMMARY = [
    ("fvu", "FVU", ".4f"),
    ("l0", "L0", ".1f"),
    ("top_correlation", "top corr.", ".3f"),
    ("peak_correlation", "peak corr.", ".3f"),
    ("mean_correlation", "mean corr.", ".3f"),
    ("max_decoder_cosine", "decoder cos.", ".3f"),
    ("unique_features", "in pairs", ".0f"),
    ("active_features", "active", ".0f"),
    ("dead_features", "dead", ".0f"),
    ("loss_recovered", "loss rec.", ".4f"),
]


@dataclass(frozen=True)
class SaeReport:
    """An SAE, and what was measured of it and of what stands beside it."""

    name: str  # its folder within the run or repository, "layer_8"; "" if it is the only one
    config: Mapping[str, Any]  # settings (`SelOrthoConfig.own_settings()`)
    measured: Measured
    pictures: Sequence[str] = ()  # paths within the run or repository

    @property
    def layer(self) -> int | None:
        return self.config.get("layer")

    @property
    def variant(self) -> str | None:
        """What the name says beside the layer, such as "twin"."""
        return self.name.removeprefix(f"layer_{self.layer}").strip("_") or None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Content of its metrics.json."""
        return self.measured.metrics

    def figure(self, key: str) -> float | None:
        """A figure of the evaluation on held-out text, or else of the end of the training."""
        figures = self.metrics.get("evaluation") or self.metrics.get("training") or {}
        return figures.get(key)


def beside_twins(saes: Sequence[SaeReport]) -> list[SaeReport]:
    """The same, each with the metrics of its twin, where that is among them."""
    metrics = {sae.name: sae.metrics for sae in saes}
    return [
        replace(sae, measured=sae.measured._replace(twin=metrics.get(f"{sae.name}{TWIN}", sae.measured.twin)))
        for sae in saes
    ]


def without_twins(saes: Sequence[SaeReport]) -> list[SaeReport]:
    """The SAEs that are not there for comparison with another; all of them where there are only twins."""
    names = {sae.name for sae in saes}
    return [sae for sae in saes if not (sae.name.endswith(TWIN) and sae.name.removesuffix(TWIN) in names)] or list(saes)


def summary_rows(reports: Sequence[SaeReport]) -> list[list[str]]:
    """The SAEs of a run side by side, headings first; where there are several layers, their mean by variant too."""
    keys = [row for row in _SUMMARY if any(report.figure(row[0]) is not None for report in reports)]
    rows = [["layer", "variant", *(heading for _, heading, _ in keys)]]
    for report in reports:
        figures = [report.figure(key) for key, _, _ in keys]
        rows.append(
            ["-" if report.layer is None else str(report.layer), report.variant or "-", *_formatted(figures, keys)]
        )
    if len({report.layer for report in reports}) > 1:
        for variant in dict.fromkeys(report.variant for report in reports):
            of_variant = [report for report in reports if report.variant == variant]
            figures = [_mean([report.figure(key) for report in of_variant]) for key, _, _ in keys]
            rows.append(["mean", variant or "-", *_formatted(figures, keys)])
    return rows


def _formatted(figures: Sequence[float | None], keys: Sequence[tuple[str, str, str]]) -> list[str]:
    pairs = zip(figures, keys, strict=True)
    return ["-" if figure is None else format(figure, spec) for figure, (_, _, spec) in pairs]


def _mean(figures: Sequence[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) / len(known) if known and len(known) == len(figures) else None
