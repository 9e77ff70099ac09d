"""The SAEs of a run: one, or one a layer and variant, all on the same batches."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, SelOrthoError
from .arguments import SETTING_NAMES, TrainingArguments, check_sae
from .layer_settings import parse_layer_settings, parse_settings, settings_of

TWIN = {"twin": {"ortho_coefficient": 0.0}}
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Member:
    """One of the SAEs that a run trains."""

    name: str  # its folder within the run's: "layer_12", "layer_12_twin"; "" if it is the only one
    layer: int
    variant: str | None  # None: the settings of the command line
    arguments: TrainingArguments  # those of the run, with this SAE's own settings


def run_members(arguments: TrainingArguments) -> list[Member]:
    """The SAEs that the arguments ask for: each layer's first, then its variants.

    Raises:
        SelOrthoError: a variant's name or settings are not allowed, or a layer occurs twice.
    """
    variants = _variants(arguments)
    layers = arguments.run.layers or [arguments.sae.layer]
    if len(set(layers)) < len(layers):
        raise SelOrthoError(f"--layers {' '.join(map(str, layers))}: expected each layer once")
    if not arguments.run.layers and not variants:
        return [Member("", layers[0], None, arguments)]
    given = arguments.run.layer_settings
    by_layer = {} if given is None else parse_layer_settings(given, SETTING_NAMES)
    members: list[Member] = []
    for layer in layers:
        own = {**settings_of(layer, by_layer), "layer": layer}
        for variant, settings in [(None, {}), *variants.items()]:
            sae = dataclasses.replace(arguments.sae, **{**own, **settings})
            name = f"layer_{layer}" if variant is None else f"layer_{layer}_{variant}"
            try:
                check_sae(sae)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
            members.append(Member(name, layer, variant, dataclasses.replace(arguments, sae=sae)))
    _check_inputs(members)
    return members


def _variants(arguments: TrainingArguments) -> dict[str, dict[str, Any]]:
    given = arguments.run.variants
    variants = {} if given is None else parse_settings("--variants", "variant", given, SETTING_NAMES)
    for name in variants:
        if not _NAME.fullmatch(name):
            raise SelOrthoError(
                f"--variants names a variant {name!r}: expected small letters, digits and hyphens, such as 'no-penalty'"
            )
    if arguments.run.twin and "twin" in variants:
        raise SelOrthoError("--twin and --variants both name a variant 'twin': leave one out")
    return {**(TWIN if arguments.run.twin else {}), **variants}


def _check_inputs(members: list[Member]) -> None:
    """All SAEs of a run read the same tokens, so what decides on those cannot differ between them."""
    for name in ("context_length", "prepend_bos", "max_norm_ratio"):
        values = {getattr(member.arguments.sae, name) for member in members}
        if len(values) > 1:
            raise SelOrthoError(
                f"{name} differs between the layers or variants of one run ({', '.join(map(repr, values))}), which "
                "read the same tokens: set it once, or train them one by one"
            )
