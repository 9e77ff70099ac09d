"""The view of steering: what the language model writes with and without some features changed, as it grows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..errors import SelOrthoError
from ..features import FeatureIndex, Generation, Sampling, Steer
from .address import Address
from .live_model import LiveModel, NotLiveError
from .rendering import label_of, note, number, problem, readable, view
from .start_view import gallery

PEAK = "peak"  # beside the modes of `Steer`: hold at a multiple of the largest activation that the index knows
MODES = {PEAK: "× its maximum", "clamp": "this value", "scale": "× what it is"}
DEFAULT_STRENGTH = 1.0  # Gemma-3-270m: 1 changes the text, 2 bends its grammar, at 4 it falls apart
EXAMPLE_PROMPT = "The weather today"
_NUMBER = re.compile(r"(\d{1,9})(?:\.0*)?(?=\s|$)")
OFFERED = 20  # features in the list below a box

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


def default_mode(index: FeatureIndex | None) -> str:
    """Return the mode that the form begins with: without an index, no largest activation is known."""
    return "clamp" if index is None else PEAK


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
            f"the largest activation of feature {feature} is not known ({why}): hold it at a value (mode clamp)"
        )
    return largest


def offered(index: FeatureIndex | None, typed: str = "") -> list[tuple[str, int]]:
    """List at most OFFERED features that a box offers for what was typed so far, as they are shown and by number."""
    if index is None:
        return []
    typed = typed.strip()
    if not typed:  # those worth a look, then others
        known = [card["feature"] for card in gallery(index)]
        known += [one.feature for one in index.most_frequent(OFFERED)]
        return [(shown(index, feature), feature) for feature in dict.fromkeys(known)][:OFFERED]
    number = _NUMBER.match(typed)
    found = [int(number[1])] if number and int(number[1]) < len(index) else []
    words = typed[number.end() :].strip() if number else typed
    found += [one.feature for one in (index.search_labels(words, OFFERED) if words else [])]
    return [(shown(index, feature), feature) for feature in dict.fromkeys(found)][:OFFERED]


def shown(index: FeatureIndex | None, feature: int) -> str:
    """Write a feature as the boxes show it: number and label."""
    label = readable(label_of(index, feature)) if index is not None and 0 <= feature < len(index) else ""
    return f"{feature} {label[:120]}".strip()


def steering_views(
    live: LiveModel, index: FeatureIndex | None, address: Address, steers: Sequence[Steer], sampling: Sampling
) -> Iterator[str]:
    """Render the plain text as it grows, then the steered one beside it, by the same seed."""
    plain: Written | None = None
    try:
        changes = [(steer.feature, label_of(index, steer.feature)) for steer in steers]
        common = {"changes": changes, "held": _in_words(address, steers)}
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
