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
from ..utils.options import refuse_contradictions
from .arguments import SETTING_NAMES, TrainingArguments
from .contradictions import TRAIN

logger = logging.getLogger(__name__)

TWIN = {"twin": {"ortho_coefficient": 0.0}}  # the twin baseline: the same run without the penalty
# What the settings of an option belong to, and how these are named.
_OWNERS = {
    "--layer_settings": ("layer", re.compile(r"0|[1-9]\d*"), "a whole number counted from 0"),
    "--variants": (
        "variant",
        re.compile(r"[a-z0-9]+(-[a-z0-9]+)*"),
        "small letters, digits and hyphens, such as 'no-penalty'",
    ),
}


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
        SelOrthoError: a variant's name or settings are not allowed, a layer occurs twice, or arguments contradict one
            another.
    """
    run = arguments.run
    layers, others = run.layers or [arguments.sae.layer], parse_settings("--variants", run.variants)
    if run.twin and "twin" in others:
        raise SelOrthoError("--twin and --variants both name a variant 'twin': leave one out")
    others = {**(TWIN if run.twin else {}), **others}
    by_layer = parse_settings("--layer_settings", run.layer_settings)
    if untrained := sorted(by_layer.keys() - set(map(str, layers))):
        logger.warning("--layer_settings has settings for layers that are not trained: %s", ", ".join(untrained))
    variants = []
    for layer in layers:
        for label, settings in {"": {}, **others}.items():
            sae = dataclasses.replace(arguments.sae, **{**by_layer.get(str(layer), {}), **settings, "layer": layer})
            name = f"layer_{layer}_{label}".rstrip("_") if run.layers or others else ""
            variants.append(Variant(name, layer, dataclasses.replace(arguments, sae=sae)))
            # errors come before the language model does, whose width is not known yet
            variants[-1].config(d_in=sae.d_sae or 1 << 30)
    hub = dataclasses.asdict(arguments.hub)
    refuse_contradictions(TRAIN, arguments.given, *({**variant.arguments.flat(), **hub} for variant in variants))
    return variants


def all_settings(arguments: TrainingArguments, variants: list[Variant]) -> dict[str, Any]:
    """Return every argument of a run, and the settings of each SAE by its name: a checkpoint holds them."""
    settings = {**arguments.flat(), "variants": None, "layer_settings": None, "saes": [v.name for v in variants]}
    for variant in variants:
        prefix = f"{variant.name}." if variant.name else ""
        settings |= {f"{prefix}{key}": value for key, value in dataclasses.asdict(variant.arguments.sae).items()}
    return settings


def parse_settings(option: str, value: str | None) -> dict[str, dict[str, Any]]:
    """Parse settings of the SAE by layer or variant, '{"5": {"ortho_coefficient": 0.05}}', or read them from a file.

    Args:
        option: what the user has typed, "--layer_settings" or "--variants".
        value: what follows it, JSON or the path of a .json file; None: no settings.

    Raises:
        SelOrthoError: it is no such object, or names something that is no layer, variant or setting.
    """
    owner, pattern, words = _OWNERS[option]
    try:
        text = Path(value).read_text(encoding="utf-8") if value and value.endswith(".json") else value or "{}"
        settings = json.loads(text)
    except (OSError, ValueError) as error:
        example = """'{"5": {"ortho_coefficient": 0.05}}'"""
        raise SelOrthoError(f"{option} {value!r} is not valid JSON ({error}); expected e.g. {example}") from error
    if not isinstance(settings, dict) or not all(isinstance(chosen, dict) for chosen in settings.values()):
        raise SelOrthoError(f"{option} {value!r}: expected an object of settings for each {owner}")
    for key, chosen in settings.items():
        if not pattern.fullmatch(key):
            raise SelOrthoError(f"{option} names a {owner} {key!r}: expected {words}")
        for name in chosen.keys() - SETTING_NAMES:
            close = difflib.get_close_matches(name, SETTING_NAMES, n=1)
            hint = f"did you mean {close[0]}?" if close else "all read the same tokens of the layers that are named"
            raise SelOrthoError(f"{option}: {name!r} of {owner} {key} is not a setting of single SAEs; {hint}")
    return settings
