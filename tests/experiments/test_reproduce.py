"""A plan in miniature, end to end: real processes, a small language model, every section of the report."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from experiments import reproduce
from hf_selortho import SelOrthoError

NONE = {"ortho_coefficient": 0.0}
FULL = {"penalty": "full", "ortho_coefficient": 5.0}


def small_plan(lm: Path, text: Path, **changes: Any) -> dict[str, Any]:
    """Every kind of experiment, in seconds."""
    return {
        "description": "A miniature.",
        "harvest": {
            "model": str(lm), "lm_dtype": "float32", "dataset": str(text), "context_length": 32,
            "held_out_fraction": 0.3, "cpu": True,
        },
        "label_column": "label",
        "seeds": 2,
        "measures": {
            "eval_samples": 40, "batch_size": 256, "ce_samples": 8, "probing_texts": 48, "first_letter_words": 0,
            "world_samples": 2000,
        },
        "timing": {"layer": 1, "d_sae": 32, "batch_size": 128, "l0": 6, "rounds": 2},
        "training": {
            "batch_size": 128, "max_steps": 12, "learning_rate": 1e-3, "logging_steps": 5, "selection_interval": 1,
            "min_support": 1, "pair_fraction": 0.01, "buffer_contexts": 32,
        },
        "recipes": {
            "paper": {"d_sae": 32, "activation": "relu", "l1_coefficient": 0.04},
            "topk": {"d_sae": 64, "activation": "topk", "k": 4, "ortho_coefficient": 5.0},
        },
        "variant_sets": {
            "paper": {"none": NONE, "selective-0.1": {"ortho_coefficient": 0.1}, "full-0.1": {"penalty": "full"}},
            "methods": {
                "none": NONE, "full-5.0": FULL, "activation-5.0": {}, "decoder-5.0": {"penalty_space": "decoder"},
            },
        },
        "sweeps": {
            "topk": {"sections": ["pareto"], "recipe": "topk", "layers": [1], "variants": ["methods"]},
            "paper": {
                "sections": ["table1", "ablations", "limits"], "recipe": "paper", "layers": [1], "variants": ["paper"],
            },
            "topk-adaptive": {
                "sections": ["pareto"], "recipe": "topk", "layers": [1], "variants": {"activation-adaptive": {}},
                "arguments": {"ortho_budget": "gradient", "ortho_budget_value": 0.01}, "reference": "topk/none",
            },
        },
        "ground_truth": {
            "worlds": {"tree": {"features": 24, "dimensions": 16, "roots": 4, "children": 2, "depth": 1}},
            "recipes": {"topk": {"d_sae": 16, "activation": "topk", "k": 2, "selection_interval": 1}},
            "variants": {"none": NONE, "decoder-5.0": {"penalty_space": "decoder"}},
            "training": {"steps": 10, "batch_size": 64, "learning_rate": 1e-3},
            "peers": {"topk": ["topk"]},
        },
        "examples": {"sweep": "topk", "variant": "activation-5.0"},
        **changes,
    }  # fmt: skip


class Sitting:
    """A plan and its folders."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder = folder
        (folder / "small.json").write_text(json.dumps(plan), encoding="utf-8")
        self.report = folder / "RESULTS.md"
        self.results = folder / "results" / "small"

    def run(self, *more: str) -> None:
        reproduce.main(
            [
                "--preset", str(self.folder / "small.json"), "--work_dir", str(self.folder / "work"), "--results_dir",
                str(self.folder / "results"), "--report", str(self.report), *more,
            ]
        )  # fmt: skip

    def record(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.results / f"{name}.json").read_text(encoding="utf-8"))
        return content

    def times(self) -> dict[str, int]:
        """When each record was written."""
        return {str(p.relative_to(self.results)): p.stat().st_mtime_ns for p in self.results.rglob("*.json")}

    def row(self, heading: str, first: str, last: bool = False) -> list[str]:
        """Cells of a row of the first (or last) table under a heading that has one, by its first cell."""
        section = self.report.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]
        line = [line for line in section.splitlines() if line.startswith(f"| {first} |")][-last]
        return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def sitting(tiny_lm_dir, sample_text_files, tmp_path_factory) -> Sitting:
    folder = tmp_path_factory.mktemp("plan")
    sitting = Sitting(folder, small_plan(tiny_lm_dir("llama"), sample_text_files.csv))
    sitting.run("--jobs", "2")
    return sitting


