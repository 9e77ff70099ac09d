"""Loading a saved SAE believes nothing: damaged, contradictory and malicious files are refused before they do harm."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_selortho import ConfigError, SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.utils.files import target_outside


@pytest.fixture
def saved(tmp_path) -> Path:
    """The folder of a small SAE."""
    SelOrthoSAE(SelOrthoConfig(d_in=12, d_sae=30)).save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_header(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(old, new))


def refused(folder: Path, **arguments: Any) -> str:
    with pytest.raises(SelOrthoError) as caught:
        SelOrthoSAE.from_pretrained(folder, **arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(W_enc=torch.zeros(30, 12)), r"W_enc has the shape \(30, 12\), .* \(12, 30\)"),
        (lambda w: w.update(input_scale=torch.ones(1)), r"input_scale has the shape \(1,\), .* \(\)"),
        (lambda w: w.update(b_dec=torch.zeros(12, dtype=torch.int64)), "b_dec is of dtype I64, expected one of BF16"),
        (lambda w: w.update(b_dec=torch.zeros(12, dtype=torch.float8_e4m3fn)), "b_dec is of dtype F8_E4M3"),
        (lambda w: w.pop("W_dec"), r"does not hold the weights of its config \(missing: W_dec\)"),
        (lambda w: w.update(threshold=torch.ones(())), r"\(unexpected: threshold\): is it another kind of model"),
        (lambda w: [w.pop(key) for key in list(w)], "missing: W_dec, W_enc, b_dec, b_enc, input_mean and 1 more"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_named(change, message, saved) -> None:
    change_weights(saved, change)
    said = refused(saved)
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: change_config(f, d_sae=10**9), r"W_dec has the shape \(30, 12\), .* give \(1000000000, 12\)"),
        (lambda f: change_config(f, d_in=10**9), r"W_dec has the shape \(30, 12\), .* give \(30, 1000000000\)"),
        (lambda f: change_header(f, b"[30,12]", b"[3000000,12]"), "is damaged or incomplete"),
        (lambda f: os.truncate(f / "model.safetensors", 2000), "model.safetensors is damaged or incomplete"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "is damaged or incomplete"),
        (lambda f: change_config(f, notes="x" * 2_000_000), "holds no JSON object of at most 1,048,576 bytes"),
    ],
)
def test_nothing_is_made_of_files_that_claim_what_they_do_not_hold(change, message, saved, monkeypatch) -> None:
    change(saved)
    monkeypatch.setattr(SelOrthoSAE, "__init__", lambda *_: pytest.fail("a model was made"))
    said = refused(saved)
    assert re.search(message, said), said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_dtypes_are_read(dtype, saved) -> None:
    change_weights(saved, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    assert SelOrthoSAE.from_pretrained(saved, dtype=torch.float32).W_dec.dtype == torch.float32
    half = SelOrthoSAE.from_pretrained(saved, dtype=torch.bfloat16)
    assert (half.W_dec.dtype, half.input_mean.dtype) == (torch.bfloat16, torch.float32)


def test_only_safetensors_are_read(saved) -> None:
    weights = saved / "model.safetensors"
    expected = load_file(weights)
    (saved / "pytorch_model.bin").write_bytes(b"no pickle")
    (saved / "model.safetensors.index.json").write_text("no JSON")
    assert torch.equal(SelOrthoSAE.from_pretrained(saved).W_dec, expected["W_dec"])
    (saved / "model.safetensors.index.json").unlink()
    weights.unlink()
    torch.save(expected, saved / "pytorch_model.bin")
    message = "holds no model.safetensors; other formats, such as pytorch_model.bin, can run code"
    assert message in refused(saved)
    assert message in refused(saved, use_safetensors=False)
    (saved / "config.json").unlink()
    assert "it holds no config.json" in refused(saved)
    assert "neither on the Hub nor a local path" in refused(saved / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_that_lead_out_of_the_folder_are_refused(name, saved, tmp_path) -> None:
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(f"../{name}")
    assert f"{saved / name} leads out of {saved}, to {tmp_path / name}" in refused(saved)
    (saved / name).unlink()
    (tmp_path / name).rename(saved / f"kept-{name}")
    (saved / name).symlink_to(f"kept-{name}")  # inside
    (tmp_path / "linked").symlink_to(saved)  # the user's own choice
    SelOrthoSAE.from_pretrained(tmp_path / "linked")


def test_a_snapshot_of_the_hubs_cache_is_a_folder_like_any_other(saved, tmp_path) -> None:
    snapshot, blobs = (
        tmp_path / "models--org--sae/snapshots" / ("c0ffee" + "0" * 34),
        tmp_path / "models--org--sae/blobs",
    )
    (snapshot / "sub").mkdir(parents=True)
    blobs.mkdir()
    for path in saved.iterdir():
        path.rename(blobs / path.name)
        (snapshot / "sub" / path.name).symlink_to(f"../../../blobs/{path.name}")
    expected = load_file(blobs / "model.safetensors")["W_dec"]
    for folder, subfolder in ((snapshot, "sub"), (snapshot / "sub", "")):
        assert torch.equal(SelOrthoSAE.from_pretrained(folder, subfolder=subfolder).W_dec, expected)


def test_where_paths_lead(tmp_path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    assert target_outside(folder, folder / "below" / ".." / "file") is None
    assert target_outside(folder, folder / ".." / "file") == tmp_path / "file"
    assert target_outside(folder, tmp_path / "folder2") == tmp_path / "folder2"  # not a matter of letters
    (folder / "out").symlink_to(tmp_path)
    assert target_outside(folder, folder / "out" / "file") == tmp_path / "file"
    (folder / "loop").symlink_to("loop")
    (folder / "one").symlink_to("other")
    (folder / "other").symlink_to("one")
    for path in (folder / "loop", folder / "loop/file", folder / "one"):
        assert target_outside(folder, path) == path, path
    snapshot, blobs = tmp_path / "snapshots/commit", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    (snapshot / "file").symlink_to(blobs / "hash")
    assert target_outside(snapshot, snapshot / "file") is None
    blobs.symlink_to(folder)
    assert target_outside(snapshot, snapshot / "file") == folder / "hash"


def sharded(folder: Path) -> SelOrthoSAE:
    sae = SelOrthoSAE(SelOrthoConfig(d_in=12, d_sae=30))
    sae.save_pretrained(folder, max_shard_size="1KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return sae


def test_several_files_and_variants_are_read(tmp_path) -> None:
    sae = sharded(tmp_path / "parts")
    sae.save_pretrained(tmp_path / "other", variant="half")
    for loaded in (
        SelOrthoSAE.from_pretrained(tmp_path / "parts", device_map="cpu"),
        SelOrthoSAE.from_pretrained(tmp_path, subfolder="other", variant="half"),
    ):
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in sae.state_dict().items())
        assert loaded.W_enc.stride() == (1, 12)  # by feature
    assert "holds no model.safetensors" in refused(tmp_path / "other")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"W_enc": "../sae/model.safetensors"}, "does not name safetensors files beside it"),
        ({"W_enc": "weights.bin"}, "does not name safetensors files beside it"),
        ({"W_enc": 5}, "does not name safetensors files beside it"),
        ({}, "does not name safetensors files beside it"),
        (["a.safetensors"], "does not name safetensors files beside it"),
        ({"W_enc": "absent.safetensors"}, "names absent.safetensors, which is missing"),
        ({"W_enc": "x" * 10_000 + ".safetensors"}, "names x+, which is missing"),
    ],
)
def test_an_index_names_safetensors_beside_it(weight_map, message, tmp_path) -> None:
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert re.search(message, refused(tmp_path))
    index.write_text("[" * 100_000)
    assert "is not valid JSON" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not JSON", "is not valid JSON"),
        (b"\xff\xfe\xfa", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b"[]", "holds no JSON object"),
        (b'{"model_type": "llama"}', "model_type='llama', expected 'selortho_sae': this is no SAE"),
        (b'{"model_type": []}', r"model_type=\[\], expected 'selortho_sae'"),
        (b"{}", "model_type=None, expected 'selortho_sae': this is no SAE"),
        (b'{"config_version": 1}', "d_in is missing"),
        (b'{"d_in": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
        (b'{"config_version": 1, "d_in": 8, "d_sae": 1e999}', "d_sae=inf: expected int or None"),
        (
            b'{"config_version": 1, "d_in": 8, "d_sae": 9, "dtype": {"a": "float32"}}',
            "dtype={'a': 'float32'}: expected",
        ),
        (b'{"config_version": 1, "d_in": 8, "d_sae": 9, "ortho_coeficient": 1}', "did you mean ortho_coefficient"),
    ],
)
@pytest.mark.parametrize("load", [SelOrthoConfig.from_pretrained, SelOrthoSAE.from_pretrained])
def test_what_is_no_config_is_refused(load, content, message, saved) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(saved)
    assert re.search(message, str(caught.value)) and len(str(caught.value)) < 1000


STEERING = {
    "transformers_weights": "../other/model.safetensors",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "configuration_files": ["config.5.0.0.json"],
    "fusion_config": {"patch_embeddings": True},
    "per_layer_config": {"0": {"d_sae": 5}},
    "attn_implementation": "kernels-community/evil",
    "num_labels": 10**9,  # transformers would make a name for each
    "to_dict": 5,
    "self": 5,
    "__class__": "str",
}


def test_what_would_steer_transformers_elsewhere_has_no_effect(saved, caplog) -> None:
    expected = SelOrthoSAE.from_pretrained(saved)
    change_config(saved, **STEERING, id2label=5, return_dict="yes", architectures=5)
    loaded = SelOrthoSAE.from_pretrained(saved)
    assert torch.equal(loaded.W_dec, expected.W_dec) and loaded.config.to_dict() == expected.config.to_dict()
    assert "without effect, as SelOrthoConfig does not know them: ['__class__', 'attn_implementation'" in caplog.text


def test_settings_given_as_arguments_are_checked_too(saved) -> None:
    assert SelOrthoSAE.from_pretrained(saved, l1_coefficient=1).config.l1_coefficient == 1.0
    assert SelOrthoConfig.from_pretrained(saved, lm_name="org/lm").lm_name == "org/lm"
    with pytest.raises(ConfigError, match="l1_coefficient=-1:"):
        SelOrthoSAE.from_pretrained(saved, l1_coefficient=-1)
    assert "give (31, 12)" in refused(saved, d_sae=31)
    assert "give (31, 12)" in refused(saved, config=SelOrthoConfig.from_pretrained(saved, d_sae=31))
    assert "cannot load the SAE" in refused(saved, no_such_argument=1)
    loaded, info = SelOrthoSAE.from_pretrained(saved, config=saved, output_loading_info=True)
    assert loaded.config.name_or_path == str(saved) and not info["missing_keys"]
    assert isinstance(AutoModel.from_pretrained(saved), SelOrthoSAE)


# A module that leaves a trace where it is imported, under the names that folders may call their code by.
EVIL = """
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import {config} as EvilConfig, {model} as EvilModel, PreTrainedTokenizerFast as EvilTokenizer
"""
LOADERS = """
import json, os, sys
from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.language_models.loading import load_language_model
from transformers import AutoModelForCausalLM

