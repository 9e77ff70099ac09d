"""Every picture is drawn, is a PNG of a sensible size, and shows what it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation import plots

FIGURES = (
    *("fvu", "reconstruction", "l1", "ortho", "peak_correlation", "top_correlation", "l0", "dead_features"),
    "pair_churn",
)


def rows(steps: int) -> list[dict]:
    return [{"step": step, **dict.fromkeys(FIGURES, 1 / step)} for step in range(1, steps + 1)]


def assert_picture(path: Path) -> None:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path)
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 600
    assert pixels[..., :3].std() > 0.03  # not an empty sheet


def test_training_curves(tmp_path, drawn):
    assert_picture(plots.plot_training_curves(rows(300), tmp_path / "curves.png"))
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert len(titles) == 6 and "Dead features" in titles
    raw, smooth = (line.get_ydata() for line in drawn[0].axes[0].lines)
    assert raw[:3].tolist() == [1, 0.5, pytest.approx(1 / 3)]
    assert smooth[-1] == pytest.approx(np.mean([1 / s for s in range(295, 301)]))  # 300 / 50 steps


def test_training_curves_of_few_rows_that_lack_figures(tmp_path, drawn):
    some = [{"step": 1, "fvu": 0.5, "pair_churn": None}, {"step": 2, "fvu": float("nan")}, {"step": 3, "fvu": 0.25}]
    assert_picture(plots.plot_training_curves(some, tmp_path / "curves.png"))
    assert len(drawn[0].axes) == 1 and drawn[0].axes[0].lines[0].get_xdata().tolist() == [1, 3]
    assert_picture(plots.plot_training_curves(rows(1), tmp_path / "one.png"))
    with pytest.raises(SelOrthoError, match="no training curves"):
        plots.plot_training_curves([{"step": 1}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def correlation_arrays(counts: list[int], low: float, threshold: float, features: tuple[int, int]) -> dict:
    return {
        "correlation_counts": np.array(counts),
        "correlation_edges": np.linspace(low, 1, len(counts) + 1),
        "correlation_threshold": np.array(threshold),
        "correlation_features": np.array(features),
    }


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_correlation_histogram_marks_the_selected_tail(tmp_path, drawn, low):
    counts = [1000, 500, 200, 90, 40, 20, 9, 4, 0, 1]
    arrays = correlation_arrays(counts, low, 0.65, (8192, 16384))
    assert_picture(plots.plot_correlation_histogram(arrays, tmp_path / "correlations.png"))
    axes = drawn[0].axes[0]
    assert axes.get_title(loc="left") == "Correlations between features (a sample of 8,192 of 16,384)"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("selected" in text and "0.65" in text for text in legend)
    marked = [bar for bar in axes.patches if bar.get_facecolor()[:3] == pytest.approx((0xD5 / 255, 0x5E / 255, 0))]
    right = [bar for bar in marked if bar.get_x() > 0]
    assert min(bar.get_x() for bar in right) == pytest.approx(0.65)  # the bin is split at the threshold
    assert {round(bar.get_height()) for bar in right} == set(np.array(counts)[np.linspace(low, 1, 11)[1:] > 0.65])
    assert any(bar.get_x() < 0 for bar in marked) == (low < 0)  # negative correlations are selected too


@pytest.mark.parametrize("density", [np.concatenate([np.zeros(7), np.logspace(-4, 0, 50)]), np.zeros(5), np.ones(5)])
def test_feature_density_names_the_dead(tmp_path, drawn, density):
    assert_picture(plots.plot_feature_density({"feature_density": density}, tmp_path / "density.png"))
    axes, dead = drawn[0].axes[0], int((density == 0).sum())
    assert (f"{dead} of {len(density)} never did" in axes.get_title(loc="left")) == (dead > 0)
    assert sum(bar.get_height() for bar in axes.patches) == len(density) - dead


def test_decoder_cosine_and_correlations_without_any_selected_pair(tmp_path, drawn):
    cosine = {"max_decoder_cosine": np.array([-0.25, 0.1, 0.5, 1.0])}
    assert_picture(plots.plot_decoder_cosine(cosine, tmp_path / "cosine.png"))
    axes = drawn[0].axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert "mean 0.34" in axes.get_legend().get_texts()[0].get_text()
    empty = correlation_arrays([0] * 10, 0, np.nan, (3, 3))
    assert_picture(plots.plot_correlation_histogram(empty, tmp_path / "none.png"))
