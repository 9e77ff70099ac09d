"""The report on made-up records: every section, and numbers that follow from the records."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_selortho.experiments.plan import Plan, load_plan
from hf_selortho.experiments.records import Records
from hf_selortho.experiments.report import write_results
from hf_selortho.experiments.worlds import World

CHANGES: dict[str, dict[str, float]] = {  # by variant, what differs from the twin's figures
    "activation-0.03": {"fvu": 0.0815, "top_correlation": 0.4},
    "decoder-0.1": {"fvu": 0.0807, "max_decoder_cosine": 0.14},
    "ortsae-0.25": {"fvu": 0.086, "max_decoder_cosine": 0.10, "dead_features": 30.0},
    "selective-0.1": {"top_correlation": 0.4, "peak_correlation": 0.8},
    "none-l0.03": {"l0": 140.0, "fvu": 0.07},
    "none-l0.05": {"l0": 100.0, "fvu": 0.09},
}
TWIN = {
    "fvu": 0.08, "l0": 120.0, "dead_features": 1.0, "top_correlation": 0.7, "peak_correlation": 0.9, "mse": 4e4,
    "max_decoder_cosine": 0.25, "mean_correlation": 0.1, "active_features": 600.0, "unique_features": 300.0,
    "loss_recovered": 0.9, "probing_accuracy_k1": 0.65, "absorption_rate": 0.01, "first_letter_f1": 0.3,
}  # fmt: skip


CLASS = {
    "pairs": 5, "fires": 1000, "apart": 3, "halved": 2, "correlation": 0.8, "correlation_beside": 0.2,
    "decoder_cosine": 0.1, "decoder_cosine_beside": None,
}  # fmt: skip
PAIR = {
    "label_a": "the|a", "label_b": "of", "fires_a": 2000, "fires_b": 1000, "a_given_b": 0.9, "b_given_a": 0.8,
    "correlation": 0.75, "correlation_beside": 0.1, "decoder_cosine": 0.3, "decoder_cosine_beside": 0.2,
    "context": None,
}  # fmt: skip


def sae_record(plan: Plan, sweep: str, variant: str, layer: int, seed: int) -> dict[str, Any]:
    arguments = next(one.arguments for one in plan.sweeps if one.name == sweep)
    evaluation = {key: value * (1 + 0.001 * seed) for key, value in {**TWIN, **CHANGES.get(variant, {})}.items()}
    if sweep in ("paper", "layers"):
        evaluation["mean_correlation"] = 0.1 - 0.005 * layer
    return {
        "kind": "sae", "sweep": sweep, "sections": [], "layer": layer, "seed": seed, "variant": variant,
        "arguments": dict(arguments), "evaluation": evaluation, "seconds": 60.0, "measuring_seconds": 30.0,
        "training": {key: evaluation[key] for key in ("fvu", "l0", "peak_correlation", "dead_features")},
        "spread_over_batches": {key: {"mean": 0.3, "std": 0.02, "batches": 100} for key in ("top_correlation",
                                "peak_correlation", "pair_churn")},
        "curve": {"step": [1, 300, 600], "fvu": [0.9, 0.2, 0.08], "l1": [1, 0.5, 0.4], "l0": [300, 150, 120],
                  "peak_correlation": [0.9] * 3, "top_correlation": [0.7] * 3, "dead_features": [0, 0, 1]},
        "versions": {"torch": "2.13.0"}, "hardware": "two cores",
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with RESULTS.md, written from records of the plan that comes with the package."""
    folder = tmp_path_factory.mktemp("report")
    plan = load_plan("demo")
    records = Records(folder / "results")
    for unit in plan.units():
        for variant in unit.sweep.variants:
            record = sae_record(plan, unit.sweep.name, variant, unit.layer, unit.seed)
            records.write(unit.record(variant), record)
    for run in plan.worlds:
        names = {name: 0.01 * number for number, name in enumerate(run.variants)}
        score = {"explained_variance": 0.9, "l0": 12.0, "uniqueness": 0.8, "f1": 0.5, "precision": 0.5}
        score |= {"recovered": 0.3, "absorption": 0.1, "training_seconds": 30.0}
        scores = {name: {**score, "mcc": 0.5 + gain + 0.001 * run.seed} for name, gain in names.items()}
        records.write(
            run.name,
            {
                "kind": "world", "world": World.from_json(run.world).to_json(),
                "recipe": run.recipe, "seed": run.seed, "settings": run.settings, "training": run.training,
                "scores": scores, "peers": {name: {**score, "mcc": 0.4} for name in run.peers},
                "hardware": "two cores", "versions": {"torch": "2.13.0"},
            },
        )  # fmt: skip
    classes = {name: dict(CLASS) for name in ("duplicate", "nested", "co-occurring")}
    examples = {"sweep": "topk", "variant": "activation-0.03", "control": "none-k28", "seed": 0, "tokens": 20_000}
    pairs = {"separated": [PAIR], "nested": [], "control_classes": classes}
    records.write("examples", {"kind": "examples", **examples, "classes": classes, **pairs})
    text = {"dataset": "news.csv", "rows": 3800, "split": "train", "fingerprint": "40b2", "revision": None}
    source = {"model": {"name": "gemma-3-270m", "revision": "a5fd"}, "text": text}
    records.write("harvest", {"kind": "harvest", **source})
    records.write("tasks-layer8", {"kind": "tasks", "layer": 8, "no_probing": "the texts have no labels"})
    rows = [
        {"label": "no penalty", "seconds_per_step": 0.1, "memory_bytes": 1e8},
        {"label": "selective", "seconds_per_step": 0.12, "memory_bytes": 1.5e8},
        {"label": "full", "seconds_per_step": 0.36, "memory_bytes": 6e8},
    ]
    records.write("timing", {"kind": "timing", "rows": rows, "memory_of_more_pairs": 1.1})
    write_results(plan, folder / "results", folder / "RESULTS.md", "python scripts/reproduce_paper.py --preset demo")
    return folder


