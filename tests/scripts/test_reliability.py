"""What goes wrong in a training run, made to go wrong: damage, full disks, NaN, signals, a second run, tokens."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_selortho import SelOrthoError
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.errors import NonFiniteError
from hf_selortho.training.checkpoint import verify
from scripts import cache_activations, train

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start(argv: list[str], script: str = "train.py", **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}  # type: ignore[dict-item]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / script), *argv],
        **{"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1][-3000:]
        time.sleep(0.002)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_run_goes_on_from_its_newest_intact_checkpoint_or_not_at_all(arguments, tmp_path) -> None:
    train.main(arguments(max_steps=4, checkpoint_every=2, eval_samples=0))
    newest = tmp_path / "run" / "checkpoints" / "step_000004"
    first = newest.with_name("step_000002")
    with pytest.raises(SelOrthoError, match="step_000004 is later than .*step_000002: resume with auto, move it away"):
        train.main(arguments(resume_from_checkpoint=first))
    shutil.move(newest, tmp_path)
    flip(first / "trainer.json")
    before = contents(tmp_path / "run")
    with pytest.raises(SelOrthoError, match="holds no intact checkpoint .*: restore one from a copy, or start again"):
        train.main(arguments(resume_from_checkpoint="auto"))
    assert contents(tmp_path / "run") == before
    flip(first / "trainer.json")
    branch = {"output_dir": tmp_path / "branch", "max_steps": 3, "eval_samples": 0}
    train.main(arguments(resume_from_checkpoint=first, **branch))
    assert [row["step"] for row in rows_of(tmp_path / "branch")] == [3]
    train.main(arguments(resume_from_checkpoint="auto", eval_samples=0))
    assert len(rows_of(tmp_path / "run")) == 12


def test_other_texts_or_activations_are_noticed_before_anything_is_replaced(
    arguments, sample_documents, harvest, from_shards, tmp_path
) -> None:
    texts, settings = tmp_path / "texts.jsonl", {"max_steps": 2, "checkpoint_every": 2, "eval_samples": 0}
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_documents))
    train.main(arguments(dataset=texts, **settings))
    with texts.open("a") as file:
        file.write('{"text": "One more document, which was not there before."}\n')
    with pytest.raises(
        SelOrthoError, match=r"made on other activations \(texts '\w{64}' -> '\w{64}'\); .* restore what"
    ):
        train.main(arguments(dataset=texts, max_steps=4, resume_from_checkpoint="auto"))

    acts = tmp_path / "acts"
    shutil.copytree(harvest, acts)
    train.main(from_shards(acts, output_dir=tmp_path / "first", **settings))
    train.main(from_shards(acts, output_dir=tmp_path / "second", **settings))
    manifest = json.loads((acts / "manifest.json").read_text())
    (acts / "manifest.json").write_text(json.dumps(manifest, indent=3))  # other bytes, as of another harvest
    before = contents(tmp_path / "second")
    checkpoint = tmp_path / "first" / "checkpoints" / "step_000002"
    argv = from_shards(acts, output_dir=tmp_path / "second", resume_from_checkpoint=checkpoint)
    with pytest.raises(SelOrthoError, match="made on other activations .activations"):
        train.main([*argv, "--overwrite_output_dir"])
    assert contents(tmp_path / "second") == before


def test_nothing_is_pickled_and_nothing_unpickled(arguments, tmp_path) -> None:
    train.main(arguments(checkpoint_every=6))
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"}
    assert kinds == {".json", ".jsonl", ".safetensors", ".md", ".png"}
    forbidden = {"pickle", "dill", "joblib", "shelve", "marshal"}
    for path in [*(ROOT / "hf_selortho").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if path.name == "tensor_files.py":  # which looks at pickles without running them
                names = [name for name in names if name != "pickle"]
            if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] != ["UnpicklingError"]:
                names.append(node.module or "")
            assert not forbidden & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called, options = ast.unparse(node.func), [ast.unparse(keyword) for keyword in node.keywords]
                # SAEs that others have saved so are read as tensors and nothing else
                allowed = path.name == "tensor_files.py" and "weights_only=True" in options
                assert called not in ("torch.load", "torch.save") or allowed, f"{path}:{node.lineno}"
                assert not called.endswith((".save_state", ".load_state")), f"{path}:{node.lineno}"  # of accelerate


def test_a_tracker_is_told_every_step_once(arguments, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"report_to": "tensorboard", "eval_samples": 0, "logging_steps": 1}
    train.main(arguments(max_steps=7, checkpoint_every=4, **settings))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000007")  # as if it had died after step 7
    train.main(arguments(resume_from_checkpoint="auto", checkpoint_every=4, **settings))
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "hf_selortho"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("fvu")] == list(range(1, 13))


# --- a disk that is full ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_a_full_disk_the_run_goes_on_and_earlier_checkpoints_stay(arguments, small_disks, tmp_path) -> None:
    settings = {"checkpoint_every": 3, "eval_samples": 0, "cpu_threads": 1, "buffer_contexts": 256}
    train.main(arguments(output_dir=tmp_path / "whole", **settings))
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoints" / "step_000012").iterdir())
    disk = small_disks(f"{int(2.6 * size) // 1024}k")  # two checkpoints, and some of a third
    run = disk.folder / "run"
    ended = start(arguments(output_dir=run, **settings), preexec_fn=disk.limit)
    errors = ended.communicate(timeout=120)[1]
    assert f"the checkpoint of step {9 if disk.mounted else 3} could not be written: {disk.reason}" in errors
    assert "The run goes on; its latest checkpoint: " in errors and "Traceback" not in errors
    if disk.mounted:
        assert ended.returncode == 0, errors
        assert checkpoints_of(run) == ["step_000003", "step_000006"]
        for name in checkpoints_of(run):
            verify(run / "checkpoints" / name)
    assert not list(run.rglob("*.tmp"))
    disk.enlarge()
    train.main(arguments(output_dir=run, resume_from_checkpoint="auto", **settings))
    assert contents(run / "checkpoints" / "step_000012") == contents(tmp_path / "whole" / "checkpoints" / "step_000012")
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_disk_too_small_for_the_weights_is_one_line(arguments, small_disks, tmp_path) -> None:
    disk = small_disks("16k")
    ended = start(arguments(output_dir=disk.folder / "run", eval_samples=0, d_sae=512), preexec_fn=disk.limit)
    errors = ended.communicate(timeout=120)[1]
    assert ended.returncode == 2 and "Traceback" not in errors
    assert re.search(rf"error: cannot write .*run/\S+: {disk.reason}; make room there and run the same", errors)
    assert not (disk.folder / "run" / "model.safetensors").exists() and not list((disk.folder / "run").rglob("*.tmp"))


# --- what is not finite -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harvest(tiny_lm_dir, sample_text_files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finite") / "acts"
    cache_activations.main(
        [*("--model", str(tiny_lm_dir("llama")), "--lm_dtype", "float32", "--dataset", str(sample_text_files.jsonl)),
         *("--layers", "1", "--stored_dtype", "float32", "--shard_tokens", "2000", "--context_length", "32"),
         *("--eval_samples", "20", "--output_dir", str(folder), "--cpu")]
    )  # fmt: skip
    return folder


@pytest.fixture
def shards(harvest, tmp_path) -> Callable[..., Path]:
    """`shards(row=7, value=nan)`: a copy of a harvest, with the hashes that belong to it, and that row of its first
    shard changed."""

    def build(row: int | slice, value: float) -> Path:
        folder = tmp_path / "acts"
        shutil.copytree(harvest, folder)
        name = "layer_1/00000.safetensors"
        tensors = load_file(folder / name)
        tensors["activations"][row] = value
        save_file(tensors, folder / name)
        content = json.loads((folder / "manifest.json").read_text())
        data = (folder / name).read_bytes()
        content["shards"][0]["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (folder / "manifest.json").write_text(json.dumps(content))
        ActivationCache(str(folder))
        return folder

    return build


@pytest.fixture
def from_shards(arguments) -> Callable[..., list[str]]:
    text = dict.fromkeys(("model", "lm_dtype", "dataset", "context_length"))
    return lambda acts, **changes: arguments(**{**text, "activations": acts, "eval_samples": 0, **changes})


def test_activations_that_are_not_finite_stop_the_run_and_are_kept(shards, from_shards, tmp_path) -> None:
    acts = shards(7, torch.inf)
    changed = load_file(acts / "tokens" / "00000.safetensors")
    with pytest.raises(NonFiniteError) as caught:
        train.main(from_shards(acts, max_steps=200, checkpoint_every=1, logging_steps=1))
    found = re.search(
        r"NaN or infinity in the activations on 1 of 128 tokens at step (\d+): the step was not taken\. Documents of "
        r"the batch: ([\d, .]+); it is in (\S+/debug/step_\d{6}\.safetensors); look at these activations, .*, or pass "
        r"--non_finite skip .*Last good checkpoint: (.*)",
        str(caught.value),
    )
    assert found, caught.value
    step = int(found[1])
    assert Path(found[3]) == tmp_path / "run" / "debug" / f"step_{step:06d}.safetensors"
    batch = load_file(found[3])
    assert set(batch) == {"activations", "token_ids", "document_ids", "positions", "context_ids"}
    bad = (~batch["activations"].isfinite()).any(1).nonzero()[:, 0]
    assert len(bad) == 1 and batch["activations"].shape == (128, 32)
    for name in ("token_ids", "document_ids", "positions"):
        assert batch[name][bad[0]] == changed[name][7]
    latest = "none (see --checkpoint_every)" if step == 1 else str(tmp_path / f"run/checkpoints/step_{step - 1:06d}")
    assert found[4] == latest
    assert [row["step"] for row in rows_of(tmp_path / "run")][-1:] == ([step - 1] if step > 1 else [])


def test_a_batch_that_is_skipped_changes_nothing_and_is_counted(shards, from_shards, tmp_path, caplog) -> None:
    acts = shards(slice(0, 3), torch.nan)
    settings = {"non_finite": "skip", "max_steps": 150, "carry_decay": 0.5, "selection_interval": 2, "logging_steps": 1}
    train.main(from_shards(acts, output_dir=tmp_path / "whole", **settings))
    skipped = [int(step) for step in re.findall(r"at step (\d+): the step was not taken", caplog.text)]
    assert skipped and all(f"step_{step:06d}.safetensors" in caplog.text for step in skipped)
    rows = rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == [step for step in range(1, 151) if step not in skipped]
    assert rows[-1]["skipped_steps"] == len(skipped)
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    # interrupted and resumed, it skips the same ones and ends with the same weights
    train.main(from_shards(acts, **{**settings, "max_steps": skipped[0]}, checkpoint_every=500))
    train.main(from_shards(acts, **settings, resume_from_checkpoint="auto"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert contents(tmp_path / "run")["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]
    assert contents(tmp_path / "run" / "pair_history") == contents(tmp_path / "whole" / "pair_history")
    # one more than allowed stops it
    with pytest.raises(NonFiniteError, match="batch number 1 that is not finite, more than --max_skipped 0"):
        train.main(from_shards(acts, **settings, max_skipped=0, output_dir=tmp_path / "other"))


@pytest.mark.parametrize(
    ("value", "changes", "message"),
    [
        (
            1e30,
            {"max_norm_ratio": None},
            "feature activations h hold NaN or infinity, or values too large to square, .* at step",
        ),
        (1e30, {"penalty": "none"}, r"NaN or infinity in the loss \(reconstruction inf, l1 .*\) at step"),
        (0.0, {"l1_coefficient": 1e25}, r"NaN or infinity in the gradient: .* at step 1: the step was not taken"),
    ],
    ids=["features", "loss", "gradient"],
)
def test_where_it_first_appeared_is_said(value, changes, message, shards, from_shards, tmp_path) -> None:
    with pytest.raises(NonFiniteError, match=message):
        train.main(from_shards(shards(slice(None), value) if value else shards(0, 0.0), max_steps=300, **changes))
    assert len(list((tmp_path / "run" / "debug").iterdir())) == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_language_model_that_is_infinite_on_one_word_is_trained_on_without_it(
    arguments, tiny_lm_dir, tiny_tokenizer, sample_documents, tmp_path
) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(tiny_lm_dir("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    rare = tiny_tokenizer("§", add_special_tokens=False).input_ids
    for token in rare:
        tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    texts = tmp_path / "texts.jsonl"
    documents = [f"{text} §" if number in (5, 77) else text for number, text in enumerate(sample_documents)]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    settings = {"model": folder, "dataset": texts, "non_finite": "skip", "held_out_fraction": 0}
    train.main(arguments(**settings, max_steps=60))
    data = json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]
    assert data["dropped_non_finite"] >= 1
    assert len(rows_of(tmp_path / "run")) == 60


# --- signals, locks, tokens -------------------------------------------------------------------------------------------


def is_training(folder: Path) -> bool:
    log = folder / "metrics.jsonl"
    return log.is_file() and log.stat().st_size > 0


def test_a_second_ctrl_c_stops_at_once(arguments, tmp_path) -> None:
    run = tmp_path / "run"
    # one batch a step that takes minutes: the first Ctrl-C cannot be obeyed before it is over
    slow = arguments(max_steps=10_000, eval_samples=0, gradient_accumulation_steps=100_000, output_dir=run)
    process = start(slow)
    wait_for(lambda: (run / "metrics.jsonl").exists(), process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    errors = process.communicate(timeout=20)[1]
    assert time.monotonic() - started < 5 and process.returncode == -signal.SIGINT
    assert re.search(r"Ctrl-C: finishing the step and writing a checkpoint; Ctrl-C or kill -INT \d+ stops", errors)


def test_a_screen_that_is_gone_does_not_keep_it_from_stopping_well(arguments, tmp_path) -> None:
    """As with `train.py 2>&1 | tee log`, whose `tee` ends by the same Ctrl-C."""
    run = tmp_path / "run"
    process = start(arguments(max_steps=100_000, eval_samples=0, output_dir=run))
    wait_for(lambda: is_training(run), process)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    time.sleep(1)  # the progress bar has nowhere to go
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    (name,) = checkpoints_of(run)
    verify(run / "checkpoints" / name)


def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_one_is_not_in_the_way(arguments, tmp_path) -> None:
    run = tmp_path / "run"
    endless = arguments(max_steps=100_000, eval_samples=0)
    first = start(endless)
    wait_for(lambda: is_training(run), first)
    for more in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "auto"], []):
        with pytest.raises(
            SelOrthoError, match=r"another process is training into .*run at this moment .*\.lock\): wait"
        ):
            train.main([*endless, *more])
    assert first.poll() is None
    first.kill()
    first.communicate()
    train.main(arguments(eval_samples=0, resume_from_checkpoint="auto"))
    assert len(rows_of(run)) == 12


@pytest.mark.slow
def test_no_token_is_left_anywhere(arguments, tmp_path) -> None:
    token = "hf_" + "Canary7" * 5
    keys = {name: f"secret-{name}-canary" for name in ("WANDB_API_KEY", "COMET_API_KEY")}
    environment = {"HF_TOKEN": token, **keys}
    said = []
    for changes in (
        {"checkpoint_every": 6, "report_to": "tensorboard", "preset": None},
        {"model": f"owner/{token}", "output_dir": tmp_path / "mistake"},
        {"dataset": f"hub-{token}/texts", "output_dir": tmp_path / "mistake"},
        {"activations": f"hub:owner/{token}", "model": None, "dataset": None, "output_dir": tmp_path / "mistake"},
    ):
        process = start(arguments(**changes), env=environment)
        said += [*process.communicate(timeout=120), str(process.returncode)]
    assert said[2::3] == ["0", "2", "2", "2"], said
    left = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (*keys.values(), token):
        assert secret not in "".join(said)
        for data in left:
            assert secret.encode() not in data
