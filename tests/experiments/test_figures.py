"""Figures of a plan hold all that is drawn into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure as Picture

from hf_selortho.experiments import figures
from hf_selortho.experiments.comparison import comparisons
from hf_selortho.experiments.summaries import TWIN, summarise


@pytest.fixture
def saved(monkeypatch) -> list[Picture]:
    """The pictures that are written while the test runs."""
    found: list[Picture] = []

    def keep(picture: Picture, path: Path) -> Path:
        found.append(picture)
        return path

    monkeypatch.setattr(figures, "save_picture", keep)
    return found


def record(variant: str, **evaluation: float) -> dict[str, Any]:
    shared = {"kind": "sae", "sweep": "topk", "layer": 8, "seed": 0, "arguments": {"activation": "topk"}}
    quantities = {"fvu": 0.08, "l0": 32.0, "top_correlation": 0.7, "peak_correlation": 0.9, "max_decoder_cosine": 0.2}
    return {**shared, "variant": variant, "evaluation": {**quantities, "loss_recovered": 0.9, **evaluation}}


@pytest.mark.parametrize(("dead", "absorbed", "panels"), [(0.0, 0.0, 4), (3.0, 0.01, 6)])
def test_all_names_are_inside_the_picture(dead, absorbed, panels, saved, tmp_path) -> None:
    names = [TWIN, *(f"{name}-0.1" for name in figures.LOOKS if name != TWIN)]
    records = [record(name, dead_features=dead, absorption_rate=absorbed) for name in names]
    found = comparisons(list(summarise(records).values()))
    figures.pareto_figure(found, tmp_path / "pareto.png", "all")
    figures.headline_figure({"TopK": found, "ReLU + L1": found}, tmp_path / "headline.png")
    assert [len(picture.axes) for picture in saved] == [panels, 4]
    for picture, count in zip(saved, (len(names), len(figures.HEADLINE)), strict=True):
        picture.draw_without_rendering()
        (legend,) = picture.legends
        assert len(legend.get_texts()) == count
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= picture.bbox.x1 and box.y1 <= picture.bbox.y1
