"""Sites of every architecture of the table, on small random models, beside hooks and sums written here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_selortho import SelOrthoError, configuration_selortho
from hf_selortho.language_models.capture import ActivationCapture, NonFiniteActivationsError, only
from hf_selortho.language_models.contexts import Context
from hf_selortho.language_models.loading import LanguageModel, find_decoder_layers
from hf_selortho.language_models.sites import _FAMILIES, SITES, HookSite, find_site

WIDTH, LAYER, VOCABULARY = 32, 1, 512
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
TOWER = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}  # as deep
TOWER |= {"image_size": 28, "patch_size": 14}
SQUARE = {name: TEXT[name] for name in TEXT if name != "head_dim"} | {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma2", "gemma3_text"), TEXT),
    **dict.fromkeys(("qwen2", "phi3", "olmo", "olmo2", "phi", "gpt_neox"), SQUARE),
    "gemma3": {"text_config": TEXT, "vision_config": TOWER, "mm_tokens_per_image": 4, "image_token_index": 511},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "initializer_range": 0.2},
    "mixtral": {**TEXT, "num_local_experts": 4},
    "qwen2_moe": {**SQUARE, **EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**TEXT, **EXPERTS},
    "olmoe": {**SQUARE, **EXPERTS},
    "gpt_oss": {**TEXT, "num_local_experts": 4},
}
SERIAL = "gpt_neox, one after the other"
OTHER: dict[str, dict[str, Any]] = {
    SERIAL: {**SQUARE, "use_parallel_residual": False},
    "mpt": {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
}
PARALLEL = ("phi", "gpt_neox")
NORMS_AFTER = ("gemma2", "gemma3", "gemma3_text", "olmo2")
PROJECTION = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense", SERIAL: "attention.dense", "phi": "self_attn.dense"}
TOKENS = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(5))
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def lm_of(tiny_tokenizer) -> Callable[[str], LanguageModel]:
    """`lm_of("llama")`: a small random language model whose norms have gains, and its tokenizer."""

    @functools.cache
    def build(kind: str) -> LanguageModel:
        config = AutoConfig.for_model(kind.split(",")[0], **{**MODELS, **OTHER}[kind])
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return LanguageModel(model, tiny_tokenizer, kind, "none", find_decoder_layers(model))

    return build


def read(lm: LanguageModel, site: str) -> Tensor:
    return only(ActivationCapture(lm, LAYER, site=site).hidden_states(TOKENS, torch.ones_like(TOKENS)))


def first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value


@torch.no_grad()
def logits(lm: LanguageModel) -> Tensor:
    return lm.model(input_ids=TOKENS, use_cache=False).logits


def plain_forward(lm: LanguageModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the model, and give what went into and came out of every module of a decoder layer."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str, _module: nn.Module, given: tuple, named: dict, output: Any) -> None:
        inputs[name] = given[0] if given else named["hidden_states"]
        outputs[name] = first(output)

    handles = [
        module.register_forward_hook(functools.partial(record, name), with_kwargs=True)
        for name, module in lm.layers[LAYER].named_modules()
        if "experts" not in name
    ]
    logits(lm)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def test_the_table_is_tried_whole() -> None:
    assert set(MODELS) == set(_FAMILIES)


@pytest.mark.parametrize("kind", [*MODELS, SERIAL])
def test_sites_are_what_a_plain_forward_gives_and_add_up(kind, lm_of) -> None:
    lm = lm_of(kind)
    layer, (inputs, outputs) = lm.layers[LAYER], plain_forward(lm)
    projection = PROJECTION.get(kind, "self_attn.o_proj")
    attention = projection.split(".")[0]
    norm_of_attention = layer.post_attention_layernorm if kind in NORMS_AFTER else nn.Identity()
    norm_of_mlp = layer.post_feedforward_layernorm if kind in NORMS_AFTER else nn.Identity()
    expected = {
        "resid_pre": inputs[""],
        "attn_z": inputs[projection],
        "attn_out": norm_of_attention(outputs[attention]),
        "mlp_in": inputs["mlp"],
        "mlp_out": norm_of_mlp(outputs["mlp"]),
        "resid_post": outputs[""],
    }
    if kind not in PARALLEL:
        expected["resid_mid"] = expected["resid_pre"] + expected["attn_out"]

    at = {site: read(lm, site) for site in expected}
    assert all(torch.equal(at[site], expected[site]) and at[site].norm() > 0.1 for site in expected)
    close(norm_of_attention(layer.get_submodule(projection)(at["attn_z"])), at["attn_out"])
    close(norm_of_mlp(first(layer.mlp(at["mlp_in"]))), at["mlp_out"])
    close(at["resid_pre"] + at["attn_out"] + at["mlp_out"], at["resid_post"])


@pytest.mark.parametrize("kind", [*MODELS, SERIAL])
def test_a_site_replaced_by_itself_changes_nothing_and_moved_goes_into_the_sum(kind, lm_of) -> None:
    lm = lm_of(kind)
    clean, move = logits(lm), torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    for site in SITES:
        if site == "resid_mid" and kind in PARALLEL:
            continue
        capture = ActivationCapture(lm, LAYER, site=site)
        with capture.splice(torch.clone):
            assert torch.equal(logits(lm), clean)
        if site == "attn_z":
            with capture.splice(lambda h: h.roll(1, -1)):
                assert not torch.allclose(logits(lm), clean, atol=1e-3)
            continue
        with capture.splice(lambda h: h + move):
            assert not torch.allclose(logits(lm), clean, atol=1e-3)
            total = read(lm, "resid_pre") + read(lm, "attn_out") + read(lm, "mlp_out")
            close(read(lm, "resid_post"), total + move if site in ("resid_mid", "resid_post") else total)
    assert torch.equal(logits(lm), clean)  # no hook is left


def test_a_target_is_read_beside_its_site_and_replaced_from_it(lm_of) -> None:
    lm = lm_of("llama")
    mlp = lm.layers[LAYER].mlp

    def computed(x: Tensor) -> Tensor:
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

    contexts = [Context(n, row[: 6 + 3 * n].tolist()) for n, row in enumerate(TOKENS)]
    capture = ActivationCapture(lm, [0, LAYER], batch_tokens=12, site="attn_z", target="mlp_out")
    assert (capture.widths, capture.target_widths) == ({0: 64, LAYER: 64}, {0: WIDTH, LAYER: WIDTH})
    assert capture.at(0).target_sites == {0: HookSite("model.layers.0.mlp")}
    assert capture.capture_all(contexts).targets[0].shape == (15, WIDTH)

    capture = ActivationCapture(lm, LAYER, site="mlp_in", target="mlp_out")
    everything = capture.capture_all(contexts)
    close(only(everything.targets), computed(only(everything.by_layer)))
    limit = float(everything.norms.median())
    kept = ActivationCapture(lm, LAYER, limit, site="mlp_in", target="mlp_out").capture_all(contexts)
    few = everything[(everything.norms <= limit).nonzero()[:, 0]]
    assert len(kept) == len(few) == 8 and kept.dropped_sinks == 7
    assert torch.equal(only(kept.targets), only(few.targets)) and torch.equal(only(kept.by_layer), only(few.by_layer))

    clean, how = logits(lm), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    written = lm.model.generate(TOKENS, **how)
    for site, replace in (("mlp_in", lambda x, y: computed(x)), ("resid_mid", lambda x, y: y)):
        capture = ActivationCapture(lm, LAYER, site=site, target="mlp_out")
        with capture.splice_from(replace):
            assert torch.equal(logits(lm), clean) and torch.equal(lm.model.generate(TOKENS, **how), written)
    with capture.splice(torch.zeros_like):  # of the target
        assert not read(lm, "mlp_out").any()
    with ActivationCapture(lm, LAYER, site="resid_mid").splice_from(lambda x, y: x if x is y else x * torch.nan):
        assert torch.equal(logits(lm), clean)


def test_nothing_behind_the_last_site_runs(lm_of) -> None:
    lm, ran = lm_of("gemma3"), []
    capture = ActivationCapture(lm, LAYER, site="resid_pre", target="attn_z")
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in lm.layers[LAYER].named_modules()
    ]
    x, y = capture.read(TOKENS, torch.ones_like(TOKENS))
    for handle in handles:
        handle.remove()
    assert only(x).shape == (2, 12, WIDTH) and only(y).shape == (2, 12, 64)
    assert "self_attn" in ran and "post_attention_layernorm" not in ran and "mlp" not in ran


def test_a_module_is_a_site_at_any_layer(lm_of) -> None:
    lm = lm_of("gemma3")
    path = "model.language_model.layers.2.mlp.down_proj"
    capture = ActivationCapture(lm, 7, site=f"{path}:input")
    assert capture.sites == {7: HookSite(path, "input")} and capture.widths == {7: 48}
    for named, module in (("resid_post", f"{lm.layers_path}.1:output"), ("mlp_in", f"{lm.layers_path}.1.mlp:input")):
        one, other = (read(lm, site) for site in (named, module))
        assert torch.equal(one, other)
    by_name = ActivationCapture(lm, LAYER, site=f"{lm.layers_path}.1.self_attn:input")  # given as hidden_states=
    before = logits(lm)
    with by_name.splice(torch.zeros_like):
        assert not torch.allclose(logits(lm), before)


def test_nan_in_the_target_alone_names_its_module(lm_of, tiny_tokenizer) -> None:
    lm = lm_of("gpt2")
    capture, bias = ActivationCapture(lm, LAYER, site="mlp_in", target="mlp_out"), lm.layers[LAYER].mlp.c_proj.bias
    contexts, before = [Context(70, TOKENS[0].tolist())], bias.clone()
    bias[3] = torch.nan
    with pytest.raises(NonFiniteActivationsError, match=r"at transformer.h.1.mlp, on 12 tokens of documents 70"):
        capture.capture_all(contexts)
    bias.copy_(before)
    assert len(capture.capture_all(contexts)) == 12


GEMMA = "model.language_model.layers.1"
REFUSED = {
    "site": ("llama", {"site": "mlp_mid"}, "unknown site .*mlp_mid.* choose resid_pre, attn_z, .*PATH:input"),
    "parallel": ("phi", {"site": "resid_mid"}, r"\(phi\) has no resid_mid: .* both read resid_pre"),
    "parallel target": ("gpt_neox", {"target": "resid_mid", "site": "attn_z"}, r"\(gpt_neox\) has no resid_mid"),
    "architecture": ("mpt", {"site": "mlp_in"}, 'not known of "mpt"; .*--module .*transformer.blocks.1: norm_1, attn,'),
    "layer": ("llama", {"site": "mlp_in", "layer": 3}, "layer 3 is out of range: .* has 3 layers, choose 0 to 2"),
    "no module": ("llama", {"site": "model.layers.1.mpl:output"}, "no module .* did you mean model.layers.1.mlp"),
    "no side": ("llama", {"site": "model.layers.1.mlp:in"}, "expected input or output behind the colon"),
    "not called": ("gemma3", {"site": "model.multi_modal_projector:output"}, "takes no part in its computation"),
    "tuple": ("gemma3", {"site": f"{GEMMA}.self_attn:output"}, "gives a tuple of 2: choose --site attn_out or a mod"),
    "rank": ("mixtral", {"site": "model.layers.1.mlp.gate:input"}, r"gives \(16, 32\) for \(2, 8\) tokens, expected"),
    "other length": (
        "gpt2",
        {"site": "mlp_in", "target": "transformer.wpe:output"},
        r"wpe:output of .* gives \(1, 8, 32\) for \(2, 8\) tokens, expected \(2, 8, 32\)",
    ),
    "target before": (
        "llama",
        {"site": "mlp_in", "target": "attn_out"},
        "attn_out of layer 1 is the site mlp_in itself",
    ),
    "module at layers": ("llama", {"layer": [0, 1], "site": "model.layers.1.mlp:input"}, "expected a single one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_line(case, lm_of) -> None:
    kind, what, message = REFUSED[case]
    with pytest.raises(SelOrthoError, match=message) as caught:
        ActivationCapture(lm_of(kind), **{"layer": LAYER, **what})
    assert "\n" not in str(caught.value)
    if case == "architecture":
        assert find_site(lm_of(kind), LAYER, "resid_pre") == HookSite("transformer.blocks.1", "input")
        assert ActivationCapture(lm_of(kind), LAYER, site="transformer.blocks.1.ffn:output").widths == {LAYER: WIDTH}


def test_the_configuration_has_these_sites() -> None:
    assert configuration_selortho.SITES == SITES
