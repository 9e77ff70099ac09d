"""Errors that a user can cause and mend; command lines print them as one line and exit with code 2."""

from __future__ import annotations

import os
import sys


class SelOrthoError(Exception):
    """A user's mistake or a broken input: the message gives the value, what was expected and the remedy."""


class NonFiniteError(SelOrthoError):
    """NaN or infinity where a number has to be."""


class ConfigError(SelOrthoError, ValueError):
    """A field of a configuration has a value that is not allowed."""


def end_without_memory(error: Exception) -> None:
    """End the command `selortho` in a line if a library found no memory to be loaded into; else do nothing."""
    short = isinstance(error, MemoryError) or "failed to map segment" in str(error) or getattr(error, "errno", 0) == 12
    if short and os.path.basename(sys.argv[0]) in ("selortho", "-m"):
        sys.stderr.write("selortho: error: too little memory to load torch: allow this process more (ulimit -v, -d)\n")
        sys.exit(2)
