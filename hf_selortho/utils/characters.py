"""Show the invisible characters of a text that somebody else has written."""

from __future__ import annotations

import re
import unicodedata

_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # Unicode categories
_IGNORABLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
# joiners and variation selectors are part of what they stand between or after, as in 👩‍🔧, می‌خواهم and ❤️
_PART = re.compile("(?<=[^\0-\x7f])[\u200c\u200d](?=[^\0-\x7f])|(?<=[^\0-\x20])[\ufe00-\ufe0f]")


def visible(text: str, alone: bool = True) -> str:
    """Show line ends as arrows, control and direction characters by number: a text turns round nothing beside it.

    A combining mark at its start is put on a dotted circle, unless the text stands after other text (not `alone`).
    """
    parts = {match.start() for match in _PART.finditer(text)}
    shown = "".join(c if place in parts else _visible(c) for place, c in enumerate(text))
    return f"◌{shown}" if alone and shown and unicodedata.category(shown[0])[0] == "M" else shown


def by_itself(token: str) -> str:
    """Show a token away from its text: as [`visible`] does, and of spaces alone each as ␣."""
    shown = visible(token)
    return shown if token.strip() else "".join("␣" if unicodedata.category(c) == "Zs" else c for c in shown)


def isolated(text: str) -> str:
    """Keep a text that is written from right to left from turning round what stands beside it in plain text."""
    return f"\u2068{text}\u2069" if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text) else text


def without_invisible(text: str) -> str:
    """Remove control and direction characters, but not those that join others."""
    parts = {match.start() for match in _PART.finditer(text)}
    return "".join(c for place, c in enumerate(text) if place in parts or not _is_invisible(c))


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    return f"‹{ord(character):04X}›" if _is_invisible(character) else character


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE or bool(_IGNORABLE.match(character))
