"""The gate that every push goes through: nothing is published that names this machine, its user or their folders."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ..errors import SelOrthoError
from ..utils.privacy import private_names

_PNG = b"\x89PNG\r\n\x1a\n"
_REMEDIES = {
    "README.md": "take it out of the template, title or other option that says so",
    ".safetensors": "save the weights again without it in their metadata",
    ".parquet": "build the feature index again, in a folder or from files of another name",
    ".pyc": "remove it",
}


def refuse_private(files: Mapping[str, Path], title: str = "") -> None:
    """Search every byte that would be published for the home folder, user name and host name, and for access tokens.

    Of safetensors and parquet files the header is searched, of pictures all but the pixels: numbers and the texts of
    a feature index are what is published on purpose.

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
            remedy = next(filter(None, remedies), "take it out of that file")
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
    return _without_pixels(content) if content.startswith(_PNG) else content


def _without_pixels(content: bytes) -> bytes:
    """Return the chunks of a PNG but those of the pixels, compressed texts unpacked."""
    chunks, place = [], len(_PNG)
    while place + 8 <= len(content):
        size, kind = struct.unpack(">I4s", content[place : place + 8])
        chunk = content[place + 8 : place + 8 + size]
        place += 12 + size
        if kind == b"IDAT":
            continue
        chunks.append(chunk)
        for start in (index for index, byte in enumerate(chunk) if byte == 0x78 and kind in (b"zTXt", b"iTXt")):
            with suppress(zlib.error):  # 0x78 is how a compressed text begins
                chunks.append(zlib.decompressobj().decompress(chunk[start:], 1 << 20))
    return b"\n".join([*chunks, content[place:]])
