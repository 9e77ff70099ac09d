"""Every script of examples/ runs as it stands, and shows what its first line says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PUBLISHED = Path(__file__).parent / "data" / "published_0_1_0" / "batchtopk"
SHOWN = {
    "train_on_a_tensor": r"FVU 0\.0\d+, L0 [34]\.\d",
    "penalty_in_another_trainer": r"150 loss 0\.\d+, top correlations 0\.[67]\d+",
    "feature_index": r"32 features, 20 pairs\n\nfeature \d+ \('.*\) fires on [\d.]+% of the tokens\n  top positive",
    "selection_score": r"correlation: .* \(2, 3\) at 1\.00\ncorrelation times cosine: .* \(0, 1\) at 0\.9",
}


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_example(name, tmp_path, monkeypatch, capsys) -> None:
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *([str(PUBLISHED)] if name == "feature_index" else [])])
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(SHOWN[name], capsys.readouterr().out)
