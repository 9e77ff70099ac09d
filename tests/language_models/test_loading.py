from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from hf_selortho.errors import SelOrthoError
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.embedded import GGUF_SHA256
from hf_selortho.language_models.loading import LanguageModel, find_decoder_layers, load_language_model

TinyDir = Callable[[str], Path]
_SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("arch", "path"),
    [("gemma2", "model.layers"), ("gemma3", "model.layers"), ("llama", "model.layers"), ("gpt2", "transformer.h")],
)
def test_loads_frozen_with_its_decoder_layers(arch: str, path: str, tiny_lm: Callable[[str], LanguageModel]) -> None:
    lm = tiny_lm(arch)
    assert (lm.layers_path, len(lm.layers), lm.d_model) == (path, 4, 32)
    assert lm.layers is lm.model.get_submodule(path)
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}


def test_finds_the_layers_of_other_architectures() -> None:
    tower = {**_SMALL, "image_size": 28, "patch_size": 14}  # as deep as the language model
    text = {**_SMALL, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64}
    experts = {**text, "num_local_experts": 3, "num_experts_per_tok": 1}  # lists of the same length in every layer
    configs = {
        "model.decoder.layers": OPTConfig(vocab_size=64, ffn_dim=32, word_embed_proj_dim=16, **_SMALL),
        "gpt_neox.layers": GPTNeoXConfig(vocab_size=64, **_SMALL),
        "model.language_model.layers": Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4),
        "model.layers": MixtralConfig(**experts),
    }
    for expected, config in configs.items():
        model = AutoModelForCausalLM.from_config(config)
        assert find_decoder_layers(model) == expected and len(model.get_submodule(expected)) == 3


def test_model_without_one_stack_of_layers_lists_what_it_has() -> None:
    model = nn.Module()
    model.first, model.second = nn.ModuleList([nn.Linear(2, 2)] * 3), nn.ModuleList([nn.Linear(2, 2)] * 3)
    model.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(num_hidden_layers=3))
    model.get_decoder = lambda: model
    with pytest.raises(SelOrthoError, match=r"length 3.*first \(3\), second \(3\)"):
        find_decoder_layers(model)


def test_revision_of_a_folder_changes_with_its_weights(tiny_lm_dir: TinyDir, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_dir("llama"), folder)
    first = load_language_model(str(folder)).revision
    assert first is not None and first.startswith("local-sha256:")
    assert load_language_model(str(folder), revision=first).revision == first

    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert load_language_model(str(folder)).revision != first
    with pytest.raises(SelOrthoError, match=f"not at {first}"):
        load_language_model(str(folder), revision=first)


def test_dtype_device_and_name(tiny_lm_dir: TinyDir) -> None:
    folder = str(tiny_lm_dir("gemma3"))
    assert load_language_model(folder).model.dtype in (torch.bfloat16, torch.float32)
    assert load_language_model(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(SelOrthoError, match='unknown dtype "int3": choose auto, float32'):
        load_language_model(folder, dtype="int3")
    with pytest.raises(SelOrthoError, match="neither on the Hub nor a local path"):
        load_language_model("./no/such/folder")
    with pytest.raises(SelOrthoError, match="cannot load the language model .*: Expected one of cpu, cuda.* toaster"):
        load_language_model(folder, device="toaster")


def _setting(**changes: object) -> Callable[[Path], object]:
    """A change of config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _as_pickle(path: Path) -> None:
    path.rename(path.with_name("pytorch_model.bin")).write_bytes(b"abc")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "cannot load the language model"),
    "wrong value": (_setting(hidden_size="wide"), "cannot load the language model"),
    "unknown type": (lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'), "abacus"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load the language model"),
    "pickle that is none": (lambda folder: _as_pickle(folder / "model.safetensors"), "its files are damaged"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 9000), "cannot load the language model"),
    "missing tensors": (_setting(num_hidden_layers=6), r"lack \d+ tensors of its config, such as model.layers.4"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_folder_is_one_line(damage: str, tiny_lm_dir: TinyDir, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_dir("llama"), folder)
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(SelOrthoError, match=message) as caught:
        load_language_model(str(folder))
    assert "\n" not in str(caught.value)


def test_a_decoder_that_says_is_decoder_false_is_one(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = GPTNeoXConfig(vocab_size=len(tiny_tokenizer), **_SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    lm = load_language_model(str(tmp_path))
    assert ActivationCapture(lm, [0, 2]).layers == (0, 2) and lm.layers_path == "gpt_neox.layers"


@pytest.mark.slow
def test_embedded_gemma_is_a_language_model(embedded_lm: LanguageModel) -> None:
    assert (embedded_lm.d_model, len(embedded_lm.layers), embedded_lm.layers_path) == (640, 18, "model.layers")
    assert embedded_lm.revision == f"gguf-sha256:{GGUF_SHA256}"
    with pytest.raises(SelOrthoError, match="is at revision gguf-sha256"):
        load_language_model("gemma-3-270m", revision="main")
    ids = [embedded_lm.tokenizer.bos_token_id, *embedded_lm.tokenizer(NEWS, add_special_tokens=False).input_ids]
    tokens = torch.tensor([ids])  # (1, t)
    with torch.inference_mode():
        logits = embedded_lm.model(input_ids=tokens).logits[0, :-1].float()
    assert nn.functional.cross_entropy(logits, tokens[0, 1:]).exp() < 60  # a random model: about 262144


NEWS = (
    "LONDON (Reuters) - Oil prices rose on Tuesday after producers in the Gulf of Mexico shut platforms ahead of a "
    "storm that forecasters expect to reach the coast of Texas by the end of the week. Traders said that stocks of "
    "heating oil were already low for the season, and that any delay in deliveries would be felt at once."
)
