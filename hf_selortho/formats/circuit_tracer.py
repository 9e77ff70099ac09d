"""The format of circuit-tracer 0.5: a folder with a transcoder for each layer of a language model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..language_models.loading import load_config
from ..modeling_selortho import SelOrthoSAE
from ..utils.hub import CONFIG, listed
from ..utils.names import local_path
from .circuit_tracer_layer import read_set
from .load import read_sae
from .plain import PlainSae

SET = "config.yaml"  # by which a folder of this format is known
_LAYER = re.compile(r"layer_(\d{1,4})")
_THRESHOLD = "activation_function.threshold"
_MLP_IN, _RESID_MID = {"mlp_in": "mlp.hook_in"}, {"resid_mid": "hook_resid_mid"}
# By architecture: circuit-tracer's names of the sites that a transcoder reads and reconstructs.
_HOOKS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "Gemma3ForCausalLM": (_MLP_IN | _RESID_MID, {"mlp_out": "hook_mlp_out"}),
    "Gemma3ForConditionalGeneration": (_MLP_IN | _RESID_MID, {"mlp_out": "hook_mlp_out"}),
    "Gemma2ForCausalLM": (_RESID_MID, {"mlp_out": "hook_mlp_out"}),  # the MLP's input before the gain of its norm only
    "LlamaForCausalLM": (_MLP_IN | _RESID_MID, {"mlp_out": "hook_mlp_out"}),
    "Qwen3ForCausalLM": (_MLP_IN, {"mlp_out": "mlp.hook_out"}),
}
_SITES = {hook: site for reads, writes in _HOOKS.values() for site, hook in (*reads.items(), *writes.items())}


def write_circuit_tracer(run: str, folder: Path) -> None:
    """Write the transcoders of a run, one of each layer and none of the twins, into an empty folder.

    circuit-tracer computes what they do, but for rounding. It would take a set that lacks a layer, and topk as relu,
    without a word, and give a wrong graph: both are refused here.

    Args:
        run: folder with layer_0, layer_1, ... of all layers of the language model.

    Raises:
        SelOrthoError: a layer is missing, they are no transcoders, or circuit-tracer cannot compute what they do.
    """
    layers = {int(found[1]): path for path in Path(local_path(run, "run")).glob("layer_*")
              if (found := _LAYER.fullmatch(path.name)) and (path / CONFIG).is_file()}  # fmt: skip
    if not layers:
        raise SelOrthoError(f"{run} holds no layer_0, layer_1, ...: expected the run of transcoders of all layers")
    configs = {layer: SelOrthoConfig.from_pretrained(layers[layer] / CONFIG) for layer in sorted(layers)}
    first = next(iter(configs.values()))
    for layer, config in configs.items():
        _check(config, first, layers[layer], layer)
    if first.lm_name is None:
        raise SelOrthoError(
            f"{run} does not say which language model it reads (lm_name): expected one, with its layers"
        )
    lm = load_config(first.lm_name, first.lm_revision)
    text, architecture = lm.get_text_config(decoder=True), next(iter(lm.architectures or ()), "")
    if missing := [f"layer_{layer}" for layer in range(text.num_hidden_layers) if layer not in layers]:
        raise SelOrthoError(
            f"{run} lacks {listed(missing)}: expected all {text.num_hidden_layers} layers of {first.lm_name}, since "
            "circuit-tracer gives wrong graphs without"
        )
    if len(layers) > text.num_hidden_layers:
        raise SelOrthoError(f"{run} has layer_{max(layers)}, but {first.lm_name} {text.num_hidden_layers} layers")
    if (first.d_in, first.width_out) != (text.hidden_size, text.hidden_size):
        raise SelOrthoError(
            f"{run} maps {first.d_in} to {first.width_out} dimensions: expected {text.hidden_size}, as {first.lm_name}"
        )
    about = {"model_kind": "transcoder_set", **_hooks(architecture, first), "model_name": first.lm_name}
    for layer, path in layers.items():
        sae = SelOrthoSAE.from_pretrained(path, dtype=torch.float32)
        save_file(fold(sae), folder / f"layer_{layer}.safetensors")
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in about.items())
    (folder / SET).write_text(lines, encoding="utf-8")


def _check(config: SelOrthoConfig, first: SelOrthoConfig, path: Path, layer: int) -> None:
    if not config.is_transcoder:
        raise SelOrthoError(f"{path} reconstructs what it reads: expected a transcoder, trained with --target mlp_out")
    if config.activation == "topk":
        raise SelOrthoError(
            f"{path} has activation topk, which circuit-tracer takes for relu without a word: train it with batchtopk"
        )
    if config.layer != layer:
        raise SelOrthoError(f"{path} says that it reads layer {config.layer}: expected layer {layer}, as its folder")
    for key in ("lm_name", "lm_revision", "site", "target", "skip", "d_sae", "d_in", "d_out"):
        if getattr(config, key) != getattr(first, key):
            raise SelOrthoError(
                f"{path} has {key}={getattr(config, key)!r}, others {getattr(first, key)!r}: expected one of all layers"
            )


def _hooks(architecture: str, config: SelOrthoConfig) -> dict[str, str]:
    if architecture not in _HOOKS:
        raise SelOrthoError(
            f"circuit-tracer does not know {architecture or 'this model'}: expected {' or '.join(_HOOKS)}"
        )
    hooks = {}
    sites = {"feature_input_hook": config.site, "feature_output_hook": str(config.target)}
    for (key, site), known in zip(sites.items(), _HOOKS[architecture], strict=True):
        if site not in known:
            gemma2 = (
                " (of its mlp_in it has the values before the gain of the norm only)"
                if "Gemma2" in architecture
                else ""
            )
            raise SelOrthoError(
                f"circuit-tracer has no hook for {site} of {architecture}{gemma2}: expected {' or '.join(known)}"
            )
        hooks[key] = known[site]
    return hooks


def fold(sae: SelOrthoSAE) -> dict[str, Tensor]:
    """Return the tensors of circuit-tracer's transcoder, with all means and scales in the weights, in float32."""
    plain = PlainSae.of(sae)
    tensors = {"W_enc": plain.W_enc.T, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    tensors |= {} if plain.W_skip is None else {"W_skip": plain.W_skip.T}
    tensors |= {} if plain.threshold is None else {_THRESHOLD: plain.threshold}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def is_circuit_tracer(name: str) -> bool:
    """Tell whether a folder holds a set of transcoders in this format."""
    return Path(name, SET).is_file() and Path(name, "layer_0.safetensors").is_file()


def read_circuit_tracer(name: str, folder: Path) -> None:
    """Read a set of transcoders in this format and save each as one of ours, in folders layer_0, layer_1, ...

    Args:
        name: folder of the set. folder: an empty one to write to.

    Raises:
        SelOrthoError: a file is damaged or missing, or a hook is at no site of ours.
    """
    place = Path(name)
    about = read_set(place / SET)
    for key in ("feature_input_hook", "feature_output_hook"):
        if about.get(key) not in _SITES:
            raise SelOrthoError(f"{place / SET} has {key} {about.get(key)!r:.50}: expected {', '.join(_SITES)}")
    layers = {int(found[1]) for path in place.glob("layer_*.safetensors") if (found := _LAYER.fullmatch(path.stem))}
    if layers != set(range(len(layers))) or not layers:
        raise SelOrthoError(
            f"{place} has layers {sorted(layers)!s:.80}: expected layer_0.safetensors and so on, without a gap"
        )
    for layer in sorted(layers):
        sae = read_sae(str(place / f"layer_{layer}.safetensors"), "circuit_tracer_layer", {}).sae
        sae.save_pretrained(folder / f"layer_{layer}")