def section(folder: Path, heading: str) -> str:
    return (folder / "RESULTS.md").read_text().split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]


def test_every_section_is_written_and_every_picture_is_there(written) -> None:
    text = (written / "RESULTS.md").read_text()
    assert set(re.findall(r"^## (.*)$", text, re.MULTILINE)) == {
        "In short", "Names", "Methods at equal L0", "Adaptive coefficient", "On the language model",
        "Known ground truth", "Pairs to read", "The paper's claims", "Table 1", "Ablations", "Layers", "Limits",
    }  # fmt: skip
    for link in re.findall(r"\]\(([^)]*\.png)\)", text):
        assert (written / link).stat().st_size > 5000, link
    assert not re.search(r"\bnan\b", text.lower())
    assert re.search(r"\. \d+ SAEs on activations, \d+ on synthetic worlds, 3 seeds of each", text), (
        "nothing is missing"
    )
    count = sum(len(unit.sweep.variants) for unit in load_plan("demo").units())
    assert f"measuring what was trained {30 * count / 3600:.1f} hours" in text


def test_what_is_worth_it_is_marked(written) -> None:
    methods = section(written, "## Methods at equal L0")
    topk = methods.split("### TopK", 1)[1].split("### ", 1)[0]
    (cheap,) = [line for line in topk.splitlines() if line.startswith("| `activation-0.03` | +")]
    assert cheap.endswith("| correlation |") and "-42.9" in cheap
    (alike,) = [line for line in topk.splitlines() if line.startswith("| `decoder-0.1` | +")]
    assert alike.endswith("| cosine |") and "-44.0" in alike
    (dear,) = [line for line in topk.splitlines() if line.startswith("| `ortsae-0.25` | +")]
    assert dear.endswith("| - |"), "bought with dead features and reconstruction"
    assert "None of the" in topk and "buys both cuts" in topk


