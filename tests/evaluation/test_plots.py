"""Every picture is drawn, is a PNG of a sensible size, and shows what it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation import plots


def rows(steps: int) -> list[dict]:
    names = (
        "fvu",
        "reconstruction",
        "l1",
        "ortho",
        "peak_correlation",
        "top_correlation",
        "l0",
        "dead_features",
        "pair_churn",
    )
    return [{"step": s, **{name: 1 / s for name in names}} for s in range(1, steps + 1)]


def assert_picture(path: Path) -> None:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path)
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 600
    assert pixels[..., :3].std() > 0.03  # not an empty sheet


def test_training_curves(tmp_path, drawn):
    path = plots.plot_training_curves(rows(300), tmp_path / "curves.png")
    assert_picture(path)
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert len(titles) == 6 and "Dead features" in titles
    line = drawn[0].axes[0].lines[0]
    assert line.get_ydata()[:3].tolist() == [1, 0.5, pytest.approx(1 / 3)]
    smooth = drawn[0].axes[0].lines[1].get_ydata()
    assert smooth[-1] == pytest.approx(np.mean([1 / s for s in range(295, 301)]))  # 300 / 50 steps


def test_training_curves_of_rows_that_lack_figures(tmp_path, drawn):
    some = [{"step": 1, "fvu": 0.5, "pair_churn": None}, {"step": 2, "fvu": float("nan")}, {"step": 3, "fvu": 0.25}]
    assert_picture(plots.plot_training_curves(some, tmp_path / "curves.png"))
    assert len(drawn[0].axes) == 1
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == [1, 3]


def test_one_row_is_enough_and_none_is_an_error(tmp_path):
    assert_picture(plots.plot_training_curves(rows(1), tmp_path / "one.png"))
    with pytest.raises(SelOrthoError, match="no training curves"):
        plots.plot_training_curves([{"step": 1}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_correlation_histogram_marks_the_selected_tail(tmp_path, drawn, low):
    edges = np.linspace(low, 1, 11)
    counts = np.array([1000, 500, 200, 90, 40, 20, 9, 4, 0, 1])
    arrays = {"correlation_counts": counts, "correlation_edges": edges, "correlation_threshold": np.array(0.65)}
    assert_picture(plots.plot_correlation_histogram(arrays, tmp_path / "correlations.png"))
    axes = drawn[0].axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("selected" in text and "0.65" in text for text in legend)
    marked = [bar for bar in axes.patches if bar.get_facecolor()[:3] == pytest.approx((0xD5 / 255, 0x5E / 255, 0))]
    right = [bar for bar in marked if bar.get_x() > 0]
    assert min(bar.get_x() for bar in right) == pytest.approx(0.65)  # the bin is split at the threshold
    assert {round(bar.get_height()) for bar in right} == set(counts[edges[1:] > 0.65].tolist())
    assert any(bar.get_x() < 0 for bar in marked) == (low < 0)  # negative correlations are selected too


def test_correlation_histogram_without_any_selected_pair(tmp_path):
    arrays = {
        "correlation_counts": np.zeros(10, dtype=np.int64),
        "correlation_edges": np.linspace(0, 1, 11),
        "correlation_threshold": np.array(np.nan),
    }
    assert_picture(plots.plot_correlation_histogram(arrays, tmp_path / "none.png"))


def test_feature_density_names_the_dead(tmp_path, drawn):
    density = np.concatenate([np.zeros(7), np.logspace(-4, 0, 50)])
    assert_picture(plots.plot_feature_density({"feature_density": density}, tmp_path / "density.png"))
    axes = drawn[0].axes[0]
    assert "7 of 57 never did" in axes.get_title(loc="left")
    assert sum(bar.get_height() for bar in axes.patches) == 50


@pytest.mark.parametrize("density", [np.zeros(5), np.ones(5)])
def test_feature_density_of_all_dead_or_always_on(tmp_path, density):
    assert_picture(plots.plot_feature_density({"feature_density": density}, tmp_path / "density.png"))


def test_decoder_cosine(tmp_path, drawn):
    cosine = np.array([-0.25, 0.1, 0.5, 1.0])
    assert_picture(plots.plot_decoder_cosine({"max_decoder_cosine": cosine}, tmp_path / "cosine.png"))
    axes = drawn[0].axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert "mean 0.34" in axes.get_legend().get_texts()[0].get_text()
