"""Show the invisible characters of a text that somebody else has written."""

from __future__ import annotations

import unicodedata

_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # Unicode categories


def visible(text: str) -> str:
    """Show line ends as arrows, control and direction characters by number: a text turns round nothing beside it."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    return f"‹{ord(character):04X}›" if unicodedata.category(character) in _INVISIBLE else character
