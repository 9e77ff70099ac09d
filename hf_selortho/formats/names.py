"""Translate names of language models and hooks between TransformerLens and the Hub."""

from __future__ import annotations

import re
from typing import Any

from ..errors import SelOrthoError

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
_LENS_SITE = re.compile(r"blocks\.(\d{1,4})\.(.+)")
# Hooks of TransformerLens by our sites; hook_mlp_in is the residual stream before the norm.
_SITES = {"hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post"}
_SITES |= {"hook_mlp_in": "resid_mid", "attn.hook_z": "attn_z", "hook_attn_out": "attn_out", "mlp.hook_in": "mlp_in"}
_SITES |= {"hook_mlp_out": "mlp_out", "mlp.hook_out": "mlp_out"}
_MODULE = re.compile(r"((?:[\w.]+\.)?(?:layers|h)\.(\d{1,4}))(?:\.(.+))?")
# Modules of a decoder layer whose side is a site whatever the architecture.
_MODULE_SITES = {("", "input"): "resid_pre", ("", "output"): "resid_post", ("self_attn.o_proj", "input"): "attn_z"}
_MODULE_SITES |= {("attn.c_proj", "input"): "attn_z", ("pre_feedforward_layernorm", "input"): "resid_mid"}
_MODULE_SITES |= {("pre_feedforward_layernorm", "output"): "mlp_in", ("attention.dense", "input"): "attn_z"}
_MODULE_SITES |= {("post_feedforward_layernorm", "output"): "mlp_out"}  # of Gemma, as the two before


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


def facts_of_hook(hook: Any) -> dict[str, Any]:
    """Return site, layer, module and side of a hook of TransformerLens, or of a module of transformers, as settings.

    A module of which no site is known is a site itself, such as "model.layers.3.mlp:output". A hook that no module
    gives, such as ln2.hook_normalized, only has its name.

    Args:
        hook: such as "blocks.3.hook_mlp_out" or "model.layers.3.self_attn.o_proj.input"; without a side, an output.
    """
    if not isinstance(hook, str) or not hook:
        return {}
    side = "input" if hook.endswith(".input") else "output"
    module, facts = hook.removesuffix(f".{side}"), dict[str, Any]()
    if lens := _LENS_SITE.fullmatch(hook):
        facts = {"site": _SITES[lens[2]], "layer": int(lens[1])} if lens[2] in _SITES else {}
    elif found := _MODULE.fullmatch(module):
        facts = {"site": _MODULE_SITES.get((found[3] or "", side), f"{module}:{side}"), "layer": int(found[2])}
    elif module.rpartition(".")[2] in ("embed_tokens", "wte", "embed_in"):
        facts = {"site": f"{module}:{side}"}
    return {**facts, "hook_name": module, "hook_side": side}


def facts_of_hooks(
    lens: Any = None, module: Any = None, lens_out: Any = None, module_out: Any = None
) -> dict[str, Any]:
    """Return the settings of what an SAE reads and, if that is another place, of what it reconstructs.

    Args:
        lens, module: one place, by its names in TransformerLens and in transformers, as for [`facts_of_hook`].
        lens_out, module_out: the other; None where it is the same.

    Raises:
        SelOrthoError: they are in different layers.
    """
    facts, target = _place(lens, module), _place(lens_out, module_out)
    here, there = ((part.get("site", part.get("hook_name")), part.get("layer")) for part in (facts, target))
    if target and here != there:
        if None not in (here[1], there[1]) and here[1] != there[1]:
            raise SelOrthoError(
                f"a transcoder from layer {here[1]} to layer {there[1]} is not read: expected one within a layer"
            )
        target = {"site": f"{target['hook_name']}:{target['hook_side']}"} | target
        target.pop("layer", None)
        return facts | {("target" if key == "site" else f"target_{key}"): value for key, value in target.items()}
    if facts.get("site") == "resid_pre" and facts["layer"] > 0 and module is None:
        facts |= {"site": "resid_post", "layer": facts["layer"] - 1}  # the same, in any architecture
    return facts


def _place(lens: Any, module: Any) -> dict[str, Any]:
    named, facts = facts_of_hook(lens), facts_of_hook(module)
    if ":" in facts.get("site", "") and ":" not in named.get("site", ":"):
        facts |= {key: named[key] for key in ("site", "layer")}  # the module says more, unless it is a site of its own
    return named | facts


def can_be_centred(model: str | None, hook: str | None) -> bool:
    """Return whether centring the weights that write to the residual stream changes the activations at a hook.

    Args:
        model: id on the Hub, or None where it is unknown.
        hook: of TransformerLens, or a module of transformers; None where it is unknown.
    """
    return not (_RMS_NORM.fullmatch(model or "") or _WITHIN_BLOCK.fullmatch(hook or ""))
