"""A plan in miniature, end to end: real processes, a small language model, every kind of record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import reproduce
from experiments.page import PUBLISHED
from experiments.records import Records
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
        self.folder, self.results = folder, folder / "results" / "small"
        (folder / "small.json").write_text(json.dumps(plan), encoding="utf-8")

    def run(self, *more: str) -> None:
        folders = ["--work_dir", str(self.folder / "work"), "--results_dir", str(self.folder / "results")]
        reproduce.main(["--preset", str(self.folder / "small.json"), *folders, *more])

    def record(self, name: str) -> dict[str, Any]:
        return Records(self.results).read(name)

    def times(self) -> dict[str, int]:
        """When each record was written."""
        return {str(p.relative_to(self.results)): p.stat().st_mtime_ns for p in self.results.rglob("*.json")}


@pytest.fixture(scope="module")
def sitting(tiny_lm_dir, sample_text_files, tmp_path_factory) -> Sitting:
    folder = tmp_path_factory.mktemp("plan")
    sitting = Sitting(folder, small_plan(tiny_lm_dir("llama"), sample_text_files.csv))
    sitting.run("--jobs", "2")
    return sitting


@pytest.mark.slow
class TestMiniature:
    def test_every_experiment_has_its_record_with_the_keys_of_the_published_ones(self, sitting) -> None:
        names = set(sitting.times())
        variants = {"topk": ("none", "full-5.0", "activation-5.0", "decoder-5.0"), "paper": ("none", "selective-0.1")}
        for seed in (0, 1):
            for sweep, expected in variants.items():
                assert {f"{sweep}/{variant}-layer1-seed{seed}.json" for variant in expected} <= names
        for name, published in [
            ("harvest", "harvest"),
            ("tasks-layer1", "tasks-layer8"),
            ("timing", "timing"),
            ("examples", "examples"),
            ("topk/none-layer1-seeds", "topk/none-layer8-seeds"),
            ("topk/none-layer1-seed0", "topk/none-layer8-seed0"),
            ("ground_truth/tree-topk-seed0", "ground_truth/flat-topk-seed0"),
        ]:
            known, own = Records(PUBLISHED).read(published).keys(), sitting.record(name).keys()
            optional = {"control", "control_classes", "no_first_letter", "no_probing"}
            of_words = {key for key in known if "first_letter" in key or key == "spelling_accuracy"}
            assert known - of_words - optional == own - optional, name
        record = sitting.record("topk/decoder-5.0-layer1-seed1")
        assert record["arguments"]["penalty_space"] == "decoder" and record["arguments"]["seed"] == 1
        assert record["arguments"]["penalty"] == "selective" and record["arguments"]["ortho_coefficient"] == 5.0
        assert record["evaluation"]["fvu"] > 0 and 0 <= record["evaluation"]["probing_accuracy_k1"] <= 1
        world = sitting.record("ground_truth/tree-topk-seed0")
        assert set(world["scores"]) == {"none", "decoder-5.0"} and set(world["peers"]) == {"topk"}
        assert {row["mode"] for row in sitting.record("timing")["rows"]} == {"encoder", "none", "selective", "full"}

    def test_each_variant_is_trained_with_its_own_settings(self, sitting) -> None:
        def cosine(variant: str, seed: int) -> float:
            figures = sitting.record(f"topk/{variant}-layer1-seed{seed}")["evaluation"]
            return float(figures["max_decoder_cosine"])

        assert all(cosine("decoder-5.0", seed) < 0.98 * cosine("none", seed) for seed in (0, 1))

    def test_records_and_pages_do_not_name_this_machine(self, sitting) -> None:
        harvested = sitting.record("harvest")
        assert harvested["text"]["dataset"].endswith(".csv") and "/" not in harvested["text"]["dataset"]
        assert "dataset" not in sitting.record("topk/none-layer1-seed0")["arguments"]
        assert any(sitting.results.rglob("*.png"))
        for page in sitting.results.rglob("*.md"):
            assert str(sitting.folder) not in page.read_text(encoding="utf-8")

    def test_a_second_sitting_does_nothing_again(self, sitting) -> None:
        before = sitting.times()
        sitting.run()
        assert sitting.times() == before

    def test_what_is_missing_is_trained_again_and_comes_out_the_same(self, sitting) -> None:
        name = "topk/activation-5.0-layer1-seed1"
        before, times = sitting.record(name), sitting.times()
        (sitting.results / f"{name}.json").unlink()
        unit = sitting.folder / "work" / "small" / "units" / "topk-layer1-seed1"
        unit.rename(unit.with_name("away"))  # as in a new sitting on another machine
        sitting.run("--only", "pareto,limits")
        assert sitting.record(name)["evaluation"] == before["evaluation"], "the same seed gives the same SAE"
        changed = {key for key, when in sitting.times().items() if when != times[key]}
        assert changed == {f"{name}.json", "tasks-layer1.json"}

    def test_another_text_is_refused(self, sitting, sample_text_files) -> None:
        with pytest.raises(SelOrthoError, match="choose another --work_dir"):
            sitting.run("--dataset", str(sample_text_files.jsonl))
        other = sitting.folder / "other.csv"
        other.write_text(sample_text_files.csv.read_text(encoding="utf-8").replace("market", "harbour"), "utf-8")
        before = sitting.times()
        with pytest.raises(SelOrthoError, match=r"is of the text .*, or choose another --results_dir"):
            sitting.run("--dataset", str(other), "--work_dir", str(sitting.folder / "other"))
        assert sitting.times() == before, "no record is touched"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "nothing"], "unknown plan 'nothing'"),
        (["--only", "pareto,nothing"], "--only nothing: expected some of"),
        (["--seeds", "0"], "seeds 0: expected"),
        (["--jobs", "0"], "--jobs 0: expected at least 1"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(arguments: list[str], expected: str, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=expected):
        reproduce.main([*arguments, "--work_dir", str(tmp_path / "w"), "--results_dir", str(tmp_path / "r")])
    assert not list(tmp_path.iterdir())
