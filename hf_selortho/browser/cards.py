"""The model card on the page: its pictures come along, its metadata stays behind."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from huggingface_hub import hf_hub_url

from ..utils.files import target_outside
from .shelf import Shown

_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[\w./-]+\.png)\)")
_LARGEST = 1 << 20  # bytes of a picture


def card_markdown(shown: Shown) -> str:
    """The card as Markdown that shows outside of its folder; data of others, to be sanitised where it is shown."""
    body = _HEADER.sub("", shown.card)
    return _PICTURE.sub(lambda found: _picture(shown, found["alt"], found["path"]), body)


def _picture(shown: Shown, alt: str, path: str) -> str:
    place = shown.place
    if not place.is_local:
        return f"![{alt}]({hf_hub_url(place.name, path, revision=place.revision)})"
    folder = Path(place.name)
    file = folder / path
    if not file.is_file() or target_outside(folder, file) or file.stat().st_size > _LARGEST:
        return f"*{alt}*"
    return f"![{alt}](data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()})"