def test_relu_is_compared_at_equal_l0(written) -> None:
    methods = section(written, "## Methods at equal L0")
    relu = methods.split("### ReLU + L1", 1)[1]
    (line,) = [line for line in relu.splitlines() if line.startswith("| `activation-0.03` | ")][:1]
    assert (
        line.split("|")[2].strip().startswith("+0.0015")
    )  # L0 is the twin's, so the twin itself is what is interpolated


def test_verdicts_and_table_one(written) -> None:
    claims = section(written, "## The paper's claims")
    assert (
        "| A step is faster than with full orthogonality | 0.42 s and 0.12 s, 3.5 times | 3.00 times | **holds** (at "
        in claims
    )
    assert (
        "| It takes less memory | 14.8 GB and 5.3 GB, 2.8 times | 4.00 times | **holds** (at this plan's width"
        in claims
    )
    assert re.search(r"The mean correlation falls with depth .* 0.085 .*, 0.060 .*, 0.035 .* \*\*holds\*\*", claims)
    assert (
        "Over the last 100 steps: FVU 0.0801 (no penalty), 0.0801 (selective), 0.0801 (full); L0 120 (no penalty)"
        in section(written, "## Table 1")
    )
    assert "| seconds a step | 0.42 | 0.12 | 0.360 | 0.120 | 0.100 |" in section(written, "## Table 1")


def test_ground_truth_names_what_raises_a_score_in_more_trainings_than_chance(written) -> None:
    truth = section(written, "## Known ground truth")
    last = list(load_plan("demo").worlds[0].variants)[-1]
    for recipe in ("TopK", "ReLU + L1"):
        part = truth.split(f"### All worlds, {recipe}\n", 1)[1].split("### ", 1)[0]
        count = len([run for run in load_plan("demo").worlds if run.recipe == {"TopK": "topk"}.get(recipe, "relu")])
        assert f"`{last}` (+" in part.split("- MCC: raised by ", 1)[1].split("; lowered by none.", 1)[0]
        assert "- uniqueness: raised by none; lowered by none." in part
        assert f" ({count} of {count}) | +0.000 (0 of {count}) |" in part and f"of the {count} trainings" in part
    assert "SAELens `matryoshka` 0.400 and 0.500" in truth and "SAELens `standard` 0.400 and 0.500" in truth


def test_pairs_are_told_with_how_often_they_fire(written) -> None:
    pairs = section(written, "## Pairs to read")
    assert "- “the a” (10% of tokens) and “of” (5% of tokens): correlation 0.75 → 0.10, P(a|b) 0.90" in pairs
    assert "| `activation-0.03` | duplicate | 5 | 5% | 3 | 2 | 0.80 | 0.20 | 0.10 | - |" in pairs
    assert "Of the twin's 15 most correlated pairs, 5 are duplicates and 5 nested" in pairs
    assert "of the 15 most correlated pairs without penalty, 5 are duplicates" in section(written, "## In short")
    assert "text `news.csv`, 3,800 rows, split `train`, fingerprint `40b2`" in (written / "RESULTS.md").read_text()


def test_a_report_of_a_part_says_what_is_missing(tmp_path) -> None:
    plan = load_plan("demo")
    unit = plan.units()[0]
    Records(tmp_path / "r").write(unit.record("none"), sae_record(plan, unit.sweep.name, "none", unit.layer, 0))
    write_results(plan, tmp_path / "r", tmp_path / "RESULTS.md", "x")
    assert re.search(r"\. 1 of \d+ SAEs on activations, 0 of \d+ on", (tmp_path / "RESULTS.md").read_text())


