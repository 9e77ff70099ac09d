"""The view that the page opens on: what the SAE is, its figures beside the twin's, and features worth a look."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ..configuration_selortho import SelOrthoConfig
from ..features.index import FeatureIndex
from .address import Address
from .catalog import CatalogEntry
from .feature_table import DENSE, sorted_features
from .rendering import view

CARDS = 12
# Of an index without a gallery: so many features, on less than 1% of the tokens; if none has a good label, 10%.
_CANDIDATES, _RARE = 400, (1.0, 100 * DENSE)
_BEFORE, _BEHIND = 16, 12  # tokens of a card around its peak
_NOT_SHOWN = ("unclear", "none")
# In metrics.json, with name and meaning; of the last three, the first one that is known.
_FIGURES = (
    (("fvu", "FVU", "unexplained variance of the activations, less is better"),),
    (("l0", "L0", "features that fire on a token"),),
    (
        ("max_decoder_cosine", "decoder cosine", "of a feature with its nearest, less is more distinct"),
        ("loss_recovered", "loss recovered", "of the language model, 1 is perfect"),
        ("top_correlation", "top correlation", "of the most correlated 0.1% of pairs"),
    ),
)
_PENALTIES = {  # by the space
    "activation": "with a penalty on features that fire together",
    "decoder": "with a penalty on features that point alike",
    "exclusion": "with a penalty on features that point alike and rarely fire together",
}
_PROBES = (("1", "one feature"), ("16", "16 features"))


def start_page(address: Address, entries: Sequence[CatalogEntry], example: str | None) -> str:
    """Render the first SAE, beside the second one where there is one.

    Args:
        address: of the view. entries: the SAE that is shown, then its twin.
        example: a text to try; None: there is no live text.
    """
    entry = entries[0]
    config = entry.config
    return view(
        "start.html",
        address,
        "Start",
        entry=entry,
        config=config,
        lm_name=without_folders(config.lm_name if config else None),
        dataset=without_folders(config.dataset if config else None),
        features=config.d_sae if config else len(entry.index) if entry.index else None,
        tokens=number_of(entry.metrics.get("training"), "tokens"),
        penalty=_penalty(config) if config else "",
        beside=entries[1].as_other if len(entries) > 1 else "",
        figures=figures(entries),
        probes=probes(entries),
        gallery=[] if entry.index is None else gallery(entry.index),
        example=example,
    )


def _penalty(config: SelOrthoConfig) -> str:
    if config.penalty == "none":
        return "without a penalty on features that overlap"
    return _PENALTIES.get("decoder" if config.penalty == "ortsae" else config.penalty_space, "with a penalty on pairs")


def figures(entries: Sequence[CatalogEntry]) -> list[tuple[str, str, list[float | None]]]:
    """Return the three figures that say most, each with name, meaning and the value of every SAE."""
    found = []
    for choices in _FIGURES:
        for key, name, meaning in choices:
            values = [number_of(entry.metrics.get("evaluation"), key) for entry in entries]
            if values[0] is not None:
                found.append((name, meaning, values))
                break
    return found


def probes(entries: Sequence[CatalogEntry]) -> list[tuple[str, str, list[float | None]]]:
    """Return the mean test AUC of the probes, as [`figures`] does, on sets that no SAE was trained on where there are.

    The dense baseline comes last: a probe on the activations themselves, before the SAE.
    """
    kept = "clean" if _auc(entries[0], "clean", "k", "1") is not None else "trained_on"
    rows: list[tuple[str, str, list[float | None]]] = []
    for k, name in _PROBES:
        rows.append((name, "", [_auc(entry, kept, "k", k) for entry in entries]))
    rows.append(("all activations", "without an SAE", [_auc(entry, kept, "dense") for entry in entries]))
    rows = [row for row in rows if row[2][0] is not None]
    sets = number_of(_parts(entries[0], "k", "1", kept), "sets")
    where = entries[0].read(kept == "trained_on")
    return [(name, meaning or f"{sets or 0:.0f} sets of texts {where}", values) for name, meaning, values in rows]


def _parts(entry: CatalogEntry, *path: str) -> Any:
    part: Any = entry.metrics.get("evaluation")
    for name in ("probes", *path):
        part = part.get(name) if isinstance(part, dict) else None
    return part


def _auc(entry: CatalogEntry, kept: str, *path: str) -> float | None:
    return number_of(_parts(entry, *path, kept), "mean")


def number_of(part: Any, name: str) -> float | None:
    """Return a finite number of an object that strangers may have written, None where there is none."""
    value = part.get(name) if isinstance(part, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -sys.float_info.max <= value <= sys.float_info.max else None  # of whole ones, too large for a float


def gallery(index: FeatureIndex) -> list[dict[str, Any]]:
    """Return at most twelve features worth a look, kinds of labels in turn, each with a context.

    An index without a gallery gets one of its well-labelled features, or else of its frequent ones; both of those that
    fire on less than 1% of the tokens, or if there is none, on less than 10%.
    """
    items = [item for item in index.facts.get("gallery") or [] if item["feature"] < len(index)] or _chosen(index)
    by_source: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        by_source.setdefault(item["source"], []).append(item)
    in_turn = chain.from_iterable(zip_longest(*by_source.values()))
    return [_cropped(item) for item in in_turn if item is not None][:CARDS]


def _cropped(card: dict[str, Any]) -> dict[str, Any]:
    """Cut the context of a card to what stands near its peak."""
    start = max(0, card["peak"] - _BEFORE)
    shown = slice(start, card["peak"] + _BEHIND)
    cut = {name: card[name][shown] for name in ("tokens", "activations")}
    return {**card, **cut, "peak": card["peak"] - start}


def _chosen(index: FeatureIndex) -> list[dict[str, Any]]:
    """Cards of features with labels of words, no two of which begin alike."""
    return next((cards for high in _RARE if (cards := _rarer_than(high, index))), [])


def _rarer_than(high: float, index: FeatureIndex) -> list[dict[str, Any]]:
    table = index.feature_table
    order = sorted_features(index, Address(view="features", high=high))[:_CANDIDATES]
    rows = table.select(["feature", "label", "label_source", "fires"]).take(order).to_pylist()
    features: dict[str, int] = {}
    for row in rows:
        first = (row["label"] or "").split(",")[0].strip().lower()
        if row["fires"] and row["label_source"] not in _NOT_SHOWN and any(c.isalpha() for c in first):
            features.setdefault(first, row["feature"])
    return [card for feature in list(features.values())[:CARDS] if (card := _card(index, feature))]


def _card(index: FeatureIndex, feature: int) -> dict[str, Any] | None:
    record = index.feature(feature)
    if not record.contexts:
        return None
    context = record.contexts[0]
    return {
        "feature": feature,
        "label": record.label,
        "source": record.label_source,
        "score": record.label_score,
        "tokens": context.tokens,
        "activations": context.activations,
        "peak": context.peak,
    }


def without_folders(name: str | None) -> str:
    """Return a Hub id as it is; of a path of the owner's machine, which is nobody's business, the last part."""
    if not name:
        return "not said"
    return Path(name).name if name.startswith(("/", "~", ".")) or "\\" in name else name
