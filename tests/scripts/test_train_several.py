"""Several SAEs in one run, and runs from harvested activations, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_selortho import SelOrthoError, SelOrthoSAE
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.training import dry_run
from scripts import cache_activations, train
from tests.scripts.conftest import command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def harvested(tiny_lm_dir, sample_text_files, tmp_path_factory) -> Path:
    """Layers 1 and 2 of the small Llama on the sample texts, in float32."""
    folder = tmp_path_factory.mktemp("harvest") / "acts"
    settings = {
        "model": tiny_lm_dir("llama"), "lm_dtype": "float32", "dataset": sample_text_files.csv, "layers": [2, 1],
        "context_length": 256, "stored_dtype": "float32", "shard_tokens": 3000, "eval_samples": 30,
        "output_dir": folder, "cpu": True,
    }  # fmt: skip
    cache_activations.main(command(settings, {}))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_layers_and_twins_equal_runs_of_their_own(live, tmp_path, capsys) -> None:
    settings = {"max_norm_ratio": "inf", "layer_settings": '{"2": {"l1_coefficient": 0.2}}'}
    train.main(live(layers=[1, 2], twin=True, **settings))
    shown = capsys.readouterr().out
    alone = {
        "layer_1": {"layer": 1}, "layer_1_twin": {"layer": 1, "ortho_coefficient": 0},
        "layer_2": {"layer": 2}, "layer_2_twin": {"layer": 2, "ortho_coefficient": 0},
    }  # fmt: skip
    for name, changes in alone.items():
        train.main(live(output_dir=tmp_path / name, **settings, **changes))
        assert same(weights(tmp_path / name), weights(tmp_path / "run" / name))
        one, of_several = (
            json.loads((folder / "metrics.json").read_text())["evaluation"]
            for folder in (tmp_path / name, tmp_path / "run" / name)
        )
        assert one == pytest.approx(of_several, rel=1e-4)
    sae = SelOrthoSAE.from_pretrained(tmp_path / "run", subfolder="layer_2")
    assert (sae.config.layer, sae.config.l1_coefficient, sae.config.hook_name) == (2, 0.2, "model.layers.2")
    together = json.loads((tmp_path / "run" / "metrics.json").read_text())["saes"]
    assert set(together) == set(alone) and together["layer_1_twin"]["variant"] == "twin"
    table = (tmp_path / "run" / "README.md").read_text()
    figure = f"{together['layer_2']['evaluation']['fvu']:.4f}"
    assert figure in table and figure in shown and "| mean | twin |" in table
    assert (tmp_path / "run" / "layer_1" / "README.md").is_file()


@pytest.mark.parametrize("source", ["live", "shards"])
def test_several_saes_resume_exactly(source, live, sourceless, harvested, tmp_path) -> None:
    build = live if source == "live" else lambda **changes: sourceless(activations=harvested, **changes)
    settings = {"layers": [1, 2], "twin": True, "checkpoint_every": 3, "eval_samples": 0}
    train.main(build(**settings))
    train.main(build(**settings, output_dir=tmp_path / "cut", max_steps=5))
    train.main(build(**settings, output_dir=tmp_path / "cut", resume_from_checkpoint="auto"))
    for name in ("layer_1", "layer_1_twin", "layer_2", "layer_2_twin"):
        assert same(weights(tmp_path / "run" / name), weights(tmp_path / "cut" / name))
        rows = [
            [json.loads(line) for line in (tmp_path / run / name / "metrics.jsonl").read_text().splitlines()]
            for run in ("run", "cut")
        ]
        assert [row["step"] for row in rows[1]] == list(range(1, 9))
        assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    if source == "shards":  # three numbers, no activations
        (saved,) = (tmp_path / "cut" / "checkpoints").glob("step_000006/process_0.json")
        assert set(json.loads(saved.read_text())["source"]) == {"seed", "epoch", "cursor", "activations"}


def test_shards_need_neither_texts_nor_language_model(
    sourceless, tiny_lm_dir, sample_text_files, tmp_path, monkeypatch
) -> None:
    texts, lm = tmp_path / "texts.csv", tmp_path / "lm"
    shutil.copy(sample_text_files.csv, texts)
    shutil.copytree(tiny_lm_dir("llama"), lm)
    settings = {"model": lm, "dataset": texts, "layers": 1, "output_dir": tmp_path / "acts", "eval_samples": 20}
    cache_activations.main(command({**settings, "cpu": True}, {}))
    texts.unlink(), shutil.rmtree(lm)
    train.main(sourceless(activations=tmp_path / "acts", layer=1))
    config = SelOrthoSAE.from_pretrained(tmp_path / "run").config
    assert (config.layer, config.lm_name, config.dataset) == (1, str(lm), str(texts))
    assert config.context_length == 128 and config.max_norm is not None
    evaluation = json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluation"]
    assert evaluation["samples"] == 20 and 0 < evaluation["fvu"] < 2 and "loss_recovered" not in evaluation


def test_the_language_model_comes_back_for_the_loss_recovered(sourceless, harvested, tiny_lm_dir, tmp_path) -> None:
    train.main(sourceless(activations=harvested, layer=2, model=tiny_lm_dir("llama"), lm_dtype="float32"))
    evaluation = json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluation"]
    assert evaluation["ce_samples"] == 8 and "loss_recovered" in evaluation
    with pytest.raises(SelOrthoError, match="the activations of .* are those of"):
        train.main(sourceless(activations=harvested, layer=2, model="acme/other", output_dir=tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no layer given: choose --layer, or --layers for several, from 1, 2"),
        ({"layer": 3}, "holds no layer 3: choose from 1, 2"),
        ({"layer": 1, "context_length": 64}, "--context_length 64: .* were cached with 256"),
        ({"layer": 1, "activations": "nowhere"}, "nowhere holds no cache of activations: write one with"),
        ({"layer": 1, "activations": "hub:acme"}, '--activations: unknown dataset "acme"'),
        ({"layers": [1, 1]}, "expected each layer once"),
        ({"layer": 1, "variants": '{"a b": {}}'}, "names a variant 'a b'"),
        ({"layer": 1, "variants": '{"x": {"k": 4}}'}, "layer_1_x: k=4: only"),
        ({"layer": 1, "twin": True, "variants": '{"twin": {}}'}, "both name a variant 'twin'"),
        ({"layers": [1, 2], "layer_settings": '{"2": {"context_length": 9}}'}, "read the same tokens"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(changes, message, sourceless, harvested, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=message):
        train.main(sourceless(**{"activations": harvested, **changes}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["live", "shards"])
def test_a_dry_run_says_what_it_takes_and_leaves_nothing(
    source, live, sourceless, harvested, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(dry_run, "PROBE_SECONDS", 0.2)
    build = live if source == "live" else lambda **changes: sourceless(activations=harvested, **changes)
    train.main(build(layers=[1, 2], twin=True, dry_run=True))
    shown = capsys.readouterr().out
    assert "4 SAEs with 16,768 parameters, trained on 1,024 tokens" in shown  # 4 (2 * 32 * 64 + 64 + 32)
    assert "activations held" in shown and "in all" in shown and not (tmp_path / "run").exists()
    monkeypatch.setattr(dry_run, "available_memory", lambda device: 100_000)
    with pytest.raises(SelOrthoError, match="this run cannot fit: it needs .* of memory .*activations held"):
        train.main(build(layers=[1, 2], dry_run=True))


def test_a_dry_harvest(tiny_lm_dir, sample_text_files, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("hf_selortho.data.cache_writer.PROBE_SECONDS", 0.2)
    settings = {
        "model": tiny_lm_dir("llama"), "dataset": sample_text_files.csv, "layers": [1], "cpu": True, "dry_run": True,
        "output_dir": tmp_path / "acts",
    }  # fmt: skip
    cache_activations.main(command(settings, {}))
    shown = capsys.readouterr().out
    assert "peak memory of a process" in shown and "tokens/s" in shown and not (tmp_path / "acts").exists()
    monkeypatch.setattr("hf_selortho.data.cache_writer.available_memory", lambda device: -(1 << 40))
    with pytest.raises(SelOrthoError, match="GB of memory .shards of a process"):
        cache_activations.main(command(settings, {}))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(SelOrthoError, match="GB of disk .activations"):
        cache_activations.main(command(settings, {"dry_run": None}))


def _launch(arguments: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = os.pathsep.join([str(ROOT / "tests" / "no_threads_left"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [*torchrun, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240, check=False
    )


@pytest.mark.slow
def test_two_processes_harvest_and_train_on_their_own_parts(
    tiny_lm_dir, sample_documents, sourceless, tmp_path
) -> None:
    """Five documents: the processes have different numbers of them, and of shards."""
    texts = tmp_path / "five.jsonl"
    long = [" ".join(sample_documents[n : n + 1 + 40 * (n == 0)]) for n in range(5)]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in long))
    settings = {
        "model": tiny_lm_dir("llama"), "dataset": texts, "layers": [1], "held_out_fraction": 0, "shard_tokens": 200,
        "output_dir": tmp_path / "acts",
    }  # fmt: skip
    done = _launch(["scripts/cache_activations.py", *command(settings, {})], 2)
    assert done.returncode == 0, done.stderr
    again = _launch(["scripts/cache_activations.py", *command(settings, {})], 2)
    assert again.returncode == 0 and again.stdout.count("holds this cache already, complete") == 1
    store = ActivationCache(str(tmp_path / "acts"))
    documents: dict[int, set[int]] = {0: set(), 1: set()}
    for entry in store.manifest.shards:
        documents[entry.number % 2] |= set(store.read(entry, [1]).origins.document_ids.tolist())
    assert not documents[0] & documents[1] and documents[0] | documents[1] == set(range(5))
    per_process = [sum(entry.number % 2 == rank for entry in store.manifest.shards) for rank in (0, 1)]
    assert per_process[0] != per_process[1]
    run = sourceless(activations=tmp_path / "acts", layer=1, batch_size=32, max_steps=30, twin=True, eval_samples=0)
    done = _launch(["scripts/train.py", *run], 2)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").glob("layer_*")} == {"layer_1", "layer_1_twin"}


@pytest.mark.slow
def test_two_processes_agree_on_how_long_to_probe(live) -> None:
    done = _launch(["scripts/train.py", *live(layers=[1, 2], twin=True, dry_run=True)], 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 SAEs with") == 1 and "trained on 1,024 tokens" in done.stdout
