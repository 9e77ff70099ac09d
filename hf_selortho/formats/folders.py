"""Write folders of converted SAEs whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import SelOrthoError
from ..utils.files import as_os_error, reason, sync
from ..utils.hub import listed


def check_target(folder: Path, replaceable: set[str] | None = None) -> None:
    """See whether a conversion may write to a folder; nothing is changed.

    Args:
        folder: it need not exist.
        replaceable: names of files that may be replaced; None: the folder has to be new or empty.

    Raises:
        SelOrthoError: it is a file or the working directory, or holds something that is to be kept.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise SelOrthoError(f"{folder} is no folder: choose another name")
    if folder.resolve() == Path.cwd():
        raise SelOrthoError(f"{folder} is the working directory, which is not replaced: name a folder in it")
    names = {path.name for path in folder.iterdir()}
    if names and replaceable is None:
        raise SelOrthoError(f"{folder} is not empty: choose another folder, or replace an SAE in it with --overwrite")
    foreign = names - (replaceable or set())
    if foreign:
        raise SelOrthoError(
            f"{folder} holds {listed(foreign)}, which no conversion wrote, so nothing in it is replaced: choose "
            "another folder"
        )


@contextmanager
def whole_folder(folder: Path, replaceable: set[str] | None = None) -> Iterator[Path]:
    """Give a folder beside `folder` to write to, which takes its place at the end; if anything fails, it is not there.

    Raises:
        SelOrthoError: as [`check_target`], or there is no room, or the folder cannot be written.
    """
    check_target(folder, replaceable)
    place = Path(os.path.abspath(folder))
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if place.is_dir():
            shutil.rmtree(place)
        temporary.rename(place)
        sync(place.parent)
    except (OSError, SafetensorError) as error:
        said = reason(as_os_error(error))
        raise SelOrthoError(f"cannot write {folder}: {said}; make room, or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
