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
LARGEST_RATIO = (
    250  # of text, English or not, some 3 to 30; a file of zeros reaches 1,000 with gzip and more with others
)
HARMLESS_BYTES = 1 << 30
_BLOCK = 1 << 20


def open_file(path: Path) -> BinaryIO:
    """A file's bytes, decompressed if its name ends in .gz, .bz2 or .xz."""
    return cast(BinaryIO, _OPENERS.get(path.suffix.lower(), open)(path, "rb"))


def refuse_bomb(path: Path) -> None:
    """Look, in bounded memory, how large a compressed file really is; a damaged one is left to its reader.

    Raises:
        SelOrthoError: it holds more than a gigabyte, and over `LARGEST_RATIO` times its own size.
    """
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
