"""The formats of OpenMOSS: Llama Scope (hyperparams.json), its R1-Distill and Llamascopium 2 (config.json)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import SelOrthoError
from .description import LINEAR, Description
from .names import facts_of_hooks
from .place import Place
from .plain import checked_k

_HYPERPARAMETERS, _CHECKPOINT = "hyperparams.json", "checkpoints/final.safetensors"
_WEIGHTS = "sae_weights.safetensors"
_LENS = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
_NORM = "dataset_average_activation_norm"
_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
_LLAMA_SCOPE = re.compile(r"(?:.*/)?Llama3_1-8B-Base-L[\w-]+(?:/.*)?")
# Settings under which an SAE is no encoder, activation function and decoder; what they must be, and why not another.
_NEEDED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("sae_type", (None, "sae"), "another kind of dictionary: expected one that reads and writes at one layer"),
    ("use_glu_encoder", (None, False), "the encoder is a product of two"),
    ("norm_activation", (None, "dataset-wise", "inference"), "each token or batch is normalised by its own norm"),
)


def find_llama_scope(place: Place) -> str | None:
    """Return the file of weights, if this is the format of Llama Scope."""
    return _CHECKPOINT if place.has(_HYPERPARAMETERS) else None


def find(place: Place) -> str | None:
    """Return the file of weights, if this is the format of Llamascopium."""
    keys = place.config.keys() if "model_type" not in place.config else set()
    theirs = {"hook_point_in", "hook_point_out"} <= keys or {"sae_type", "act_fn"} <= keys
    return (place.has(_WEIGHTS) or place.has("sae_weights.pt") or _WEIGHTS) if theirs else None


def describe_llama_scope(place: Place, file: str) -> Description:
    """Tell what an SAE or transcoder is, whose one threshold is meant for the weights with both norms folded in.

    Raises:
        SelOrthoError: it is of another kind, or a norm is missing.
    """
    config = place.json(_HYPERPARAMETERS)
    theta = config.get("jump_relu_threshold")
    _check(place, config, (("act_fn", ("jumprelu",), "expected jumprelu"), ("norm_activation", ("dataset-wise",), "")))
    if not isinstance(theta, float) or config.get("apply_decoder_bias_to_pre_encoder"):
        raise SelOrthoError(f"{place}: jump_relu_threshold={theta!r:.50} of {_HYPERPARAMETERS}: expected a number")
    norms = config.get(_NORM)
    factors = _factors(place, config, *(norms.get(way) if isinstance(norms, dict) else None for way in ("in", "out")))
    names = {key: name for key, name in LINEAR.items() if key != "b_dec" or config.get("use_decoder_bias", True)}
    facts = _facts(config, "meta-llama/Llama-3.1-8B" if _LLAMA_SCOPE.fullmatch(str(place)) else None)
    return Description(
        place.tensors(file),
        names,
        "jumprelu",
        threshold=theta,
        unit_rows=True,
        factors=factors,
        raw=True,
        facts=facts,
        metadata=config,
        folded=["the mean norms of the activations", "the norms of the decoder rows"],
    )


def describe(place: Place, file: str) -> Description:
    """Tell what an SAE of Llamascopium or of Llama Scope R1-Distill is.

    Raises:
        SelOrthoError: it is of another kind, or a norm is missing.
    """
    config, tensors = place.config, place.tensors(file)
    tensors = tensors.within("sae") if "sae" in tensors.loaded else tensors
    _check(place, config)
    activation = config.get("act_fn")
    if activation not in ("relu", "jumprelu", "topk"):
        why = "keeps the largest of a batch, without a threshold" if activation == "batchtopk" else "is not read"
        raise SelOrthoError(f"{place}: act_fn={activation!r:.50} {why}: expected relu, jumprelu or topk")
    names = dict(_LENS if "W_E" in tensors.headers else LINEAR)
    if activation == "jumprelu":
        names["threshold"] = _THRESHOLDS[_THRESHOLDS[1] in tensors.headers]
    if config.get("use_decoder_bias") is False:
        del names["b_dec"]
    stored, factors = [name for name in tensors.headers if name.startswith(f"{_NORM}.")], (1.0, 1.0)
    hooks = [config.get(f"hook_point_{way}") for way in ("in", "out")]
    if config.get("norm_activation", "dataset-wise") == "dataset-wise":
        keys = [f"{_NORM}.{hook}" for hook in hooks]
        norms = [float(tensors.read(key).sum()) if key in stored else None for key in keys]
        factors = _factors(place, config, *norms)
    k = config.get("top_k", config.get("k")) if activation == "topk" else None
    return Description(
        tensors,
        names,
        activation,
        k=checked_k(k, str(place)) if activation == "topk" else None,
        log_thresholds=True,
        subtracts=bool(config.get("apply_decoder_bias_to_pre_encoder")),
        unit_rows=activation != "relu" and bool(config.get("sparsity_include_decoder_norm")),
        factors=factors,
        ignored=stored,
        facts=_facts(config, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if "R1-Distill" in str(place) else None),
        metadata=config,
        folded=["the mean norms of the activations"] if factors != (1, 1) else [],
    )


def _check(place: Place, config: Mapping[str, Any], more: tuple[tuple[str, tuple[Any, ...], str], ...] = ()) -> None:
    for key, allowed, why in (*_NEEDED, *more):
        if config.get(key) not in allowed:
            raise SelOrthoError(
                f"{place}: {key}={config.get(key)!r:.50} is not read: {why or 'expected ' + allowed[0]}"
            )


def _factors(place: Place, config: Mapping[str, Any], norm_in: Any, norm_out: Any) -> tuple[float, float]:
    """Return the root of d_model over each mean norm."""
    width = config.get("d_model")
    fits = all(isinstance(norm, (int, float)) and 0 < norm < 1e30 for norm in (norm_in, norm_out))
    if type(width) is not int or not 0 < width < 1 << 40 or not fits:
        raise SelOrthoError(
            f"{place}: d_model={width!r:.50} and the mean norms {norm_in!r:.50}, {norm_out!r:.50} of the activations: "
            "expected positive numbers; take config and weights as their library wrote them"
        )
    return math.sqrt(width) / norm_in, math.sqrt(width) / norm_out


def _facts(config: Mapping[str, Any], lm_name: str | None) -> dict[str, Any]:
    hooks = [config.get(f"hook_point_{way}") for way in ("in", "out")]
    return {"lm_name": lm_name} | facts_of_hooks(hooks[0], lens_out=hooks[1])
