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
from hf_selortho.utils.safe_paths import target_outside

ROOT = Path(__file__).parents[1]
COMMIT = "c0ffee" + "0" * 34


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


def with_header(folder: Path, header: bytes, length: int | None = None) -> None:
    """Write another header, over the values that are there."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    values = data[8 + int.from_bytes(data[:8], "little") :]
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + values)


def refused(folder: Path, **arguments: Any) -> str:
    with pytest.raises(SelOrthoError) as caught:
        SelOrthoSAE.from_pretrained(folder, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a process takes on top to find out that it must not load a folder.
MEASURE = """
import json, resource, sys
from hf_selortho import SelOrthoError, SelOrthoSAE

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

good, *bad = sys.argv[1:]
SelOrthoSAE.from_pretrained(good)  # what libraries take once
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 10**9,) * 2)
found = []
for folder in bad:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before, said = status("VmHWM"), None
    try:
        SelOrthoSAE.from_pretrained(folder)
    except SelOrthoError as error:
        said = str(error)
    found.append([said, status("VmHWM") - before])
print(json.dumps(found))
"""
CLAIMS: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "d_sae": (
        lambda folder, header: change_config(folder, d_sae=10**9),
        r"W_dec has the shape \(30, 12\), .* give \(1000000000, 12\): the weights do not fit its config.json",
    ),
    "d_in": (
        lambda folder, header: change_config(folder, d_in=10**9),
        r"W_dec has the shape \(30, 12\), .* give \(30, 1000000000\)",
    ),
    "header": (
        lambda folder, header: with_header(folder, header.replace(b"[30,12]", b"[1000000000,12]")),
        r"model\.safetensors is damaged or incomplete",
    ),
    "header length": (
        lambda folder, header: with_header(folder, header, 4 * 10**9),
        "has a header of 4,000,000,000 bytes",
    ),
    "long header": (
        lambda folder, header: with_header(folder, header + b" " * (300 << 20)),
        r"has a header of [\d,]+ bytes, expected at most 1,048,576",
    ),
    "long config": (
        lambda folder, header: change_config(folder, notes="x" * (300 << 20)),
        r"config\.json has [\d,]+ bytes, expected at most 1,048,576",
    ),
    # transformers would make a name for each
    "labels": (lambda folder, header: change_config(folder, num_labels=10**9), "loaded"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_file_claims_is_not_allocated(saved, tmp_path) -> None:
    data = (saved / "model.safetensors").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    folders = [Path(shutil.copytree(saved, tmp_path / name)) for name in CLAIMS]
    for folder, (change, _) in zip(folders, CLAIMS.values(), strict=True):
        change(folder, header)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, saved, *folders], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    for (said, taken), (_, message) in zip(json.loads(done.stdout.splitlines()[-1]), CLAIMS.values(), strict=True):
        assert re.search(message, said or "loaded"), said
        assert taken < 200e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(W_enc=torch.zeros(30, 12)), r"W_enc has the shape \(30, 12\), .* \(12, 30\)"),
        (lambda w: w.update(b_enc=torch.zeros(1, 30)), r"b_enc has the shape \(1, 30\), .* \(30,\)"),
        (lambda w: w.update(input_scale=torch.ones(1)), r"input_scale has the shape \(1,\), .* \(\)"),
        (lambda w: w.update(b_dec=torch.zeros(12, dtype=torch.int64)), "b_dec is of dtype I64, expected one of BF16"),
        (lambda w: w.update(b_dec=torch.zeros(12, dtype=torch.uint8)), "b_dec is of dtype U8"),
        (lambda w: w.update(b_dec=torch.zeros(12, dtype=torch.bool)), "b_dec is of dtype BOOL"),
        (lambda w: w.update(b_dec=torch.zeros(12, dtype=torch.complex64)), "b_dec is of dtype C64"),
        (lambda w: w.update(b_dec=torch.zeros(12, dtype=torch.float8_e4m3fn)), "b_dec is of dtype F8_E4M3"),
        (lambda w: w.pop("W_dec"), r"does not hold the weights of a SelOrthoSAE \(missing: W_dec\)"),
        (lambda w: w.update(threshold=torch.ones(())), r"\(unexpected: threshold\): is it another kind of model"),
        (lambda w: [w.pop(key) for key in list(w)], "missing: W_dec, W_enc, b_dec, b_enc, input_mean and 1 more"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_named(change, message, saved) -> None:
    change_weights(saved, change)
    found = refused(saved)
    assert re.search(message, found), found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_dtypes_are_read(dtype, saved) -> None:
    change_weights(saved, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    assert SelOrthoSAE.from_pretrained(saved, dtype=torch.float32).W_dec.dtype == torch.float32


def test_only_safetensors_are_read(saved) -> None:
    weights = saved / "model.safetensors"
    torch.save(load_file(weights), saved / "pytorch_model.bin")
    weights.unlink()
    message = "holds no model.safetensors; other formats, such as pytorch_model.bin, can run code"
    assert message in refused(saved)
    assert message in refused(saved, use_safetensors=False)
    weights.mkdir()
    assert message in refused(saved)
    (saved / "config.json").unlink()
    assert "it holds no config.json" in refused(saved)
    assert "no such local path" in refused(saved / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_that_lead_out_of_the_folder_are_refused(name, saved, tmp_path) -> None:
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    assert f"{saved / name} leads out of {saved}, to {tmp_path / name}" in refused(saved)
    (saved / name).unlink()
    (saved / name).symlink_to(f"../{name}")
    assert "leads out of" in refused(saved)
    (saved / name).unlink()
    (tmp_path / name).rename(saved / f"kept-{name}")
    (saved / name).symlink_to(f"kept-{name}")  # inside
    SelOrthoSAE.from_pretrained(saved)
    linked = tmp_path / "linked"
    linked.symlink_to(saved)  # the user's own choice
    SelOrthoSAE.from_pretrained(linked)
    (saved / name).unlink()
    (saved / name).symlink_to(name)  # to itself
    assert "holds no" in refused(saved)


def test_a_snapshot_of_the_hubs_cache_is_a_folder_like_any_other(saved, tmp_path) -> None:
    repository = tmp_path / "models--org--sae"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    (snapshot / "sub").mkdir(parents=True)
    blobs.mkdir()
    for path in saved.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
        (snapshot / "sub" / path.name).symlink_to(f"../../../blobs/{path.name}")
    expected = load_file(blobs / "model.safetensors")["W_dec"]
    for folder, subfolder in ((snapshot, ""), (snapshot, "sub"), (snapshot / "sub", "")):
        assert torch.equal(SelOrthoSAE.from_pretrained(folder, subfolder=subfolder).W_dec, expected)

    (blobs / "model.safetensors").rename(tmp_path / "secret")
    (blobs / "model.safetensors").symlink_to(tmp_path / "secret")  # a blob that is itself a way out
    assert "leads out of" in refused(snapshot)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert "leads out of" in refused(snapshot)
    branch = repository / "snapshots" / "main"  # no commit
    snapshot.rename(branch)
    assert "leads out of" in refused(branch)


def test_where_paths_lead(tmp_path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    assert target_outside(folder, folder / "below" / "file") is None
    assert target_outside(folder, folder / "below" / ".." / "file") is None
    assert target_outside(folder, folder / ".." / "file") == tmp_path / "file"
    assert target_outside(folder, Path("/etc/passwd")) == Path("/etc/passwd").resolve()
    assert target_outside(folder, tmp_path / "folder2") == tmp_path / "folder2"  # not a matter of letters
    (folder / "out").symlink_to(tmp_path)
    assert target_outside(folder, folder / "out" / "file") == tmp_path / "file"
    (folder / "loop").symlink_to("loop")
    assert target_outside(folder, folder / "loop") is not None


def sharded(tmp_path: Path) -> tuple[Path, SelOrthoSAE]:
    sae = SelOrthoSAE(SelOrthoConfig(d_in=12, d_sae=30))
    sae.save_pretrained(tmp_path / "parts", max_shard_size="1KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    return tmp_path / "parts", sae


def test_weights_in_several_files_are_read(tmp_path) -> None:
    folder, sae = sharded(tmp_path)
    loaded = SelOrthoSAE.from_pretrained(folder)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in sae.state_dict().items())
    sae.save_pretrained(tmp_path / "other", variant="half")
    assert torch.equal(SelOrthoSAE.from_pretrained(tmp_path / "other", variant="half").W_dec, sae.W_dec)
    assert "holds no model.safetensors" in refused(tmp_path / "other")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"W_enc": "../sae/model.safetensors"}, "names '../sae/model.safetensors': expected safetensors files beside"),
        ({"W_enc": "/etc/passwd"}, "names '/etc/passwd': expected safetensors files beside"),
        ({"W_enc": "weights.bin"}, "names 'weights.bin': expected"),
        ({"W_enc": 5}, "names '5': expected"),
        ({"W_enc": ".."}, "names '..': expected"),
        ({"W_enc": "absent.safetensors"}, "names 'absent.safetensors', which is missing"),
        ({"W_enc": "x" * 10_000 + ".safetensors"}, r"names 'x+', which is missing"),
        ({"W_enc": "out.safetensors"}, "out.safetensors leads out of"),
        ({}, "names no file"),
        (None, "names no file"),
        (["a.safetensors"], "names no file"),
    ],
)
def test_an_index_names_files_beside_it(weight_map, message, saved, tmp_path) -> None:
    folder, _ = sharded(tmp_path)
    (folder / "out.safetensors").symlink_to(saved / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = refused(folder)
    assert re.search(message, found), found


def test_the_files_of_an_index_hold_each_tensor_once(tmp_path) -> None:
    folder, _ = sharded(tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["W_enc"]
    shutil.copy(folder / file, folder / "again.safetensors")
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "x": "again.safetensors"}}))
    assert "W_enc is in" in refused(folder)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in content["weight_map"].items() if v != file}}))
    assert "missing: " in refused(folder)
    index.write_text("[" * 100_000)
    assert "is not valid JSON" in refused(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"not JSON", "is not valid JSON"),
        (b"\xff\xfe\xfa", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"a":' * 200_000, "is not valid JSON|expected at most 1,048,576"),
        (b"[]", "holds a JSON list, expected an object"),
        (b"null", "holds a JSON NoneType"),
        (b"5", "holds a JSON int"),
        (b'{"model_type": "llama"}', "model_type='llama', expected 'selortho_sae': this is no SAE"),
        (b'{"model_type": []}', r"model_type=\[\], expected 'selortho_sae'"),
        (b"{}", "d_in is missing"),
        (b'{"d_in": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
        (b'{"d_in": 8, "d_sae": ' + b"9" * 400 + b"}", "d_sae=9.*9: expected a number below 2"),
        (b'{"d_in": 8, "d_sae": 1e999}', "d_sae=inf: expected int or None, not float"),
    ],
)
@pytest.mark.parametrize("load", [SelOrthoConfig.from_pretrained, SelOrthoSAE.from_pretrained])
def test_what_is_no_config_is_refused(load, content, message, saved) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(saved)
    assert re.search(message, str(caught.value)) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8': expected one of bfloat16"),
        ({"dtype": "nn"}, "dtype='nn': expected one of"),
        ({"dtype": 5}, "dtype=5: expected one of"),
        ({"dtype": {"a": "float32"}}, "dtype={'a': 'float32'}: expected one of"),
        ({"architectures": 5}, "architectures=5: expected list or None, not int"),
        ({"id2label": 5}, "id2label=5: expected dict or None, not int"),
        ({"id2label": {"x": "y"}}, "transformers refuses these settings: invalid literal"),
        ({"return_dict": "yes"}, "return_dict='yes': expected bool or None, not str"),
        ({"is_encoder_decoder": None}, "is_encoder_decoder=None: expected bool"),
        ({"chunk_size_feed_forward": "0"}, "chunk_size_feed_forward='0': expected int"),
        ({"transformers_version": []}, r"transformers_version=\[\]: expected str or None"),
        ({f"x{number}": 0 for number in range(101)}, "101 settings that SelOrthoConfig does not know, such as 'x0'"),
        ({"d_sae": "x" * 100_000}, "d_sae='x+...x+': expected int"),
        ({"matryoshka_prefixes": [10**30]}, "matryoshka_prefixes=1.*: expected a number below 2"),
        ({"l1_coefficient": 10**400}, "l1_coefficient=1.*0: expected a number below 2"),
        (
            {"ortho_coeficient": 1},
            "ortho_coeficient is not a setting of SelOrthoConfig; did you mean ortho_coefficient",
        ),
    ],
)
def test_wrong_values_in_a_config_are_named(changes, message, saved) -> None:
    change_config(saved, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        SelOrthoSAE.from_pretrained(saved)
    assert len(str(caught.value)) < 1000


STEERING = {
    "transformers_weights": "../other/model.safetensors",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "configuration_files": ["config.5.0.0.json"],
    "fusion_config": {"patch_embeddings": True},
    "per_layer_config": {"0": {"d_sae": 5}},
    "attn_implementation": "kernels-community/evil",
    "num_labels": 3,
    "to_dict": 5,
    "self": 5,
    "__class__": "str",
}


@pytest.mark.parametrize("key", STEERING)
def test_what_would_steer_transformers_elsewhere_has_no_effect(key, saved, caplog) -> None:
    expected = SelOrthoSAE.from_pretrained(saved)
    change_config(saved, **{key: STEERING[key]})
    loaded = SelOrthoSAE.from_pretrained(saved)
    assert torch.equal(loaded.W_dec, expected.W_dec) and loaded.config.to_dict() == expected.config.to_dict()
    assert f"without effect, as SelOrthoConfig does not know them: ['{key}']" in caplog.text


def test_other_files_of_the_folder_are_not_looked_at(saved, tmp_path) -> None:
    """A name of transformers' distributed checkpoints, an adapter, a pickle."""
    expected = SelOrthoSAE.from_pretrained(saved)
    save_file({"W_dec": torch.zeros(30, 12)}, saved / "shard-00000-model-00001-of-00001.safetensors")
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    (saved / "pytorch_model.bin").write_bytes(b"no pickle")
    (saved / "model.safetensors.index.json").write_text("no JSON")
    assert torch.equal(SelOrthoSAE.from_pretrained(saved).W_dec, expected.W_dec)


def test_settings_given_as_arguments_are_checked_too(saved) -> None:
    assert SelOrthoSAE.from_pretrained(saved, l1_coefficient=1).config.l1_coefficient == 1.0
    assert SelOrthoConfig.from_pretrained(saved, lm_name="org/lm").lm_name == "org/lm"
    with pytest.raises(ConfigError, match="l1_coefficient=-1.0"):
        SelOrthoSAE.from_pretrained(saved, l1_coefficient=-1)
    assert "give (31, 12)" in refused(saved, d_sae=31)
    config = SelOrthoConfig.from_pretrained(saved, d_sae=31)
    assert "give (31, 12)" in refused(saved, config=config)
    loaded, info = SelOrthoSAE.from_pretrained(saved, config=saved, output_loading_info=True)
    assert loaded.config.name_or_path == str(saved) and not any(info["missing_keys"])
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
    assert "it needs code of its own repository, which is not run" in ours[3][0]
    assert "pickle" in ours[4][0] and "safetensors" in ours[4][0]
    assert [executed for _, executed in ours] == [False] * 5
    assert trusting[1]  # whoever asks transformers for it gets it: the trap works

    marker.unlink()
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # so does the other
