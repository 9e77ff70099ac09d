"""Named settings of the SAE, by layer or by variant: '{"5": {"ortho_coefficient": 0.05}, "12": {"k": 64}}'."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError


def parse_layer_settings(value: str, allowed: Collection[str]) -> dict[int, dict[str, Any]]:
    """Settings by layer, of `--layer_settings`; raises as [`parse_settings`] does."""
    settings = parse_settings("--layer_settings", "layer", value, allowed)
    for layer in settings:
        if not (layer.isdecimal() and str(int(layer)) == layer):  # "05" would repeat "5"
            raise SelOrthoError(f"--layer_settings names a layer {layer!r}: expected a whole number counted from 0")
    return {int(layer): chosen for layer, chosen in settings.items()}


def parse_settings(option: str, owner: str, value: str, allowed: Collection[str]) -> dict[str, dict[str, Any]]:
    """Settings by name from JSON, or from the .json file that `value` names.

    Args:
        option: what the user has typed, such as "--layer_settings". owner: what has the settings, "layer".
        value: what follows the option.
        allowed: settings that may occur.

    Raises:
        SelOrthoError: it is not such an object, names something twice, a setting is none of `allowed` (suggests the
            closest), or its value has the wrong type.
    """
    text = value
    if value.endswith(".json"):
        try:
            text = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SelOrthoError(f"{option} {value}: expected a JSON file in UTF-8 ({error})") from error
    try:
        settings = json.loads(text, object_pairs_hook=lambda items: _without_repetition(option, items))
    except ValueError as error:
        raise SelOrthoError(
            f'{option} {value!r} is not valid JSON ({error}); expected e.g. \'{{"5": {{"ortho_coefficient": 0.05}}}}\''
        ) from error
    if not isinstance(settings, dict) or not all(isinstance(item, dict) for item in settings.values()):
        raise SelOrthoError(f"{option} {value!r}: expected an object of settings for each {owner}")
    for key, chosen in settings.items():
        for name, setting in chosen.items():
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise SelOrthoError(f"{option}: {name!r} of {owner} {key} is not a setting of the SAE{hint}")
            _check_type(f"{option}: {name}={setting!r} of {owner} {key}", name, setting)
    return settings


def settings_of(layer: int, settings: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The settings of one layer, empty if it has none of its own."""
    return settings.get(layer, {})


def _without_repetition(option: str, items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; the standard library would silently take the last of several values."""
    names = [name for name, _ in items]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SelOrthoError(f"{option} names {', '.join(map(repr, twice))} twice: expected each name once")
    return dict(items)


def _check_type(where: str, name: str, value: Any) -> None:
    """Refuse a value of a type that the configuration does not have for this setting, on whichever layer."""
    kind = next((f.type for f in SelOrthoConfig.own_fields() if f.name == name), Any)
    allowed = [getattr(t, "__origin__", t) for t in get_args(kind) or (kind,)]
    if isinstance(allowed[0], str):
        fits, expected = value in allowed, "one of " + ", ".join(map(repr, allowed))
    else:
        fits = Any in allowed or type(value) in allowed or (type(value) is int and float in allowed)
        expected = " or ".join("None" if t is type(None) else getattr(t, "__name__", str(t)) for t in allowed)
    if not fits:
        raise SelOrthoError(f"{where}: expected {expected}")