def test_in_short_says_what_the_tables_say(written) -> None:
    topk, relu, truth, _, prices = section(written, "## In short").strip().splitlines()
    assert topk.startswith("- **TopK**: the paper's penalty (`activation-0.03`) cuts the mean of the top 0.1% ")
    assert "correlations by 43% (FVU +1.9%); " in topk and prices.startswith("*FVU* here: relative to the twin's")
    assert (
        "a penalty on decoder cosines (`decoder-0.1`) cuts the mean maximum decoder cosine by 44% (FVU +0.9%)" in topk
    )
    count = len([name for name in load_plan("demo").sweeps[0].variants if not name.startswith("none")])
    assert f"none of the {count} settings tried buys a quarter less" in topk and relu.startswith("- **ReLU + L1**: ")
    runs = load_plan("demo").worlds
    assert f"({len(runs)} trainings" in truth and "(`activation-0.03`) changes the features' F1" in truth
    assert "+0.000 (TopK, FVU +0.0%) and +0.000 (ReLU + L1, FVU +0.0%)" in truth
    told = [
        f"(`{name}`) buys with TopK MCC +{0.01 * n:.3f} (FVU +0.0%), with ReLU + L1 MCC +0."
        for n, name in enumerate(runs[0].variants)
    ]
    assert sum(words in truth for words in told[1:]) == 1


def test_a_cut_that_costs_dead_features_is_told_as_such(tmp_path) -> None:
    plan, records = load_plan("demo"), Records(tmp_path / "r")
    for name, changes in {"none": {}, "ortsae-0.1": {"max_decoder_cosine": 0.1, "dead_features": 9.0}}.items():
        for seed in range(plan.seeds):
            record = sae_record(plan, "topk", name, 8, seed)
            records.write(f"topk/{name}-layer8-seed{seed}", {**record, "evaluation": {**TWIN, **changes}})
    write_results(plan, tmp_path / "r", tmp_path / "RESULTS.md", "x")
    short = section(tmp_path, "## In short")
    cut = (
        "OrtSAE (`ortsae-0.1`) cuts the mean maximum decoder cosine by 60% (FVU +0.0%, 8.0 more dead features of 1280)"
    )
    assert cut in short


ROOT = Path(__file__).parents[2]


def test_the_results_are_what_their_records_give(tmp_path) -> None:
    shutil.copytree(ROOT / "results" / "demo", tmp_path / "results" / "demo")
    published = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^Written by `(python scripts/reproduce_paper.py [^`]*)`", published, re.MULTILINE)
    write_results(load_plan("demo"), tmp_path / "results" / "demo", tmp_path / "RESULTS.md", command)
    written = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert written == published, "write it anew: python scripts/reproduce_paper.py --preset demo --report_only"
    for link in re.findall(r"\]\(([^)]*\.png)\)", published):
        assert (ROOT / link).is_file(), link


def test_the_records_are_of_the_plan_as_it_is() -> None:
    plan, records = load_plan("demo"), Records(ROOT / "results" / "demo")
    seen = seen_worlds = 0
    for unit in plan.units():
        for variant, settings in unit.sweep.variants.items():
            if records.has(name := unit.record(variant)):
                wanted = {**unit.sweep.arguments, **settings, "seed": unit.seed}
                arguments = records.read(name)["arguments"]
                assert {key: arguments.get(key) for key in wanted} == wanted, name
                seen += 1
    assert seen == len(list(records.all("sae"))), "there are records of variants that the plan does not have"
    for run in plan.worlds:
        if records.has(run.name):
            known = records.read(run.name)
            assert World.from_json(known["world"]) == World.from_json(run.world)
            assert (known["settings"], known["variants"]) == (run.settings, run.variants)
            assert known["training"] == run.training and known["seed"] == run.seed
            seen_worlds += 1
    assert seen_worlds == len(list(records.all("world"))) == len(plan.worlds)


def test_readme_quotes_the_results() -> None:
    readme, results = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md"))
    found = results.split("\n## In short\n\n", 1)[1].split("\n\n", 1)[0]
    first_screen = readme.split("\n```bash\n", 1)[0]
    assert found.count("\n") == 2 and found in first_screen, f"README.md should say, before its first command:\n{found}"
    assert "](results/demo/figures/headline.png)" in first_screen
