"""Language models that are not made like Llama: each trains, or is refused in one line before anything is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedTokenizerFast

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.commands import cache, evaluate, index, train
from hf_selortho.data.contexts import Cutter
from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation.evaluator import evaluate_saes
from hf_selortho.features import FeatureCapture
from hf_selortho.features.logit_lens import find_final_norm, top_logits
from hf_selortho.language_models.capture import ActivationCapture, only
from hf_selortho.language_models.loading import check_context_length, load_language_model

WIDTH, LAYER = 32, 1
TEXT = {
    "vocab_size": 512, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
TOWER = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}  # as deep
TOWER |= {"image_size": 28, "patch_size": 14}
GPT = {"vocab_size": 512, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
ALTUP = {"num_hidden_layers": 4, "laurel_rank": 4, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8}
ALTUP |= {"num_kv_shared_layers": 1, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4}
ALTUP |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": TEXT,
    "gpt2": {**GPT, "n_positions": 16},
    "openai-gpt": GPT,  # a layer returns a list
    "mamba": {**TEXT, "state_size": 4},
    "mpt": {"vocab_size": 512, "d_model": WIDTH, "n_layers": 3, "n_heads": 4, "max_seq_len": 16},
    "mistral3": {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": {"model_type": "pixtral", **TOWER}},
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **TOWER},
        "image_token_index": 511,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {"depth": 3, "hidden_size": 16, "out_hidden_size": WIDTH, "num_heads": 2},
        "image_token_id": 511,
    },
    "gemma3": {"text_config": TEXT, "vision_config": TOWER, "mm_tokens_per_image": 4, "image_token_index": 511},
    "gemma3n_text": {**TEXT, **ALTUP},  # four residual streams
    "gemma3_text": {**TEXT, "use_bidirectional_attention": True},  # as EmbeddingGemma has it
    "bert": TEXT,
    "xmod": TEXT,  # asks for a language beside the text
    "t5": {"d_model": WIDTH, "num_layers": 3, "vocab_size": 512},
    "vit": TOWER,
}


@pytest.fixture(scope="module")
def model_dir(tiny_tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """`model_dir("llama", vocab_size=600)`: the folder of a small random language model, with the tiny tokenizer."""

    def build(kind: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        config = AutoConfig.for_model(kind, **{**MODELS[kind], **changes})
        auto_models: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModel)
        for make in auto_models:
            if type(config) in make._model_mapping:
                make.from_config(config).save_pretrained(folder)
                break
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return build


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def as_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')


def configured(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def retokenized(**tokens: str) -> Callable[[Path], object]:
    """Give the tokenizer tokens behind its last one: `word="zebra"` for one that texts hold, else special ones."""

    def change(folder: Path) -> None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_tokens([tokens[name] for name in tokens if name == "word"])
        tokenizer.add_special_tokens({name: token for name, token in tokens.items() if name != "word"})
        tokenizer.save_pretrained(folder)

    return change


def nothing(folder: Path) -> None:
    """Leave the model as it is."""


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((kind, nothing) for kind in ("openai-gpt", "mamba", "mistral3", "llava", "qwen2_5_vl", "gemma3")),
        pytest.param("llama", retokenized(pad_token="[PAD]"), id="llama-pad token without embedding"),
    ],
)
def test_it_is_read_replaced_and_measured(kind, change, model_dir, sample_documents) -> None:
    folder = model_dir(kind)
    change(folder)
    lm = load_language_model(str(folder), dtype="float32")
    capture = ActivationCapture(lm, LAYER)
    contexts = Cutter(lm.tokenizer, 24).cut(list(enumerate(sample_documents[:12])))
    assert lm.d_model == WIDTH and len({len(context.input_ids) for context in contexts}) > 1  # some are padded
    assert only(capture.capture_all(contexts).by_layer).isfinite().all()

    eye = torch.eye(WIDTH)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=WIDTH, d_sae=2 * WIDTH, layer=LAYER)).eval()
    sae.load_state_dict({**sae.state_dict(), "W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye])})
    (evaluation,) = evaluate_saes([sae], capture, contexts, ce_samples=8, progress=False)
    assert evaluation.metrics["ce_reconstruction"] == pytest.approx(evaluation.metrics["ce_clean"], rel=1e-4)
    assert evaluation.metrics["ce_zero_ablation"] != pytest.approx(evaluation.metrics["ce_clean"], rel=1e-4)
    if kind == "openai-gpt":  # each of its layers ends with a norm, and no other comes behind the last
        with pytest.raises(SelOrthoError, match="expected one norm after transformer.h, found none"):
            find_final_norm(lm)
        return
    assert all(len(top.positive) == 3 for top in top_logits(lm, sae.W_dec[:2], k=3, progress=False))


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "four streams": ("gemma3n_text", nothing, r"layer 1 of .* gives \(4, 2, 8, 32\) for .*expected \(2, 8, 32\)"),
    "both directions": ("bert", nothing, r"\(bert\) reads its text in both directions"),
    "both directions in a decoder": ("gemma3_text", nothing, r"\(gemma3_text\) reads its text in both directions"),
    "cannot compute": ("xmod", nothing, r"cannot read a text \(ValueError: Input language unknown.*choose another"),
    "encoder and decoder": ("t5", nothing, r"encoder-decoder model \(t5\)"),
    "no language": ("vit", nothing, r"is no language model \(its type is vit\)"),
    "larger tokenizer": ("llama", retokenized(word="zebra"), "token ids up to 512, .* embeddings for 0 to 511; put"),
    "BOS without embedding": ("llama", retokenized(bos_token="[B]"), "token ids up to 512"),
    "no tokenizer": ("llama", without_tokenizer, "it has no tokenizer that can be read; put the tokenizer.json"),
    "no tokenizer, and an empty one made": ("gpt2", without_tokenizer, "knows no tokens; put the tokenizer.json"),
    "adapter": ("llama", as_adapter, r"holds an adapter .* merge it into its model with PEFT"),
    "missing library": (
        "llama",
        configured(quantization_config={"quant_method": "hqq"}),
        "it needs a library that is missing .* or choose the model with plain weights",
    ),
    "code of its own": (
        "llama",
        configured(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}),
        "code of its own repository, which is not run",
    ),
    "position limit": ("gpt2", nothing, "context_length 32: .* reads at most 16 tokens at once"),
    "position limit by another name": ("mpt", nothing, "context_length 32: .* reads at most 16 tokens at once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_line(case, model_dir) -> None:
    kind, change, message = REFUSED[case]
    folder = model_dir(kind)
    change(folder)
    with pytest.raises(SelOrthoError, match=message) as caught:
        lm = load_language_model(str(folder), dtype="float32")
        ActivationCapture(lm, LAYER)
        check_context_length(lm, 32)
    assert "\n" not in str(caught.value) and re.escape(str(folder)) in re.escape(str(caught.value))


@pytest.mark.parametrize("case", ["four streams", "position limit", "larger tokenizer"])
@pytest.mark.parametrize("command", [train, cache, evaluate, index, FeatureCapture], ids=lambda c: c.__name__)
def test_every_command_refuses_it_before_it_writes(command, case, model_dir, sample_text_files, tmp_path) -> None:
    kind, change, message = REFUSED[case]
    folder, output = model_dir(kind), tmp_path / "out"
    change(folder)
    text = ["--dataset", str(sample_text_files.csv), "--cpu", "--lm_dtype", "float32", "--model", str(folder)]
    config = SelOrthoConfig(d_in=WIDTH, d_sae=64, layer=LAYER, context_length=32, lm_name=str(folder))
    sae = SelOrthoSAE(config)
    sae.save_pretrained(tmp_path / "sae")
    with pytest.raises(SelOrthoError, match=message):
        if command is FeatureCapture:
            FeatureCapture(sae)
        elif command in (evaluate, index):
            command.main([str(tmp_path / "sae"), *text, "--output", str(output), "--held_out_fraction", "0.5"])
        else:
            own = ["--layer", str(LAYER), "--buffer_contexts", "4096"] if command is train else ["--layers", str(LAYER)]
            command.main([*text, *own, "--context_length", "32", "--output_dir", str(output)])
    assert not output.exists()
