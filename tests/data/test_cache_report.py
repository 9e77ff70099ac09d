"""The diagnosis of harvested activations: numbers that were computed by hand, pictures, and damaged manifests."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread

from hf_selortho.data import cache_report as report
from hf_selortho.data.cache_statistics import LayerStatistics
from hf_selortho.errors import SelOrthoError
from hf_selortho.language_models.capture import TokenOrigins
from hf_selortho.utils.plots import BLUE, VERMILION


def layer(**changes: Any) -> dict[str, Any]:
    """Fifteen tokens of norms near 100, and five sinks near 1000."""
    return {
        "hook_name": "model.layers.8",
        "d_in": 2,
        "mean": [30.0, 40.0],
        "scale": 40.0,
        "median_norm": 100.0,
        "max_norm": 400.0,
        "dropped_sinks": 5,
        "norm_quantiles": {"0": 80.0, "0.5": 100.0, "0.99": 150.0, "0.999": 900.0, "1": 1250.0},
        "norm_histogram": {
            "edges": [64 * 2 ** (n / 64) for n in range(64 * 5 + 1)],
            "counts": [15 if n == 40 else 5 if n == 255 else 0 for n in range(64 * 5)],
        },
        "sinks_by_position": {"1": 3, "10": 1, "2": 1},
        "largest_norms": [
            {"norm": 1250.0, "position": 1, "token_id": 5, "token": "\n", "document_id": 3, "kept": False},
            {"norm": 150.0, "position": 77, "token_id": 6, "token": " été", "document_id": 4, "kept": True},
        ],
        **changes,
    }


def without_sinks(**changes: Any) -> dict[str, Any]:
    return layer(dropped_sinks=0, sinks_by_position={}, **changes)


def manifest(*layers: dict[str, Any], ratio: float | None = 4.0) -> dict[str, Any]:
    return {
        "model": {"name": "gemma-3-270m", "revision": "abc123", "dtype": "float32"},
        "text": {"dataset": "texts/$a_$b", "revision": None, "split": "train"},
        "contexts": {"context_length": 128, "prepend_bos": True, "min_tokens": 8},
        "max_norm_ratio": ratio,
        "rows": 1990,
        "counts": {
            "documents": 20, "contexts": 30, "rows": 1990, "dropped_special": 30, "dropped_sinks": 10,
            "dropped_tails": 4, "dropped_tail_tokens": 17,
        },
        "layers": {str(8 + 3 * number): one for number, one in enumerate(layers or [layer()])},
    }  # fmt: skip


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_table_of_known_numbers() -> None:
    text = report.report_table(manifest())
    lines = text.splitlines()
    assert "gemma-3-270m (revision abc123, float32)" in lines[0]
    assert "texts/$a_$b (revision unknown, split train)" in lines[1]
    assert "30 of up to 128 tokens, with BOS, from 20 documents" in lines[2]
    assert "1,990 tokens" in lines[3] and "30 special" in lines[4] and "10 sinks" in lines[5]
    assert "4 ends of documents shorter than 8 tokens (17 tokens)" in lines[6]
    [row] = [line.split() for line in lines if "model.layers.8" in line]
    assert row == [
        *("8", "model.layers.8", "1.25", "40", "100"),  # |(30, 40)| / 40
        *("150", "(1.50x)", "900", "(9.00x)", "1,250", "(12.50x)", "5", "(0.25%)"),  # 5 of 1990 + 10 tokens
    ]
    assert ["1,250", "12.50x", "1", "dropped", r"'\n'"] in [line.split() for line in lines]
    assert ["150", "1.50x", "77", "kept", "'", "été'"] in [line.split() for line in lines]
    assert "sinks by position: 1 (3), 2 (1), 10 (1); norm above 400" in text
    assert max(map(len, lines)) <= 120


def test_columns_are_aligned_and_layers_in_order() -> None:
    wide = layer(hook_name="model.language_model.layers.11", scale=123456.0)
    content = manifest(layer(), wide)
    content["layers"] = dict(reversed(content["layers"].items()))  # JSON objects have no order
    lines = report.report_table(content).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("layer"))
    header, first, second = lines[start : start + 3]
    assert first.split()[0] == "8" and second.split()[0] == "11"
    assert len(header) == len(first) == len(second)
    end = header.index("scale", header.index("/scale") + 6) + len("scale")
    assert first[:end].endswith(" 40") and second[:end].endswith(" 123,456")
    assert "dropped at one layer is dropped at all" in lines[-1]


def test_only_the_most_frequent_positions_are_named() -> None:
    places = {str(position): 100 - position for position in range(1, 9)}
    text = report.report_table(manifest(layer(sinks_by_position=places, dropped_sinks=764)))
    assert "1 (99), 2 (98), 3 (97), 4 (96), 5 (95), elsewhere (279)" in text  # 94 + 93 + 92


def test_no_sinks_no_limit_nothing_to_divide_by() -> None:
    assert "sinks: none, no norm is above 400" in report.report_table(manifest(without_sinks()))
    text = report.report_table(manifest(without_sinks(max_norm=None, scale=0.0, median_norm=0.0), ratio=None))
    assert "every token is kept" in text and "no threshold at this layer" in text and "?" in text
    assert "dropped at all" not in text


def test_coarse_bins_hold_every_token_and_none_straddles_the_limit() -> None:
    edges = [2 ** (n / 64) for n in range(3, 201)]
    counts = list(range(1, 198))
    coarse, merged = report.merged_bins(edges, counts, 4.0)
    assert merged.sum() == sum(counts)
    np.testing.assert_allclose(np.diff(np.log2(coarse)), 1 / 8)
    assert np.isclose(coarse, 4.0).sum() == 1
    below = sum(count for edge, count in zip(edges, counts, strict=False) if edge < 3.999)
    assert merged[coarse[:-1] < 3.999].sum() == below
    assert coarse[0] <= edges[0] and coarse[-1] >= edges[-1]


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_coarse_bins_with_a_limit_elsewhere(limit: float) -> None:
    coarse, merged = report.merged_bins([1.0, 2 ** (1 / 64)], [7], limit)
    assert merged.tolist() == [7] and len(coarse) == 2
    assert [len(part) for part in report.merged_bins([1.0], [], limit)] == [0, 0]


def test_picture_shows_norms_limit_and_sinks(tmp_path, drawn) -> None:
    path = report.draw_report(manifest(layer(), without_sinks()), tmp_path / "norms.png")
    pixels = imread(path)
    assert pixels.shape[0] >= 800 and pixels.shape[1] >= 1000 and pixels[..., :3].std() > 0.03
    norms, sinks, _, no_sinks = drawn[0].axes
    heights = {color: [b.get_height() for b in norms.patches if to_hex(b.get_facecolor()) == color.lower()]
               for color in (BLUE, VERMILION)}  # fmt: skip
    assert sum(heights[BLUE]) == 15 and sum(heights[VERMILION]) == 5
    assert [line.get_xdata()[0] for line in norms.lines] == [100, 400]
    assert [text.get_text() for text in norms.texts] == ["median 100", "sink threshold 400"]
    assert norms.get_xscale() == norms.get_yscale() == "log"
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in sinks.patches}
    assert bars == {1: 3, 2: 1, 10: 1}
    assert no_sinks.texts[0].get_text() == "No norm is above 400." and not no_sinks.patches


def test_drawn_twice_the_picture_is_the_same(tmp_path) -> None:
    for name in ("one.png", "two.png"):
        report.draw_report(manifest(layer(), layer()), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    "odd",
    [
        without_sinks(max_norm=None),
        without_sinks(max_norm=None, median_norm=0.0),
        without_sinks(norm_histogram={"edges": [1.0], "counts": []}),
        layer(sinks_by_position={"1": 5000, "900": 1}),
    ],
)
def test_odd_layers_are_drawn(tmp_path, odd) -> None:
    assert report.draw_report(manifest(odd), tmp_path / "odd.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_a_harvest_gathers_can_be_reported(tmp_path, capsys) -> None:
    statistics = LayerStatistics(4, 16)
    activations = torch.ones(100, 4)
    activations[7] *= 50
    norms = activations.norm(dim=1)
    numbers = torch.arange(100)
    origins = TokenOrigins(numbers, numbers % 16, numbers, numbers)
    statistics.see(norms, origins, 8.0)
    statistics.keep(activations[norms <= 8], norms[norms <= 8])
    entry = {
        "hook_name": "h",
        "median_norm": 2.0,
        "max_norm": 8.0,
        **statistics.summary(8.0, lambda token: f"t{token}"),
    }
    folder = write(tmp_path, manifest(entry))
    report.main([str(folder), "--output", str(tmp_path / "norms.png")])
    out = capsys.readouterr().out
    assert "sinks by position: 7 (1)" in out and "100 (50.00x)" in out  # the maximum, of |(50, 50, 50, 50)|
    assert (tmp_path / "norms.png").is_file()


def damaged(*keys: str, value: Any = None) -> dict[str, Any]:
    """A manifest with another value somewhere, or without it."""
    content = copy.deepcopy(manifest())
    inner: Any = content
    for key in keys[:-1]:
        inner = inner[int(key) if isinstance(inner, list) else key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "not valid JSON"),
        ("[]", r"the whole of it is \[\], expected an object"),
        (damaged("rows"), "rows is missing"),
        (damaged("model"), "model is missing, expected an object"),
        (damaged("counts", "dropped_sinks", value="3"), "counts.dropped_sinks is '3', expected a whole number"),
        (damaged("layers", value={}), r"layers is \{\}, expected an object of layers by number"),
        (damaged("layers", "8", "scale"), "layers.8.scale is missing"),
        (damaged("layers", "8", "scale", value=math.nan), "layers.8.scale is nan, expected a number of at least 0"),
        (damaged("layers", "8", "mean", value=[1, "2"]), r"layers.8.mean is \[1, '2'\], expected a list of numbers"),
        (damaged("layers", "8", "max_norm", value=-1), "layers.8.max_norm is -1"),
        (damaged("layers", "8", "norm_quantiles", "0.999"), "layers.8.norm_quantiles.0.999 is missing"),
        (damaged("layers", "8", "norm_histogram", value={"edges": [1, 2], "counts": []}), "layers.8.norm_histogram"),
        (
            damaged("layers", "8", "norm_histogram", value={"edges": [1, 10**400], "counts": [3]}),
            "layers.8.norm_histogram",
        ),
        (damaged("layers", "8", "sinks_by_position", value={"first": 1}), "layers.8.sinks_by_position"),
        (damaged("layers", "8", "largest_norms", value={}), r"layers.8.largest_norms is \{\}, expected a list"),
        (damaged("layers", "8", "largest_norms", "1", "token"), r"layers.8.largest_norms\[1\].token is missing"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, content, fault) -> None:
    folder = write(tmp_path / "acts", content)
    with pytest.raises(SelOrthoError, match=rf"acts/manifest.json is damaged: {fault}.*harvest the activations again"):
        report.main([str(folder)])


def test_what_the_user_can_mend(tmp_path, capsys) -> None:
    folder = str(write(tmp_path / "acts", manifest()))
    with pytest.raises(SelOrthoError, match="expected a name that ends in .png"):
        report.main([folder, "--output", "norms.pdf"])
    with pytest.raises(SelOrthoError, match="cannot write picture .*folder that exists"):
        report.main([folder, "--output", str(tmp_path / "none" / "norms.png")])
    with pytest.raises(SelOrthoError, match='"me/acts" is not in the local cache'):
        report.main(["hub:me/acts"])


def test_a_screen_without_the_tokens_characters(tmp_path) -> None:
    folder = write(tmp_path, manifest())
    done = run(folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"' \xe9t\xe9'" in done.stdout


def test_unknown_folder_is_one_line() -> None:
    done = run("nowhere")
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "nowhere" in line and "cache_activations.py" in line


def run(folder: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The report as a program of its own."""
    command = [sys.executable, "-m", "hf_selortho.data.cache_report", str(folder)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
