"""The script that builds feature indexes, on runs of a small language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.features.index import FeatureIndex
from hf_selortho.formats import write_saelens
from hf_selortho.modeling_selortho import SelOrthoSAE
from scripts import build_feature_index, train

SMALL = ["--tokens", "1_500", "--cpu", "--lm_dtype", "float32"]


@pytest.fixture(scope="module")
def trained(tiny_lm_dir, sample_text_files, tmp_path_factory) -> Path:
    """A run of two layers with twins."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    settings = {
        "model": tiny_lm_dir("llama"), "lm_dtype": "float32", "layers": [1, 2], "twin": True, "context_length": 32,
        "dataset": sample_text_files.csv, "held_out_fraction": 0.3, "d_sae": 64, "pair_fraction": 0.01,
        "batch_size": 128, "buffer_contexts": 32, "refresh_every": 4, "max_steps": 26, "learning_rate": 1e-3,
        "eval_samples": 0, "output_dir": folder, "cpu": True,
    }  # fmt: skip
    argv: list[str] = []
    for key, value in settings.items():
        argv += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    train.main(argv)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "small"))


@pytest.mark.slow
def test_every_sae_of_a_run(run, capsys) -> None:
    build_feature_index.main([str(run), *SMALL])
    lines = capsys.readouterr().out.splitlines()
    names = ["layer_1", "layer_1_twin", "layer_2", "layer_2_twin"]
    assert len(lines) == 4 and all(f"{name}/feature_index: 64 features" in "".join(lines) for name in names)
    for name in names:
        index = FeatureIndex.open(run / name)
        facts, twin = index.facts, name.endswith("_twin")
        assert len(index) == 64 and facts["sae"]["name"] == f"small/{name}"
        assert facts["pairs"]["source"] == ("held_out" if twin else "training") and index.pairs > 0
        assert (facts["twin"] or {}).get("name") == (None if twin else f"small/{name}_twin")
        assert facts["text"]["held_out_fraction"] == 0.3 and facts["text"]["tokens"] >= 1400
    pair = FeatureIndex.open(run / "layer_1").pair_table.to_pylist()[0]
    assert pair["score"] is not None and pair["twin_a"] is not None


def test_what_is_no_index_is_never_replaced(run, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(SelOrthoError, match="thesis.tex"):
        build_feature_index.main([str(run / "layer_1"), *SMALL, "--overwrite", "--output", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_single_sae_and_its_twin_beside_it(run, tmp_path) -> None:
    for name, to in (("layer_1", "demo"), ("layer_1_twin", "demo-twin")):
        shutil.copytree(run / name, tmp_path / to)
    build_feature_index.main([str(tmp_path / "demo"), *SMALL])
    facts = FeatureIndex.open(tmp_path / "demo").facts
    assert facts["sae"]["name"] == "demo" and facts["twin"]["name"] == "demo-twin"
    shutil.copytree(run / "layer_1_twin", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "demo-twin")
    argv = [str(tmp_path / "demo"), *SMALL, "--overwrite"]
    build_feature_index.main(argv)
    assert FeatureIndex.open(tmp_path / "demo").facts["twin"] is None
    build_feature_index.main([*argv, "--twin", str(tmp_path / "elsewhere")])
    assert FeatureIndex.open(tmp_path / "demo").facts["twin"]["name"] == "elsewhere"


def test_an_sae_of_another_library(run, tmp_path, tiny_lm_dir, sample_text_files) -> None:
    write_saelens(SelOrthoSAE.from_pretrained(run / "layer_1"), tmp_path / "lens")
    text = ["--dataset", str(sample_text_files.csv), "--held_out_fraction", "1", "--model", str(tiny_lm_dir("llama"))]
    build_feature_index.main([str(tmp_path / "lens"), *SMALL, *text])
    facts = FeatureIndex.open(tmp_path / "lens").facts
    assert facts["pairs"]["source"] == "held_out" and facts["text"]["held_out_fraction"] == 1


def test_labels(run, tmp_path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"2": "rivers"}))
    argv = [str(run / "layer_1"), *SMALL, "--labels", str(labels)]
    build_feature_index.main(argv)
    assert FeatureIndex.open(run / "layer_1").label(2) == "rivers"
    labels.write_text(json.dumps({"64": "rivers"}))
    with pytest.raises(SelOrthoError, match="'64' is no feature of this SAE: expected 0 to 63"):
        build_feature_index.main([*argv, "--overwrite"])
    assert FeatureIndex.open(run / "layer_1").label(2) == "rivers"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--output", "x"],
            r"--output: .* has several SAEs \(layer_1, layer_1_twin, layer_2, .*\): name one",
        ),
        (["--tokens", "0"], "tokens 0: expected at least 1"),
        (["--subfolder", "layer_9"], "layer_9"),
        (["--subfolder", "layer_1", "--dataset", "nothing.csv"], "nothing.csv"),
        (["--subfolder", "layer_1", "--held_out_fraction", "0"], "held_out_fraction 0.0: expected a share"),
    ],
)
def test_mistakes(trained, argv, message) -> None:
    with pytest.raises(SelOrthoError, match=message):
        build_feature_index.main([str(trained), "--cpu", *argv])
    assert not list(trained.rglob("feature_index"))


def test_a_hub_id_needs_an_output() -> None:
    with pytest.raises(SelOrthoError, match="--output is needed: org/name is no folder of this machine"):
        build_feature_index.main(["org/name", "--cpu"])


def test_unknown_arguments(capsys) -> None:
    with pytest.raises(SystemExit):
        build_feature_index.main(["runs/x", "--nosuch", "3"])
    assert "unknown arguments: --nosuch 3" in capsys.readouterr().err
