"""Sparse autoencoders with selective orthogonality, as models of the Hugging Face Hub."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, SelOrthoError
from .utils.imports import after_import

if TYPE_CHECKING:
    from .configuration_selortho import SelOrthoConfig
    from .modeling_selortho import SelOrthoOutput, SelOrthoSAE
    from .pair_selection import Pairs, select_pairs
    from .penalties import decorrelation_penalty

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Pairs",
    "SelOrthoConfig",
    "SelOrthoError",
    "SelOrthoOutput",
    "SelOrthoSAE",
    "decorrelation_penalty",
    "load",
    "select_pairs",
]

# The module of each name above that needs torch, which takes seconds to import: not before the name is used.
_MODULES = {
    "SelOrthoConfig": "configuration_selortho",
    "SelOrthoOutput": "modeling_selortho",
    "SelOrthoSAE": "modeling_selortho",
    "load": "formats.load",
    "Pairs": "pair_selection",
    "select_pairs": "pair_selection",
    "decorrelation_penalty": "penalties",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_config() -> None:
    config = __getattr__("SelOrthoConfig")
    import_module("transformers").AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_model() -> None:
    import_module("transformers").AutoModel.register(
        __getattr__("SelOrthoConfig"), __getattr__("SelOrthoSAE"), exist_ok=True
    )


# `AutoModel.from_pretrained` knows our SAEs wherever this package has been imported, before transformers or after it.
after_import("transformers.models.auto.configuration_auto", _register_config)
after_import("transformers.models.auto.modeling_auto", _register_model)
