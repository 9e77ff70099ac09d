"""Tell by its config.json whether an SAE is one of this package, and of which other library it is if not."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

FORMATS = (  # that are read
    "selortho", "saelens", "sparsify", "gemma_scope", "gemma_scope_2", "dictionary_learning", "qwen_scope",
    "circuit_tracer_layer", "cross_layer", "llama_scope", "llamascopium", "hook_z", "goodfire", "qresearch", "openai",
)  # fmt: skip
SETS = ("circuit-tracer",)  # of transcoders of all layers of a language model, read and written as a whole
TARGETS = ("saelens", "selortho", *SETS)  # that are written
# Library, keys that its config.json holds together, and the weights beside it; none of them has a model_type.
_SIGNATURES: tuple[tuple[str, frozenset[str], str], ...] = (
    ("Gemma Scope 2", frozenset({"hf_hook_point_in"}), "params.safetensors"),
    ("dictionary_learning", frozenset({"trainer"}), "ae.pt"),
    ("Llamascopium (Llama Scope)", frozenset({"hook_point_in", "hook_point_out"}), "sae_weights.safetensors"),
    ("Llamascopium (Llama Scope)", frozenset({"sae_type", "act_fn"}), "sae_weights.safetensors"),
    ("sparsify", frozenset({"sae", "batch_size"}), "cfg.json and sae.safetensors, in a folder for each hook"),
    ("sparsify", frozenset({"d_in", "num_latents"}), "cfg.json and sae.safetensors"),
    ("SAELens", frozenset({"d_in", "d_sae"}), "cfg.json and sae_weights.safetensors"),
)


def is_own(content: Mapping[str, Any], model_type: str) -> bool:
    """Return whether the content of a config.json is of an SAE of this package."""
    if "model_type" in content:
        return content["model_type"] == model_type
    return "config_version" in content


def library_of(content: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return whose SAE has a config.json of this content, and its files; None where it is of none that is known."""
    if "model_type" in content:
        return None
    return next(((name, files) for name, keys, files in _SIGNATURES if keys <= content.keys()), None)


def check_own(content: Mapping[str, Any], path: Path, model_type: str) -> None:
    """Refuse the content of a config.json of anything else than an SAE of this package.

    Raises:
        ConfigError: with the name of the other library or kind of model, and what its SAEs are read from.
    """
    if is_own(content, model_type):
        return
    expected = f"expected {model_type!r}"
    library = library_of(content)
    if library is None:
        kind = reprlib.repr(content.get("model_type"))
        raise ConfigError(f"{path} has model_type={kind}, {expected}: this is no SAE")
    name, files = library
    raise ConfigError(
        f"{path} has no model_type, {expected}: this is the config of an SAE of {name}, which hf_selortho.load, "
        f"evaluate, index, convert, info and browse read with {files}: name the folder that holds them"
    )
