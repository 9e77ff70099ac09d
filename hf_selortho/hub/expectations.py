"""What a reader of a model card may expect of a penalty: what the project's own comparison of methods has measured.

`expectations.json` is written from the records of that comparison (`hf_selortho.experiments.expectations`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

EXPECTATIONS = Path(__file__).with_name("expectations.json")
PENALTY_SETTINGS = (
    "penalty", "penalty_space", "selection_space", "ortho_coefficient", "pair_fraction", "decoder_ratio",
    "decoder_pairs",
)  # fmt: skip
_NAMES = {"relu": "ReLU", "topk": "TopK"}
_LIKE = {"relu": "relu", "jumprelu": "relu", "topk": "topk", "batchtopk": "topk"}  # that was measured


def expectation_facts(config: Mapping[str, Any]) -> dict[str, str] | None:
    """What was measured with the setting that is most like this one.

    Args:
        config: settings of an SAE.

    Returns:
        Strings for the template: "where" (language model, layer, activation function, seeds), "setting", the changes
        against the twin ("correlation", "cosine", "fvu", "dead") and, where synthetic worlds were trained with such a
        penalty, "world_setting", "trainings", "mcc", "uniqueness", "f1" and "absorption". None if no such penalty was
        measured.
    """
    if config.get("reduction", "mean") == "sum":  # its coefficient is another quantity
        return None
    known = _measured()
    like = _LIKE.get(config.get("activation", "relu"))
    found = _nearest(config, [one for one in known["saes"] if one["activation"] == like])
    if found is None:
        return None
    source = known["source"]
    facts = {
        "where": f"{source['model']}, layer {source['layer']}, {_NAMES[found['activation']]}, {source['seeds']} seeds",
        "setting": _setting(found),
        **{key: f"{100 * found[key]:+.1f}%" for key in ("correlation", "cosine", "fvu")},
        "dead": f"{found['dead']:+.1f}",
    }
    world = _nearest(config, known["worlds"])
    if world is not None:
        scores = {key: f"{world[key]:+.3f}" for key in ("mcc", "uniqueness", "f1", "absorption")}
        facts |= {"world_setting": _setting(world), "trainings": str(world["trainings"]), **scores}
    return facts


@cache
def _measured() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(EXPECTATIONS.read_text(encoding="utf-8"))
    return content


def _nearest(config: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry of the same penalty whose coefficient and share of pairs differ by the least factor."""
    same = [one for one in measured if _kind(one) == _kind(config)]
    return min(same, key=lambda one: _distance(one, config), default=None)


def _kind(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two penalties the same but for their strength."""
    if settings.get("penalty", "selective") != "selective":
        return (settings["penalty"],)
    companion = settings.get("decoder_pairs", "alike") if settings.get("decoder_ratio", 0) > 0 else None
    return settings.get("penalty_space", "activation"), settings.get("selection_space", "same"), companion


def _distance(one: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    keys = ("ortho_coefficient", "pair_fraction")[: 2 if one["penalty"] == "selective" else 1]
    return sum(abs(math.log(one[key] / config[key])) for key in keys if config.get(key))


def _setting(one: Mapping[str, Any]) -> str:
    pairs = f" on {100 * one['pair_fraction']:g}% of the pairs" if one["penalty"] == "selective" else ""
    return f"`ortho_coefficient` {one['ortho_coefficient']:g}{pairs}"
