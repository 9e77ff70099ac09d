"""Errors that a user can cause and mend; command lines print them as one line and exit with code 2."""

from __future__ import annotations


class SelOrthoError(Exception):
    """A user's mistake or a broken input: the message gives the value, what was expected and the remedy."""


class NonFiniteError(SelOrthoError):
    """NaN or infinity where a number has to be."""


class ConfigError(SelOrthoError, ValueError):
    """A field of a configuration has a value that is not allowed."""
