"""The view of all features: a table, sorted and filtered by the address, and a histogram of their frequencies."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import SelOrthoError
from ..features.index import FeatureIndex
from ..features.records import LABEL_SOURCES
from .address import Address
from .charts import HEIGHT, WIDTH
from .rendering import view

FEATURES_ON_A_PAGE = 50
DENSE = 0.1  # share of the tokens above which a feature says little about any of them
# What the table can be sorted by: the heading, what it means, and whether the first click sorts upwards.
FEATURE_COLUMNS = {
    "feature": ("number", "its number in the SAE", True),
    "label": ("label", "what it fires on", True),
    "label_source": ("kind", "how its label was got", True),
    "label_score": ("score", "how well the label tells where it fires, from 0 to 1", False),
    "frequency": ("fires on", "share of the tokens of the index", False),
    "max_activation": ("strongest", "largest activation", False),
    "moved": ("moved", "1 less the cosine of its direction with that in the SAE that the training started from", False),
}
_UNNAMED = ("unclear", "none")  # kinds of labels that are listed last
# Between the bars of the histogram, in percent of the tokens: ..., 1, 1.6, 2.5, 4, 6.3, 10, ..., 100. Two digits, so
# that addresses are short.
_EDGES = [float(f"{10 ** (place / 5):.2g}") for place in range(-30, 11)]


class FrequencyBar(NamedTuple):
    """Features of about one frequency."""

    x: float
    width: float
    height: float
    low: float  # percent of the tokens, inclusive
    high: float  # exclusive, unless it is 100
    is_decade: bool  # starts at a power of ten
    features: int
    within: bool  # the range of the address
    query: str  # of the address that a click leads to


def feature_table(address: Address, index: FeatureIndex) -> str:
    """Render the features of an index, sorted, filtered and by pages."""
    found = sorted_features(index, address)
    pages = max(1, -(-len(found) // FEATURES_ON_A_PAGE))
    page = min(max(address.page, 1), pages)
    sources = index.feature_table["label_source"].value_counts().to_pylist()
    counts = {one["values"]: one["counts"] for one in sources}
    frequency = _column(index, "frequency")
    return view(
        "features.html",
        address,
        "Features",
        index=index,
        columns=columns_of(index),
        sort=sort_column(index, address.sort),
        rows=feature_rows(index, found[(page - 1) * FEATURES_ON_A_PAGE : page * FEATURES_ON_A_PAGE]),
        counts={kind: counts[kind] for kind in LABEL_SOURCES if kind in counts},
        total=len(found),
        page=page,
        pages=pages,
        bars=frequency_bars(index, address),
        dense=DENSE,
        dense_features=int((frequency > DENSE).sum()),
        dead_features=int((_column(index, "fires") == 0).sum()),
    )


def columns_of(index: FeatureIndex) -> dict[str, tuple[str, str, bool]]:
    """Return the columns of the table, of which an index lacks the last one unless its SAE was trained from another."""
    return {name: words for name, words in FEATURE_COLUMNS.items() if name in index.feature_table.column_names}


def sort_column(index: FeatureIndex, wanted: str) -> str:
    """Return the column that the table is sorted by; without a wanted one, the scores, or frequencies without scores.

    Raises:
        SelOrthoError: there is no such column.
    """
    if wanted and wanted not in (columns := columns_of(index)):
        raise SelOrthoError(f"sort={wanted!r:.50}: expected one of {', '.join(columns)}")
    scores = index.feature_table["label_score"]
    return wanted or ("frequency" if scores.null_count == len(scores) else "label_score")


def sorted_features(index: FeatureIndex, address: Address) -> np.ndarray:
    """Return the numbers (features,) of the features that an address lists, in its order.

    By score, and where the address names no order, features without a good label come last, after them those that
    never fired.

    Raises:
        SelOrthoError: there is no such column or kind of labels.
    """
    column = sort_column(index, address.sort)
    found = np.flatnonzero(_kept(index, address) & _in_range(_column(index, "frequency"), address))
    if column == "label":
        names = pc.utf8_lower(index.feature_table["label"].take(pa.array(found)))
        keys = pc.rank(names, sort_keys="ascending", tiebreaker="dense").to_numpy().astype(float)
    elif column == "label_source":
        kinds = pc.index_in(index.feature_table["label_source"], pa.array(LABEL_SOURCES))
        keys = kinds.to_numpy().astype(float)[found]
    else:
        keys = _column(index, column)[found]
    last = np.isnan(keys).astype(int)
    if not address.sort or column == "label_score":
        last = last + 2 * _unnamed(index)[found]
    return found[np.lexsort((found, keys if address.up else -keys, last))]


def feature_rows(index: FeatureIndex, features: np.ndarray) -> list[dict[str, Any]]:
    """Return the small columns of features, each with "dense": whether it fires on more than a tenth of the tokens."""
    rows: list[dict[str, Any]] = index.feature_table.select([*columns_of(index), "fires"]).take(features).to_pylist()
    return [{**row, "dense": row["frequency"] > DENSE} for row in rows]


def frequency_bars(index: FeatureIndex, address: Address) -> list[FrequencyBar]:
    """Lay out how many of the features fire on which share of the tokens, on a logarithmic axis; [] if none fires.

    The range of the address is left aside. A click on a bar selects it; with one bar selected, all from it to that one.
    """
    frequency = _column(index, "frequency")[_kept(index, address)]
    places = np.searchsorted(_EDGES, 100 * frequency[frequency > 0], side="right") - 1
    if not len(places):
        return []
    places = places.clip(0, len(_EDGES) - 2)  # the last bar holds what fires on every token
    first, counts = int(places.min()), np.bincount(places - places.min()).tolist()
    width, selected = WIDTH / len(counts), _selected_bars(address)
    bars = []
    for bar, count in enumerate(counts, first):
        ends = (selected[0], bar) if selected and selected[0] == selected[1] else (bar, bar)
        is_alone = selected == (bar, bar)
        bars.append(
            FrequencyBar(
                x=(bar - first) * width + 0.5,
                width=max(width - 1, 0.5),
                height=max(1.5, HEIGHT * count / max(counts)) if count else 0.0,
                low=_EDGES[bar],
                high=_EDGES[bar + 1],
                is_decade=bar % 5 == 0,
                features=count,
                within=(address.low or 0) <= _EDGES[bar] and _EDGES[bar + 1] <= (address.high or math.inf),
                query=address.to(
                    low=None if is_alone else _EDGES[min(ends)],
                    high=None if is_alone else _EDGES[max(ends) + 1],
                    page=1,
                ).query(),
            )
        )
    return bars


def _selected_bars(address: Address) -> tuple[int, int] | None:
    """The first and last bar of the range of the address, where it ends at edges of bars."""
    if address.low not in _EDGES or address.high not in _EDGES:
        return None
    return _EDGES.index(address.low), _EDGES.index(address.high) - 1


def _kept(index: FeatureIndex, address: Address) -> np.ndarray:
    """Whether each feature (features,) has the kind and score of label, and the number or words, of the address."""
    table = index.feature_table
    kept = np.ones(len(table), bool)
    if address.only:
        if address.only not in LABEL_SOURCES:
            raise SelOrthoError(f"only={address.only!r:.50}: expected one of {', '.join(LABEL_SOURCES)}")
        kept &= pc.equal(table["label_source"], address.only).fill_null(False).to_numpy()
    if address.score:
        kept &= _column(index, "label_score") >= address.score  # none of those without a score
    wanted = address.q.strip().lower()
    if wanted:
        matches = pc.match_substring(pc.utf8_lower(table["label"]), wanted).fill_null(False).to_numpy()
        kept &= matches | (_column(index, "feature") == float(wanted)) if wanted.isdecimal() else matches
    return kept


def _in_range(frequency: np.ndarray, address: Address) -> np.ndarray:
    """Whether each frequency (features,) is in the range of the address, whose end is left out unless it is 100%."""
    low = -math.inf if address.low is None else address.low
    high = math.inf if address.high is None or address.high >= 100 else address.high
    return (100 * frequency >= low) & (100 * frequency < high)


def _unnamed(index: FeatureIndex) -> np.ndarray:
    """0 for each feature (features,) with a label, 1 for one whose label is unclear, 2 for one that never fired."""
    kinds = pc.index_in(index.feature_table["label_source"], pa.array(_UNNAMED))
    return pc.fill_null(kinds, -1).to_numpy() + 1


def _column(index: FeatureIndex, name: str) -> np.ndarray:
    """A column of numbers (features,), NaN where there is none."""
    return index.feature_table[name].cast("float64").to_numpy()
