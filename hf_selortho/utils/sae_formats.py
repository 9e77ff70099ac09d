"""Tell by its config.json whether an SAE is one of this package, and of which other library it is if not."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

FORMATS = ("selortho", "saelens", "sparsify", "gemma_scope")  # that are read
SETS = ("circuit-tracer",)  # of transcoders of all layers of a language model, read and written as a whole
TARGETS = ("saelens", "selortho", *SETS)  # that are written
# Keys that a config.json of another library holds together; none of them has a model_type.
_SIGNATURES: tuple[tuple[str, frozenset[str]], ...] = (
    ("Gemma Scope 2", frozenset({"hf_hook_point_in"})),
    ("dictionary_learning", frozenset({"trainer"})),
    ("Llamascopium (Llama Scope)", frozenset({"hook_point_in", "hook_point_out"})),
    ("Llamascopium (Llama Scope)", frozenset({"sae_type", "act_fn"})),
    ("sparsify", frozenset({"sae", "batch_size"})),
    ("sparsify", frozenset({"d_in", "num_latents"})),
    ("SAELens", frozenset({"d_in", "d_sae"})),
)
_READ = {"SAELens": "cfg.json and sae_weights.safetensors", "sparsify": "cfg.json and sae.safetensors"}


def is_own(content: Mapping[str, Any], model_type: str) -> bool:
    """Return whether the content of a config.json is of an SAE of this package."""
    if "model_type" in content:
        return content["model_type"] == model_type
    return "config_version" in content


def library_of(content: Mapping[str, Any]) -> str | None:
    """Return the library whose SAE has a config.json of this content, or None where it is of none that is known."""
    if "model_type" in content:
        return None
    return next((name for name, keys in _SIGNATURES if keys <= content.keys()), None)


def check_own(content: Mapping[str, Any], path: Path, model_type: str) -> None:
    """Refuse the content of a config.json of anything else than an SAE of this package.

    Raises:
        ConfigError: with the name of the other library or kind of model, and whether its SAEs can be read.
    """
    if is_own(content, model_type):
        return
    expected = f"expected {model_type!r}"
    library = library_of(content)
    if library is None:
        kind = reprlib.repr(content.get("model_type"))
        raise ConfigError(f"{path} has model_type={kind}, {expected}: this is no SAE")
    said = f"{path} has no model_type, {expected}: this is the config of an SAE of {library}"
    if files := _READ.get(library):
        raise ConfigError(
            f"{said}, which hf_selortho.formats.load_sae and selortho convert read from {files}: name the folder that "
            "holds both"
        )
    raise ConfigError(f"{said}, a format that is not read; load it with SAELens, whose save_model writes what is read")
