"""Names of language models and hooks: TransformerLens's, and ours."""

from __future__ import annotations

import pytest

from hf_selortho.formats.names import hub_name, layer_of, lens_name


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
