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

from ..configuration_selortho import SelOrthoConfig, score_of_selection

EXPECTATIONS = Path(__file__).with_name("expectations.json")
PENALTY_SETTINGS = (
    "penalty", "penalty_space", "selection_space", "ortho_coefficient", "pair_fraction", "decoder_ratio",
    "decoder_pairs", "selection_interval",
)  # fmt: skip
_NAMES = {"relu": "ReLU", "topk": "TopK"}
_FARTHEST = 4.0  # factor of a strength beyond which a measurement says nothing
_LIKE = {"relu": "relu", "jumprelu": "relu", "topk": "topk", "batchtopk": "topk"}  # that was measured


def expectation_facts(config: Mapping[str, Any]) -> dict[str, str] | None:
    """What was measured with the setting that is most like this one.

    Args:
        config: settings of an SAE.

    Returns:
        Strings for the template: "where" (language model, layer, activation function, seeds), "setting", the changes
        against the twin ("correlation", "cosine", "fvu", "dead") and, where synthetic worlds were trained with such a
        penalty, "world_setting", "trainings", "world_fvu", "mcc", "uniqueness", "recovered", "f1" and "absorption".
        None if no such penalty was measured.
    """
    config = {**SelOrthoConfig.default_settings(), **{key: value for key, value in config.items() if value is not None}}
    if config["reduction"] == "sum" or not config["ortho_coefficient"]:  # a sum's coefficient is another quantity
        return None
    known = _measured()
    like = _LIKE.get(config["activation"])
    found = _nearest(config, [one for one in known["saes"] if one["activation"] == like])
    if found is None:
        return None
    source = known["source"]
    facts = {
        "where": f"{source['model']}, layer {source['layer']}, {_NAMES[found['activation']]}, {source['seeds']} seeds",
        "setting": _setting(found),
        **{key: _figure(found[key], 1, 100) + "%" for key in ("correlation", "cosine", "fvu")},
        "dead": _figure(found["dead"], 1),
    }
    world = _nearest(config, [one for one in known["worlds"] if one["activation"] == like])
    if world is not None:
        scores = {key: _figure(world[key], 3) for key in ("mcc", "uniqueness", "recovered", "f1", "absorption")}
        facts |= {"world_setting": _setting(world), "trainings": str(world["trainings"]), **scores}
        facts["world_fvu"] = _figure(world["fvu"], 0, 100) + "%"
    return facts


@cache
def _measured() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(EXPECTATIONS.read_text(encoding="utf-8"))
    return content


def _nearest(config: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry of the same penalty whose strengths differ by the smallest factors; None beyond [`_FARTHEST`].

    Among those of equal strengths, the one whose pairs were selected most nearly as often.
    """
    near = [one for one in measured if _kind(one) == _kind(config) and _distance(one, config) <= math.log(_FARTHEST)]

    def far(one: Mapping[str, Any]) -> tuple[float, float]:
        return _distance(one, config), abs(math.log(one["selection_interval"] / config["selection_interval"]))

    return min(near, key=far, default=None)


def _kind(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two penalties the same but for their strength."""
    if settings["penalty"] != "selective":
        return (settings["penalty"],)
    companion = settings["decoder_pairs"] if settings["decoder_ratio"] > 0 else None
    return (
        settings["penalty_space"],
        score_of_selection(settings["penalty_space"], settings["selection_space"]),
        companion,
    )


def _distance(one: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """Logarithms of the factors by which strengths differ, summed up."""
    keys = ["ortho_coefficient"] + ["pair_fraction", "decoder_ratio"] * (one["penalty"] == "selective")
    return sum(abs(math.log(one[key] / config[key])) for key in keys if config.get(key) and one[key])


def _figure(found: Sequence[float], digits: int, unit: float = 1.0) -> str:
    mean, deviation = found
    return f"{unit * mean:+.{digits}f} ± {unit * deviation:.{digits}f}"


def _setting(one: Mapping[str, Any]) -> str:
    selected = f", selected every {one['selection_interval']} steps"
    pairs = f" on {100 * one['pair_fraction']:g}% of the pairs{selected}" if one["penalty"] == "selective" else ""
    beside = f", `decoder_ratio` {one['decoder_ratio']:g}" if one["decoder_ratio"] else ""
    return f"`ortho_coefficient` {one['ortho_coefficient']:g}{pairs}{beside}"
