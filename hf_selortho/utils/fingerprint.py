"""Fingerprints of local files: they tell whether the files changed, without reading gigabytes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_ENDS = 1 << 20


def fingerprint(files: Iterable[Path], start: bytes = b"") -> str:
    """Hash name, size, first and last megabyte of each file, with `start` before them.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256(start)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()
