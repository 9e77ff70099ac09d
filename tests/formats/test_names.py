"""Names of language models and hooks: TransformerLens's, and ours."""

from __future__ import annotations

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.formats.names import facts_of_hooks, hub_name, lens_name


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
    ("hook", "site", "layer"),
    [
        ("blocks.12.hook_resid_post", "resid_post", 12),
        ("blocks.12.hook_resid_pre", "resid_post", 11),
        ("blocks.0.hook_resid_pre", "resid_pre", 0),
        ("blocks.3.hook_mlp_out", "mlp_out", 3),
        ("blocks.3.hook_mlp_in", "resid_mid", 3),
        ("blocks.3.ln2.hook_normalized", None, None),
        ("layers.4", "resid_post", 4),
        ("model.layers.4.input", "resid_pre", 4),
        ("model.language_model.layers.4.self_attn.o_proj.input", "attn_z", 4),
        ("layers.4.mlp", "layers.4.mlp:output", 4),
        (7, None, None),
    ],
)
def test_hooks(hook, site, layer) -> None:
    lens = isinstance(hook, str) and hook.startswith("blocks.")
    facts = facts_of_hooks(hook) if lens else facts_of_hooks(module=hook)
    assert (facts.get("site"), facts.get("layer")) == (site, layer)


def test_one_place_by_two_names_and_a_target_in_another_layer() -> None:
    module = "model.layers.3.post_attention_layernorm.input"  # of a norm before the MLP, or of one behind attention
    both = facts_of_hooks("blocks.3.hook_resid_mid", module, None, "model.layers.3.mlp")
    assert (both["site"], both["hook_side"], both["target"]) == ("resid_mid", "input", "model.layers.3.mlp:output")
    assert "target" not in facts_of_hooks("blocks.3.hook_mlp_out", None, "blocks.3.hook_mlp_out")
    with pytest.raises(SelOrthoError, match="from layer 3 to layer 5 is not read"):
        facts_of_hooks("blocks.3.hook_resid_mid", lens_out="blocks.5.hook_mlp_out")
