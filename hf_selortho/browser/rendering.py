"""Render the templates, which escape whatever a text, a label or an index holds, and format numbers and tokens."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..features.index import FeatureIndex
from ..language_models.token_text import BYTES
from ..utils.characters import by_itself, isolated, visible
from .address import Address
from .charts import HEIGHT, WIDTH

_NAME = re.compile(r"<[^<>\s]+>")
_CHARACTERS = {"↵": "line break", "⇥": "tab", "␍": "line break", "⍽": "space", "␣": "space"}  # alone in a label
# How a label was got, by its source in the index: in a word, and what its score says.
LABEL_KINDS = {
    "token": ("token", "it fires on one word; the score says how purely"),
    "context": ("context", "it fires beside one word; the score says how purely"),
    "concept": ("concept", "it tells labelled texts apart by itself; the score is the test AUC"),
    "model": (
        "language model",
        "explained by a language model, which then told by it where it fires; balanced accuracy",
    ),
    "file": ("by hand", "given by a person; not measured"),
    "tokens": ("strongest tokens", "the tokens on which it fires most; not measured"),
    "unclear": ("unclear", "no label tells well enough where it fires"),
    "none": ("never fired", "it never fired on the text of the index"),
}


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


def signed_number(value: float) -> str:
    """Format a number of three significant digits with its sign."""
    return ("+" if value > 0 else "") + number(value).replace("-", "−")


def percent(share: float | None) -> str:
    """Format a share as a percentage of two or three significant digits."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.2g}%" if share < 0.0995 else f"{100 * share:.1f}".removesuffix(".0") + "%"


def score(value: float | None) -> str:
    """Format a score in [0, 1] with two digits, "–" where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"


def amount(count: float) -> str:
    """Format a large number in words: 2.9 million."""
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,.0f}"


def quoted(token: str) -> str:
    """Write a token within plain text, such as a title."""
    return isolated(repr(token))


def token_parts(token: str) -> list[tuple[str, bool]]:
    """Split a token into what is text and what is not: bytes of a character, the name of a special token."""
    if _NAME.fullmatch(token):
        return [(token, True)]
    return [(part, BYTES.fullmatch(part) is not None) for part in BYTES.split(token) if part]


def readable(label: str) -> str:
    """Write a label with its lone signs of white space as words: "↵" is a line break."""
    parts = [_CHARACTERS.get(part[:1], part) if len(set(part)) == 1 else part for part in label.split(", ")]
    return visible(", ".join(dict.fromkeys(parts))) if label.strip() else "white space" if label else ""


def full_label(label: str, source: str) -> str:
    """Return a label with "unclear" before it where no label of the feature is good enough; "" where it never fired."""
    words = {"unclear": f"unclear: {label}" if label else "unclear", "none": ""}
    return words.get(source, label)


def label_of(index: FeatureIndex | None, feature: int) -> str:
    """Return the label of a feature as [`full_label`] does, "" without an index.

    Raises:
        SelOrthoError: there is no such feature.
    """
    if index is None:
        return ""
    summary = index.summary(feature)
    return full_label(summary.label, summary.label_source)


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
        readable=readable,
        by_itself=by_itself,
        quoted=quoted,
        token_parts=token_parts,
        number=number,
        signed=signed,
        signed_number=signed_number,
        percent=percent,
        score=score,
        amount=amount,
        share_of=share_of,
        thousands="{:,}".format,
    )
    environment.globals.update(
        href=href,
        zip=functools.partial(zip, strict=True),
        full_label=full_label,
        label_of=label_of,
        WIDTH=WIDTH,
        HEIGHT=HEIGHT,
        LABEL_KINDS=LABEL_KINDS,
    )
    return environment
