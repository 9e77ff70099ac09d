"""The folder of an activation cache while it is written: shards appear whole, and the progress survives a kill."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import SelOrthoError
from ..utils.files import LOCK, is_full, reason, replace_file, sync
from .cache_manifest import FORMAT, FORMAT_VERSION, HELD_OUT, MANIFEST, TRAIN, WORK, CacheSettings, Manifest, shard_path
from .cache_statistics import CacheStatistics

_SETTINGS, _NORMS = "settings.json", "norms.json"
_SHARD = re.compile(r"(held_out/)?(tokens|layer_\d+)/\d+\.safetensors")


@dataclass
class Progress:
    """What one process has cached; training and held-out shards apart, by TRAIN and HELD_OUT."""

    statistics: CacheStatistics
    written: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, HELD_OUT: 0})  # shards, empty ones included
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {TRAIN: [], HELD_OUT: []})
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {TRAIN: {}, HELD_OUT: {}})
    stream: dict[str, Any] | None = None  # state of the text stream behind the last training shard


class CacheFolder:
    """The folder of a cache while it is written.

    A file is flushed to the disk under a temporary name and then renamed. Once all files of a shard are there, the
    process writes its progress into the hidden work folder; a shard beyond that is written again. The manifest comes
    last: where it is, the cache is complete.
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
        finished, unfinished = _json_object(self.folder / MANIFEST), _json_object(self.work / _SETTINGS)
        complete = finished.get("format") == FORMAT
        entries = set(path.name for path in self.folder.iterdir()) if self.folder.exists() else set()
        if not complete and WORK not in entries and entries - {LOCK}:
            raise SelOrthoError(
                f"output folder {self.folder} is not empty and holds no cache: choose another --output_dir"
            )
        present = finished if complete else unfinished
        if present and not overwrite and (differences := _differences(present, plan)):
            raise SelOrthoError(
                f"{self.folder} holds a cache of other settings ({'; '.join(differences)}): use the same ones to go "
                "on, another --output_dir, or --overwrite_output_dir to replace it"
            )
        if complete and not overwrite:
            shutil.rmtree(self.work, ignore_errors=True)
            return False
        if complete or unfinished != plan:
            self.work.mkdir(parents=True, exist_ok=True)
            (self.work / _SETTINGS).unlink(missing_ok=True)  # first: without it, nothing in the work folder counts
            (self.folder / MANIFEST).unlink(missing_ok=True)
            others = self.folder.rglob("*.safetensors")  # of the user, perhaps: only shards are removed
            shards = [path for path in others if _SHARD.fullmatch(path.relative_to(self.folder).as_posix())]
            for path in (*self.work.iterdir(), *shards):
                path.unlink()
            self.write(f"{WORK}/{_SETTINGS}", _json(plan))
        return True

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

    def write_shard(
        self, part: str, number: int, rows: int, folders: Mapping[str, dict[str, Tensor]]
    ) -> dict[str, Any]:
        """Write a shard, given its tensors by folder such as "layer_8", and return its entry of the manifest."""
        files = {}
        for folder, tensors in folders.items():
            path, data = shard_path(part, folder, number), save(tensors)
            self.write(path, data)
            files[path] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        return {"number": number, "rows": rows, "files": files}

    def write_progress(self, rank: int, progress: Progress) -> None:
        """Write what a process has cached."""
        numbers = {name: value for name, value in vars(progress).items() if name != "statistics"}
        self.write(f"{WORK}/{rank}.safetensors", save(vars(progress.statistics), {"progress": json.dumps(numbers)}))

    def read_progress(self, rank: int, progress: Progress) -> Progress:
        """Fill an empty progress with what the process of this rank has written, if anything."""
        path = self.work / f"{rank}.safetensors"
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                vars(progress).update(json.loads(file.metadata()["progress"]))
                vars(progress.statistics).update({name: file.get_tensor(name) for name in file.keys()})
        return progress

    def write_norms(self, norms: Sequence[tuple[float, float | None]]) -> None:
        """Write the median norm, and the norm above which a token is a sink, of each layer."""
        self.write(f"{WORK}/{_NORMS}", _json({"norms": norms}))

    def read_norms(self) -> list[tuple[float, float | None]] | None:
        """Return what [`write_norms`] wrote; None before that."""
        norms = _json_object(self.work / _NORMS).get("norms")
        return None if norms is None else [(median, limit) for median, limit in norms]

    def finish(self, manifest: Manifest, card: str) -> None:
        """Write the card and the manifest, which makes the cache complete."""
        self.write("README.md", card.encode())
        self.write(MANIFEST, _json({"format": FORMAT, "version": FORMAT_VERSION, **asdict(manifest)}))
        shutil.rmtree(self.work)


def _json(content: Mapping[str, Any]) -> bytes:
    """Write an object with a line for each of its keys."""
    values = (
        (json.dumps(key), json.dumps(value, ensure_ascii=False, allow_nan=False)) for key, value in content.items()
    )
    return ("{\n" + ",\n".join(f" {key}: {value}" for key, value in values) + "\n}\n").encode()


def _json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file or it holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the settings that differ, such as "text.seed 0 -> 1"."""
    differences = []
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            differences += _differences(old, value, f"{prefix}{key}.")
        elif value != old:
            differences.append(f"{prefix}{key} {reprlib.repr(old)} -> {reprlib.repr(value)}")
    return differences
