"""Errors that a user can cause and mend; command lines print them as one line and exit with code 2."""

from __future__ import annotations

import re

# How libraries say that memory has run out, beside MemoryError.
_OUT_OF_MEMORY = re.compile(
    r"(can't|cannot|not enough|unable to|failed to) (allocate|map segment|mmap)|out of memory|bad_alloc|"
    r"not enough memory|memory allocation|can't start new thread",
    re.IGNORECASE,
)


class SelOrthoError(Exception):
    """A user's mistake or a broken input: the message gives the value, what was expected and the remedy."""


class NonFiniteError(SelOrthoError):
    """NaN or infinity where a number has to be."""


class ConfigError(SelOrthoError, ValueError):
    """A field of a configuration has a value that is not allowed."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an exception, or what it was raised from, says that memory has run out."""
    if error is None:
        return False
    says_so = isinstance(error, (ImportError, OSError, RuntimeError)) and _OUT_OF_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(says_so) or is_out_of_memory(error.__cause__)


def out_of_memory(error: Exception, remedy: str) -> SelOrthoError:
    """Say in a line that memory has run out, and what to do."""
    said = " ".join(str(error).split()) or type(error).__name__
    return SelOrthoError(f"out of memory ({said[:150]}): {remedy}, or allow this process more (ulimit -v)")
