"""SAEs of sparsify and Gemma Scope, and conversions on the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.command_line import run_script
from hf_selortho.hub.interop import load_sae
from hf_selortho.hub.interop.__main__ import main
from hf_selortho.hub.interop.places import hub_name, layer_of, lens_name


@torch.no_grad()
def test_we_compute_what_sparsify_computes(tmp_path) -> None:
    sparsify = pytest.importorskip("sparsify")
    theirs = sparsify.SparseCoder(24, sparsify.SparseCoderConfig(num_latents=48, k=5))
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.3)
    folder = tmp_path / "layers.7"
    theirs.save_to_disk(folder)
    sae, x = load_sae(folder), torch.randn(100, 24)
    out = theirs.encode(x)
    dense = torch.zeros(100, 48).scatter(1, out.top_indices, out.top_acts)
    torch.testing.assert_close(sae.encode(x), dense, atol=1e-5, rtol=1e-5)
    decoded = theirs.decode(out.top_acts, out.top_indices)
    torch.testing.assert_close(sae.decode(dense), decoded, atol=1e-5, rtol=1e-5)
    assert (sae.config.layer, sae.config.hook_name, sae.config.k) == (7, "layers.7", 5)
    sae.save_pretrained(tmp_path / "own")
    assert torch.equal(SelOrthoSAE.from_pretrained(tmp_path / "own").encode(x), sae.encode(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": True}, "transcode=True is not read"),
        ({"skip_connection": True}, "skip_connection=True is not read"),
        ({"activation": "groupmax"}, "activation='groupmax' is not read"),
        ({"k": None}, "k=None, expected the number"),
        ({"num_latents": 10**9}, "has the shape"),
        ({"num_latents": 0, "expansion_factor": "x"}, "d_sae=None, expected a positive"),
        ({"d_in": None}, "d_in=None, expected a positive"),
    ],
)
def test_what_sparsify_can_and_we_cannot_is_named(changes, message, tmp_path) -> None:
    sparsify = pytest.importorskip("sparsify")
    sparsify.SparseCoder(24, sparsify.SparseCoderConfig(num_latents=48, k=5)).save_to_disk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SelOrthoError, match=message):
        load_sae(tmp_path)


def scope_arrays(d_in: int = 24, d_sae: int = 48) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {**arrays, "threshold": random.uniform(0, 2, d_sae).astype(np.float32)}


def save_scope(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True)
    arrays = {**scope_arrays(), **changes}
    np.savez(folder / "params.npz", **{name: array for name, array in arrays.items() if array is not None})
    return folder


@torch.no_grad()
def test_gemma_scope_computes_as_published(tmp_path) -> None:
    arrays = {name: torch.from_numpy(array) for name, array in scope_arrays().items()}
    sae = load_sae(save_scope(tmp_path / "layer_20/width_16k/average_l0_71"))
    x = torch.randn(200, 24)
    z = x @ arrays["W_enc"] + arrays["b_enc"]
    h = torch.relu(z) * (z > arrays["threshold"])
    torch.testing.assert_close(sae.encode(x), h, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(h), h @ arrays["W_dec"] + arrays["b_dec"], atol=1e-5, rtol=1e-5)
    assert (sae.config.layer, sae.config.hook_name, sae.config.activation) == (20, "model.layers.20", "jumprelu")


@torch.no_grad()
def test_thresholds_of_zero_and_below_are_those_of_relu(tmp_path) -> None:
    threshold = np.concatenate([np.zeros(24), -np.ones(24)]).astype(np.float32)
    sae = load_sae(save_scope(tmp_path / "x", threshold=threshold))
    sae.save_pretrained(tmp_path / "own")
    x = torch.randn(50, 24)
    for model in (sae, SelOrthoSAE.from_pretrained(tmp_path / "own")):
        torch.testing.assert_close(model.encode(x), torch.relu(x @ sae.W_enc + sae.b_enc), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, "expected W_dec, W_enc, b_dec, b_enc, threshold"),
        ({"more": np.zeros(3)}, "holds W_dec, W_enc, b_dec, b_enc, more"),
        ({"b_enc": np.zeros(47, np.float32)}, r"b_enc has the shape \(47,\), the others give \(48,\)"),
        ({"W_enc": np.zeros(24, np.float32)}, "d_sae=0, expected a positive"),
        ({"b_enc": np.array([object()] * 48)}, "is damaged"),
        ({"b_enc": np.zeros(48, np.int32)}, "b_enc of int32"),
        ({"b_enc": np.full(48, np.nan, np.float32)}, "b_enc holds NaN or infinity"),
    ],
)
def test_what_is_no_sae_of_gemma_scope_is_named(changes, message, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=message):
        load_sae(save_scope(tmp_path / "x", **changes))


def test_arrays_that_claim_more_than_they_hold_are_refused(tmp_path) -> None:
    folder = save_scope(tmp_path / "x")
    path = folder / "params.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)})
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in {**members, "W_enc.npy": header.getvalue()}.items():
            new.writestr(name, data)
    with pytest.raises(SelOrthoError, match="it is damaged"):
        load_sae(folder)
    zeros = io.BytesIO()
    np.save(zeros, np.zeros((4000, 4000), np.float32))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as new:  # 64 MB in a hundred bytes
        for name, data in {**members, "W_enc.npy": zeros.getvalue()}.items():
            new.writestr(name, data)
    with pytest.raises(SelOrthoError, match="would unpack to"):
        load_sae(folder)
    path.write_bytes(b"PK" + bytes(100))
    with pytest.raises(SelOrthoError, match="no file of arrays"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("lens", "hub"),
    [
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gpt2-small", "openai-community/gpt2"),
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
    ],
)
def test_names_of_language_models(lens, hub) -> None:
    assert hub_name(lens) == hub
    assert hub_name(lens_name(hub)) == hub and hub_name(hub) == hub


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.12.hook_resid_post", 12),
        ("blocks.12.hook_resid_pre", 11),
        ("blocks.0.hook_resid_pre", None),
        ("blocks.3.hook_mlp_out", None),
        ("layers.4", 4),
        ("model.layers.4", 4),
        ("layers.4.mlp", None),
        (7, None),
    ],
)
def test_hooks(hook, layer) -> None:
    assert layer_of(hook) == layer


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_selortho.hub.interop", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_conversion_on_the_command_line(tmp_path, capsys) -> None:
    scope, x = save_scope(tmp_path / "layer_3/width_16k/average_l0_9"), torch.randn(9, 24)
    done = convert(scope, tmp_path / "own", "--to", "selortho")
    assert done.returncode == 0 and "from_pretrained(" in done.stdout, done.stderr
    assert json.loads((tmp_path / "own/run.json").read_text())["converted_from"]["format"] == "gemma_scope"
    main(["convert", str(tmp_path / "own"), str(tmp_path / "deep/lens"), "--to", "saelens"])
    assert "SAE.load_from_disk(" in capsys.readouterr().out
    with torch.no_grad():
        expected = load_sae(scope).encode(x)
        for place in ("own", "deep/lens"):
            torch.testing.assert_close(load_sae(tmp_path / place).encode(x), expected, atol=1e-5, rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "layer_3", "own"]


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys) -> None:
    SelOrthoSAE(SelOrthoConfig(d_in=8, d_sae=16)).save_pretrained(tmp_path / "own")
    kept = (tmp_path / "own/config.json").read_bytes()
    cases = [
        ((tmp_path / "own", tmp_path / "own", "--to", "saelens"), "is not empty: choose another folder"),
        ((tmp_path, tmp_path / "new", "--to", "saelens"), "SAEs in sub-folders: own"),
        ((tmp_path / "own", tmp_path / "new", "--to", "pickle"), "invalid choice: 'pickle'"),
        ((tmp_path / "own", tmp_path / "new", "--to", "saelens", "--from", "sparsify"), "lacks cfg.json"),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        with pytest.raises(SystemExit) as caught:
            run_script(lambda arguments=arguments: main(["convert", *map(str, arguments)]))
        said = capsys.readouterr().err
        assert caught.value.code == 2 and message in said, said
        assert said.count("\n") == 1 and not (tmp_path / "new").exists()
    assert (tmp_path / "own/config.json").read_bytes() == kept


def test_unknown_formats_and_arguments(tmp_path) -> None:
    with pytest.raises(SelOrthoError, match="format 'pickle': expected auto or one of selortho, saelens"):
        load_sae(tmp_path, "pickle")
    with pytest.raises(SelOrthoError, match="dtype says nothing"):
        load_sae(tmp_path, dtype="float32")
