"""The view of steering: what the language model writes with and without some features changed, as it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import SelOrthoError
from ..features import Generation, Sampling, Steer
from .address import Address
from .live_model import LiveModel, NotLiveError
from .rendering import note, problem, view

Written = tuple[Generation, list[float]]  # with the largest activation of a steered feature on each token


def steers_of(features: Sequence[float | None], mode: str, value: float) -> list[Steer]:
    """Return the same change of every feature that is named.

    Raises:
        SelOrthoError: the change is not allowed.
    """
    return [Steer(int(f), mode, float(value)) for f in features if f is not None]  # type: ignore[arg-type]


def steering_views(live: LiveModel, address: Address, steers: Sequence[Steer], sampling: Sampling) -> Iterator[str]:
    """Render the plain text as it grows, then the steered one beside it, by the same seed."""
    plain: Written | None = None
    try:
        for generation in live.stream(address.q, (), sampling, address.sae):
            plain = _written(generation)
            yield view("steer.html", address, "Steer", plain=plain, steered=None, steers=steers)
        for generation in live.stream(address.q, steers, sampling, address.sae) if steers else ():
            yield view("steer.html", address, "Steer", plain=plain, steered=_written(generation), steers=steers)
    except NotLiveError as error:
        yield note(address, "Steer", str(error))
    except SelOrthoError as error:
        yield problem(address, str(error))


def _written(generation: Generation) -> Written:
    activations = generation.feature_acts  # (tokens, steers)
    return generation, activations.amax(1).tolist() if generation.steers else [0.0] * len(generation)
