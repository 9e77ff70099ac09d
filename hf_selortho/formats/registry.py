"""What is known of published repositories that their own files do not say: registry.json, with its source."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def registry() -> dict[str, dict[str, Any]]:
    """Return the facts of each repository, by its name in lower case."""
    return json.loads(Path(__file__).with_name("registry.json").read_text(encoding="utf-8"))["repositories"]


def facts_of_repository(name: str) -> dict[str, Any]:
    """Return what is known of a repository beside its files; nothing of most."""
    return dict(registry().get(name.lower(), {}))
