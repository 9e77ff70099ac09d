"""Render the templates, which escape whatever a text, a label or an index holds, and format numbers and tokens."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..language_models.token_text import BYTES
from ..utils.characters import by_itself, isolated, visible
from .address import Address
from .charts import HEIGHT, WIDTH

_NAME = re.compile(r"<[^<>\s]+>")


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with so many significant digits, "–" for what is not defined."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:#.{digits}g}".rstrip(".")
        return f"{value:.0f}" if "e" in text else text
    return f"{value:.{max(digits - 1, 0)}e}"


def signed(value: float | None) -> str:
    """Format a difference of correlations with its sign."""
    return "–" if value is None or not math.isfinite(value) else f"{value:+.2f}".replace("-", "−")


def percent(share: float | None) -> str:
    """Format a share as a percentage of two or three significant digits."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.2g}%" if share < 0.0995 else f"{100 * share:.1f}".removesuffix(".0") + "%"


def quoted(token: str) -> str:
    """Write a token within plain text, such as a title."""
    return isolated(repr(token))


def token_parts(token: str) -> list[tuple[str, bool]]:
    """Split a token into what is text and what is not: bytes of a character, the name of a special token."""
    if _NAME.fullmatch(token):
        return [(token, True)]
    return [(part, BYTES.fullmatch(part) is not None) for part in BYTES.split(token) if part]


def share_of(value: float, scale: float) -> float:
    """Return the share of a scale that a value takes, from 0 to 1; 0 where there is no scale."""
    return min(max(value / scale, 0.0), 1.0) if scale > 0 else 0.0


def href(view: str, **fields: Any) -> str:
    """Return the query of a view's address, for a link."""
    return Address(view=view, **fields).query()


def render(template: str, /, **values: Any) -> str:
    """Render a template of the package."""
    return _environment().get_template(template).render(values)


def view(template: str, address: Address, title: str, **values: Any) -> str:
    """Render a view with its address and title, which the page's script writes into the browser's."""
    return render(template, address=address, title=title, **values)


def problem(address: Address, message: str) -> str:
    """Render a view that cannot be shown, and why."""
    return view("problem.html", address, "Problem", message=message)


def note(address: Address, title: str, message: str) -> str:
    """Render a view of one paragraph."""
    return view("note.html", address, title, message=message)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hf_selortho.browser"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        visible=visible,
        by_itself=by_itself,
        quoted=quoted,
        token_parts=token_parts,
        number=number,
        signed=signed,
        percent=percent,
        share_of=share_of,
        thousands="{:,}".format,
    )
    environment.globals.update(href=href, zip=functools.partial(zip, strict=True), WIDTH=WIDTH, HEIGHT=HEIGHT)
    return environment
