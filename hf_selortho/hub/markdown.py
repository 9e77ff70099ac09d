"""Foreign text and numbers made safe and readable in a model card.

A dataset, model or run may be named anything. Whatever does not come from the template goes through here, so that it
can neither end a YAML block, a table cell or a code fence, nor bring in HTML, links or pictures.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control characters, bidirectional marks, lone surrogates, line separators


def mask_tokens(text: str) -> str:
    """Text without access tokens of the Hub, which a command line may hold."""
    return _TOKEN.sub("hf_***", text)


def one_line(value: Any) -> str:
    """Text on one line: whitespace collapsed, invisible characters replaced by a space, access tokens masked."""
    text = "".join(" " if unicodedata.category(c) in _INVISIBLE else c for c in str(value))
    return mask_tokens(" ".join(text.split()))


def code(value: Any) -> str:
    """An inline code span, safe in paragraphs, headings and table cells."""
    text = one_line(value)
    if not text:
        return "(empty)"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fence(text: str) -> str:
    """Backticks enough to fence a block of code that holds `text`."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def cell(value: Any) -> str:
    """An inline code span for a table cell, which a bare pipe would end even inside of code."""
    return code(value).replace("|", "\\|")


def literal(value: str) -> str:
    """A Python string literal on one line of plain ASCII."""
    text = ascii(value)
    return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text else text


def number(value: float | int, kind: str = "") -> str:
    """A number for a reader.

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
    """A time span in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
