"""The benchmark at sizes of milliseconds: its files, its arithmetic, its refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import benchmark, memory
from benchmarks import cases as benchmark_cases
from benchmarks.cases import MODES, Case, Conditions, base_config, cases_of, refusal
from benchmarks.inputs import Batches, load_activations, prepare, synthetic_activations
from benchmarks.report import load_peers, stage_speeds
from benchmarks.rounds import Measured, ratio, rows_of, run_rounds, turns_of
from benchmarks.steps import PHASES, Repetition, TrainingSteps
from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.penalties import full_penalty_bytes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = {"batch": 128, "d_in": 16, "steps": 2, "k": 4, "l0": 10, "cpu_threads": 1}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(output: Path, **changes: object) -> list[str]:
    """A command line for a benchmark of a few seconds."""
    settings = {**SMALL, "output": output, **changes}
    values = {
        key: value if isinstance(value, list) else [value] for key, value in settings.items() if value is not None
    }
    return [part for key, value in values.items() for part in (f"--{key}", *map(str, value))] + ["--cpu"]


def test_it_measures_every_mode_and_writes_three_files(tmp_path, capsys) -> None:
    peers = tmp_path / "peers.json"
    peers.write_text('{"another library": 0.5, "a third": {"256": 0.25}}')
    benchmark.main(
        command(
            tmp_path / "out", widths=[256, 512], activation=["topk", "relu"], selection_interval=[1, 2], peers=peers
        )
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "benchmark.json", "benchmark.md", "benchmark.png"
    }  # fmt: skip
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    rows = content["rows"]
    assert {(row["width"], row["activation"]) for row in rows} == {(n, a) for n in (256, 512) for a in ("topk", "relu")}
    one = {(row["mode"], row["interval"]): row for row in rows if (row["width"], row["activation"]) == (512, "relu")}
    assert {mode for mode, _ in one} == set(MODES) and len(one) == 10
    assert all(row["skipped"] is None and row["seconds_per_step"] > 0 for row in one.values())
    assert one["encoder", 1]["ratio_to_encoder"] == one["none", 1]["ratio_to_no_penalty"] == 1
    selective = one["selective", 1]
    assert selective["pairs"] == 131 and selective["tokens_per_second"] == 128 / selective["seconds_per_step"]
    phases = selective["seconds_by_phase"]
    assert list(phases) == list(PHASES) and all(seconds >= 0 for seconds in phases.values())
    assert phases["selection"] > 0 and phases["penalty"] > 0
    assert one["none", 1]["seconds_by_phase"]["selection"] == one["none", 1]["seconds_by_phase"]["penalty"] == 0
    assert one["ortsae", 5]["seconds_by_phase"]["selection"] == 0 < one["ortsae", 5]["seconds_by_phase"]["penalty"]
    assert selective["l0"] == pytest.approx(10, rel=0.25)  # on three batches of 128 tokens
    text = (tmp_path / "out" / "benchmark.md").read_text()
    assert text in capsys.readouterr().out
    for part in ("another library (peer)", "thresholds set so that L0 = 10, not trained", "synthetic", "torch 2"):
        assert part in text
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_real_activations_and_a_trained_sae(tmp_path, capsys) -> None:
    save_file({"x": torch.randn(300, 16), "y": torch.zeros(3)}, tmp_path / "a.safetensors")
    config = SelOrthoConfig(d_in=16, d_sae=64, activation="batchtopk", k=4, ortho_coefficient=0.0, carry_decay=0.5)
    SelOrthoSAE(config).save_pretrained(tmp_path / "sae")
    changes = {"activations": tmp_path / "a.safetensors", "tensor": "x", "sae": tmp_path / "sae", "d_in": None}
    benchmark.main(command(tmp_path / "out", **changes, only=["selective"]))
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert [(row["width"], row["mode"]) for row in rows] == [(64, "encoder"), (64, "none"), (64, "selective")]
    assert rows[2]["l0"] == pytest.approx(4) and rows[2]["pairs"]
    assert "a.safetensors, 300 tokens" in capsys.readouterr().out


def test_a_language_model_brings_its_speed_and_its_activations(tiny_lm_dir, sample_text_files, tmp_path) -> None:
    changes = {"model": tiny_lm_dir("llama"), "layer": 1, "dataset": sample_text_files.csv, "d_in": 32}
    benchmark.main(command(tmp_path / "out", **changes, widths=256, activation="topk", only="none"))
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert content["d_in"] == 32 and content["supply"]["lm_tokens_per_second"] > 0
    text = (tmp_path / "out" / "benchmark.md").read_text()
    assert "LM" in text and "up to layer 1" in text


def test_ratios_are_medians_of_the_ratios_of_each_round() -> None:
    assert ratio([2.0, 30.0, 6.0], [1.0, 10.0, 2.0]) == 3
    assert ratio([None, 30.0, None], [1.0, 10.0, 2.0]) == 3
    assert ratio([None, None], [1.0, 2.0]) is None
    encoder = Measured(Case("encoder"), [Repetition(1.0), Repetition(10.0), Repetition(1.0)])
    none = Measured(Case("none"), [Repetition(2.0), Repetition(20.0), Repetition(4.0)])
    selective = Measured(Case("selective", 3), [Repetition(8.0), None, Repetition(8.0)])
    refused = Measured(Case("full"), [None] * 3, refused="too large")
    rows = rows_of([encoder, none, selective, refused], 16, width=8)
    assert rows[1]["ratio_to_encoder"] == 2 and rows[1]["seconds_per_step"] == 4  # the slow round does not count
    assert rows[1]["seconds_per_step_min"] == 2 and rows[1]["tokens_per_second"] == 4
    assert rows[2]["ratio_to_no_penalty"] == 3 and rows[2]["ratio_to_encoder"] == 8
    assert rows[3]["skipped"] == "too large" and "seconds_per_step" not in rows[3]


def test_long_intervals_take_part_in_fewer_rounds() -> None:
    assert turns_of(1, 10) == list(range(10)) and turns_of(2, 10) == [0, 2, 4, 6, 8]
    assert turns_of(5, 10) == [0, 3, 6] and turns_of(100, 2) == [0, 1]


def test_stages_one_after_the_other() -> None:
    phases = dict(forward=0.1, selection=0.3, penalty=0.0, backward=0.1, optimiser=0.05, normalisation=0.05)
    speeds = stage_speeds(phases, 0.6, 120, {"lm_tokens_per_second": 1000.0, "buffer_tokens_per_second": 1000.0})
    assert speeds == pytest.approx(
        {"LM": 1000, "buffer": 1000, "SAE": 600, "selection": 400, "penalty": None, "optimiser": 1200, "all": 1000 / 7}
    )


def test_the_full_penalty_is_refused_with_bytes_or_seconds(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark_cases, "available_memory", lambda device: 1000)
    benchmark.main(command(tmp_path, widths=256, activation="topk", only=["full"]))
    *_, full = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert f"{full_penalty_bytes(256, 128):,} bytes" in full["skipped"] and "1,000 are available" in full["skipped"]
    assert full["skipped"] in (tmp_path / "benchmark.md").read_text()
    monkeypatch.undo()
    slow = Conditions(n=1000, batch=128, d_in=10, device=CPU, product_seconds=1.0, limit_seconds=60)
    assert "about 200 s a step" in refusal(Case("full"), slow)
    assert refusal(Case("full"), dataclasses.replace(slow, product_seconds=0.1)) is None
    assert refusal(Case("selective"), slow) is None and refusal(Case("selective"), slow, (500, 29)) is None
    assert "at least 80 s a step" in refusal(Case("selective"), slow, (500, 40))


def test_a_slow_case_is_measured_once() -> None:
    sae = SelOrthoSAE(base_config("relu", 16, 64, 1))
    steps = TrainingSteps(sae, Batches(synthetic_activations(256, 16), 64, CPU))
    for result in run_rounds(steps, cases_of(["selective"], [1, 2]), rounds=3, limit_seconds=1e-9):
        repetitions = 3 if result.case.mode == "encoder" else 1
        assert len(result.done) == repetitions and not any(r.phases for r in result.done)


@pytest.mark.parametrize("target", [20.0, 100.0])
def test_thresholds_bring_about_the_wanted_l0_and_uneven_frequencies(target) -> None:
    activations = synthetic_activations(4096, 32)
    sae = SelOrthoSAE(base_config("relu", 32, 1024, 1))
    sae.set_input_statistics(*Batches(activations, 64, CPU).statistics())
    prepare(sae, activations, target)
    h = sae.encode(synthetic_activations(4096, 32))
    assert float((h > 0).float().sum(1).mean()) == pytest.approx(target, rel=0.1)
    density = (h > 0).float().mean(0)
    assert density.median() < 0.6 * density.mean()
    before = sae.b_enc.clone()
    prepare(sae, activations, target)
    assert torch.equal(before, sae.b_enc)


def test_every_case_finds_the_same_weights() -> None:
    sae = SelOrthoSAE(base_config("relu", 16, 128, 1))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    steps = TrainingSteps(sae, Batches(synthetic_activations(256, 16), 64, CPU))
    for case in cases_of(None, [1, 3]):
        if case.mode != "encoder":
            found = steps.run(case.config(base_config("relu", 16, 128, 1)), 0, phases=True)
            assert found.seconds > 0 and set(found.phases) == set(PHASES)
    torch.testing.assert_close(dict(sae.state_dict()), before)


def test_the_cases_are_what_the_intervals_ask_for() -> None:
    assert [(c.mode, c.interval) for c in cases_of(["selective", "every-step", "ortsae"], [1, 10])] == [
        ("encoder", 1), ("none", 1), ("selective", 1), ("selective", 10), ("every-step", 10), ("ortsae", 1),
        ("ortsae", 5),
    ]  # fmt: skip
    config = Case("every-step", 10).config(base_config("topk", 8, 16, 2))
    assert (config.penalty, config.penalty_schedule, config.selection_interval) == ("selective", "every_step", 10)


@pytest.mark.slow
def test_peak_memory_in_a_process_of_its_own() -> None:
    sae = SelOrthoSAE(base_config("relu", 16, 4096, 1))
    batches = Batches(synthetic_activations(2048, 16), 1024, CPU)
    peak = memory.peak_in_own_process(Case("encoder"), sae, batches)
    assert peak == pytest.approx(4 * 4096 * 1024, rel=0.5)  # its buffer, and the threads' working memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": "nowhere.safetensors"}, "--activations nowhere.safetensors: no such file"),
        ({"only": "everything"}, "--only everything: expected some of encoder, none, selective"),
        ({"activation": "gelu"}, "--activation gelu: expected some of topk, relu, relu-dense"),
        ({"batch": 0}, "--batch 0: expected at least 1"),
        ({"selection_interval": 0}, "--selection_interval: expected"),
        ({"widths": 2}, "--k 4: more than the 2 features"),
        ({"l0": 200, "activation": "relu"}, "--l0 200 with 256 features: expected more than 0 and at most 64"),
        ({"model": "some"}, "--model and --layer belong together"),
        ({"sae": "folder"}, "--sae brings its own sizes"),
        ({"peers": "nowhere.json"}, "--peers nowhere.json: cannot be read"),
    ],
)
def test_mistakes_are_named(changes, message, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=re.escape(message)):
        benchmark.main(command(tmp_path / "out", **{"widths": 256, **changes}))
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_named(tmp_path) -> None:
    path = tmp_path / "a.pt"
    for content, message in [
        (torch.zeros(4, 4, 4), "has shape (4, 4, 4)"),
        ({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, "holds a, b: choose one with --tensor"),
        ([1, 2], "holds no tensor"),
        (torch.full((2, 2), torch.nan), "holds NaN or infinity"),
        (Path("x"), "expected a .safetensors file, or a .pt file of tensors alone"),  # not loaded: it could run code
    ]:
        torch.save(content, path)
        with pytest.raises(SelOrthoError, match=re.escape(message)):
            load_activations(str(path))
    torch.save(torch.zeros(2, 2), path)
    with pytest.raises(SelOrthoError, match="2 wide, expected d_in=16"):
        benchmark.main(command(tmp_path / "out", widths=256, activations=path))
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(SelOrthoError, match="expected a .safetensors file"):
        load_activations(str(tmp_path / "a.safetensors"))
    (tmp_path / "peers.json").write_text('{"a": "fast"}')
    with pytest.raises(SelOrthoError, match="expected JSON like"):
        load_peers(str(tmp_path / "peers.json"))
    with pytest.raises(SelOrthoError, match="cannot write to"):
        benchmark.main(command(path, widths=256))


def test_a_mistake_is_one_line_and_code_2() -> None:
    argv = [sys.executable, str(ROOT / "benchmarks" / "benchmark.py"), "--only", "everything"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("benchmark.py: error: --only everything") and len(done.stderr.splitlines()) == 1