@pytest.mark.slow
class TestMiniature:
    def test_every_experiment_has_its_record(self, sitting) -> None:
        names = set(sitting.times())
        for seed in (0, 1):
            for variant in ("none", "full-5.0", "activation-5.0", "decoder-5.0"):
                assert f"topk/{variant}-layer1-seed{seed}.json" in names
            assert f"topk-adaptive/activation-adaptive-layer1-seed{seed}.json" in names
            assert f"ground_truth/tree-topk-seed{seed}.json" in names
        assert {"timing.json", "examples.json", "tasks-layer1.json", "harvest.json"} <= names
        assert "topk/none-layer1-seeds.json" in names
        harvested = sitting.record("harvest")
        assert harvested["text"]["dataset"].endswith(".csv") and "/" not in harvested["text"]["dataset"]
        record = sitting.record("topk/decoder-5.0-layer1-seed1")
        assert record["arguments"]["penalty_space"] == "decoder" and record["arguments"]["seed"] == 1
        assert record["arguments"]["penalty"] == "selective" and record["arguments"]["ortho_coefficient"] == 5.0
        assert record["evaluation"]["fvu"] > 0 and 0 <= record["evaluation"]["probing_accuracy_k1"] <= 1
        assert record["versions"]["torch"] and record["hardware"] and record["seconds"] > 0
        world = sitting.record("ground_truth/tree-topk-seed0")
        assert set(world["scores"]) == {"none", "decoder-5.0"} and set(world["peers"]) == {"topk"}

    def test_numbers_of_the_report_are_those_of_the_records(self, sitting) -> None:
        for variant in ("none", "selective-0.1", "full-0.1"):
            values = [sitting.record(f"paper/{variant}-layer1-seed{s}")["evaluation"] for s in (0, 1)]
            row = sitting.row("## Ablations", f"`{variant}`", last=True)
            for cell, key, digits in ((row[1], "fvu", 4), (row[2], "l0", 1), (row[4], "top_correlation", 3)):
                seeds = [value[key] for value in values]
                assert cell == f"{statistics.fmean(seeds):.{digits}f} ± {statistics.stdev(seeds):.{digits}f}"
        mcc = [sitting.record(f"ground_truth/tree-topk-seed{s}")["scores"]["none"]["mcc"] for s in (0, 1)]
        assert f"{statistics.fmean(mcc):.3f} ± {statistics.stdev(mcc):.3f}" in sitting.row("### tree, topk", "`none`")

    def test_differences_are_from_the_twin_of_the_same_seed(self, sitting) -> None:
        def cosine(variant: str, seed: int) -> float:
            return sitting.record(f"topk/{variant}-layer1-seed{seed}")["evaluation"]["max_decoder_cosine"]

        change = [cosine("decoder-5.0", s) / cosine("none", s) - 1 for s in (0, 1)]
        assert max(change) < -0.02, "each variant is trained with its own settings, not with those of the one before it"
        row = sitting.row("### TopK", "`decoder-5.0`")
        assert row[4] == f"{100 * statistics.fmean(change):+.1f} ± {100 * statistics.stdev(change):.1f}%"

    def test_every_section_and_figure_is_there(self, sitting) -> None:
        text = sitting.report.read_text()
        headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert set(headings) == {
            "In short", "Names", "Methods at equal L0", "Adaptive coefficient", "On the language model",
            "Known ground truth", "Pairs to read", "The paper's claims", "Table 1", "Ablations", "Limits",
        }  # fmt: skip
        for link in re.findall(r"\]\(([^)]*\.png)\)", text):
            assert (sitting.report.parent / link).is_file(), link
        assert "nan" not in text.lower().split() and "| None" not in text
        assert str(sitting.folder) not in text, "paths of this machine are nobody's business"

    def test_a_second_sitting_does_nothing_again(self, sitting) -> None:
        before, report = sitting.times(), sitting.report.read_text()
        sitting.run()
        after = sitting.times()
        assert {name for name in after if after[name] != before[name]} <= {"tasks-layer1.json"}
        assert sitting.report.read_text() == report

    def test_what_is_missing_is_trained_again_and_comes_out_the_same(self, sitting) -> None:
        name = "topk/activation-5.0-layer1-seed1"
        before, times = sitting.record(name), sitting.times()
        (sitting.results / f"{name}.json").unlink()
        for folder in (sitting.folder / "work").glob("**/topk-layer1-seed1"):
            folder.rename(folder.with_name("away"))  # as in a new sitting on another machine
        sitting.run("--only", "pareto,limits")
        after = sitting.record(name)
        assert after["evaluation"] == before["evaluation"], "the same seed gives the same SAE"
        changed = {key for key, when in sitting.times().items() if when != times[key]}
        assert changed == {f"{name}.json", "tasks-layer1.json"}

    def test_another_text_is_refused(self, sitting, sample_text_files) -> None:
        with pytest.raises(SelOrthoError, match="choose another --work_dir"):
            sitting.run("--dataset", str(sample_text_files.jsonl))
        other = sitting.folder / "other.csv"
        other.write_text(sample_text_files.csv.read_text(encoding="utf-8").replace("market", "harbour"), "utf-8")
        before = sitting.times()
        with pytest.raises(SelOrthoError, match=r"are of the text .*: choose another --results_dir"):
            sitting.run("--dataset", str(other), "--work_dir", str(sitting.folder / "other"))
        assert sitting.times() == before, "no record is touched"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "nothing"], "unknown plan 'nothing'"),
        (["--only", "pareto,nothing"], "--only nothing: expected some of"),
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--jobs", "0"], "--jobs 0: expected at least 1"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], expected: str, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=expected):
        reproduce.main([*arguments, "--work_dir", str(tmp_path / "w"), "--results_dir", str(tmp_path / "r")])
    assert not list(tmp_path.iterdir()), "nothing is made for a plan that cannot run"
