"""Take the arguments of the public functions as what they are meant to be, or refuse them in one line."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeVar

from .activation_functions import named
from .errors import SelOrthoError

T = TypeVar("T")


def text_of(value: Any, what: str) -> str:
    """Take a text; raise a SelOrthoError for anything else, and for half a character."""
    if not isinstance(value, str):
        raise SelOrthoError(f"{what} is {named(value)}: expected a text")
    half = next((place for place, c in enumerate(value) if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        raise SelOrthoError(
            f"{what} holds half a character (a lone surrogate, {value[half]!r}) at place {half}: type it again, or "
            'replace it with text.encode("utf-8", "replace").decode()'
        )
    return str(value)


def texts_of(values: Any, what: str = "texts") -> list[str]:
    """Take texts from whatever has an order; raise a SelOrthoError for a single text and for what is none."""
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        remedy = f"; a single text goes into a list, as in [{values!r:.40}]" if isinstance(values, str) else ""
        raise SelOrthoError(f"{what} is {named(values)}: expected a list of texts{remedy}")
    return [text_of(value, f"number {number} of {what}") for number, value in enumerate(values)]


def name_of(value: Any, what: str) -> str:
    """Take the path of a folder or an id of the Hub; raise a SelOrthoError for anything else."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise SelOrthoError(f"{what} is {named(value)}: expected a folder or an id of the Hub")
    return str(os.fspath(value))


def whole_number(value: Any, what: str, least: int = 0, end: int | None = None) -> int:
    """Take a whole number of at least `least` and below `end`, such as that of a feature; NumPy's and PyTorch's, too.

    Raise a SelOrthoError for anything else, such as True and 3.0.
    """
    number = None
    if not _is_bool(value):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            number = operator.index(value)
    if number is None or number < least or (end is not None and number >= end):
        allowed = f"of at least {least}" if end is None else f"from {least} to {end - 1}"
        kind = "number" if number is not None else "whole number"
        raise SelOrthoError(f"{what} {named(value) if number is None else number}: expected a {kind} {allowed}")
    return number


def finite_number(value: Any, what: str) -> float:
    """Take a finite number; raise a SelOrthoError for anything else, such as True and "3"."""
    number = math.nan
    if not isinstance(value, str | bytes) and not _is_bool(value):
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            number = float(value)
    if not math.isfinite(number):
        raise SelOrthoError(f"{what} {named(value)}: expected a finite number")
    return number


def object_of(value: Any, kind: type[T], what: str, remedy: str) -> T:
    """Take an object of a class; raise a SelOrthoError for any other one."""
    if not isinstance(value, kind):
        raise SelOrthoError(f"{what} is {named(value)}: expected a {kind.__name__}; {remedy}")
    return value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
