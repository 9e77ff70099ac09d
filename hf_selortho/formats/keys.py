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


@dataclass(frozen=True)
class KeyTable:
    """The keys of one object of a config."""

    obeyed: frozenset[str]  # read by the format
    meaningless: frozenset[str]  # they change nothing at inference: settings of the training, names, devices
    refused: dict[str, Refusal]

    def check(self, content: Content, path: str, prefix: str = "") -> list[str]:
        """Return the keys that are in none of the three groups, with `prefix` in front.

        Args:
            content: the object.
            path: of its file, for messages.
            prefix: where in the file the object is, such as "metadata.".

        Raises:
            SelOrthoError: a key has a value that changes what the SAE computes or reads, and cannot be obeyed.
        """
        for key, refusal in self.refused.items():
            if key in content and (reason := refusal(content[key], content)):
                raise SelOrthoError(f"{path}: {prefix}{key}={content[key]!r:.80} is not read: {reason}")
        known = self.obeyed | self.meaningless | self.refused.keys()
        return [prefix + key for key in content if key not in known]


def unless(*neutral: Any, reason: str) -> Refusal:
    """Refuse a value, for this reason, unless it is one of these, of the same type."""
    allowed = [(type(value), value) for value in neutral]
    return lambda value, _content: None if (type(value), value) in allowed else reason


def checked(content: Content, key: str, kind: type, expected: str, path: str, default: Any = None) -> Any:
    """Return the value of an obeyed key, or the default where it is missing.

    Raises:
        SelOrthoError: it is of another type, so that nobody knows what is to be obeyed.
    """
    value = content.get(key, default)
    if value is not default and type(value) is not kind:
        raise SelOrthoError(f"{path}: {key}={value!r:.80}, expected {expected}: take the file as its library wrote it")
    return value


def warn_of_unknown(keys: list[str], path: str) -> None:
    """List the keys whose meaning is not known here, in one line."""
    if keys:
        logger.warning("%s: not used, as their meaning is not known here: %s", path, listed(keys, 20))
