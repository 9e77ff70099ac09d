"""The folder of an activation cache while it is written: shards appear whole, and the progress survives a kill."""

from __future__ import annotations

import json
import re
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import SelOrthoError
from ..utils.files import LOCK, is_full, reason, replace_file, sync
from ..utils.memory import check_fits, free_disk
from .cache_manifest import FORMAT, FORMAT_VERSION, MANIFEST, WORK, CacheSettings, Manifest, of_today

_SETTINGS = "settings.json"
_SHARD = re.compile(r"(held_out/)?(tokens|(layer|target)_\d+)/\d+\.safetensors")


class CacheFolder:
    """The folder of a cache while it is written.

    A file is flushed to the disk under a temporary name and then renamed. Behind the files of a shard comes its record
    in the hidden work folder; a shard without a record is written again. The manifest comes last: where it is, the
    cache is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / WORK

    def begin(self, settings: CacheSettings, *, overwrite: bool = False) -> bool:
        """Prepare the folder; return False if it holds the cache of these settings, complete.

        Args:
            settings: of the cache. An unfinished one of the same settings goes on.
            overwrite: replace a cache that is complete, or has other settings.

        Raises:
            SelOrthoError: the folder cannot be written, or holds something else, or a cache of other settings.
        """
        plan = json.loads(_json({"version": FORMAT_VERSION, **asdict(settings)}))
        manifest, unfinished = _read_object(self.folder / MANIFEST), _read_object(self.work / _SETTINGS)
        complete = manifest.get("format") == FORMAT
        entries = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        if not complete and WORK not in entries and entries - {LOCK}:
            raise SelOrthoError(
                f"output folder {self.folder} is not empty and holds no cache: choose another --output_dir"
            )
        present = manifest if complete else unfinished
        present = of_today(present) if present else present
        differing = [name for name, value in plan.items() if present.get(name) != value]
        if "version" in differing:
            differing = ["version"]
        if present and differing and not overwrite:
            changes = "; ".join(f"{n} {reprlib.repr(present.get(n))} -> {reprlib.repr(plan[n])}" for n in differing)
            raise SelOrthoError(
                f"{self.folder} holds a cache of other settings ({changes}): use the same ones to go on, another "
                "--output_dir, or --overwrite_output_dir to replace it"
            )
        if complete and not overwrite:
            shutil.rmtree(self.work, ignore_errors=True)
            return False
        if complete or unfinished != plan:
            self._clear()
            self.write(f"{WORK}/{_SETTINGS}", _json(plan))
        return True

    def _clear(self) -> None:
        """Remove the shards and the work folder, and nothing else, whatever of them is there."""
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / _SETTINGS).unlink(missing_ok=True)  # first: without it, nothing in the work folder counts
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for path in list(self.folder.rglob("*.safetensors")):
            if _SHARD.fullmatch(path.relative_to(self.folder).as_posix()):
                path.unlink()
        for path in [path for path in self.work.rglob("*") if path.is_file()]:
            path.unlink()

    def write(self, path: str, data: bytes) -> None:
        """Write a file of the folder; it has its name only once it is safely on the disk.

        Raises:
            SelOrthoError: there is no room, or the folder cannot be written; whatever was there before is intact.
        """
        target = self.folder / path
        try:
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                sync(target.parent.parent)
            replace_file(target, data, self.work / f"{path.replace('/', '-')}.tmp")
        except OSError as error:
            raise SelOrthoError(
                f"cannot write {target}: {reason(error)}; the shards written so far are safe: "
                f"{'make room and ' if is_full(error) else ''}run the same command again to go on"
            ) from error

    def write_record(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep an object in the work folder under a name, such as "norms" or "held_out/00003"."""
        self.write(f"{WORK}/{name}.json", _json(content))

    def read_record(self, name: str) -> dict[str, Any]:
        """Return what was kept under a name; empty if nothing was."""
        return _read_object(self.work / f"{name}.json")

    def shard_records(self, part: str) -> Iterator[dict[str, Any]]:
        """Read the records of the shards of a part, those of all processes, by rising number."""
        numbers = sorted(int(path.stem) for path in (self.work / part).glob("[0-9]*.json"))
        return (self.read_record(f"{part}{number:05d}") for number in numbers)

    def finish(self, manifest: Manifest, card: str) -> None:
        """Write the card and the manifest, which makes the cache complete."""
        self.write("README.md", card.encode())
        self.write(MANIFEST, manifest_bytes(manifest))
        shutil.rmtree(self.work)


def check_disk(folder: Path, needed: float) -> None:
    """Raise a SelOrthoError if the disk has less room than the shards will take beyond those that are there."""
    present = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder.is_dir() else 0
    remedy = "use --max_tokens, fewer --layers or another --output_dir"
    check_fits("disk", {"activations": needed - present}, free_disk(folder), remedy)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the content of a manifest.json."""
    return _json({"format": FORMAT, "version": FORMAT_VERSION, **asdict(manifest)})


def _json(content: Mapping[str, Any]) -> bytes:
    """Write an object with a line for each of its keys."""
    lines = (f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file or it holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
