"""Translate names of language models and hooks between TransformerLens and the Hub."""

from __future__ import annotations

import re
from typing import Any

# The names that TransformerLens gives to models whose id on the Hub it does not use itself.
_ORIGINS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "gelu-1l": "NeelNanda/GELU_1L512W_C4_Code",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
}
# Others are called like the last part of their id.
_SHORT = (
    (re.compile(r"gemma-.+"), "google/{}"),
    (re.compile(r"pythia-.+"), "EleutherAI/{}"),
    (re.compile(r"qwen(?!-1_8b).+", re.IGNORECASE), "Qwen/{}"),
)
# TransformerLens wants these ids whole, but people leave the owner out.
_WHOLE = (
    (re.compile(r"Llama-2-\d+b(-chat)?"), "meta-llama/{}-hf"),
    (re.compile(r"(meta-)?llama-[23][.-].+", re.IGNORECASE), "meta-llama/{}"),
)
# Families whose norms do not subtract a mean: TransformerLens does not centre them, whatever it is asked for.
_RMS_NORM = re.compile(r".*(gemma|llama|mistral|mixtral|qwen|olmo-?[23]|phi-?[34]|deepseek|gpt-oss).*", re.I)
# Hooks behind a LayerNorm and before what writes to the residual stream: centring changes nothing there.
_WITHIN_BLOCK = re.compile(r".*(attn\.hook_(?!result|out)|mlp\.hook_(?!out)|ln\w*\.hook_)\w+")
_LENS_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|mid|post)")
_LAYER = re.compile(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.(\d{1,4})(?:\.output)?")


def hub_name(model: Any) -> str | None:
    """Return the id on the Hub of a model of TransformerLens; what looks like an id stays as it is."""
    if not isinstance(model, str) or not model:
        return None
    if "/" in model:
        return model
    forms = (form.format(model) for pattern, form in (*_SHORT, *_WHOLE) if pattern.fullmatch(model))
    return _ORIGINS.get(model) or next(forms, model)


def lens_name(model: str) -> str:
    """Return what TransformerLens calls a model of the Hub."""
    names = {origin: name for name, origin in reversed(_ORIGINS.items())}
    _, _, name = model.partition("/")
    known = any(form.format(name) == model and pattern.fullmatch(name) for pattern, form in _SHORT)
    return names.get(model, name if known else model)


def lens_hook(layer: int, site: str) -> str | None:
    """Return the hook of TransformerLens at a site of a decoder layer; None where it has none, as for mlp_in."""
    if site == "attn_z":
        return f"blocks.{layer}.attn.hook_z"
    known = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    return f"blocks.{layer}.hook_{site}" if site in known else None


def layer_of(hook: Any) -> int | None:
    """Return the decoder layer after which a hook of TransformerLens or a module of transformers reads, else None."""
    if not isinstance(hook, str):
        return None
    if found := _LENS_HOOK.fullmatch(hook):
        number, place = int(found[1]), found[2]
        return number if place == "post" else number - 1 if place == "pre" and number > 0 else None
    found = _LAYER.fullmatch(hook)
    return int(found[1]) if found else None


def can_be_centred(model: str | None, hook: str | None) -> bool:
    """Return whether centring the weights that write to the residual stream changes the activations at a hook.

    Args:
        model: id on the Hub, or None where it is unknown.
        hook: of TransformerLens, or a module of transformers; None where it is unknown.
    """
    return not (_RMS_NORM.fullmatch(model or "") or _WITHIN_BLOCK.fullmatch(hook or ""))
