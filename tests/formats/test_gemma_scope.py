"""The format of Gemma Scope: an archive that a stranger has made, and what its name says."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_selortho import SelOrthoError, SelOrthoSAE
from hf_selortho.formats import load_sae
from hf_selortho.formats.gemma_scope import facts_of


def arrays(dtype: str = "<f4") -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"W_enc": (8, 16), "W_dec": (16, 8), "b_enc": (16,), "b_dec": (8,), "threshold": (16,)}
    return {name: np.abs(random.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}


def members(dtype: str = "<f4", **changes: np.ndarray) -> dict[str, bytes]:
    files = {}
    for name, array in {**arrays(dtype), **changes}.items():
        file = io.BytesIO()
        np.save(file, array)
        files[f"{name}.npy"] = file.getvalue()
    return files


def save(folder: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "params.npz", "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return folder


def header_of(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4"])
@torch.no_grad()
def test_every_kind_of_number_and_a_saved_copy(dtype, compression, tmp_path) -> None:
    sae = load_sae(save(tmp_path / "layer_20/width_16k/average_l0_71", members(dtype), compression))
    assert (sae.config.layer, sae.config.hook_name, sae.config.activation) == (20, "model.layers.20", "jumprelu")
    assert sae.W_enc.dtype == torch.float32 and not sae.training
    expected = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays(dtype).items()}
    x = torch.randn(50, 8)
    z = x @ expected["W_enc"] + expected["b_enc"]
    h = torch.where(z > expected["threshold"], z, 0)
    torch.testing.assert_close(sae.encode(x), h, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(h), h @ expected["W_dec"] + expected["b_dec"], atol=1e-5, rtol=1e-5)
    sae.save_pretrained(tmp_path / "own")
    own = SelOrthoSAE.from_pretrained(tmp_path / "own")
    assert torch.equal(own.encode(x), sae.encode(x)) and torch.equal(own.decode(h), sae.decode(h))


@pytest.mark.parametrize(
    ("name", "subfolder", "facts"),
    [
        ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", ("google/gemma-2-2b", 20)),
        ("google/gemma-scope-9b-it-res", "layer_9/width_131k/average_l0_22", ("google/gemma-2-9b-it", 9)),
        ("google/gemma-scope-2b-pt-mlp", "layer_20/width_16k/average_l0_71", ("google/gemma-2-2b", 20)),
        ("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", ("google/gemma-2-2b", None)),
        ("google/gemma-scope-2b-pt-resolution", "layer_20/width_16k/average_l0_71", (None, 20)),
        ("saes/gemma-scope-27b-pt-att/layer_2/width_16k/average_l0_9", None, ("google/gemma-2-27b", 2)),
        (
            "models--google--gemma-scope-2b-pt-res/snapshots/x/layer_2/width_1m/average_l0_9",
            None,
            ("google/gemma-2-2b", 2),
        ),
        ("my/saes", None, (None, None)),
    ],
)
def test_language_model_and_layer_by_name(name, subfolder, facts) -> None:
    found = facts_of(f"{name}/{subfolder}" if subfolder else name)
    assert (found.get("lm_name"), found.get("layer")) == facts
    hook = found.get("hook_name")
    assert (hook or "").startswith(f"model.layers.{facts[1]}") == (facts[1] is not None)
    assert (hook is None) == (name == "my/saes")


@torch.no_grad()
def test_thresholds_of_zero_and_below_are_those_of_relu(tmp_path) -> None:
    threshold = np.concatenate([np.zeros(8), -np.ones(8)]).astype(np.float32)
    sae = load_sae(save(tmp_path / "x", members(threshold=threshold)))
    sae.save_pretrained(tmp_path / "own")
    x = torch.randn(50, 8)
    for model in (sae, SelOrthoSAE.from_pretrained(tmp_path / "own")):
        torch.testing.assert_close(model.encode(x), torch.relu(x @ sae.W_enc + sae.b_enc), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": np.zeros(3)}, r"\(unexpected: more\)"),
        (
            {"b_enc": np.zeros(15, np.float32)},
            r"b_enc has the shape \(15,\), d_in and d_sae of the config give \(16,\)",
        ),
        ({"W_enc": np.zeros(8, np.float32)}, "d_in=0, expected a positive"),
        ({"b_enc": np.array([object()] * 16)}, "is damaged"),
        ({"b_enc": np.zeros(16, np.int32)}, "b_enc is of dtype int32"),
        ({"b_enc": np.full(16, np.nan, np.float32)}, "b_enc holds NaN or infinity"),
    ],
)
def test_what_is_no_sae_of_gemma_scope_is_named(changes, message, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=message):
        load_sae(save(tmp_path, members(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold.npy": None}, r"\(missing: threshold\)"),
        ({"W_enc.npy": header_of((1 << 20, 1 << 20))}, "is damaged"),
        ({"W_enc.npy": b""}, "is damaged"),
        ({"W_enc.npy": b"\x80\x04N."}, "is damaged"),  # a pickle
        ({"W_enc.npy": None, "W_enc": b"x"}, "is damaged"),
        ({"W_enc.npy": None, "../W_enc.npy": b"x"}, "is damaged"),
        ({"x\ny": b""}, "is damaged"),
    ],
)
def test_what_is_no_array_is_refused(changes, message, tmp_path) -> None:
    files = {name: data for name, data in {**members(), **changes}.items() if data is not None}
    with pytest.raises(SelOrthoError, match=message):
        load_sae(save(tmp_path, files))


def test_no_damage_ends_in_another_error(tmp_path) -> None:
    whole = (save(tmp_path, members(), zipfile.ZIP_LZMA) / "params.npz").read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "params.npz").write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        try:
            load_sae(tmp_path)
        except SelOrthoError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert refused > 60
    (tmp_path / "params.npz").write_bytes(b"PK" + bytes(100))
    with pytest.raises(SelOrthoError, match="no file of arrays"):
        load_sae(tmp_path)
