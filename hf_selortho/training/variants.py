"""The SAEs of a run, one a layer and variant, all trained on the same batches."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configuration_selortho import SelOrthoConfig
from ..errors import ConfigError, SelOrthoError
from .arguments import SETTING_NAMES, TrainingArguments

logger = logging.getLogger(__name__)

TWIN = {"twin": {"ortho_coefficient": 0.0}}  # the twin baseline: the same run without the penalty
_SHARED = ("context_length", "prepend_bos", "max_norm_ratio")  # settings that decide which tokens are read
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Variant:
    """One of the SAEs that a run trains."""

    name: str  # its folder within the run's: "layer_12", "layer_12_twin"; "" if it is the only one
    layer: int
    arguments: TrainingArguments  # those of the run, with this SAE's own settings

    def config(self, d_in: int, **provenance: Any) -> SelOrthoConfig:
        """Build the SAE's configuration.

        Args:
            d_in: width of the activations; by default there are as many features (the paper's 1:1).
            provenance: the fields that the language model and the text decide.

        Raises:
            ConfigError: a setting is not allowed; names the SAE among several.
        """
        settings = dataclasses.asdict(self.arguments.sae)
        settings["d_sae"] = settings["d_sae"] or d_in
        try:
            return SelOrthoConfig(**settings, d_in=d_in, **provenance)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}" if self.name else str(error)) from error


def make_variants(arguments: TrainingArguments) -> list[Variant]:
    """List the SAEs that the arguments ask for: each layer's first, then its variants and its twin.

    Raises:
        SelOrthoError: a variant's name or settings are not allowed, or a layer occurs twice.
    """
    layers, others = arguments.run.layers or [arguments.sae.layer], _named_variants(arguments)
    if len(set(layers)) < len(layers):
        raise SelOrthoError(f"--layers {' '.join(map(str, layers))}: expected each layer once")
    by_layer = parse_layer_settings(arguments.run.layer_settings)
    if untrained := sorted(set(by_layer) - set(layers)):
        logger.warning(
            "--layer_settings has settings for layers that are not trained: %s", ", ".join(map(str, untrained))
        )
    alone = not arguments.run.layers and not others
    variants = []
    for layer in layers:
        for label, settings in {"": {}, **others}.items():
            sae = dataclasses.replace(arguments.sae, **{**by_layer.get(layer, {}), **settings, "layer": layer})
            name = "" if alone else f"layer_{layer}_{label}".rstrip("_")
            variants.append(Variant(name, layer, dataclasses.replace(arguments, sae=sae)))
    for variant in variants:  # errors come before the language model does, whose width is not known yet
        variant.config(d_in=variant.arguments.sae.d_sae or 1 << 30)
    _check_shared_settings(variants, arguments)
    return variants


def with_shared_settings(arguments: TrainingArguments, variants: list[Variant]) -> TrainingArguments:
    """Give a run the settings by which all of its SAEs read the same tokens."""
    shared = {name: getattr(variants[0].arguments.sae, name) for name in _SHARED}
    return dataclasses.replace(arguments, sae=dataclasses.replace(arguments.sae, **shared))


def all_settings(arguments: TrainingArguments, variants: list[Variant]) -> dict[str, Any]:
    """Return every argument of a run, and the settings of each SAE by its name: a checkpoint holds them."""
    settings = {**arguments.flat(), "variants": None, "layer_settings": None, "saes": [v.name for v in variants]}
    for variant in variants:
        prefix = f"{variant.name}." if variant.name else ""
        settings |= {f"{prefix}{key}": value for key, value in dataclasses.asdict(variant.arguments.sae).items()}
    return settings


def parse_layer_settings(value: str | None) -> dict[int, dict[str, Any]]:
    """Parse `--layer_settings`: settings by layer, raises as [`parse_settings`] does."""
    settings = parse_settings("--layer_settings", "layer", value or "{}")
    for layer in settings:
        if not (layer.isdecimal() and str(int(layer)) == layer):  # "05" would repeat "5"
            raise SelOrthoError(f"--layer_settings names a layer {layer!r}: expected a whole number counted from 0")
    return {int(layer): chosen for layer, chosen in settings.items()}


def parse_settings(option: str, owner: str, value: str) -> dict[str, dict[str, Any]]:
    """Parse settings of the SAE by name, '{"5": {"ortho_coefficient": 0.05}}', or read them from a .json file.

    Args:
        option: what the user has typed, such as "--layer_settings". owner: what has the settings, "layer".
        value: what follows the option.

    Raises:
        SelOrthoError: it is not such an object, names something twice, or holds no setting of the SAE (suggests one).
    """

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SelOrthoError(f"{option} names {', '.join(map(repr, twice))} twice: expected each name once")
        return dict(items)

    try:
        text = Path(value).read_text(encoding="utf-8") if value.endswith(".json") else value
        settings = json.loads(text, object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        example = """'{"5": {"ortho_coefficient": 0.05}}'"""
        raise SelOrthoError(f"{option} {value!r} is not valid JSON ({error}); expected e.g. {example}") from error
    if not isinstance(settings, dict) or not all(isinstance(item, dict) for item in settings.values()):
        raise SelOrthoError(f"{option} {value!r}: expected an object of settings for each {owner}")
    for key, chosen in settings.items():
        for name in chosen:
            if name not in SETTING_NAMES:
                close = difflib.get_close_matches(name, SETTING_NAMES, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise SelOrthoError(f"{option}: {name!r} of {owner} {key} is not a setting of the SAE{hint}")
    return settings


def _named_variants(arguments: TrainingArguments) -> dict[str, dict[str, Any]]:
    """Settings of the variants, of the twin first, by name."""
    variants = parse_settings("--variants", "variant", arguments.run.variants or "{}")
    for name in variants:
        if not _NAME.fullmatch(name):
            raise SelOrthoError(
                f"--variants names a variant {name!r}: expected small letters, digits and hyphens, such as 'no-penalty'"
            )
    if arguments.run.twin and "twin" in variants:
        raise SelOrthoError("--twin and --variants both name a variant 'twin': leave one out")
    return {**(TWIN if arguments.run.twin else {}), **variants}


def _check_shared_settings(variants: list[Variant], arguments: TrainingArguments) -> None:
    """Refuse settings that decide on the tokens and differ between the SAEs, or from those of cached activations."""
    for name in _SHARED:
        values = {getattr(variant.arguments.sae, name) for variant in variants}
        if len(values) > 1:
            raise SelOrthoError(
                f"{name} differs between the layers or variants of one run ({', '.join(map(repr, values))}), which "
                "read the same tokens: set it once, or train them one by one"
            )
        cached = getattr(arguments.sae, name)
        if arguments.data.activations is not None and values != {cached}:
            raise SelOrthoError(
                f"{name} {values.pop()}: the activations of {arguments.data.activations} were cached with {cached}; "
                "leave it out, or cache them again"
            )
