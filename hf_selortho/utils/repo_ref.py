"""Where an SAE is, as people type it: a folder, or owner/name of the Hub with a revision and a subfolder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from ..errors import SelOrthoError

_OF_THE_HUB = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@\s]+))?(?:/(?P<subfolder>[\w.-]+(?:/[\w.-]+)*))?"
)


@dataclass(frozen=True)
class Place:
    """A folder, or a place in a repository of the Hub."""

    name: str  # the folder, or owner/name
    revision: str | None = None
    subfolder: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return os.path.isdir(self.name)

    @property
    def lookup(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that go with the name."""
        parts = {"revision": self.revision, "subfolder": self.subfolder}
        return {key: value for key, value in parts.items() if value}

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.name}{revision}" + (f"/{self.subfolder}" if self.subfolder else "")


def parse_place(text: str, local: bool = True) -> Place:
    """The place that `runs/demo` or `org/name[@revision][/subfolder]` means.

    Args:
        text: as it was typed. local: whether folders of this machine count; if not, only the Hub is meant.

    Raises:
        SelOrthoError: it is neither.
    """
    expected = f"{'a folder or ' if local else ''}owner/name[@revision][/subfolder] of the Hub"
    if local and os.path.isdir(text):
        return Place(text)
    found = _OF_THE_HUB.fullmatch(text)
    if found is None or ".." in text:
        raise SelOrthoError(f"{text!r:.200} is no place of an SAE: expected {expected}")
    if not local and os.path.exists(found["repo"]):
        raise SelOrthoError(f"{text!r:.200} is a path of this machine: expected {expected}")
    return Place(found["repo"], found["revision"], found["subfolder"])
