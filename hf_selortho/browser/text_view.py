"""What fires on a text: the strongest features of all of it or of a token, and the nearest ones of another SAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SelOrthoError
from ..features import TokenFeatures
from ..modeling_selortho import SelOrthoSAE
from ..utils.characters import isolated, visible
from .address import Address
from .catalog import CatalogEntry

STRONGEST = 20  # features in the table of a text
ON_A_TOKEN = 30


class FiringRow(NamedTuple):
    """A feature in the table of a text or of a token."""

    feature: int
    activation: float  # on the token, or the largest of the text
    peak_token: str  # on which it has it
    fires: int  # tokens of the text on which it fires


def text_values(address: Address, entry: CatalogEntry, reading: TokenFeatures) -> dict[str, Any]:
    """Return what the view of a text shows: its shaded tokens, and the features of the text or of a token."""
    chosen, selected = address.feature, address.token
    if chosen is not None and not 0 <= chosen < reading.feature_acts.shape[1]:
        chosen = None
    if selected is not None and not 0 <= selected < len(reading):
        selected = None
    activations = peaks(reading) if chosen is None else activations_on(reading, chosen)
    record = None if chosen is None or entry.index is None else entry.index.feature(chosen)
    rows = _text_rows(reading) if selected is None else _token_rows(reading, selected)
    return {
        "entry": entry,
        "reading": reading,
        "activations": activations.tolist(),
        "scale": max(float(activations.max()), record.max_activation if record else 0.0) or 1.0,
        "chosen": chosen,
        "record": record,
        "selected": selected,
        "rows": rows,
        "caption": _caption(reading, selected, rows),
    }


def activations_on(reading: TokenFeatures, feature: int) -> Tensor:
    """Return the activations (tokens,) of a feature, 0 where the SAE says nothing."""
    return reading.on(feature).where(reading.trained_on, 0)


def peaks(reading: TokenFeatures) -> Tensor:
    """Return the strongest activation on each token (tokens,), 0 where the SAE says nothing."""
    return reading.feature_acts.amax(1).where(reading.trained_on, 0)


def _text_rows(reading: TokenFeatures) -> list[FiringRow]:
    rows = []
    for feature, activation in reading.strongest(STRONGEST):
        activations = activations_on(reading, feature)
        peak_token = reading.tokens[int(activations.argmax())]
        rows.append(FiringRow(feature, activation, peak_token, int((activations > 0).sum())))
    return rows


def _token_rows(reading: TokenFeatures, token: int) -> list[FiringRow]:
    return [
        FiringRow(feature, activation, reading.tokens[token], 1)
        for feature, activation in reading.top(ON_A_TOKEN)[token]
    ]


def _caption(reading: TokenFeatures, token: int | None, rows: Sequence[FiringRow]) -> str:
    if token is None:
        return "The strongest features of the text" if rows else "No feature fires on this text."
    title = f"Token {token}, “{isolated(visible(reading.tokens[token]))}”"
    if not rows:
        reason = "no feature fires on it" if reading.trained_on[token] else "the SAE does not read this token"
        return f"{title}: {reason}."
    fires = int((reading.feature_acts[token] > 0).sum())
    return f"{title}: {fires} features fire" + (f", the strongest {len(rows)}" if fires > len(rows) else "")


class Counterpart(NamedTuple):
    """A feature that fires on a text, beside the nearest one of another SAE."""

    feature: int
    activation: float  # the largest of the text
    nearest: int  # the feature of the other SAE whose decoder direction is nearest
    cosine: float  # of the two directions
    nearest_activation: float  # the largest of the text


@torch.no_grad()
def counterparts(
    saes: tuple[SelOrthoSAE, SelOrthoSAE], readings: tuple[TokenFeatures, TokenFeatures], k: int
) -> list[Counterpart]:
    """Return the `k` strongest features of the first SAE on a text, each beside its nearest one in the second SAE."""
    (sae, other), (reading, other_reading) = saes, readings
    own, theirs = (f"{one.config.written_site} of width {one.config.width_out}" for one in saes)
    if own != theirs:
        raise SelOrthoError(
            f"directions of {own} and of {theirs} do not compare: choose SAEs of one site of the same language model"
        )
    decoder = other.W_dec.float()  # (d_sae of the other, d_in)
    norms = decoder.norm(dim=1).clamp_min(1e-12)
    rows = []
    for feature, activation in reading.strongest(k):
        direction = torch.nn.functional.normalize(sae.W_dec[feature].float(), dim=0)  # (d_in,)
        cosine, nearest = (decoder @ direction.to(decoder.device) / norms).max(0)
        there = float(activations_on(other_reading, int(nearest)).max())
        rows.append(Counterpart(feature, activation, int(nearest), float(cosine), there))
    return rows


def compared_values(
    entries: Sequence[CatalogEntry], readings: Sequence[TokenFeatures], saes: Sequence[SelOrthoSAE]
) -> list[dict[str, Any]]:
    """Return what the view of two SAEs on one text shows of each."""
    sides = []
    for this, other in ((0, 1), (1, 0)):
        reading, trained_on = readings[this], readings[this].trained_on
        activations = peaks(reading)
        sides.append(
            {
                "entry": entries[this],
                "other": entries[other],
                "reading": reading,
                "activations": activations.tolist(),
                "scale": float(activations.max()) or 1.0,
                "l0": float((reading.feature_acts[trained_on] > 0).sum(1).float().mean()) if trained_on.any() else 0,
                "rows": counterparts((saes[this], saes[other]), (readings[this], readings[other]), 12),
            }
        )
    return sides
