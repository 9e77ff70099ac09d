"""docs/metrics.md says what is in the files of a run: every key that occurs, and none that never does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from hf_selortho.evaluation import probe_scores
from hf_selortho.evaluation.probe_sets import Cap
from hf_selortho.hub.card_results import METRICS
from scripts import train

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented() -> dict[str, set[str]]:
    """Keys by heading."""
    parts = re.split(r"^#{2,3} ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    tables = {part.split("\n", 1)[0]: re.findall(r"^\| (`.*?) \|", part, re.MULTILINE) for part in parts}
    return {heading: set(re.findall(r"`(\w+)`", " ".join(cells))) for heading, cells in tables.items()}


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    return documented()


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_key_is_documented_and_every_documented_key_occurs(known, arguments, tmp_path) -> None:
    kinds = {"relu": {}, "topk": {"activation": "topk", "k": 4}, "jumprelu": {"activation": "jumprelu"}}
    metrics, rows, timings, runs = [], [], [], []
    for name, settings in kinds.items():
        folder = tmp_path / name
        train.main(arguments(output_dir=folder, max_steps=4, eval_samples=12, eval_ce_samples=4, **settings))
        metrics.append(json.loads((folder / "metrics.json").read_text()))
        runs.append(json.loads((folder / "run.json").read_text()))
        rows += rows_of(folder / "metrics.jsonl")
        timings += rows_of(folder / "timings.jsonl")
    row_keys = {key for row in rows for key in row}
    assert row_keys == known["metrics.jsonl"]
    assert {key for row in timings for key in row} - {"step"} == known["timings.jsonl"]
    assert {key for run in runs for key in run} == known["run.json"] - {"converted_from"}
    for content in metrics:
        assert content.keys() == known["metrics.json"] - {"saes", "all_layers"}
        assert content["evaluation"].keys() == known["evaluation"]
        assert content["data"].keys() == known["data"]
        means = content["training"].keys()
        assert known["training"] <= means <= known["training"] | known["metrics.jsonl"] | known["timings.jsonl"]
        assert content["training_start"].keys() <= known["metrics.jsonl"]
    assert {metric.key for metric in METRICS} <= known["evaluation"]


def test_a_run_of_several_saes(known, arguments, tmp_path) -> None:
    train.main([*arguments(layer=None, max_steps=2, eval_samples=0), "--layers", "0", "2", "--twin"])
    content = json.loads((tmp_path / "run/metrics.json").read_text())
    assert content.keys() == {"schema_version", "saes"} <= known["metrics.json"]
    assert set(content["saes"]) == {"layer_0", "layer_0_twin", "layer_2", "layer_2_twin"}
    for sae in content["saes"].values():
        assert (
            sae.keys() - {"layer", "variant"} == known["metrics.json"] - {"saes", "all_layers"}
            and sae["evaluation"] == {}
        )
    assert "## SAEs" in (tmp_path / "run/README.md").read_text()


def test_the_probes_of_a_run_are_in_its_metrics_and_cards(known, arguments, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(probe_scores, "QUICK_SETS", ("54_cs_tf", "125_world_country_Italy"))
    monkeypatch.setattr(probe_scores, "QUICK", Cap(64, 12))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    train.main([*arguments(layer=None, max_steps=2), "--layers", "0", "--twin", "--probes", "quick"])
    content = json.loads((tmp_path / "run/metrics.json").read_text())
    for name, sae in content["saes"].items():
        assert sae["evaluation"].keys() == known["evaluation"] | {"probes"}
        assert sae["evaluation"]["probes"].keys() == known["probes"] - {"benchmark"}
        assert json.loads((tmp_path / f"run/{name}/metrics.json").read_text())["evaluation"] == sae["evaluation"]
    assert "AUC, k=1" in capsys.readouterr().out
    assert "| 16 features |" in (tmp_path / "run/README.md").read_text()
