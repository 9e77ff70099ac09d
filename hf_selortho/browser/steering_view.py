"""The view of steering: what the language model writes with and without some features changed, as it grows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import SelOrthoError
from ..features import FeatureIndex, Generation, Sampling, Steer
from ..features.records import FeatureSummary
from ..utils.characters import visible
from .address import Address
from .live_model import LiveModel, NotLiveError
from .pairs import DENSE, holds_words
from .rendering import note, number, problem, view

PEAK = "peak"  # beside the modes of `Steer`: hold at a multiple of the largest activation that the index knows
MODES = {PEAK: "times its largest activation", "clamp": "held at this activation", "scale": "times what it is"}
DEFAULT_STRENGTH = 2.0
EXAMPLE_PROMPT = "The weather today"
_NUMBER = re.compile(r"(\d{1,9})(?:\.0*)?(?=\s|$)")
_OFFERED = 20  # features in the list below a box

Chosen = str | float | None  # of a feature: its number, alone or before its label, or words of the label
Written = tuple[Generation, list[float]]  # with the largest activation of a steered feature on each token


def steers_of(index: FeatureIndex | None, features: Sequence[Chosen], mode: str, value: float) -> list[Steer]:
    """Return the same change of every feature that is chosen.

    Raises:
        SelOrthoError: no label says what was typed, the change is not allowed, or a largest activation is not known.
    """
    numbers = [feature_of(index, one) for one in features if one is not None and str(one).strip()]
    if mode != PEAK:
        return [Steer(feature, mode, float(value)) for feature in numbers]  # type: ignore[arg-type]
    return [Steer(feature, "clamp", float(value) * _largest(index, feature)) for feature in numbers]


def feature_of(index: FeatureIndex | None, chosen: str | float) -> int:
    """Return the number of a feature that somebody has typed or chosen.

    Raises:
        SelOrthoError: it is no number, and no label holds it.
    """
    text = str(chosen).strip()
    if found := _NUMBER.match(text):
        return int(found[1])
    labelled = index.search_labels(text, 1) if index is not None else []
    if not labelled:
        raise SelOrthoError(f"feature {text!r:.60}: no label holds it; type a number, or a word of a label")
    return labelled[0].feature


def _largest(index: FeatureIndex | None, feature: int) -> float:
    largest = 0.0 if index is None else index.summary(feature).max_activation
    if largest <= 0:
        why = "there is no feature index" if index is None else "it never fires on the text of the feature index"
        raise SelOrthoError(
            f"the largest activation of feature {feature} is not known ({why}): choose to hold it at an activation"
        )
    return largest


def offered(index: FeatureIndex | None, typed: str = "") -> list[tuple[str, int]]:
    """List the features that a box offers for what was typed so far, as they are shown and by number."""
    if index is None:
        return []
    typed = typed.strip()
    if not typed:
        found = worth_a_look(index, _OFFERED)
    else:
        numbered = _NUMBER.match(typed)
        exact = [int(numbered[1])] if numbered and int(numbered[1]) < len(index) else []
        words = typed[numbered.end() :].strip() if exact and numbered else typed
        labelled = index.search_labels(words, _OFFERED) if words else []
        found = [index.summary(n) for n in exact] + [one for one in labelled if one.feature not in exact]
    return [(shown(index, one.feature), one.feature) for one in found]


def shown(index: FeatureIndex | None, feature: int) -> str:
    """Write a feature as the boxes show it: number and label."""
    known = index is not None and 0 <= feature < len(index)
    return f"{feature} {visible(index.label(feature))[:60]}".strip() if known and index else str(feature)


def worth_a_look(index: FeatureIndex, k: int) -> list[FeatureSummary]:
    """Return features to start with: those of the index's gallery, else the best labelled ones that fire seldom."""
    if gallery := index.facts.get("gallery"):
        return [index.summary(item["feature"]) for item in gallery[:k] if item["feature"] < len(index)]
    table = index.feature_table
    frequency, largest = table["frequency"].to_numpy(), table["max_activation"].to_numpy()
    score = np.nan_to_num(table["label_score"].to_numpy().astype(float))
    order = np.lexsort((-largest, -score))
    seldom = order[(largest[order] > 0) & (frequency[order] <= DENSE / 10)]
    best = (feature for feature in seldom.tolist() if holds_words(index.label(feature)))
    return [index.summary(feature) for _, feature in zip(range(k), best, strict=False)]


def steering_views(
    live: LiveModel, index: FeatureIndex | None, address: Address, steers: Sequence[Steer], sampling: Sampling
) -> Iterator[str]:
    """Render the plain text as it grows, then the steered one beside it, by the same seed."""
    plain: Written | None = None
    changes = [(steer.feature, "" if index is None else index.label(steer.feature)) for steer in steers]
    common = {"changes": changes, "held": _in_words(address, steers)}
    try:
        for generation in live.stream(address.q, (), sampling, address.sae):
            plain = _written(generation)
            yield view("steer.html", address, "Steer", plain=plain, steered=None, **common)
        for generation in live.stream(address.q, steers, sampling, address.sae) if steers else ():
            yield view("steer.html", address, "Steer", plain=plain, steered=_written(generation), **common)
    except NotLiveError as error:
        yield note(address, "Steer", str(error))
    except SelOrthoError as error:
        yield problem(address, str(error))


def _in_words(address: Address, steers: Sequence[Steer]) -> str:
    """What becomes of the features' activations."""
    value = number(address.value)
    if address.mode == "scale":
        return f"times {value}"
    if address.mode == "clamp":
        return f"held at {value}"
    held = " and ".join(number(steer.value) for steer in steers)
    return f"held at {held}, {value} × {'its largest activation' if len(steers) == 1 else 'their largest activations'}"


def _written(generation: Generation) -> Written:
    activations = generation.feature_acts  # (tokens, steers)
    return generation, activations.amax(1).tolist() if generation.steers else [0.0] * len(generation)
