"""The SAEs of a run: one, or one a layer and variant, all on the same batches."""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, SelOrthoError
from .arguments import SETTING_NAMES, TrainingArguments, check_sae
from .layer_settings import parse_layer_settings, parse_settings, settings_of

logger = logging.getLogger(__name__)

TWIN = {"twin": {"ortho_coefficient": 0.0}}
_INPUTS = ("context_length", "prepend_bos", "max_norm_ratio")  # settings that decide which tokens are read
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
    given = arguments.run.layer_settings
    by_layer = {} if given is None else parse_layer_settings(given, SETTING_NAMES)
    if others := sorted(set(by_layer) - set(layers)):
        logger.warning("--layer_settings has settings for layers that are not trained: %s", ", ".join(map(str, others)))
    alone = not arguments.run.layers and not variants
    members: list[Member] = []
    for layer in layers:
        own = {**settings_of(layer, by_layer), "layer": layer}
        for variant, settings in [(None, {}), *variants.items()]:
            sae = dataclasses.replace(arguments.sae, **{**own, **settings})
            name = "" if alone else f"layer_{layer}" if variant is None else f"layer_{layer}_{variant}"
            try:
                check_sae(sae)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}" if name else str(error)) from error
            members.append(Member(name, layer, variant, dataclasses.replace(arguments, sae=sae)))
    _check_inputs(members, arguments)
    return members


def with_inputs_of(members: list[Member], arguments: TrainingArguments) -> TrainingArguments:
    """The arguments of the run, reading the tokens that its SAEs read."""
    own = {name: getattr(members[0].arguments.sae, name) for name in _INPUTS}
    return dataclasses.replace(arguments, sae=dataclasses.replace(arguments.sae, **own))


def all_settings(arguments: TrainingArguments, members: list[Member]) -> dict[str, Any]:
    """Every argument of a run, and the settings of each SAE, which may come from files, by name."""
    own = {"saes": [member.name for member in members]}
    for member in members:
        prefix = f"{member.name}." if member.name else ""
        own |= {f"{prefix}{name}": value for name, value in dataclasses.asdict(member.arguments.sae).items()}
    return {**arguments.flat(), "variants": None, "layer_settings": None, **own}


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


def _check_inputs(members: list[Member], arguments: TrainingArguments) -> None:
    """All SAEs of a run read the same tokens, so what decides on those cannot differ between them."""
    for name in _INPUTS:
        values = {getattr(member.arguments.sae, name) for member in members}
        if len(values) > 1:
            raise SelOrthoError(
                f"{name} differs between the layers or variants of one run ({', '.join(map(repr, values))}), which "
                "read the same tokens: set it once, or train them one by one"
            )
        harvested = getattr(arguments.sae, name)
        if arguments.data.activations is not None and values != {harvested}:
            raise SelOrthoError(
                f"{name} {values.pop()}: the activations of {arguments.data.activations} were harvested with "
                f"{harvested}; leave it out, or harvest again"
            )
