"""The gate that every push goes through: nothing is published that names this machine, its user or their folders."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ..errors import SelOrthoError
from ..utils.privacy import private_names

_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 1024  # bytes before the text of a chunk: keywords, a language
_REMEDIES = {
    "README.md": "take it out of the template, title or other option that says so",
    ".safetensors": "save the weights again without it in their metadata",
    ".parquet": "build the feature index again, in a folder or from files of another name",
}


def refuse_private(files: Mapping[str, Path], title: str = "") -> None:
    """Search every byte that would be published for the home folder, user name and host name, and for access tokens.

    Of safetensors and parquet files the header is searched, of pictures also what is compressed: numbers and the texts
    of a feature index are what is published on purpose.

    Args:
        files: by path in the repository.
        title: of the commit.

    Raises:
        SelOrthoError: something is there; names the file and what to do.
    """
    for what, words in private_names(title.encode()):
        raise SelOrthoError(f"--commit_message holds {what} ({words!r}), so nothing was pushed: choose another one")
    for name, path in files.items():
        for what, words in private_names(b"./" + name.encode("utf-8", "surrogateescape") + b"\n" + _searched(path)):
            remedies = (_REMEDIES.get(key) for key in (PurePosixPath(name).name, PurePosixPath(name).suffix))
            remedy = next(filter(None, remedies), "take it out of that file, or leave the file out")
            raise SelOrthoError(
                f"{name} holds {what} ({words!r:.120}), so nothing was pushed: {remedy}, and push again"
            )


def _searched(path: Path) -> bytes:
    """Return what of a file is words."""
    with path.open("rb") as file:
        start = file.read(8)
        if path.suffix == ".safetensors" and len(start) == 8:
            return file.read(struct.unpack("<Q", start)[0])
        if start[:4] == b"PAR1" and path.stat().st_size > 12:
            file.seek(-8, 2)
            size = struct.unpack("<I", file.read(4))[0]
            file.seek(-min(8 + size, path.stat().st_size), 2)
            return file.read(size)
        content = start + file.read()
    return b"\n".join([content, *_unpacked(content)]) if content.startswith(_PNG) else content


def _unpacked(content: bytes) -> Iterator[bytes]:
    """Yield the compressed texts of a PNG."""
    for chunk in re.finditer(b"zTXt|iTXt", content):
        for start in re.finditer(b"x", content[chunk.end() : chunk.end() + _HEAD]):  # how a compressed text begins
            with suppress(zlib.error):
                yield zlib.decompressobj().decompress(content[chunk.end() + start.start() :], 1 << 20)
