"""Sparse autoencoders with selective orthogonality, as models of the Hugging Face Hub."""

from __future__ import annotations

from .errors import ConfigError, SelOrthoError, end_without_memory

try:
    from transformers import AutoConfig, AutoModel

    from .configuration_selortho import SelOrthoConfig
    from .modeling_selortho import SelOrthoOutput, SelOrthoSAE
    from .pair_selection import Pairs, select_pairs
    from .penalties import decorrelation_penalty
except (ImportError, MemoryError, OSError) as error:
    end_without_memory(error)
    raise

__version__ = "0.1.0"

AutoConfig.register(SelOrthoConfig.model_type, SelOrthoConfig, exist_ok=True)
AutoModel.register(SelOrthoConfig, SelOrthoSAE, exist_ok=True)

__all__ = [
    "ConfigError",
    "Pairs",
    "SelOrthoConfig",
    "SelOrthoError",
    "SelOrthoOutput",
    "SelOrthoSAE",
    "decorrelation_penalty",
    "select_pairs",
]
