"""What becomes of each key that another library writes beside an SAE: obeyed, without meaning here, or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import SelOrthoError
from ..utils.hub import listed

logger = logging.getLogger(__name__)

Content: TypeAlias = Mapping[str, Any]
# Of a value and the whole content: why the SAE is not read with it, or None where the value changes nothing.
Refusal: TypeAlias = Callable[[Any, Content], str | None]


_KINDS = {str: "a text", int: "a whole number", bool: "true or false", dict: "an object of arguments"}


@dataclass(frozen=True)
class KeyTable:
    """The keys of one object of a config."""

    obeyed: Mapping[str, type]  # read by the format, each of a type; `object`: the format checks it
    meaningless: str  # names; they change nothing at inference: settings of the training, names, devices
    refused: Mapping[str, Refusal]

    def check(self, content: Content, path: str, prefix: str = "") -> list[str]:
        """Return the keys that are in none of the three groups, with `prefix` in front.

        Args:
            content: the object.
            path: of its file, for messages.
            prefix: where in the file the object is, such as "metadata.".

        Raises:
            SelOrthoError: a value cannot be obeyed: it is of another type, or changes what the SAE computes or reads.
        """
        for key, value in content.items():
            said, kind = f"{path}: {prefix}{key}={value!r:.80}", self.obeyed.get(key, object)
            if value is not None and kind is not object and type(value) is not kind:
                raise SelOrthoError(f"{said}, expected {_KINDS[kind]}: take the file as its library wrote it")
            if key in self.refused and (reason := self.refused[key](value, content)):
                raise SelOrthoError(f"{said} is not read: {reason}")
        known = {*self.obeyed, *self.meaningless.split(), *self.refused}
        return [prefix + key for key in content if key not in known]


def unless(*neutral: Any, reason: str) -> Refusal:
    """Refuse a value, for this reason, unless it is one of these, of the same type."""
    allowed = [(type(value), value) for value in neutral]
    return lambda value, _content: None if (type(value), value) in allowed else reason


def warn_of_unknown(keys: list[str], path: str) -> None:
    """List the keys whose meaning is not known here, in one line."""
    if keys:
        logger.warning("%s: not used, as their meaning is not known here: %s", path, listed(keys, 20))
