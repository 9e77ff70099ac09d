"""A text as an SAE reads it: its tokens shaded, and the features that fire on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import SelOrthoSAE
from ..features import TokenFeatures
from ..features.render import bar_html, label_html, legend_html, line_break, number, token_html, visible
from ..features.render import escape as escaped
from . import parts
from .address import Address
from .shelf import Shown

STRONGEST = 20  # features in the table of a text
ON_A_TOKEN = 30


def read_text(address: Address, shown: Shown, reading: TokenFeatures) -> str:
    """The view of a text: its tokens, the features of the text or of a token, and the chosen feature beside."""
    chosen = address.feature
    if chosen is not None and not 0 <= chosen < reading.feature_acts.shape[1]:
        chosen = None
    scale = _scale(shown, reading, chosen)
    what = "strongest feature of each token" if chosen is None else f"feature {chosen}"
    tokens = _buttons(reading, chosen, scale, address.token)
    listing = (
        _token_table(address, shown, reading) if _is_token(address, reading) else _text_table(address, shown, reading)
    )
    aside = ""
    if chosen is not None:
        clear = '<button type="button" class="so-button" data-set="feature=">shade by the strongest</button>'
        card = parts.feature_card(shown.key, shown.index, chosen)
        aside = f'<aside aria-label="the chosen feature">{clear}{card}</aside>'
    return (
        f"{legend_html(scale, f'shaded by the {what}' if chosen is None else f'shaded by {what}')}"
        f'<div class="so-reading">{tokens}</div>{_left_out(reading)}<div class="so-cols so-wide">{listing}{aside}</div>'
    )


def shaded_text(reading: TokenFeatures, feature: int, scale: float) -> str:
    """A text shaded by a feature, without buttons."""
    values = reading.on(feature).where(reading.trained_on, 0).tolist()
    most = max(values)
    words = f"It fires on {sum(v > 0 for v in values)} of {len(reading)} tokens, at most {number(most)}."
    return f'<div class="so-reading">{_plain(reading, values, scale)}</div>{parts.note(words)}'


def compared(
    address: Address,
    sides: Sequence[tuple[str, Shown | None]],
    readings: Sequence[TokenFeatures],
    saes: Sequence[SelOrthoSAE],
) -> str:
    """Two SAEs on one text, each feature beside its nearest one in the other SAE."""
    columns = []
    for own, other in ((0, 1), (1, 0)):
        key, shown = sides[own]
        reading = readings[own]
        title = shown.title if shown else key
        index = shown.index if shown else None
        scale = float(_peaks(reading).max()) or 1.0
        rows = []
        for feature, activation in reading.strongest(12):
            nearest, cosine = counterpart(saes[own], feature, saes[other])
            there = float(readings[other].on(nearest).where(readings[other].trained_on, 0).max())
            other_shown = sides[other][1]
            other_index = other_shown.index if other_shown else None
            rows.append(
                [
                    _name(key, shown, feature, parts.label_of(index, feature)),
                    number(activation),
                    _name(sides[other][0], other_shown, nearest, parts.label_of(other_index, nearest)),
                    number(cosine, 2),
                    number(there),
                ]
            )
        l0 = (
            float((reading.feature_acts[reading.trained_on] > 0).sum(1).float().mean())
            if reading.trained_on.any()
            else 0
        )
        heads = ("feature", "strongest", "nearest in the other", "cosine", "strongest there")
        columns.append(
            f'<div><h3>{escaped(title)}</h3><p class="so-note">{number(l0)} features fire on a token of this text.</p>'
            f"{legend_html(scale, 'strongest feature of each token')}"
            f'<div class="so-reading">{_plain(reading, _peaks(reading).tolist(), scale)}</div>'
            f"{parts.table(heads, rows, f'The strongest features of {title}', 'so-small')}</div>"
        )
    return f'<div class="so-cols so-two-columns">{"".join(columns)}</div>'


@torch.no_grad()
def counterpart(sae: SelOrthoSAE, feature: int, other: SelOrthoSAE) -> tuple[int, float]:
    """The feature of another SAE whose decoder direction is nearest to that of a feature, and the cosine."""
    direction = torch.nn.functional.normalize(sae.W_dec[feature].float(), dim=0)  # (d_in,)
    rows = other.W_dec.float()  # (d_sae, d_in)
    cosines = rows @ direction.to(rows.device) / rows.norm(dim=1).clamp_min(1e-12)
    nearest = int(cosines.argmax())
    return nearest, float(cosines[nearest])


def _name(key: str, shown: Shown | None, feature: int, label: str) -> str:
    if shown is None or shown.index is None:
        return f'<span class="so-id">{feature}</span> {label_html(label) if label else ""}'
    return parts.feature_link(key, feature, label)


def _peaks(reading: TokenFeatures) -> torch.Tensor:
    """The strongest activation on each token (tokens,), 0 where the SAE says nothing."""
    return reading.feature_acts.amax(1).where(reading.trained_on, 0)


def _is_token(address: Address, reading: TokenFeatures) -> bool:
    return address.token is not None and 0 <= address.token < len(reading)


def _scale(shown: Shown, reading: TokenFeatures, chosen: int | None) -> float:
    """The activation that is shaded fully: of a chosen feature, the largest that is known of it."""
    if chosen is None:
        return float(_peaks(reading).max()) or 1.0
    here = float(reading.on(chosen).where(reading.trained_on, 0).max())
    known = shown.index.summary(chosen).max_activation if shown.index is not None else 0.0
    return max(here, known) or 1.0


def _buttons(reading: TokenFeatures, chosen: int | None, scale: float, selected: int | None) -> str:
    values = _peaks(reading) if chosen is None else reading.on(chosen).where(reading.trained_on, 0)
    pieces = []
    for place, (token, value, kept) in enumerate(
        zip(reading.tokens, values.tolist(), reading.trained_on.tolist(), strict=True)
    ):
        marks = [mark for mark, on in (("so-unread", not kept), ("so-chosen", place == selected)) if on]
        title = f"{token!r}: {number(value)}" if kept else f"{token!r}: the SAE does not read this token"
        pieces.append(token_html(token, value / scale, title, " ".join(marks), f"token={place}") + line_break(token))
    return "".join(pieces)


def _plain(reading: TokenFeatures, values: Sequence[float], scale: float) -> str:
    """A text shaded by values, without buttons."""
    return "".join(
        token_html(
            token, value / scale if scale > 0 else 0.0, f"{token!r}: {number(value)}", "" if kept else "so-unread"
        )
        for token, value, kept in zip(reading.tokens, values, reading.trained_on.tolist(), strict=True)
    )


def _left_out(reading: TokenFeatures) -> str:
    left = int((~reading.trained_on).sum())
    if not left:
        return ""
    words = "The hatched token is" if left == 1 else f"The {left} hatched tokens are"
    return parts.note(
        f"{words} no input of the SAE: the language model reads it, but it is BOS, another special token, or a sink, "
        "whose activation has a far larger norm; the training left these out."
    )


def _text_table(address: Address, shown: Shown, reading: TokenFeatures) -> str:
    found = reading.strongest(STRONGEST)
    if not found:
        return parts.note("No feature fires on this text.")
    most = found[0].activation
    rows = []
    for feature, activation in found:
        acts = reading.on(feature).where(reading.trained_on, 0)
        peak = int(acts.argmax())
        rows.append(
            [
                _beside(address, shown, feature),
                f"{bar_html(activation / most)}{number(activation)}",
                f'<code class="so-token">{escaped(visible(reading.tokens[peak]))}</code>',
                str(int((acts > 0).sum())),
                _open(shown, feature),
            ]
        )
    return (
        "<div>"
        + parts.table(("feature", "strongest", "on", "tokens", ""), rows, "The strongest features of the text")
        + "</div>"
    )


def _token_table(address: Address, shown: Shown, reading: TokenFeatures) -> str:
    assert address.token is not None
    place = address.token
    token = visible(reading.tokens[place])
    back = '<button type="button" class="so-button" data-set="token=">features of the whole text</button>'
    found = reading.top(ON_A_TOKEN)[place]
    title = f"Token {place}, “{token}”"
    if not found:
        why = "no feature fires on it" if bool(reading.trained_on[place]) else "the SAE does not read this token"
        return f"<div>{back}{parts.note(f'{title}: {why}.')}</div>"
    most = found[0].activation
    rows = [
        [
            _beside(address, shown, feature),
            f"{bar_html(activation / most)}{number(activation)}",
            _open(shown, feature),
        ]
        for feature, activation in found
    ]
    fires = int((reading.feature_acts[place] > 0).sum())
    caption = f"{title}: {fires} features fire" + (f", the strongest {len(found)}" if fires > len(found) else "")
    return f"<div>{back}{parts.table(('feature', 'activation', ''), rows, caption)}</div>"


def _beside(address: Address, shown: Shown, feature: int) -> str:
    """A link that shades the text by a feature, and opens the feature beside it."""
    inner = f'<span class="so-id">{feature}</span> {label_html(parts.label_of(shown.index, feature))}'
    chosen = ' <span class="so-tag">shaded</span>' if feature == address.feature else ""
    return parts.link(address.to(feature=feature), inner, "so-feature") + chosen


def _open(shown: Shown, feature: int) -> str:
    """A link to the view of a feature, where there is one."""
    if shown.index is None:
        return ""
    return parts.link(Address(view="feature", sae=shown.key, id=feature), "open", "so-button")
