"""Take the arguments of the public functions as what they are meant to be, or refuse them in one line."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import NonFiniteError, SelOrthoError

T = TypeVar("T")


def floats_of(
    value: Any, what: str, axes: int | None = None, like: Tensor | None = None, finite: bool = False
) -> Tensor:
    """Take floating-point numbers as a tensor; lists and NumPy arrays become one. Only `finite` looks at the numbers.

    Args:
        value: what was given. what: its name in an error.
        axes: how many it must have; default: any but none.
        like: a tensor on whose device it must be; what is no tensor is put there.
        finite: refuse NaN and infinity.

    Raises:
        NonFiniteError: the numbers are to be finite and are not.
        SelOrthoError: it is something else, holds integers, or is on another device.
    """
    tensor = value
    if not isinstance(value, Tensor):
        try:
            if isinstance(value, list | tuple) and value and hasattr(value[0], "__array__"):
                value = [torch.as_tensor(row) for row in value]
                tensor = torch.stack(value)
            elif isinstance(value, list | tuple) or hasattr(value, "__array__"):
                tensor = torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            tensor = value
        if not isinstance(tensor, Tensor):
            raise SelOrthoError(f"{what}: got {named(value)}, expected a tensor, a NumPy array or lists of numbers")
        tensor = tensor if like is None else tensor.to(like.device)
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        remedy = "token ids are no activations" if not tensor.is_complex() else "take its real part"
        raise SelOrthoError(f"{what}: got {kind}, expected dense floating-point numbers, as of x.float(); {remedy}")
    if tensor.ndim == 0 or tensor.ndim != (axes or tensor.ndim):
        expected = {None: "(..., width)", 1: "(n,)", 2: "two axes, such as (tokens, features)"}[axes]
        raise SelOrthoError(f"{what} has shape {tuple(tensor.shape)}: expected {expected}")
    if like is not None and tensor.device != like.device:
        raise SelOrthoError(f"{what} on {tensor.device}: expected {like.device}, as of x.to({str(like.device)!r})")
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if finite and not traced and tensor.numel() and not _is_finite(tensor):
        rows = (~tensor.reshape(-1, tensor.shape[-1]).isfinite().all(1)).nonzero()[:, 0]
        raise NonFiniteError(
            f"{what} hold NaN or infinity in {len(rows)} of {tensor.shape[:-1].numel()} rows, the first is number "
            f"{int(rows[0])}: expected finite numbers; look for the batch or the weight they came from"
        )
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether no entry is NaN or infinite, by the extremes of each row: without a copy of the tensor's size."""
    return all(bool(extremes.isfinite().all()) for extremes in tensor.detach().aminmax(dim=-1))


def named(value: Any) -> str:
    """Write a value with its type for an error, short."""
    if value is None or type(value) in (int, float):
        return str(value)
    plain = isinstance(value, str | bytes | bool | complex)
    return f"{value!r:.60} ({type(value).__name__})" if plain else f"an object of type {type(value).__name__}"


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
