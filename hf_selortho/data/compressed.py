"""Compressed local files, and those that are far larger than they look."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import SelOrthoError

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BROKEN: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)  # what a damaged one raises
LARGEST_RATIO = 250  # texts have 3 to 30; a file of zeros 1,000 with gzip, and more with the others
HARMLESS_BYTES = 1 << 30
_BLOCK = 1 << 20
# `datasets` unpacks whatever begins like this, whatever it is called
_BEGINNINGS = {
    b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip",
    b"Rar!\x1a": ".rar", b"7z\xbc\xaf\x27\x1c": ".7z", b"\x04\x22\x4d\x18": ".lz4",
}  # fmt: skip


def open_file(path: Path) -> BinaryIO:
    """A file's bytes, decompressed if its name ends in .gz, .bz2 or .xz."""
    return cast(BinaryIO, _OPENERS.get(path.suffix.lower(), open)(path, "rb"))


def refuse_bomb(path: Path) -> None:
    """Look, in bounded memory, how large a compressed file really is; a damaged one is left to its reader.

    Raises:
        SelOrthoError: it holds more than a gigabyte, and over `LARGEST_RATIO` times its own size; or it is compressed
            and has the name of a file that is not.
    """
    _refuse_disguise(path)
    if path.suffix.lower() not in _OPENERS:
        return
    try:
        limit = max(HARMLESS_BYTES, LARGEST_RATIO * path.stat().st_size)
        size = 0
        with open_file(path) as file:
            while size <= limit and (block := file.read(_BLOCK)):
                size += len(block)
    except BROKEN:
        return
    if size > limit:
        raise SelOrthoError(
            f'"{path}" has {path.stat().st_size:,} bytes and holds more than {limit:,}: no text is compressed like '
            "that. If it is what you want, decompress it yourself"
        )


def _refuse_disguise(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return  # its reader says so
    kind = next((kind for beginning, kind in _BEGINNINGS.items() if start.startswith(beginning)), None)
    if kind is not None and path.suffix.lower() != kind:
        raise SelOrthoError(f'"{path}" is compressed ({kind}), but its name does not end so: name it as what it is')
