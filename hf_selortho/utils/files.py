"""Files that are whole or not there, also after a power cut, and folders that one process writes at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from ..errors import SelOrthoError

LOCK = ".lock"
_END = 1 << 20  # bytes that a fingerprint reads at each end of a file
_ATTEMPTS = 5  # to write on a full disk, a second apart


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Write to a temporary name, flush it to the disk, then rename: readers see the old file or the new one.

    Args:
        path: the file. data: what it shall hold. temporary: that name, on the same disk; by default beside the file.

    Raises:
        OSError: there is no room, or the folder cannot be written; what was there before is intact.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """Hash a file, a part at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(files: Iterable[Path], start: bytes = b"") -> str:
    """Hash name, size, first and last megabyte of each file, with `start` before them: gigabytes are not read.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256(start)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(_END))
            file.seek(max(0, size - _END))
            digest.update(file.read(_END))
    return digest.hexdigest()


def is_full(error: OSError) -> bool:
    """Tell whether a write failed for want of room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def reason(error: OSError) -> str:
    """Say why a write failed."""
    return "the disk is full" if is_full(error) else error.strerror or str(error)


def when_there_is_room(write: Callable[[], None]) -> None:
    """Write something; on a full disk, wait a little: a checkpoint that finds no room is removed.

    Raises:
        OSError: there still is no room, or something else is wrong.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return write()
        except OSError as error:
            if not is_full(error):
                raise
        time.sleep(1)
    return write()


class FolderLock:
    """Keeps other processes out of a folder while this one writes it: `with FolderLock(folder, "training"):`.

    The kernel releases the lock when the process ends, however it ends. The folder is made if it is missing, and goes
    again if an error comes before anything is in it. The file `.lock` stays: to remove it would let two processes in.

    Args:
        folder: where to write.
        doing: what the process in it does, for the message.

    Raises:
        SelOrthoError: another process is in it, or it cannot be written.
    """

    def __init__(self, folder: Path, doing: str) -> None:
        self.folder, self.doing = folder, doing
        self._lock = FileLock(folder / LOCK)
        self._made: list[Path] = []  # the innermost first

    def __enter__(self) -> FolderLock:
        try:
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SelOrthoError(
                f"another process is {self.doing} into {self.folder} at this moment (it holds {self.folder / LOCK}): "
                "wait until it is done, or choose another --output_dir"
            ) from None
        except OSError as error:
            raise SelOrthoError(
                f"cannot write to output folder {self.folder} ({reason(error)}): choose another --output_dir"
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for folder in self._made if error is not None else ():
            if any(entry.name != LOCK for entry in folder.iterdir()):
                break
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
        self._lock.release()


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Make a folder that is removed at the end, also where SIGTERM is what ends the process."""
    ends = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with TemporaryDirectory(prefix=prefix) as folder:
        if ends:
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            yield Path(folder)
        finally:
            if ends:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def target_outside(folder: Path, path: Path) -> Path | None:
    """Return where a file of `folder` leads, if that is out of the folder; None if it stays inside.

    In huggingface_hub's cache, snapshots/<commit>/file is a link to ../../blobs/<hash>: that counts as inside.
    """
    root, target = (Path(os.path.realpath(place)) for place in (folder, path))  # unlike resolve, alike in all Pythons
    if any(place.is_symlink() for place in (target, *target.parents)):  # what is left are links to themselves
        return path
    blobs = {parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"}
    return None if target.is_relative_to(root) or target.parent in blobs else target


def refuse_outside(folder: Path, path: Path) -> None:
    """Raise a SelOrthoError if a file of `folder` is a link that leads out of it."""
    if outside := target_outside(folder, path):
        raise SelOrthoError(f"{path} leads out of {folder}, to {outside}: put the file itself into the folder")


def write_text(path: Path, text: str) -> None:
    """Write a file whole: readers see the old one or the new one, also after a power cut.

    Raises:
        SelOrthoError: there is no room, or the folder cannot be written; what was there before is intact.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """[`write_text`] of JSON; NaN and infinity become null."""
    write_text(path, json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n")


def cannot_write(path: Path, error: OSError) -> SelOrthoError:
    """Make the error of a file of a run that cannot be written."""
    return SelOrthoError(
        f"cannot write {path}: {reason(error)}; {'make room there' if is_full(error) else 'choose another folder'} and "
        "run the same command again, a training with --resume_from_checkpoint auto: its checkpoints are as they were"
    )


def as_os_error(error: Exception) -> OSError:
    """Return the error of the operating system that others give as text, "... (os error 28)" or "[Errno 28] ..."."""
    if isinstance(error, OSError) and error.errno:
        return error
    if number := re.search(r"(?:os error |\[Errno )(\d+)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return error if isinstance(error, OSError) else OSError(str(error))


def jsonable(value: Any) -> Any:
    """Turn a value into what JSON has: NaN and infinity, what could not be measured, become null, a tuple a list."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value
