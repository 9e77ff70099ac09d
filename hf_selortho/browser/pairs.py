"""The views of pairs: the table of those that the penalty acted on, and one of them."""

from __future__ import annotations

from typing import Any

from ..errors import SelOrthoError
from ..features.index import FeatureIndex
from .address import Address
from .charts import curves
from .rendering import view

PAIRS_ON_A_PAGE = 50
# What the table of pairs can be sorted by: the column, its heading and what it means.
PAIR_COLUMNS = {
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


def pair_table(address: Address, index: FeatureIndex) -> str:
    """Render the pairs of an index, sorted, filtered and by pages."""
    rows = sorted_pairs(index, address)
    pages = max(1, -(-len(rows) // PAIRS_ON_A_PAGE))
    page = min(max(address.page, 1), pages)
    return view(
        "pairs.html",
        address,
        "Pairs",
        index=index,
        classes=PAIR_CLASSES,
        columns=PAIR_COLUMNS,
        sort=sort_column(index, address.sort),
        rows=rows[(page - 1) * PAIRS_ON_A_PAGE : page * PAIRS_ON_A_PAGE],
        total=len(rows),
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
    """Return the column that the table of pairs is sorted by; without a wanted one, that of the selection.

    Raises:
        SelOrthoError: there is no such column.
    """
    if wanted and wanted not in PAIR_COLUMNS:
        raise SelOrthoError(f"sort={wanted!r:.50}: expected one of {', '.join(PAIR_COLUMNS)}")
    return wanted or ("score" if index.facts["pairs"].get("source") == "training" else "correlation")


def sorted_pairs(index: FeatureIndex, address: Address) -> list[dict[str, Any]]:
    """Return rows of the table of pairs, filtered by class, number or label and sorted; the undefined come last."""
    column = sort_column(index, address.sort)
    rows: list[dict[str, Any]] = index.pair_table.to_pylist()
    if address.only:
        rows = [row for row in rows if row["pair_class"] == address.only]
    wanted = address.q.strip().lower()
    if wanted.isdecimal():
        rows = [row for row in rows if int(wanted) in (row["a"], row["b"])]
    elif wanted:
        rows = [row for row in rows if any(wanted in index.label(row[side]).lower() for side in "ab")]
    sign = 1 if address.up else -1
    return sorted(rows, key=lambda row: (row[column] is None, sign * (row[column] or 0.0)))
