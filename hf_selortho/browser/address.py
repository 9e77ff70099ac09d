"""The address of a view: what the page shows as a query, so that every finding can be sent to a colleague."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlencode

from ..errors import SelOrthoError

MAX_CHARACTERS = 2000  # of a text
MAIN, TWIN = "main", "twin"  # keys of the SAEs of the page
VIEWS = {
    "start": "Start",
    "text": "Text",
    "features": "Features",
    "feature": "Feature",  # one of them
    "concepts": "Concepts",
    "pairs": "Pairs",
    "search": "Search",
    "steer": "Steer",
    "compare": "Compare",
    "run": "Run",
    "graph": "Graph",  # where there is one
}
_LONGEST = 9 * MAX_CHARACTERS + 500  # a text, percent-encoded (a Chinese character takes nine), and the rest


@dataclass(frozen=True)
class Address:
    """The query of the page's address; what is not there keeps its default."""

    view: str = "start"
    sae: str = MAIN
    q: str = ""  # a text, prompt or search phrase
    id: int | None = None  # the feature of the view "feature", the node of a graph
    token: int | None = None  # whose features are listed
    feature: int | None = None  # the one that shades a text
    a: int | None = None
    b: int | None = None
    by: str = "label"  # what a search looks at
    sort: str = ""  # of a table; "": of pairs, by what they were chosen; of features, by how good their labels are
    up: bool = False  # the smallest first
    only: str = ""  # a class of pairs, or a kind of labels
    low: float | None = None  # percent of the tokens on which the features of the table fire at least
    high: float | None = None  # ... and below which they stay
    score: float | None = None  # of the labels of the table, from 0 to 1, at least
    concept: str = ""  # whose features are shown
    graph: str = ""  # which one is shown
    cut: float | None = None  # share of the influence that the drawn nodes of a graph have together
    hidden: bool = False  # pairs that the table hides are in it
    page: int = 1
    mode: str = "clamp"  # of steering: what `value` means; without a value, the page chooses both
    value: float | None = None
    other: str = ""  # another SAE of the Hub, where the owner allows it

    def query(self) -> str:
        """Return the query "?view=...", without what has its default."""
        parts = {"view": self.view}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "view" and value != field.default:
                text = "1" if value is True else str(value)
                parts[field.name] = text.removesuffix(".0") if isinstance(value, float) else text
        return "?" + urlencode(parts)

    def to(self, **changes: Any) -> Address:
        """Return the address with changes."""
        return dataclasses.replace(self, **changes)


def parse_address(query: str) -> Address:
    """Return the address that a query means.

    A view "pair" is that of "pairs" with a pair open, a view "feature" without a number the table of all features; a
    text without a view is read.

    Raises:
        SelOrthoError: the view is unknown, a number is none, or the query is too long.
    """
    if len(query) > _LONGEST:
        raise SelOrthoError(
            f"this address has {len(query):,} characters, expected at most {_LONGEST:,}: shorten its text"
        )
    fields = _fields(query)
    if fields["view"] not in VIEWS:
        raise SelOrthoError(f"there is no view {fields['view']!r:.50}: choose {', '.join(VIEWS)}")
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Address)}
    return Address(**{name: _parse(name, text, kinds[name]) for name, text in fields.items() if name in kinds})


def view_of(query: str) -> str:
    """Return the view that a query names, whatever else is wrong with it; "start" where there is no such view."""
    view = _fields(query)["view"]
    return view if view in VIEWS else "start"


def _fields(query: str) -> dict[str, str]:
    """The parts of a query, "view" among them; the page's script takes the same view."""
    fields = {name: values[0] for name, values in parse_qs(query.lstrip("?")).items()}
    named = fields.setdefault("view", "text" if "q" in fields else "start")
    if named == "pair" or (named == "feature" and "id" not in fields):
        fields["view"] = f"{named}s"
    return fields


def _parse(name: str, text: str, kind: str) -> Any:
    if kind == "bool":
        return text == "1"
    if kind == "str":
        return text
    try:
        number = int(text) if kind.startswith("int") else float(text)
    except ValueError as error:
        raise SelOrthoError(f"{name}={text!r:.50} in the address: expected a number") from error
    if not -1e9 < number < 1e9:
        raise SelOrthoError(f"{name}={text!r:.50} in the address: expected a smaller number")
    return number
