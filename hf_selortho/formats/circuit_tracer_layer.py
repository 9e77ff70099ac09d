"""One layer of a set of transcoders of circuit-tracer: layer_{N}.safetensors, and config.yaml for the whole set."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import SelOrthoError
from ..utils.hub import find_file
from .description import Description
from .names import facts_of_hooks
from .place import Place
from .registry import facts_of_repository

_FILE, _CROSS_LAYER = r"layer_(\d{1,3})\.safetensors", r"W_enc_\d{1,3}\.safetensors"
_NAMES = {"W_enc": "W_enc.T", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_THRESHOLD = "activation_function.threshold"
_LARGEST_YAML = 1 << 20  # bytes


def find(place: Place) -> str | None:
    """Return the file of weights, if this is the format."""
    return place.one(_FILE)


def find_cross_layer(place: Place) -> str | None:
    """Return the file of weights, if this is a cross-layer transcoder."""
    return place.one(_CROSS_LAYER)


def describe(place: Place, file: str) -> Description:
    """Tell what the transcoder of a layer is.

    Raises:
        SelOrthoError: neither config.yaml nor what is known of the repository says what it reads.
    """
    tensors, config = place.tensors(file), _config(place)
    layer = re.fullmatch(_FILE, file)
    assert layer is not None
    names = dict(_NAMES)
    names |= {"threshold": _THRESHOLD} if _THRESHOLD in tensors.headers else {}
    names |= {"W_skip": "W_skip.T"} if "W_skip" in tensors.headers else {}
    activation = "jumprelu" if "threshold" in names else "relu"
    return Description(tensors, names, activation, facts=_facts(place, config, int(layer[1])), metadata=config)


def describe_cross_layer(place: Place, file: str) -> Description:
    """Tell what the features of one layer of a cross-layer transcoder are.

    Raises:
        SelOrthoError: unless what is not exact was asked for.
    """
    lost = "what it writes to later layers is added to its own: encode is exact, the reconstruction is not"
    layer = file.removeprefix("W_enc_").removesuffix(".safetensors")
    if not place.approximate:
        raise SelOrthoError(
            f"{place} is a cross-layer transcoder, which writes to several layers: with --approximate "
            f"(approximate=True) {lost}"
        )
    encoder, decoder, config = place.tensors(file), place.tensors(f"W_dec_{layer}.safetensors"), _config(place)
    key = f"W_dec_{layer}"
    shape, kind = decoder.headers.get(key, ((), ""))
    if len(shape) != 3:
        raise SelOrthoError(f"{decoder.path}: {key} has the shape {shape}, expected (features, layers, d_model)")
    headers = {**encoder.headers, key: ((shape[0], shape[2]), kind)}
    tensors = replace(encoder, headers=headers, loaded={key: lambda: decoder.read(key).sum(1)})
    names = {name: f"{name}_{layer}" for name in ("b_enc", "W_dec", "b_dec")} | {"W_enc": f"W_enc_{layer}.T"}
    names |= {"threshold": f"threshold_{layer}"} if f"threshold_{layer}" in encoder.headers else {}
    activation = "jumprelu" if "threshold" in names else "relu"
    return Description(tensors, names, activation, facts=_facts(place, config, int(layer)), metadata=config, lost=lost)


def _config(place: Place) -> dict[str, Any]:
    path = find_file(place.name, "config.yaml", place.lookup)
    known = facts_of_repository(place.name)
    return known if path is None else known | read_set(path)


def read_set(path: Path) -> dict[str, str]:
    """Read the config.yaml of a set of transcoders, of which only plain texts by name are taken.

    Raises:
        SelOrthoError: it cannot be read, or holds more than a megabyte.
    """
    try:
        if path.stat().st_size > _LARGEST_YAML:
            raise SelOrthoError(f"{path} holds more than a megabyte: download it again")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise SelOrthoError(f"{path} cannot be read: {error!s:.100}") from error
    pairs = (line.partition(" #")[0].partition(":") for line in lines if not line[:1].isspace())
    return {key: text for key, _, value in pairs if (text := value.strip().strip("\"'"))}


def _facts(place: Place, config: dict[str, Any], layer: int) -> dict[str, Any]:
    hooks = [config.get(f"feature_{way}_hook") for way in ("input", "output")]
    if not all(isinstance(hook, str) for hook in hooks):
        raise SelOrthoError(
            f"{place} does not say what its transcoders read: expected a config.yaml with feature_input_hook and "
            "feature_output_hook beside the weights"
        )
    source, target = (f"blocks.{layer}.{hook}" for hook in hooks)
    model = config.get("model_name")
    return {"lm_name": model or None} | facts_of_hooks(source, lens_out=target)
