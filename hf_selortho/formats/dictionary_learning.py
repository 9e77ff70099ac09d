"""The format of dictionary_learning: ae.pt and config.json, of the seven classes of its dictionaries."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import SelOrthoError
from .description import LENS, LINEAR, Description
from .place import Place
from .plain import checked_k

WEIGHTS = "ae.pt"
_TOPK = LINEAR | {"b_dec": "b_dec"}
_GATED = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T", "b_dec": "decoder_bias"}
_GATED |= {"r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"}
# Of each class: names of the tensors, activation function, whether b_dec is subtracted from the input.
_CLASSES: dict[str, tuple[dict[str, str], str, bool]] = {
    "AutoEncoder": (LINEAR | {"b_dec": "bias"}, "relu", True),
    "AutoEncoderNew": (LINEAR, "relu", False),
    "AutoEncoderTopK": (_TOPK, "topk", True),
    "BatchTopKSAE": (_TOPK | {"threshold": "threshold"}, "jumprelu", True),
    "MatryoshkaBatchTopKSAE": (LENS | {"threshold": "threshold"}, "jumprelu", True),
    "JumpReluAutoEncoder": (LENS | {"threshold": "threshold"}, "jumprelu", False),
    "GatedAutoEncoder": (_GATED, "gated", True),
}
_SETTINGS = ("k", "group_sizes", "threshold")  # beside the weights


def find(place: Place) -> str | None:
    """Return the file of weights, if this is the format."""
    return WEIGHTS if place.has(WEIGHTS) or isinstance(place.config.get("trainer"), dict) else None


def describe(place: Place, file: str) -> Description:
    """Tell what a dictionary is; of a backup made in training, the biases are scaled as the library does at the end.

    Raises:
        SelOrthoError: it is of another class.
    """
    config, tensors = place.json("config.json", "config.json and ae.pt"), place.tensors(file)
    trainer, buffer = (part if isinstance(part := config.get(key), dict) else {} for key in ("trainer", "buffer"))
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise SelOrthoError(
            f"{place}: dict_class={kind!r:.80} of dictionary_learning is not read: expected {', '.join(_CLASSES)}"
        )
    names, activation, subtracts = _CLASSES[kind]
    factor = 1.0
    if "ae" in tensors.loaded:
        norm = _number(tensors.loaded.get("norm_factor", 1.0))
        factor, tensors = 1 / norm if norm else 0.0, tensors.within("ae")
    k = trainer.get("k") if activation == "topk" else None
    ignored = [name for name in _SETTINGS if name not in names.values()]
    return Description(
        tensors,
        names,
        activation,
        k=checked_k(k, str(place)) if activation == "topk" else None,
        subtracts=subtracts,
        unit_rows=kind == "AutoEncoder",  # as the library does when it loads one
        factors=(factor, factor),
        raw=True,
        ignored=ignored,
        facts=_facts(trainer, buffer),
        metadata=config,
        folded=["norm_factor of a backup"] if factor != 1 else [],
    )


def _number(value: Any) -> float:
    """Return a number or the only entry of a tensor; of anything else 0, which is no factor."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    return float(value) if one or type(value) is float or (type(value) is int and abs(value) < 1 << 60) else 0.0


def _facts(trainer: dict[str, Any], buffer: dict[str, Any]) -> dict[str, Any]:
    layer, module, context = trainer.get("layer"), trainer.get("submodule_name"), buffer.get("ctx_len")
    facts: dict[str, Any] = {"lm_name": name if isinstance(name := trainer.get("lm_name"), str) else None}
    if type(context) is int and context > 1:
        facts["context_length"] = context
    if isinstance(module, str) and not module.startswith("resid_post"):
        return facts | {"hook_name": module}
    return facts | ({"site": "resid_post", "layer": layer} if type(layer) is int and layer >= 0 else {})
