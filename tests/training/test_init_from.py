"""Training that starts from an SAE: the same function at the start, frozen halves, resuming, what has moved."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.commands import index, train
from hf_selortho.data.buffer import ActivationStatistics
from hf_selortho.features import FeatureIndex
from hf_selortho.formats import load_sae, write_saelens
from hf_selortho.training.starting_point import StartingPoint, cosines_with
from tests.scripts.conftest import command

KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "jumprelu": {},
    "transcoder": {"activation": "relu", "site": "mlp_in", "target": "mlp_out", "skip": True},
    "centered": {"activation": "relu", "centered": True},
}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def start_of(kind: str, d_in: int = 32, unit: bool = False, **settings: Any) -> SelOrthoSAE:
    """An SAE as a stranger may have made it: means, a scale, decoder rows that are not of norm 1."""
    given: dict[str, Any] = {"d_sae": 48, "activation": kind, "penalty": "none", **KINDS[kind], **settings}
    if given.get("target"):
        given["d_out"] = d_in // 2 if not settings else d_in
    torch.manual_seed(1)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=d_in, **given)).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
        if unit or kind in ("topk", "batchtopk"):  # equal norms, with which nothing else is selected
            sae.normalize_decoder()
            sae.W_dec.mul_(1 if unit else 3)
        if kind == "batchtopk":
            sae.threshold.fill_(0.7)
        sae.set_input_statistics(torch.randn(d_in), 2.5)
        if sae.config.is_transcoder:
            sae.set_output_statistics(torch.randn(sae.config.width_out), 0.4)
    return sae


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_computes_what_the_sae_does_with_unit_decoder_rows(kind: str, measured: bool) -> None:
    start = start_of(kind)
    config = SelOrthoConfig(**{**start.config.own_settings(), "penalty": "selective", "centered": False})
    target = torch.randn(config.width_out) if config.is_transcoder else None
    statistics = ActivationStatistics(torch.randn(32) * 3, 40.0, 1.0, None, target, 7.0)
    sae = StartingPoint(start, {"name": "x"}).new_sae(config, statistics, measured).eval()
    x = 3 * torch.randn(200, 32)
    torch.testing.assert_close(sae.reconstruct(x), start.reconstruct(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.encode(x) > 0, start.encode(x) > 0)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert float(sae.input_scale) == (40.0 if measured else 2.5)


def test_a_topk_sae_of_unequal_rows_and_raw_units_are_warned_of(caplog) -> None:
    start = start_of("topk")
    with torch.no_grad():
        start.W_dec[0] *= 2
    statistics = ActivationStatistics(torch.zeros(32), 400.0, 1.0, None)
    sae = StartingPoint(start, {"name": "x"}).new_sae(start.config, statistics, measured=False)
    assert "decoder rows have norms from 3 to 6" in caplog.text and "--input_statistics measured" in caplog.text
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))


@pytest.fixture
def live(tiny_lm_dir, sample_text_files, tmp_path) -> Callable[..., list[str]]:
    def build(**changes: object) -> list[str]:
        settings = {
            "model": tiny_lm_dir("llama"), "lm_dtype": "float32", "dataset": sample_text_files.csv, "cpu": True,
            "context_length": 32, "buffer_contexts": 32, "refresh_every": 4, "batch_size": 128, "max_steps": 6,
            "learning_rate": 1e-2, "pair_fraction": 0.01, "eval_samples": 0, "output_dir": tmp_path / "run",
        }  # fmt: skip
        return command(settings, changes)

    return build


def saved(folder: Path, kind: str = "jumprelu", **settings: Any) -> Path:
    start_of(kind, layer=1, **settings).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_published_sae_of_another_format_goes_on_and_says_where_it_came_from(live, tmp_path) -> None:
    write_saelens(start_of("topk", layer=1, lm_name="org/lm", hook_name="model.layers.1"), tmp_path / "published")
    start = load_sae(tmp_path / "published")
    train.main(
        live(init_from=tmp_path / "published", max_steps=1, learning_rate=1e-12, twin=True, layer=2, eval_samples=5)
    )
    x = 3 * torch.randn(50, 32)
    for name in ("layer_2", "layer_2_twin") if (tmp_path / "run/layer_2").is_dir() else ("",):
        sae = SelOrthoSAE.from_pretrained(tmp_path / "run", subfolder=name)
        torch.testing.assert_close(sae.reconstruct(x), start.reconstruct(x), rtol=1e-4, atol=1e-4)
        assert (sae.config.activation, sae.config.k, sae.config.d_sae, sae.config.layer) == ("topk", 4, 48, 2)
        folder = tmp_path / "run" / name
        moved = json.loads((folder / "metrics.json").read_text())["moved"]["decoder"]
        assert moved["share_above_0.9"] == 1 and moved["median_cosine"] == pytest.approx(1)
        origin = json.loads((folder / "run.json").read_text())["init_from"]
        assert (origin["format"], origin["name"]) == ("saelens", str(tmp_path / "published"))
        assert "Cosine with the start" in (folder / "README.md").read_text()
    assert not (tmp_path / "run" / "start").exists()


FROZEN = {"encoder": ("W_enc", "b_enc", "log_threshold", "threshold"), "decoder": ("W_dec", "b_dec", "W_skip")}


@pytest.mark.parametrize(("kind", "part"), [("jumprelu", "encoder"), ("batchtopk", "encoder"), ("topk", "decoder")])
def test_a_frozen_half_stays_bit_for_bit_and_the_run_resumes_to_the_same_bytes(kind, part, live, tmp_path) -> None:
    start, settings = saved(tmp_path / "sae", kind, unit=True), {"freeze": part, "penalty": "none"}
    train.main(live(init_from=start, checkpoint_every=3, output_dir=tmp_path / "whole", **settings))
    before, whole = weights(start), weights(tmp_path / "whole")
    for name, value in before.items():
        same = name in (*FROZEN[part], "input_mean", "input_scale")
        assert torch.equal(whole[name], value) == same, name
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run)
    shutil.rmtree(run / "checkpoints" / "step_000006")
    (run / "run.json").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(live(init_from=start, checkpoint_every=3, resume_from_checkpoint="auto", **settings))
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (run / "moved.safetensors").read_bytes() == (tmp_path / "whole" / "moved.safetensors").read_bytes()


def test_a_run_that_was_interrupted_goes_on_from_what_it_kept_of_the_sae_that_may_have_changed(live, tmp_path) -> None:
    given = {"init_from": saved(tmp_path / "sae"), "checkpoint_every": 3}
    train.main(live(**given, output_dir=tmp_path / "whole"))
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run)
    start_of("jumprelu", layer=1).save_pretrained(run / "start")  # as an unfinished run leaves it
    (run / "start" / "run.json").write_text('{"init_from": {"name": "kept"}}')
    shutil.rmtree(run / "checkpoints" / "step_000006")
    saved(tmp_path / "sae", "relu", d_sae=64)
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(live(**given, resume_from_checkpoint="auto"))
    assert json.loads((run / "run.json").read_text())["init_from"] == {"name": "kept"}
    assert (run / "moved.safetensors").read_bytes() == (tmp_path / "whole" / "moved.safetensors").read_bytes()
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_what_has_moved_is_in_metrics_file_index_and_page(live, tmp_path, sample_text_files, capsys) -> None:
    start = saved(tmp_path / "sae", "relu")
    train.main(live(init_from=start, input_statistics="measured", max_steps=40, learning_rate=0.03))
    run = tmp_path / "run"
    before, after, moved = weights(start), weights(run), load_file(run / "moved.safetensors")
    for part, axis in (("W_dec", 1), ("W_enc", 0)):
        a, b = before[part].double(), after[part].double()
        brute = (a * b).sum(axis) / (a.norm(dim=axis) * b.norm(dim=axis))
        name = {"W_dec": "decoder", "W_enc": "encoder"}[part]
        torch.testing.assert_close(moved[name].double(), brute, rtol=1e-5, atol=1e-5)
        figures = json.loads((run / "metrics.json").read_text())["moved"][name]
        assert figures["share_above_0.9"] == pytest.approx(float((brute > 0.9).double().mean()))
        assert figures["median_cosine"] == pytest.approx(float(brute.quantile(0.5)), abs=1e-5)
    index.main([str(run), "--tokens", "300", "--concepts", "none", "--cpu"])
    read = FeatureIndex.open(run).feature_table
    torch.testing.assert_close(torch.tensor(read["moved"].to_pylist()), 1 - moved["decoder"])
    same = SelOrthoSAE.from_pretrained(run)
    assert all(float(values.min()) > 0.9999 for values in cosines_with(same, same).values())


LINES = [
    ({"d_sae": 64}, "has d_sae=48, not 64, and training does not change it; leave --d_sae out"),
    ({"activation": "topk", "k": 4}, "has activation=jumprelu, not topk"),
    ({"site": "mlp_out"}, "has site=resid_post, not mlp_out"),
    ({"variants": '{"wide": {"d_sae": 64}}'}, "has d_sae=48, not 64"),
    ({"init_from": "wide"}, "has d_in=24, not 32"),
    ({"init_from": "nothing"}, "nothing"),
    ({"input_normalization": "none"}, "/sae: it says how activations are scaled; leave --input_normalization out"),
    ({"jumprelu_threshold": 0.1}, "with --jumprelu_threshold 0.1: its thresholds are kept"),
    ({"freeze": "encoder"}, "--freeze encoder with --penalty selective: the penalty would move only what is frozen"),
    ({"freeze": "decoder", "resample_every": 2, "dead_after_tokens": 128}, "--freeze decoder with --resample_every 2"),
    ({"init_from": None, "layer": 1, "input_statistics": "measured"}, "it acts only with --init_from"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "line"), LINES, ids=lambda value: re.sub(r"\W+", "-", str(value))[:40])
def test_what_cannot_be_is_refused_in_one_line(changes, line, live, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "sae")
    saved(tmp_path / "wide", d_in=24)
    with pytest.raises(SelOrthoError, match=re.escape(line)) as error:
        train.main(live(**{"init_from": tmp_path / "sae", **changes}))
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "start").exists()
