"""The training script on small random language models: real files, real processes, no network."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_selortho import SelOrthoError, SelOrthoSAE
from hf_selortho.data.pair_history import read_pair_history
from hf_selortho.formats import write_saelens
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.contexts import Context, pad_batch
from scripts import evaluate_sae, train
from tests.utils.test_memory import limited

ROOT = Path(__file__).parents[2]
LEFT_BY_A_RUN = {
    ".lock", ".selortho_run.json", "README.md", "config.json", "metrics.json", "metrics.jsonl", "model.safetensors",
    "pair_history", "pictures", "run.json", "timings.jsonl",
}  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_an_evaluated_documented_sae(arguments, tmp_path, tiny_lm, capsys) -> None:
    train.main(arguments())
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == LEFT_BY_A_RUN
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["evaluation"]["samples"] == 30 and 0 < metrics["evaluation"]["fvu"] < 2
    assert {"loss_recovered", "peak_correlation", "top_correlation", "l0", "dead_features"} <= set(
        metrics["evaluation"]
    )
    assert metrics["training"]["steps"] == 12 and metrics["training"]["tokens"] == 12 * 128
    assert metrics["data"]["dropped_special"] == metrics["data"]["contexts"]
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, 13))  # the last 100 steps are all logged
    assert rows[-1]["reconstruction"] < rows[0]["reconstruction"]
    card = (run / "README.md").read_text()
    assert "model-index" in card and "selective orthogonality" in card
    assert sorted(p.name for p in (run / "pictures").iterdir()) == [
        "correlations.png", "decoder_cosine.png", "feature_density.png", "training_curves.png"
    ]  # fmt: skip
    info = json.loads((run / "run.json").read_text())
    assert info["arguments"]["d_sae"] == 64 and info["versions"]["torch"] == torch.__version__
    sae = SelOrthoSAE.from_pretrained(run)
    assert (sae.config.d_in, sae.config.layer, sae.config.hook_name) == (32, 1, "model.layers.1")
    assert sae.config.lm_revision.startswith("local-sha256:") and sae.config.dataset.endswith("sample.csv")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    shown = capsys.readouterr().out
    assert "FVU" in shown and f"{metrics['evaluation']['fvu']:.4f}" in shown and "Next:" in shown


def snapshots_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "pair_history").iterdir()}


def test_users_feed_raw_activations(arguments, tmp_path, tiny_lm, tiny_tokenizer) -> None:
    train.main(arguments(max_steps=60))
    sae = SelOrthoSAE.from_pretrained(tmp_path / "run")
    lm = tiny_lm("llama")
    ids = [
        tiny_tokenizer.bos_token_id,
        *tiny_tokenizer("The market sold a new engine", add_special_tokens=False).input_ids,
    ]
    hidden = ActivationCapture(lm, 1).hidden_states(*pad_batch([Context(0, ids)], 0))[1][0, 1:]
    error = (sae(hidden).reconstruction - hidden).square().sum() / (hidden - sae.input_mean).square().sum()
    assert error < 0.7


@pytest.mark.parametrize(
    "changes",
    [
        {"penalty": "none", "buffer_reuse": 4, "streaming": True},
        {"correlation_threshold": 0.3, "pair_fraction": 0.5, "ortho_budget": "gradient", "ortho_budget_value": 0.1},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "warmup_steps": 0.2, "decay_steps": 4},
        {"mixed_precision": "bf16", "input_normalization": "none", "max_norm_ratio": "inf"},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_arguments_act(changes, arguments, tmp_path) -> None:
    train.main(arguments(eval_samples=0, **changes))
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["reconstruction"] < rows[0]["reconstruction"]
    assert rows[-1]["tokens"] == 12 * 128 * changes.get("gradient_accumulation_steps", 1)
    assert any(row["ortho"] > 0 for row in rows) == (changes.get("penalty") != "none")
    assert bool(read_pair_history(tmp_path / "run", d_sae=64)) == ("penalty" not in changes)  # the others select none
    assert rows[-1]["peak_correlation"] > 0  # measured even where nothing is penalised


def test_pairs_are_selected_at_every_interval(arguments, tmp_path) -> None:
    train.main(arguments(eval_samples=0, selection_interval=5))
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if row["ortho"] > 0] == [1, 6, 11]
    assert [row["step"] for row in rows if row["pair_churn"] is not None] == [6, 11]
    assert all(row["peak_correlation"] > 0 for row in rows)  # between selections, that of the latest
    history = read_pair_history(tmp_path / "run", d_sae=64)
    assert [snapshot.step for snapshot in history] == [1, 6, 11]
    for snapshot in history:
        row = rows[snapshot.step - 1]
        assert snapshot.selected == len(snapshot) == row["selected_pairs"] == 21  # of 64 * 63 / 2, a hundredth
        assert float(snapshot.correlation.abs().mean()) == pytest.approx(row["top_correlation"])


def test_the_full_penalty_is_refused_where_its_matrices_do_not_fit(arguments, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hf_selortho.training.run.available_memory", lambda device: 500_000)
    train.main(arguments(penalty="full", eval_samples=0, max_steps=1))
    with pytest.raises(SelOrthoError, match="d_sae matrices of --penalty full 0.01 GB.*lower --buffer"):
        train.main(arguments(penalty="full", d_sae=1000, output_dir=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_limit_of_the_process_refuses_a_run_that_needs_more(arguments, tmp_path) -> None:
    with limited(resource.RLIMIT_AS, "VmSize", 900_000_000):
        with pytest.raises(
            SelOrthoError, match="cannot fit: it needs .* to this process .*ulimit count.*lower --buffer"
        ):
            train.main(arguments(d_sae=1_000_000, eval_samples=0))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_penalty_lowers_the_correlations_of_the_selected_pairs(arguments, tmp_path) -> None:
    tops = []
    for coefficient in (0, 3):
        folder = tmp_path / str(coefficient)
        changes = {"ortho_coefficient": coefficient, "selection_interval": 1}
        train.main(arguments(max_steps=150, output_dir=folder, eval_samples=0, **changes))
        tops.append(sum(row["top_correlation"] for row in rows_of(folder)[-20:]) / 20)
    assert tops[1] < 0.85 * tops[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"selection_interval": 2, "carry_decay": 0.5, "ortho_budget": "gradient"},
        {"activation": "batchtopk", "k": 4, "selection_interval": 4, "penalty_schedule": "every_step"},
    ],
    ids=["carried", "batchtopk"],
)
def test_resumed_it_ends_as_if_never_stopped(changes, arguments, tmp_path) -> None:
    train.main(arguments(output_dir=tmp_path / "whole", buffer_reuse=2, eval_samples=0, **changes))
    part = arguments(max_steps=7, checkpoint_every=3, buffer_reuse=2, eval_samples=0, **changes)
    train.main(part)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_000006", "step_000007"]
    more = {"checkpoint_every": 3, "resume_from_checkpoint": "auto", "keep_checkpoints": 1}
    train.main(arguments(buffer_reuse=2, eval_samples=0, **more, **changes))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 13))
    logs = [(tmp_path / folder / "metrics.jsonl").read_bytes() for folder in ("whole", "run")]
    assert logs[0] == logs[1]
    assert snapshots_of(tmp_path / "whole") == snapshots_of(tmp_path / "run") != {}
    timings = [json.loads(line)["step"] for line in (tmp_path / "run" / "timings.jsonl").read_text().splitlines()]
    assert timings == list(range(1, 13))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000012"]


def test_an_output_folder_in_use(arguments, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("mine")
    once = arguments(max_steps=1, eval_samples=0)
    with pytest.raises(SelOrthoError, match="is not empty"):
        train.main(once)
    with pytest.raises(SelOrthoError, match="is not empty"):
        train.main([*once, "--overwrite_output_dir"])
    assert (tmp_path / "run" / "README.md").read_text() == "mine"
    (tmp_path / "run" / "README.md").unlink()
    train.main(once)
    assert list(snapshots_of(tmp_path / "run")) == ["step_000001.safetensors"]
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train.main([*once, "--overwrite_output_dir", "--penalty", "none"])
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "pair_history").exists()


def test_to_overwrite_an_unfinished_run_says_how_to_go_on_instead(arguments, tmp_path, caplog) -> None:
    train.main([*arguments(max_steps=2, eval_samples=0), "--checkpoint_every", "1"])
    again = [*arguments(max_steps=2, eval_samples=0), "--overwrite_output_dir"]
    train.main([*again, "--checkpoint_every", "1"])
    assert "starts again" not in caplog.text, "it was finished"
    (tmp_path / "run/run.json").unlink()
    train.main(again)
    assert "step_2" in caplog.text.replace("0", "") and "--resume_from_checkpoint auto in its place" in caplog.text


def test_a_run_that_cannot_start_does_not_replace_another(arguments, tmp_path) -> None:
    train.main(arguments(max_steps=1, eval_samples=0))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    mistakes = {
        "layer 9 is out of range: .* has 4 layers": {"layer": 9},
        r'no column of text "body": choose --text_column from: text .*, label': {"text_column": "body"},
        "--buffer_contexts 1 and --context_length 32: the buffer holds fewer": {"buffer_contexts": 1},
        "context_length 512: .* reads at most 256 tokens": {"context_length": 512},
    }
    for message, mistake in mistakes.items():
        with pytest.raises(SelOrthoError, match=message):
            train.main([*arguments(**mistake), "--overwrite_output_dir"])
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore:.*no supported trackers are currently installed")
def test_a_tracker_that_is_not_installed(arguments, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match="comet_ml"):
        train.main(arguments(report_to="comet_ml"))
    assert not (tmp_path / "run").exists()


def evaluated(folder: Path, samples: int, ce_samples: int, *more: str) -> dict:
    """The figures of scripts/evaluate_sae.py."""
    output = folder.with_suffix(".evaluated.json")
    sizes = [*("--eval_samples", str(samples)), *("--eval_ce_samples", str(ce_samples)), *("--output", str(output))]
    evaluate_sae.main([str(folder), "--lm_dtype", "float32", "--batch_size", "128", "--cpu", *sizes, *more])
    return json.loads(output.read_text())["evaluation"]


def test_evaluated_again_also_in_the_format_of_another_library_it_has_the_same_figures(arguments, tmp_path) -> None:
    train.main(arguments())
    ours = json.loads((tmp_path / "run/metrics.json").read_text())["evaluation"]
    assert evaluated(tmp_path / "run", 30, 8) == pytest.approx(ours, rel=1e-5)
    write_saelens(SelOrthoSAE.from_pretrained(tmp_path / "run"), tmp_path / "lens")
    theirs = evaluated(tmp_path / "lens", 30, 8)
    for key in ("fvu", "l0", "ce_reconstruction", "ce_clean", "tokens", "dead_features", "max_decoder_cosine"):
        assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key


def test_tasks_of_the_evaluation(arguments, sample_text_files, tmp_path) -> None:
    train.main(arguments(held_out_fraction=0.3))
    run, other = tmp_path / "run", tmp_path / "lens"
    write_saelens(SelOrthoSAE.from_pretrained(run), other)
    text = ["--dataset", str(sample_text_files.csv), "--held_out_fraction", "0.3", "--label_column", "label"]
    found = evaluated(run, 8, 2, *text, "--probing_texts", "60", "--compare_with", str(other))
    assert found["probing_classes"] == 4 and 8 <= found["probing_texts"] <= 60
    for key in ("probing_accuracy_k1", "probing_accuracy_k5", "probing_accuracy_all", "probing_accuracy_lm"):
        assert 0 <= found[key] <= 1
    (of_itself,) = found["compared_with"].values()
    assert of_itself["matched_cosine"] == pytest.approx(1, abs=1e-4) and of_itself["shared_features"] == 1
    document = (ROOT / "docs/metrics.md").read_text().split("### tasks", 1)[1].split("\n## ", 1)[0]
    assert all(f"`{key}`" in document for key in found if key.startswith(("probing", "compared")))


def test_too_little_text_to_hold_out_is_known_before_training(arguments, tmp_path) -> None:
    text = tmp_path / "two.txt"
    text.write_text("One document of a few words for the model.\n\nAnother document of a few words for it.\n")
    with pytest.raises(SelOrthoError, match="gives no held-out context"):
        train.main(arguments(dataset=text, held_out_fraction=0.01))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_size", "0"], "--batch_size 0: expected at least 1"),
        (["--output", "/nonexistent/x.json"], "there is no folder /nonexistent"),
        (["--probing_texts", "3"], "--probing_texts 3: expected at least 8"),
        ([], "neither on the Hub nor a local path"),
    ],
)
def test_bad_arguments_of_the_evaluation(argv, message, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=message):
        evaluate_sae.main([str(tmp_path if argv else tmp_path / "nothing"), *argv])


def test_an_sae_does_not_fit_another_language_model(arguments, tiny_lm_dir, tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    train.main(arguments(max_steps=1, eval_samples=0))
    config = AutoConfig.from_pretrained(tiny_lm_dir("llama"))
    config.hidden_size = 48
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny_lm_dir("llama")).save_pretrained(tmp_path / "wide")
    with pytest.raises(SelOrthoError, match="(?s)32.*48|48.*32"):
        evaluate_sae.main([str(tmp_path / "run"), "--model", str(tmp_path / "wide"), "--cpu"])


def run_script(argv: list[str], launcher: list[str] | None = None, **environment: str) -> subprocess.CompletedProcess:
    command = [*(launcher or [sys.executable]), str(ROOT / "scripts" / "train.py"), *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 9}, "layer 9 is out of range: .* has 4 layers, choose 0 to 3"),
        ({"dataset": "nosuch/data"}, "--preset demo"),
    ],
    ids=["layer", "network"],
)
def test_a_mistake_is_one_line_and_code_2_and_leaves_nothing(changes, message, arguments, tmp_path) -> None:
    result = run_script(arguments(**changes))
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and result.stdout == ""
    assert lines[-1].startswith("train.py: error: ") and "Traceback" not in result.stderr
    assert re.search(message, lines[-1]), lines[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_as_one(arguments, tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_script(arguments(checkpoint_every=6, selection_interval=2), torchrun)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["training"]["tokens"] == 12 * 128 and metrics["data"]["processes"] == 2
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["reconstruction"] < rows[0]["reconstruction"]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000012"
    assert {"process_0.safetensors", "process_1.safetensors"} <= {path.name for path in checkpoint.iterdir()}
    [*_, last] = history = read_pair_history(tmp_path / "run", d_sae=64)
    assert [snapshot.step for snapshot in history] == [1, 3, 5, 7, 9, 11] and len(snapshots_of(tmp_path / "run")) == 6
    for rank in (0, 1):
        assert torch.equal(last.j, load_file(checkpoint / f"process_{rank}.safetensors")["sae..pairs.j"])
