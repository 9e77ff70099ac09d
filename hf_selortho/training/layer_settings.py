"""Settings of the SAE that differ by layer: '{"5": {"ortho_coefficient": 0.05}, "12": {"pair_fraction": 0.0005}}'."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import SelOrthoError


def parse_layer_settings(value: str, allowed: Collection[str]) -> dict[int, dict[str, Any]]:
    """Settings by layer from JSON, or from the .json file that `value` names.

    Raises:
        SelOrthoError: it is not such an object, or a setting is none of `allowed` (suggests the closest).
    """
    text = value
    if value.endswith(".json"):
        try:
            text = Path(value).read_text(encoding="utf-8")
        except OSError as error:
            raise SelOrthoError(f"--layer_settings {value}: {error.strerror}; expected a JSON file") from error
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise SelOrthoError(
            f"--layer_settings {value!r} is not valid JSON ({error}); "
            'expected e.g. \'{"5": {"ortho_coefficient": 0.05}}\''
        ) from error
    if not isinstance(settings, dict) or not all(isinstance(item, dict) for item in settings.values()):
        raise SelOrthoError(f"--layer_settings {value!r}: expected an object of settings for each layer")
    for layer, chosen in settings.items():
        if not layer.isdecimal():
            raise SelOrthoError(f"--layer_settings names a layer {layer!r}: expected a whole number counted from 0")
        for name in chosen:
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise SelOrthoError(f"--layer_settings: {name!r} of layer {layer} is not a setting of the SAE{hint}")
    return {int(layer): chosen for layer, chosen in settings.items()}


def settings_of(layer: int, settings: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The settings of one layer, empty if it has none of its own."""
    return settings.get(layer, {})
