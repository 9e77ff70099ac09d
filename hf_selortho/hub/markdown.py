"""Render cards from Jinja templates in which every foreign string is safe Markdown and every number readable.

A dataset, model or run may be named anything. What a template prints becomes a code span, so that it can neither end a
YAML block, a table cell or a code fence, nor bring in HTML, links or pictures; filters give it other safe forms.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jinja2 import Environment, Undefined

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control characters, bidirectional marks, lone surrogates, line separators


class Markdown(str):
    """Text that is safe in a card as it is."""

    def __html__(self) -> str:  # by which Jinja knows it
        return self


def render(template: str, values: Mapping[str, Any]) -> str:
    """Render a template of a card; raises whatever Jinja or a value of another type than expected raises."""
    text = _environment().from_string(template).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _environment() -> Environment:
    """Jinja with autoescape for Markdown: the filters return Markdown, all else goes through [`_shown`]."""
    environment = Environment(autoescape=True, finalize=_shown)
    filters: dict[str, Callable[[Any], str]] = {
        make.__name__: make for make in (code, cell, literal, number, duration, one_line, fence)
    }
    filters |= {kind: partial(number, kind=kind) for kind in ("percent", "count", "exact")}
    filters["json"] = lambda value: mask_tokens(json.dumps(value, indent=2))
    for name, make in filters.items():
        environment.filters[name] = lambda value, make=make: Markdown(make(value))
    return environment


def _shown(value: Any) -> str:
    if hasattr(value, "__html__"):
        return value
    if value is None or isinstance(value, Undefined):
        return Markdown()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Markdown(number(value) if is_number else code(value))


def mask_tokens(text: str) -> str:
    """Replace access tokens of the Hub, which a command line may hold."""
    return _TOKEN.sub("hf_***", text)


def one_line(value: Any) -> str:
    """Put text on one line: whitespace collapsed, invisible characters replaced by a space, access tokens masked."""
    text = "".join(" " if unicodedata.category(c) in _INVISIBLE else c for c in str(value))
    return mask_tokens(" ".join(text.split()))


def code(value: Any) -> str:
    """Make an inline code span, safe in paragraphs and headings."""
    text = one_line(value)
    if not text:
        return "(empty)"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def cell(value: Any) -> str:
    """Make an inline code span for a table cell, which a bare pipe would end even inside of code."""
    return code(value).replace("|", "\\|")


def fence(text: str) -> str:
    """Return backticks enough to fence a block of code that holds `text`."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def literal(value: str | int) -> str:
    """Write a value as a Python literal on one line of plain ASCII."""
    text = ascii(value)
    return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text else text


def number(value: float | int, kind: str = "") -> str:
    """Write a number for a reader.

    `kind` is "" (four significant digits), "percent", "count" (whole, with separators),
    "exact" (a setting, as it was given).
    """
    if kind == "percent":
        return f"{100 * value:.1f}%"
    if kind == "exact":
        return f"{value:g}"
    if isinstance(value, int) or kind == "count":
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    digits = 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(digits, 6)}f}" if 0 < digits <= 6 else f"{value:,.0f}" if digits <= 0 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Write a time span in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