marker, *folders = sys.argv[1:]
found = []
def attempt(load, *arguments, **options):
    try:
        found.append([type(load(*arguments, **options)).__name__, os.path.exists(marker)])
    except SelOrthoError as error:
        found.append([str(error), os.path.exists(marker)])

sae, known, unknown, pickled = folders
attempt(SelOrthoSAE.from_pretrained, sae)
attempt(SelOrthoConfig.from_pretrained, sae)
attempt(load_language_model, known, dtype="float32")
attempt(load_language_model, unknown, dtype="float32")
attempt(load_language_model, pickled, dtype="float32")
attempt(AutoModelForCausalLM.from_pretrained, known, trust_remote_code=True)
print(json.dumps(found))
"""


def plant(folder: Path, marker: Path, config: str, model: str) -> None:
    """Give a saved model code of its own, and name it in every place where transformers looks for it."""
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker), config=config, model=model))
    auto_map = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModel": "evil.EvilModel",
        "AutoModelForCausalLM": "evil.EvilModel",
    }
    change_config(folder, auto_map=auto_map)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():
        names = {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}}
        tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), **names}))


class Trap:
    """A pickle of it runs a command where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_code_of_a_folder_is_not_run(saved, tiny_lm_dir, tmp_path) -> None:
    marker = tmp_path / "executed"
    known, unknown, pickled = (
        Path(shutil.copytree(tiny_lm_dir("llama"), tmp_path / name)) for name in ("known", "unknown", "pickled")
    )
    plant(saved, marker, "PreTrainedConfig", "PreTrainedModel")
    for folder in (known, unknown):
        plant(folder, marker, "LlamaConfig", "LlamaForCausalLM")
    change_config(unknown, model_type="unheard_of")  # nothing but its own code could load it
    (pickled / "model.safetensors").unlink()
    torch.save(Trap(marker), pickled / "pytorch_model.bin")
    done = subprocess.run(
        [sys.executable, "-c", LOADERS, marker, saved, known, unknown, pickled],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        **{"capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stderr
    *ours, trusting = json.loads(done.stdout.splitlines()[-1])
    assert [said for said, _ in ours[:3]] == ["SelOrthoSAE", "SelOrthoConfig", "LanguageModel"]
    assert ours[3][0].startswith("cannot load the language model")  # which has nothing but its own code
    assert "pickle" in ours[4][0] and "safetensors" in ours[4][0]
    assert [executed for _, executed in ours] == [False] * 5
    assert trusting[1]  # whoever asks transformers for it gets it: the trap works

    marker.unlink()
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # so does the other
