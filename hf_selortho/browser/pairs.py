"""The views of pairs: the table of those that the penalty acted on, and one of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..errors import SelOrthoError
from ..features.index import FeatureIndex
from ..features.words import is_wordless
from .address import Address
from .charts import curves
from .feature_table import DENSE
from .rendering import readable, view

PAIRS_ON_A_PAGE = 50
COUNTERPART = 0.5  # the least cosine of two decoder directions, here and in the twin, of what is one feature
# What the table of pairs can be sorted by: the column, its heading and what it means.
PAIR_COLUMNS = {
    "difference": (
        "difference",
        "correlation less that in the twin, where the twin has both features; sorted by its size",
    ),
    "score": ("trained", "score of the last selection of the training"),
    "correlation": ("now", "correlation on the text of the index"),
    "twin_correlation": ("twin", "correlation of the nearest features of the twin, trained without the penalty"),
    "decoder_cosine": ("cosine", "cosine of the decoder directions"),
    "support": ("both fire", "tokens on which both fire"),
}
PAIR_CLASSES = {
    "duplicate": "fire together both ways and point alike",
    "nested": "one fires nearly only where the other does",
    "co-occurring": "fire together, for another reason",
    "unmeasured": "too rare on this text",
}


@dataclass(frozen=True)
class PairRows:
    """What the table of pairs holds."""

    rows: list[dict[str, Any]]  # sorted; columns of the index's pair table, and the difference to the twin
    classes: Counter[str]  # pairs by class, before one class was chosen
    hidden: int  # pairs with a dense feature, or one whose label holds no word, that are not (or would not be) shown


def pair_table(address: Address, index: FeatureIndex) -> str:
    """Render the pairs of an index, sorted, filtered and by pages."""
    found = find_pairs(index, address)
    pages = max(1, -(-len(found.rows) // PAIRS_ON_A_PAGE))
    page = min(max(address.page, 1), pages)
    return view(
        "pairs.html",
        address,
        "Pairs",
        index=index,
        classes=PAIR_CLASSES,
        columns={name: words for name, words in PAIR_COLUMNS.items() if _has_twin(index) or "twin" not in words[1]},
        sort=sort_column(index, address.sort),
        found=found,
        rows=found.rows[(page - 1) * PAIRS_ON_A_PAGE : page * PAIRS_ON_A_PAGE],
        page=page,
        pages=pages,
    )


def pair_page(address: Address, index: FeatureIndex, has_twin: bool) -> str:
    """Render both features of a pair side by side, and what is known of the pair."""
    assert address.a is not None and address.b is not None
    pair = index.pair(address.a, address.b)
    history = curves({"correlation": zip(pair.history_steps, pair.history, strict=True)}, low=0.0)
    return view(
        "pair.html",
        address.to(a=pair.a, b=pair.b),
        f"Pair {pair.a}, {pair.b}",
        index=index,
        pair=pair,
        a=index.feature(pair.a),
        b=index.feature(pair.b),
        classes=PAIR_CLASSES,
        has_twin=has_twin,
        history=history,
    )


def sort_column(index: FeatureIndex, wanted: str) -> str:
    """Return the column that the table of pairs is sorted by.

    Without a wanted one, that is the difference to the twin; without a twin, what the pairs were selected by.

    Raises:
        SelOrthoError: there is no such column.
    """
    if wanted and wanted not in PAIR_COLUMNS:
        raise SelOrthoError(f"sort={wanted!r:.50}: expected one of {', '.join(PAIR_COLUMNS)}")
    if not wanted and _has_twin(index):
        return "difference"
    return wanted or ("score" if index.facts["pairs"].get("source") == "training" else "correlation")


def find_pairs(index: FeatureIndex, address: Address) -> PairRows:
    """Return rows of the table of pairs, filtered by class, number or label and sorted; the undefined come last."""
    column = sort_column(index, address.sort)
    rows: list[dict[str, Any]] = index.pair_table.to_pylist()
    wanted = address.q.strip().lower()
    if wanted.isdecimal():
        rows = [row for row in rows if float(wanted) in (row["a"], row["b"])]
    elif wanted:
        rows = [row for row in rows if any(wanted in index.label(row[side]).lower() for side in "ab")]
    features = {row[side] for row in rows for side in "ab"}
    dull = {feature for feature in features if _is_dull(index, feature)}
    hidden = [row for row in rows if row["a"] in dull or row["b"] in dull]
    if not address.hidden:
        rows = [row for row in rows if row["a"] not in dull and row["b"] not in dull]
    classes = Counter(row["pair_class"] for row in rows)
    if address.only:
        rows = [row for row in rows if row["pair_class"] == address.only]
    for row in rows:
        row["difference"] = _difference(row)
    sign = 1 if address.up else -1
    size = abs if column == "difference" else float

    def place(row: dict[str, Any]) -> tuple[bool, float]:
        return row[column] is None, sign * size(row[column] or 0.0)

    return PairRows(sorted(rows, key=place), classes, len(hidden))


def _difference(row: dict[str, Any]) -> float | None:
    """The correlation less that in the twin; None where either is not known, or the twin has not these features."""
    here, there = row["correlation"], row["twin_correlation"]
    matches = [row[name] for name in ("twin_match_a", "twin_match_b") if row[name] is not None]
    if here is None or there is None or min(matches, default=1.0) < COUNTERPART:
        return None
    return float(here - there)


def holds_words(label: str) -> bool:
    """Tell whether a label is more than white space, however it is written, and punctuation."""
    return not all(is_wordless(part) for part in readable(label).split(", "))


def _is_dull(index: FeatureIndex, feature: int) -> bool:
    label = index.label(feature)
    return index.feature_table["frequency"][feature].as_py() > DENSE or bool(label and not holds_words(label))


def _has_twin(index: FeatureIndex) -> bool:
    known = index.pair_table["twin_correlation"]
    return len(known) > known.null_count
