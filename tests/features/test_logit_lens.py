"""The tokens whose logits a direction raises and lowers, against the language models' own norms and unembeddings."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from hf_selortho import SelOrthoError
from hf_selortho.features.logit_lens import find_final_norm, top_logits, written_tokens
from hf_selortho.language_models.loading import LanguageModel, find_decoder_layers
from hf_selortho.language_models.token_text import TokenTexts

ARCHITECTURES = ["gemma2", "gemma3", "llama", "gpt2"]
PADDING_ROWS = 40  # of the vocabulary, beyond the tokenizer's last token


def random_lm(config: PreTrainedConfig, tokenizer) -> LanguageModel:
    """A language model whose norms scale and shift, too."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.normal_(1, 0.5)
    return LanguageModel(model, tokenizer, "random", "none", find_decoder_layers(model))


@pytest.fixture(params=ARCHITECTURES)
def lm(request, tiny_lm_dir, tiny_tokenizer) -> LanguageModel:
    config = AutoConfig.from_pretrained(tiny_lm_dir(request.param))
    config.vocab_size += PADDING_ROWS
    return random_lm(config, tiny_tokenizer)


@pytest.fixture
def directions() -> Tensor:
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(0))


def brute_force(lm: LanguageModel, direction: Tensor) -> Tensor:
    """Logits (tokens,) of the tokens from the 5th to the tokenizer's last one, through the model's own modules."""
    gpt2 = type(lm.model).__name__ == "GPT2LMHeadModel"
    final = lm.model.get_submodule("transformer.ln_f" if gpt2 else "model.norm")
    long = 1e3 * direction / direction.norm()  # no epsilon matters
    head = lm.model.get_output_embeddings()
    logits = (head(final(long[None])) - head(final(torch.zeros(1, len(direction)))))[0, 4 : len(lm.tokenizer)]
    return logits - logits.mean()


def check(lm: LanguageModel, directions: Tensor, k: int = 6) -> None:
    for direction, (raised, lowered) in zip(directions, top_logits(lm, directions, k, progress=False), strict=True):
        logits = brute_force(lm, direction)
        for effects, expected in ((raised, logits.topk(k)), (lowered, logits.topk(k, largest=False))):
            assert [effect.token_id for effect in effects] == (expected.indices + 4).tolist()
            torch.testing.assert_close(torch.tensor([e.logit for e in effects]), expected.values, atol=1e-3, rtol=1e-3)
            assert [effect.token for effect in effects] == [TokenTexts(lm.tokenizer).token(e.token_id) for e in effects]


def test_as_the_language_model_computes_it(lm, directions) -> None:
    check(lm, directions)


@pytest.mark.parametrize("chunk_bytes", [1, 5000])
def test_chunks_change_nothing(tiny_lm, directions, chunk_bytes: int) -> None:
    lm = tiny_lm("gemma2")
    expected = top_logits(lm, directions, progress=False)
    for ours, theirs in zip(top_logits(lm, directions, progress=False, chunk_bytes=chunk_bytes), expected, strict=True):
        for one, other in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
            assert one == replace(other, logit=pytest.approx(other.logit, rel=1e-4, abs=1e-4))


def test_the_length_of_a_direction_does_not_matter(tiny_lm, directions) -> None:
    lm = tiny_lm("gpt2")
    expected = top_logits(lm, directions, progress=False)
    for factor in (1e-6, 1e4):
        for ours, theirs in zip(top_logits(lm, factor * directions, progress=False), expected, strict=True):
            assert [e.token_id for e in ours[0]] == [e.token_id for e in theirs[0]]
            assert [e.logit for e in ours[0]] == pytest.approx([e.logit for e in theirs[0]], rel=1e-4)


def test_a_model_in_bfloat16_is_read_in_float32(tiny_lm, directions) -> None:
    lm = tiny_lm("gpt2")
    coarse = replace(lm, model=copy.deepcopy(lm.model).bfloat16())
    widened = replace(lm, model=copy.deepcopy(coarse.model).float())
    assert top_logits(coarse, directions, progress=False) == top_logits(widened, directions, progress=False)
    assert coarse.model.dtype is torch.bfloat16


def test_a_direction_of_nothing_has_no_effects(tiny_lm, directions) -> None:
    directions[2] = 0
    effects = top_logits(tiny_lm("gemma3"), directions, progress=False)
    assert effects[2] == ([], []) and effects[1].positive and effects[1].negative
    assert top_logits(tiny_lm("gemma3"), directions[:0], progress=False) == []


def test_more_tokens_than_there_are(tiny_lm, directions) -> None:
    lm = tiny_lm("llama")
    raised, lowered = top_logits(lm, directions, 10_000, progress=False)[0]
    assert len(raised) == len(lm.tokenizer) - 4  # special tokens
    assert [e.token_id for e in raised] == [e.token_id for e in reversed(lowered)]
    assert sum(e.logit for e in raised) == pytest.approx(0, abs=1e-2)


def test_placeholders_and_special_tokens_are_left_out(tiny_tokenizer) -> None:
    tokenizer: PreTrainedTokenizerFast = copy.deepcopy(tiny_tokenizer)
    ordinary = ["<h1>", "[12]", "unused1", "<unused>"]
    tokenizer.add_tokens(["<unused0>", "[unused12]", "<|reserved_special_token_3|>", "[PAD1519]", *ordinary])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>"]})
    kept = set(written_tokens(tokenizer, len(tokenizer) + 9).tolist())
    assert kept == {*range(4, len(tiny_tokenizer)), *tokenizer.convert_tokens_to_ids(ordinary)}
    assert max(written_tokens(tokenizer, 100).tolist()) == 99


def test_models_without_one_final_norm(tiny_tokenizer, directions) -> None:
    vocabulary = {"vocab_size": len(tiny_tokenizer)}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    post_norm = OPTConfig(do_layer_norm_before=False, word_embed_proj_dim=32, **sizes, **vocabulary)
    with pytest.raises(SelOrthoError, match="OPTForCausalLM.*expected one norm after model.decoder.layers, found none"):
        top_logits(random_lm(post_norm, tiny_tokenizer), directions)
    bloom = random_lm(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **vocabulary), tiny_tokenizer)
    assert find_final_norm(bloom) is bloom.model.transformer.ln_f  # not the norm of the embeddings
    bloom.model.transformer.add_module("second_norm", torch.nn.LayerNorm(32))
    with pytest.raises(SelOrthoError, match="found ln_f, second_norm"):
        top_logits(bloom, directions)


def test_errors(tiny_lm, directions) -> None:
    lm = tiny_lm("gemma2")
    with pytest.raises(SelOrthoError, match=r"directions of shape \(7, 31\): expected \(n, 32\)"):
        top_logits(lm, directions[:, :31])
    directions[3, 0] = torch.nan
    with pytest.raises(SelOrthoError, match="directions hold NaN or infinity in 1 of 7 rows, the first is number 3"):
        top_logits(lm, directions)


@pytest.mark.slow
def test_the_real_gemma_names_what_an_embedding_stands_for(embedded_lm) -> None:
    paris = embedded_lm.tokenizer(" Paris", add_special_tokens=False).input_ids
    embedding = embedded_lm.model.get_input_embeddings().weight[paris].float()
    raised, lowered = top_logits(embedded_lm, embedding, progress=False)[0]
    assert raised[0].token == " Paris" and {" London", " Tokyo"} <= {effect.token for effect in raised}
    assert all("unused" not in effect.token for effect in raised + lowered)
