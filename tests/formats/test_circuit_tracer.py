"""The folder of circuit-tracer holds what it loads and nothing else, computes the same, and wrong sets are refused."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_selortho import SelOrthoError, SelOrthoSAE
from hf_selortho.commands.convert import main
from hf_selortho.formats.circuit_tracer_layer import read_set
from hf_selortho.formats.convert import convert
from tests.transcoder_run import save_transcoders, transcoder

THRESHOLD = "activation_function.threshold"


def computed(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and output as circuit-tracer computes them from the tensors of a layer."""
    z = x @ tensors["W_enc"].T + tensors["b_enc"]
    h = z * (z > tensors[THRESHOLD]) if THRESHOLD in tensors else torch.relu(z)
    y = h @ tensors["W_dec"] + tensors["b_dec"]
    return h, y + (x @ tensors["W_skip"].T if "W_skip" in tensors else 0)


@pytest.fixture
def lm(tiny_lm_dir) -> Path:
    return tiny_lm_dir("gemma3")


@pytest.mark.parametrize(("kind", "skip"), [("batchtopk", True), ("jumprelu", False), ("relu", True)])
def test_a_set_is_written_whole_and_read_back(lm, tmp_path, kind, skip) -> None:
    run = save_transcoders(tmp_path / "run", lm, activation=kind, skip=skip)
    written = convert(str(run), tmp_path / "set", "circuit-tracer")
    assert [path.name for path in written] == ["config.yaml", *(f"layer_{n}.safetensors" for n in range(4))]
    assert (tmp_path / "set/config.yaml").read_text().splitlines() == [
        'model_kind: "transcoder_set"', 'feature_input_hook: "mlp.hook_in"', 'feature_output_hook: "hook_mlp_out"',
        f'model_name: "{lm}"',
    ]  # fmt: skip
    convert(str(tmp_path / "set"), tmp_path / "back", "selortho")
    expected = {"W_enc": (48, 32), "b_enc": (48,), "W_dec": (48, 32), "b_dec": (32,)}
    expected |= {"W_skip": (32, 32)} if skip else {}
    expected |= {} if kind == "relu" else {THRESHOLD: (48,)}
    x = 0.5 + torch.randn(200, 32)
    for layer in range(4):
        tensors = load_file(tmp_path / f"set/layer_{layer}.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
        sae = SelOrthoSAE.from_pretrained(run / f"layer_{layer}").eval()
        back = SelOrthoSAE.from_pretrained(tmp_path / f"back/layer_{layer}").eval()
        assert (back.config.site, back.config.target, back.config.layer) == ("mlp_in", "mlp_out", layer)
        h, y = computed(tensors, x)
        with torch.no_grad():
            assert 0.1 < (sae.encode(x) > 0).float().mean() < 0.6
            for one in (sae, back):
                torch.testing.assert_close(one.encode(x), h, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(one.reconstruct(x), y, rtol=1e-4, atol=1e-4)


def test_a_set_is_replaced_on_request(lm, tmp_path, capsys) -> None:
    run, there = save_transcoders(tmp_path / "run", lm), tmp_path / "set"
    main([str(run), str(there), "--to", "circuit-tracer"])
    assert f"from_pretrained(MODEL, '{there}', backend='nnsight')" in capsys.readouterr().out
    with pytest.raises(SelOrthoError, match="is not empty"):
        convert(str(run), there, "circuit-tracer")
    convert(str(run), there, "circuit-tracer", overwrite=True)
    shutil.copytree(run, there / "run")
    with pytest.raises(SelOrthoError, match="holds run, which no conversion wrote"):
        convert(str(run), there, "circuit-tracer", overwrite=True)
    assert (there / "run/layer_3/model.safetensors").is_file()


def other(folder: Path, lm: Path, layer: int, **settings: object) -> None:
    """Put another transcoder in the place of one."""
    transcoder(lm, layer, **settings).save_pretrained(folder / f"layer_{layer}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run, lm: shutil.rmtree(run / "layer_2"), "lacks layer_2: expected all 4 layers"),
        (lambda run, lm: other(run, lm, 4), "has layer_4, but"),
        (lambda run, lm: other(run, lm, 1, activation="topk"), "layer_1 has activation topk, which"),
        (lambda run, lm: other(run, lm, 1, skip=True), "layer_1 has skip=True, others False"),
        (lambda run, lm: other(run, lm, 1, target=None, site="mlp_out"), "layer_1 reconstructs what it reads"),
        (lambda run, lm: other(run, lm, 1, site="attn_out"), "site='attn_out', others 'mlp_in'"),
        (lambda run, lm: save_transcoders(run, lm, site="attn_out"), "has no hook for attn_out of Gemma3ForCausalLM"),
        (lambda run, lm: save_transcoders(run, lm, d_in=16), "maps 16 to 16 dimensions: expected 32"),
        (lambda run, lm: [shutil.rmtree(path) for path in run.iterdir()], "holds no layer_0"),
    ],
)
def test_sets_that_would_give_wrong_graphs_are_refused(lm, tmp_path, change, words) -> None:
    run = save_transcoders(tmp_path / "run", lm)
    change(run, lm)
    with pytest.raises(SelOrthoError, match=re.escape(words)):
        convert(str(run), tmp_path / "set", "circuit-tracer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("arch", "words"),
    [("gemma2", "before the gain of the norm only): expected resid_mid"), ("gpt2", "does not know GPT2LMHeadModel")],
)
def test_architectures_without_the_hook_are_refused(tiny_lm_dir, tmp_path, arch, words) -> None:
    run = save_transcoders(tmp_path / "run", tiny_lm_dir(arch))
    with pytest.raises(SelOrthoError, match=re.escape(words)):
        convert(str(run), tmp_path / "set", "circuit-tracer")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda there: (there / "layer_1.safetensors").unlink(), "without a gap"),
        (lambda there: (there / "layer_1.safetensors").write_bytes(b"x" * 99), "is damaged or incomplete"),
        (lambda there: (there / "config.yaml").write_text("feature_input_hook: 'ln2.hook_normalized'"), "expected mlp"),
        (lambda there: save_file({"W_enc": torch.ones(3, 2)}, there / "layer_0.safetensors"), "missing: W_dec, b_dec"),
    ],
)
def test_damaged_sets_are_refused(lm, tmp_path, damage, words) -> None:
    convert(str(save_transcoders(tmp_path / "run", lm)), tmp_path / "set", "circuit-tracer")
    damage(tmp_path / "set")
    with pytest.raises(SelOrthoError, match=re.escape(words)):
        convert(str(tmp_path / "set"), tmp_path / "back", "selortho")
    assert not (tmp_path / "back").exists()


def test_the_config_of_a_set_is_read_line_by_line(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model_name: 'a/b' # x\n  within: x\nscan: x#y\na:" + 100_000 * " " + '"x"y\'\n')
    start = time.perf_counter()
    assert {"model_name": "a/b", "scan": "x#y"}.items() <= read_set(path).items() and "  within" not in read_set(path)
    assert time.perf_counter() - start < 1
    path.write_text((1 << 20) * "a:b\n")
    with pytest.raises(SelOrthoError, match="more than a megabyte"):
        read_set(path)
