"""The benchmark at sizes of milliseconds: its files, its arithmetic, its refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file

from benchmarks import benchmark
from benchmarks import steps as benchmark_steps
from benchmarks.cases import MODES, Case, base_config, cases_of
from benchmarks.inputs import Batches, load_activations, make_sae, synthetic_activations
from benchmarks.memory import peak_in_own_process
from benchmarks.steps import Measured, TrainingSteps, ratio, rows_of, run_rounds, turns_of
from hf_selortho import SelOrthoError
from hf_selortho.penalties import full_penalty_bytes

CPU = torch.device("cpu")
SMALL = {"batch": 128, "d_in": 16, "steps": 2, "k": 4, "l0": 10, "cpu_threads": 1}


@pytest.fixture(autouse=True)
def _threads_and_accelerator():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def command(output: Path, **changes: object) -> list[str]:
    """A command line for a benchmark of a few seconds."""
    values = {key: value if isinstance(value, list) else [value] for key, value in {**SMALL, **changes}.items()}
    arguments = [part for key, value in values.items() for part in (f"--{key}", *map(str, value))]
    return [*arguments, "--output", str(output), "--cpu"]


def test_it_measures_every_mode_and_writes_three_files(tmp_path, capsys) -> None:
    settings = {"widths": [256, 512], "activation": ["topk", "relu"], "selection_interval": [1, 2]}
    benchmark.main(command(tmp_path, **settings))
    content = json.loads((tmp_path / "benchmark.json").read_text())
    rows = content["rows"]
    assert {(row["width"], row["activation"]) for row in rows} == {(n, a) for n in (256, 512) for a in ("topk", "relu")}
    one = {(row["mode"], row["interval"]): row for row in rows if (row["width"], row["activation"]) == (512, "relu")}
    assert {mode for mode, _ in one} == set(MODES) and len(one) == 10
    assert all(row["skipped"] is None and row["seconds_per_step"] > 0 for row in one.values())
    assert one["encoder", 1]["ratio_to_encoder"] == one["none", 1]["ratio_to_no_penalty"] == 1
    selective = one["selective", 1]
    assert selective["pairs"] == 131 and selective["tokens_per_second"] == 128 / selective["seconds_per_step"]
    assert selective["seconds_by_phase"]["selection"] > 0 and one["none", 1]["pairs"] is None
    assert selective["l0"] == pytest.approx(10, rel=0.25)  # on a batch of 128 tokens
    text = (tmp_path / "benchmark.md").read_text()
    assert text in capsys.readouterr().out
    assert "thresholds set so that L0 = 10, not trained" in text and "synthetic" in text and "torch 2" in text
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_activations_come_from_a_file_and_the_language_model_is_timed(tiny_lm_dir, sample_text_files, tmp_path) -> None:
    save_file({"x": torch.randn(300, 24)}, tmp_path / "a.safetensors")
    settings = {"widths": 256, "activation": "topk", "only": "none"}
    lm = {"model": tiny_lm_dir("llama"), "layer": 1, "dataset": sample_text_files.csv}
    for name, changes, d_in in (("file", {"activations": tmp_path / "a.safetensors"}, 24), ("lm", lm, 32)):
        benchmark.main(command(tmp_path / name, **settings, **changes))
        assert json.loads((tmp_path / name / "benchmark.json").read_text())["d_in"] == d_in
    assert "a.safetensors, 300 tokens" in (tmp_path / "file" / "benchmark.md").read_text()
    assert re.search(r"up to layer 1: [\d,]+ tokens/s, shuffle buffer", (tmp_path / "lm" / "benchmark.md").read_text())


def test_ratios_are_medians_of_the_ratios_of_each_round() -> None:
    assert ratio([2.0, 30.0, 6.0], [1.0, 10.0, 2.0]) == 3
    assert ratio([None, 30.0, None], [1.0, 10.0, 2.0]) == 3
    assert ratio([None, None], [1.0, 2.0]) is None
    results = [
        Measured(Case("encoder"), [1.0, 10.0, 1.0]),
        Measured(Case("none"), [2.0, 20.0, 4.0]),
        Measured(Case("selective", 3), [8.0, None, 8.0]),
        Measured(Case("full"), [None] * 3, refused="too large"),
    ]
    rows = rows_of(results, 16, 5.0, width=8)
    assert rows[1]["ratio_to_encoder"] == 2 and rows[1]["seconds_per_step"] == 4  # the slow round does not count
    assert rows[1]["seconds_per_step_min"] == 2 and rows[1]["tokens_per_second"] == 4
    assert rows[2]["ratio_to_no_penalty"] == 3 and rows[2]["ratio_to_encoder"] == 8
    assert rows[3]["skipped"] == "too large" and "seconds_per_step" not in rows[3]


def test_long_intervals_take_part_in_fewer_rounds() -> None:
    assert turns_of(1, 10) == list(range(10)) and turns_of(2, 10) == [0, 2, 4, 6, 8]
    assert turns_of(5, 10) == [0, 3, 6] and turns_of(100, 2) == [0, 1]


def small_steps(d_sae: int = 64) -> TrainingSteps:
    batches = Batches(synthetic_activations(256, 16), 64, CPU)
    return TrainingSteps(make_sae(base_config("relu", 16, d_sae, 1), batches, 10.0), batches)


def test_a_slow_case_is_measured_once_and_one_without_room_not_at_all(monkeypatch) -> None:
    monkeypatch.setattr(benchmark_steps, "available_memory", lambda device: 1000)
    results = run_rounds(small_steps(), cases_of(["selective", "full"], [1, 2]), rounds=3, limit_seconds=1e-9)
    *measured, full = results
    assert [len(result.done) for result in measured] == [1] * 4 and not full.done
    assert full.refused is not None
    assert f"{full_penalty_bytes(64, 64):,} bytes" in full.refused and "1,000 are available" in full.refused


def test_every_case_finds_the_same_weights() -> None:
    steps = small_steps(128)
    before = {name: tensor.clone() for name, tensor in steps.sae.state_dict().items()}
    for case in cases_of([], [1, 3]):
        assert steps.run(case, 0) > 0
    torch.testing.assert_close(dict(steps.sae.state_dict()), before)


@pytest.mark.parametrize("target", [20.0, 100.0])
def test_thresholds_bring_about_the_wanted_l0_and_uneven_frequencies(target) -> None:
    batches = Batches(synthetic_activations(4096, 32), 64, CPU)
    sae = make_sae(base_config("relu", 32, 1024, 1), batches, target)
    density = (sae.encode(synthetic_activations(4096, 32)) > 0).float().mean(0)
    assert float(density.sum()) == pytest.approx(target, rel=0.1)
    assert density.median() < 0.6 * density.mean()


def test_the_cases_are_what_the_intervals_ask_for() -> None:
    assert [(c.mode, c.interval) for c in cases_of(["selective", "every-step", "ortsae"], [1, 10])] == [
        ("encoder", 1), ("none", 1), ("selective", 1), ("selective", 10), ("every-step", 10), ("ortsae", 1),
        ("ortsae", 5),
    ]  # fmt: skip
    config = Case("every-step", 10).config(base_config("topk", 8, 16, 2))
    assert (config.penalty, config.penalty_schedule, config.selection_interval) == ("selective", "every_step", 10)


@pytest.mark.slow
def test_peak_memory_in_a_process_of_its_own() -> None:
    batches = Batches(synthetic_activations(2048, 16), 1024, CPU)
    config = base_config("relu", 16, 4096, 1)
    peak = peak_in_own_process(Case("encoder"), make_sae(config, batches, None), config, batches)
    assert peak == pytest.approx(4 * 4096 * 1024, rel=0.5)  # its buffer, and the threads' working memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": "nowhere.safetensors"}, "--activations nowhere.safetensors: expected a .safetensors file"),
        ({"only": "everything"}, "--only everything: expected some of encoder, none, selective"),
        ({"activation": "gelu"}, "--activation gelu: expected some of topk, relu, relu-dense"),
        ({"batch": 0}, "--batch 0: expected at least 1"),
        ({"selection_interval": 0}, "--selection_interval: expected"),
        ({"widths": 2}, "--widths 2: expected at least 2 features, and for topk at least --k 4"),
        ({"l0": 200, "activation": "relu"}, "--l0 200 with 256 features: expected more than 0 and at most 64"),
        ({"model": "some"}, "--model and --layer belong together"),
    ],
)
def test_mistakes_are_named(changes, message, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=re.escape(message)):
        benchmark.main(command(tmp_path / "out", **{"widths": 256, **changes}))
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_named(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    for content, message in [
        ({"a": torch.zeros(4, 4, 4)}, "a tensor of shape (4, 4, 4)"),
        ({"a": torch.full((2, 2), torch.nan)}, "expected finite floats"),
        ({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, "holds a, b: expected a tensor named activations"),
    ]:
        save_file(content, path)
        with pytest.raises(SelOrthoError, match=re.escape(message)):
            load_activations(str(path))
    path.write_bytes(b"nonsense")
    with pytest.raises(SelOrthoError, match="expected a .safetensors file"):
        load_activations(str(path))
    with pytest.raises(SelOrthoError, match="cannot write to"):
        benchmark.main(command(path, widths=256, activation="topk"))
