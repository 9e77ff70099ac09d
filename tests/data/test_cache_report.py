"""The report on cached activations: numbers that were computed by hand, and pictures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from hf_selortho.data import cache_report as report
from hf_selortho.data.cache_manifest import parse_manifest
from hf_selortho.errors import SelOrthoError
from hf_selortho.utils.plots import BLUE, VERMILION
from tests.data.caches import content, summary, write_cache


def manifest(tmp_path, **changes):
    """The manifest of a small cache, with another summary of layer 5."""
    write_cache(tmp_path, [10])
    written = json.loads((tmp_path / "manifest.json").read_text())
    written["statistics"]["5"] |= changes
    return parse_manifest(json.dumps(written).encode(), "manifest.json")


def test_table_of_known_numbers(tmp_path) -> None:
    lines = report.report_table(manifest(tmp_path)).splitlines()
    assert f"google/gemma-2-2b (revision {'c' * 40}, bfloat16)" in lines[0] and "fancyzhx/ag_news" in lines[1]
    assert "30 of up to 128 tokens, 20 documents" in lines[2] and "10 tokens kept" in lines[3]
    assert lines[4].endswith("30 special tokens, 10 sinks, 4 ends of documents shorter than 8 tokens")
    header, row = lines[6], lines[7]
    assert row.split() == ["2", "0.50", "2", "100", "1000", "1000", "1000", "5"]  # |(0.5, ..., 0.5)| / 2
    assert len(header) == len(row)
    assert "layer 2: sinks by position: 1 (3), 2 (1), 10 (1)" in lines


def test_picture_shows_norms_limit_and_sinks(tmp_path, drawn) -> None:
    without = summary(5, sinks_by_position=[0] * 9, max_norm=None)
    path = report.draw_report(manifest(tmp_path, **without), tmp_path / "norms.png")
    pixels = imread(path)
    assert pixels.shape[0] >= 800 and pixels.shape[1] >= 1000 and pixels[..., :3].std() > 0.03
    norms, sinks, _, no_sinks = drawn[0].axes
    heights = {to_hex(bar.get_facecolor()): bar.get_height() for bar in norms.patches}
    assert heights == {BLUE.lower(): 15, VERMILION.lower(): 5}
    assert [line.get_xdata()[0] for line in norms.lines] == [100, 400]
    assert [text.get_text().strip() for text in norms.texts] == ["median 100", "sink threshold 400"]
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in sinks.patches}
    assert {position: count for position, count in bars.items() if count} == {1: 3, 2: 1, 10: 1}
    assert no_sinks.texts[0].get_text() == "No token is a sink."
    again = report.draw_report(manifest(tmp_path, **without), tmp_path / "again.png")
    assert again.read_bytes() == path.read_bytes()


def test_its_former_name_still_runs(tmp_path) -> None:
    write_cache(tmp_path / "acts", [10])
    command = [sys.executable, "-m", "hf_selortho.activations.report", "acts", "--output", "norms.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert "google/gemma-2-2b" in done.stdout and (tmp_path / "norms.png").is_file()


def test_what_the_user_can_mend(tmp_path) -> None:
    write_cache(tmp_path, [10])
    with pytest.raises(SelOrthoError, match=r"nowhere.*selortho cache"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(SelOrthoError, match=r"ending in \.png"):
        report.main([str(tmp_path), "--output", "norms.pdf"])
    with pytest.raises(SelOrthoError, match="cannot write picture"):
        report.main([str(tmp_path), "--output", str(tmp_path / "none" / "norms.png")])
    (tmp_path / "manifest.json").write_text(json.dumps(content()))
    with pytest.raises(SelOrthoError, match=r"manifest.json is damaged: shards is \(\), expected at least one"):
        report.main([str(tmp_path)])
