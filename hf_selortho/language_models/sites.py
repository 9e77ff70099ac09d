"""Hook sites: the places in a language model where activations are read or replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import SelOrthoError
from .loading import LanguageModel

# Of a decoder layer, in the order of its computation. attn_out and mlp_out are what is added to the residual stream:
# resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post. attn_z: the heads, one after the other.
SITES = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")

_SHOWN = 20  # modules in an error

# Families of architectures whose decoder layers are made alike: the module, within the layer, and side of each site.
_PRE_NORM = {
    "attn_z": "self_attn.o_proj:input",
    "attn_out": "self_attn:output",
    "resid_mid": "post_attention_layernorm:input",  # which is the norm before the MLP here
    "mlp_in": "post_attention_layernorm:output",
    "mlp_out": "mlp:output",
}
_FOUR_NORMS = {
    "attn_z": "self_attn.o_proj:input",
    "attn_out": "post_attention_layernorm:output",
    "resid_mid": "pre_feedforward_layernorm:input",
    "mlp_in": "pre_feedforward_layernorm:output",
    "mlp_out": "post_feedforward_layernorm:output",
}
_POST_NORM = {**_FOUR_NORMS, "resid_mid": "mlp:input", "mlp_in": "mlp:input"}
_GPT2 = {
    "attn_z": "attn.c_proj:input",
    "attn_out": "attn:output",
    "resid_mid": "ln_2:input",
    "mlp_in": "mlp:input",
    "mlp_out": "mlp:output",
}
_NEOX = {
    "attn_z": "attention.dense:input",
    "attn_out": "attention:output",
    "resid_mid": "post_attention_layernorm:input",
    "mlp_in": "mlp:input",
    "mlp_out": "mlp:output",
}
_PARALLEL = {
    "attn_z": "self_attn.dense:input",
    "attn_out": "self_attn:output",
    "mlp_in": "mlp:input",
    "mlp_out": "mlp:output",
}
_FAMILIES: dict[str, dict[str, str]] = {  # by `model_type` of the text config; none with residual multipliers
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo"), _PRE_NORM),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), _PRE_NORM),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _FOUR_NORMS),
    "olmo2": _POST_NORM,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "phi": _PARALLEL,
}


@dataclass(frozen=True)
class HookSite:
    """The input or the output of one module of a language model."""

    module: str  # its path in the model, such as "model.layers.8"
    side: Literal["input", "output"] = "output"

    def hook(self, model: nn.Module, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `function` on the activations at this site in every forward pass of `model`.

        What it returns takes their place; None leaves them as they are. Of several inputs or outputs, the first counts;
        of inputs that are all passed by name, `hidden_states`.
        """

        def apply(value: Any) -> Any:
            if not isinstance(value, (tuple, list)):
                return function(value)
            changed = function(value[0])
            return None if changed is None else type(value)([changed, *value[1:]])

        def apply_to_inputs(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if inputs or not named:
                changed = apply(inputs) if inputs else None
                return None if changed is None else (changed, named)
            name = "hidden_states" if "hidden_states" in named else next(iter(named))
            changed = function(named[name])
            return None if changed is None else (inputs, {**named, name: changed})

        module = model.get_submodule(self.module)
        if self.side == "input":
            return module.register_forward_pre_hook(apply_to_inputs, with_kwargs=True)
        return module.register_forward_hook(lambda _module, _inputs, output: apply(output))


def find_site(lm: LanguageModel, layer: int, site: str) -> HookSite:
    """Find where a site of a decoder layer of `lm` is.

    Args:
        lm: the language model.
        layer: decoder layer, counted from 0.
        site: one of `SITES`, or a module of any layer as "PATH:input" or "PATH:output", its path being that in
            `lm.model.named_modules()`.

    Raises:
        SelOrthoError: the layer is out of range, the architecture has no such site or is not in the table, or there is
            no such module.
    """
    if ":" in site:
        return _find_module(lm, site)
    if site not in SITES:
        raise SelOrthoError(
            f'unknown site "{site}": choose {", ".join(SITES)}, or a module as PATH:input or PATH:output'
        )
    depth = len(lm.layers)
    if not 0 <= layer < depth:
        raise SelOrthoError(f'layer {layer} is out of range: "{lm.name}" has {depth} layers, choose 0 to {depth - 1}')
    path = f"{lm.layers_path}.{layer}"
    if site in ("resid_pre", "resid_post"):
        return HookSite(path, "input" if site == "resid_pre" else "output")
    config = lm.model.config.get_text_config(decoder=True)
    modules = _FAMILIES.get(config.model_type)
    if modules is None:
        names = [name for name, _ in lm.layers[layer].named_modules() if name]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise SelOrthoError(
            f'site {site}: not known of "{config.model_type}"; choose resid_pre, resid_post, or by --module one of '
            f"the modules in {path}: {', '.join(names[:_SHOWN])}{more}"
        )
    if site == "resid_mid" and (modules is _PARALLEL or (modules is _NEOX and config.use_parallel_residual)):
        raise SelOrthoError(
            f'"{lm.name}" ({config.model_type}) has no resid_mid: attention and MLP of a layer both read resid_pre; '
            "choose another site"
        )
    return _find_module(lm, f"{path}.{modules[site]}")


def _find_module(lm: LanguageModel, site: str) -> HookSite:
    path, _, side = site.rpartition(":")
    if side not in ("input", "output"):
        raise SelOrthoError(f'site "{site}": expected input or output behind the colon, as in {path}:output')
    names = [name for name, _ in lm.model.named_modules() if name]
    if (whole := f"{lm.model.base_model_prefix}.{path}") in names and path not in names:
        path = whole  # as sparsify names modules, without the language model's head
    if path not in names:
        close = get_close_matches(path, names, n=4, cutoff=0.5)
        raise SelOrthoError(
            f'"{lm.name}" has no module "{path}": '
            + (f"did you mean {', '.join(close)}?" if close else f"its decoder layers are {lm.layers_path}.0 to ...")
        )
    return HookSite(path, "input" if side == "input" else "output")
