"""The view of steering: what the language model writes with and without some features changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .. import SelOrthoError
from ..features.render import escape, line_break, number, token_html, visible
from ..features.sampling import Sampling
from ..features.steering import Generation, Steer
from . import parts
from .address import Address
from .live import LiveModel, NotLiveError


def steers_of(features: Sequence[float | None], mode: str, value: float) -> list[Steer]:
    """The same change of every feature that is named.

    Raises:
        SelOrthoError: the change is not allowed.
    """
    return [Steer(int(f), mode, float(value)) for f in features if f is not None]  # type: ignore[arg-type]


def steered_pages(live: LiveModel, address: Address, steers: Sequence[Steer], sampling: Sampling) -> Iterator[str]:
    """The view as it grows: first the plain text, then the steered one, by the same seed."""
    plain: Generation | None = None
    steered: Generation | None = None
    try:
        for plain in live.stream(address.q, (), sampling, address.sae):
            yield _page(address, plain, None, steers)
        for steered in live.stream(address.q, steers, sampling, address.sae) if steers else ():
            yield _page(address, plain, steered, steers)
    except NotLiveError as error:
        yield parts.section(address, "Steer", parts.note(str(error)))
    except SelOrthoError as error:
        yield parts.problem(address, str(error))


def blank(address: Address) -> str:
    """Before anything was generated."""
    words = (
        "Choose one feature, or both of a pair, and what becomes of its activation at the layer of the SAE, on every "
        "token that the language model reads. The rest of the residual stream stays as it is. Then generate: the text "
        "with and without the change appears side by side, by the same seed."
    )
    return parts.section(address, "Steer", parts.note(words))


def _page(address: Address, plain: Generation | None, steered: Generation | None, steers: Sequence[Steer]) -> str:
    names = ", ".join(
        f"feature {s.feature} {'times' if s.mode == 'scale' else 'held at'} {number(s.value)}" for s in steers
    )
    right = _written(steered) if steered is not None else '<p class="so-empty">not yet written</p>'
    if not steers:
        right = '<p class="so-empty">no feature is chosen</p>'
    body = (
        f'<div class="so-cols so-two-columns"><div><h3>Unchanged</h3>{_written(plain)}</div>'
        f"<div><h3>Steered{': ' + escape(names) if names else ''}</h3>{right}</div></div>"
    )
    return parts.section(address, "Steer", body)


def _written(generation: Generation | None) -> str:
    if generation is None:
        return ""
    acts = generation.feature_acts  # (tokens, steers)
    values = acts.amax(1).tolist() if acts.shape[1] else [0.0] * len(acts)
    most = max(values, default=0.0) or 1.0
    pieces = []
    for place, token in enumerate(generation.tokens):
        value = values[place] if place < len(values) else 0.0
        mark = "" if place >= generation.prompt_tokens else "so-prompt"
        pieces.append(
            token_html(token, value / most, f"{visible(token)!r}: {number(value)} before the change", mark)
            + line_break(token)
        )
    ended = ' <span class="so-tag">the model ended the text</span>' if generation.ended else ""
    return f'<div class="so-reading">{"".join(pieces)}{ended}</div>'
