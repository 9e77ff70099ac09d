"""What the page shows, as the query of its address: every finding can be sent to a colleague."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qs, urlencode

from .. import SelOrthoError
from .live import MAX_CHARACTERS
from .shelf import MAIN

VIEWS = {
    "text": "Text",
    "feature": "Feature",
    "pairs": "Pairs",
    "search": "Search",
    "steer": "Steer",
    "compare": "Compare",
    "run": "Run",
}
_LONGEST = 3 * MAX_CHARACTERS + 500  # a text, percent-encoded, and the rest


@dataclass(frozen=True)
class Address:
    """The query of the page's address; what is not there keeps its default."""

    view: str = "text"
    sae: str = MAIN
    q: str = ""  # a text, prompt or search phrase
    id: int | None = None  # the feature of the view "feature"
    token: int | None = None  # whose features are listed
    feature: int | None = None  # the one that shades a text
    a: int | None = None
    b: int | None = None
    by: str = "label"  # what a search looks at
    sort: str = ""  # of the table of pairs; "": by what they were chosen
    up: bool = False  # the smallest first
    only: str = ""  # a class of pairs
    page: int = 1
    mode: str = "clamp"
    value: float | None = None
    other: str = ""  # another SAE of the Hub, where the owner allows it

    def query(self) -> str:
        """As the query of an address, "?view=...", without what has its default."""
        default = Address(view=self.view)
        parts = {"view": self.view}
        for name in Address.__dataclass_fields__:
            value = getattr(self, name)
            if name != "view" and value != getattr(default, name):
                parts[name] = "1" if value is True else str(value)
        return "?" + urlencode(parts)

    def to(self, **changes: Any) -> Address:
        """The same with changes."""
        return replace(self, **changes)


def parse_address(query: str) -> Address:
    """The address that a query means; a view "pair" is that of "pairs" with a pair open.

    Raises:
        SelOrthoError: the view is unknown, a number is none, or the query is too long.
    """
    if len(query) > _LONGEST:
        raise SelOrthoError(
            f"this address has {len(query):,} characters, expected at most {_LONGEST:,}: shorten its text"
        )
    fields = parse_qs(query.lstrip("?"), keep_blank_values=False)
    given = {name: values[-1] for name, values in fields.items() if name in Address.__dataclass_fields__}
    if given.get("view") == "pair":
        given["view"] = "pairs"
    if given.get("view", "text") not in VIEWS:
        raise SelOrthoError(f"there is no view {given['view']!r:.50}: choose {', '.join(VIEWS)}")
    found: dict[str, Any] = {}
    for name, value in given.items():
        kind = Address.__dataclass_fields__[name].type
        found[name] = _read(name, value, str(kind))
    return Address(**found)


def _read(name: str, value: str, kind: str) -> Any:
    if kind == "bool":
        return value == "1"
    if kind.startswith(("int", "float")):
        try:
            number = int(value) if kind.startswith("int") else float(value)
        except ValueError as error:
            raise SelOrthoError(f"{name}={value!r:.50} in the address: expected a number") from error
        if not -1e9 < number < 1e9:
            raise SelOrthoError(f"{name}={value!r:.50} in the address: expected a smaller number")
        return number
    return value
