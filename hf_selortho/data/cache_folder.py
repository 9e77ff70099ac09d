"""Shards on their way to the disk: each appears whole or not at all, and a record says that it is there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import SelOrthoError
from ..utils.files import LOCK, is_full, reason, replace_file, sync
from .activation_cache import FORMAT, HELD_OUT, MANIFEST, WORK, shard_path

_FINISHED = f"{WORK}-finished"
_PLAN, _CALIBRATION = "plan.json", "calibration.json"
_SHARD_FOLDER = re.compile(r"tokens|layer_\d+")


@dataclass(frozen=True)
class Record:
    """What is known of a shard that is on the disk."""

    number: int
    content: dict[str, Any]  # rows, files, counts, state of the stream behind the shard
    tensors: dict[str, Tensor]  # statistics


class ShardFolder:
    """The folder of a harvest while it is written.

    Shards and their records are flushed to the disk under temporary names and then renamed, the record last: what a
    killed process left without a record is written again. Nothing in the folder depends on when or how often the
    harvest was interrupted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / WORK

    def begin(self, plan: dict[str, Any], *, overwrite: bool = False) -> bool:
        """Prepare the folder for a harvest with these settings; False if it holds that harvest, finished.

        Args:
            plan: the settings.
            overwrite: replace a harvest that is there; but one with these settings that is not finished goes on.

        Raises:
            SelOrthoError: it cannot be written, or holds something else, or a harvest with other settings.
        """
        try:
            return self._begin(plan, overwrite)
        except OSError as error:
            raise SelOrthoError(f"cannot write to output folder {self.folder}: {error}") from error

    def _begin(self, plan: dict[str, Any], overwrite: bool) -> bool:
        shutil.rmtree(self.folder / _FINISHED, ignore_errors=True)
        unfinished, finished = _json_object(self.work / _PLAN), _json_object(self.folder / MANIFEST)
        if unfinished is not None and not (overwrite and _differing(unfinished, plan)):
            self._check_plan(unfinished, plan)
            return True
        is_harvest = self.work.is_dir() or (finished or {}).get("format") == FORMAT
        if overwrite and is_harvest:
            self._remove()
        elif is_harvest and finished is not None:
            self._check_plan(finished, plan)
            shutil.rmtree(self.work, ignore_errors=True)  # of one that was to replace it and did not get far
            return False
        names = {entry.name for entry in self.folder.iterdir()} if self.folder.exists() else set()
        if names - {WORK, LOCK} and not (overwrite and is_harvest):
            left = "the rest of a harvest that was to be replaced" if WORK in names else "no harvest"
            remedy = "pass --overwrite_output_dir to go on with that, or " if WORK in names else ""
            raise SelOrthoError(
                f"output folder {self.folder} is not empty and holds {left}: {remedy}choose another --output_dir"
            )
        self.work.mkdir(parents=True, exist_ok=True)
        sync(self.folder.absolute().parent)
        self.write(f"{WORK}/{_PLAN}", _json(plan))
        return True

    def write(self, path: str, data: bytes) -> None:
        """Write a file of the folder; it has its name only once it is safely on the disk.

        Raises:
            SelOrthoError: there is no room, or the folder cannot be written; whatever was there before is intact.
        """
        target = self.folder / path
        temporary = self.work / f"{path.replace('/', '-')}.tmp"
        try:
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                sync(target.parent.parent)
            replace_file(target, data, temporary)
        except OSError as error:
            raise SelOrthoError(
                f"cannot write {target}: {reason(error)}; the shards written so far are safe: "
                f"{'make room and ' if is_full(error) else ''}run the same command again to go on"
            ) from error

    def commit(
        self, part: str, number: int, tokens: dict[str, Tensor], by_layer: dict[int, Tensor], record: Record
    ) -> None:
        """Write a shard of `part`, then its record."""
        files = {}
        named = {"tokens": tokens, **{f"layer_{layer}": {"activations": rows} for layer, rows in by_layer.items()}}
        for name, tensors in named.items() if record.content["rows"] else ():
            path, data = shard_path(part, name, number), save(tensors)
            self.write(path, data)
            files[path] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        content = {**record.content, "number": number, "files": files}
        path = f"{WORK}/{part}{number:05d}.safetensors"
        self.write(path, save(record.tensors, {"record": json.dumps(content)}))

    def write_calibration(
        self, layers: Sequence[int], medians: Sequence[float], limits: Sequence[float | None]
    ) -> None:
        """Median norms, and the norm above which a token is a sink, of each layer."""
        names = list(map(str, layers))
        content = {"medians": dict(zip(names, medians, strict=True)), "limits": dict(zip(names, limits, strict=True))}
        self.write(f"{WORK}/{_CALIBRATION}", _json(content))

    def calibration(self) -> tuple[dict[str, float], dict[str, float | None]]:
        """The medians and limits written down, by layer."""
        content = self._read(_CALIBRATION)
        return content["medians"], content["limits"]

    def read_calibration(self, layers: Sequence[int]) -> tuple[float | None, ...] | None:
        """The limits of these layers; None if they are not known yet."""
        if not (self.work / _CALIBRATION).is_file():
            return None
        _, limits = self.calibration()
        return tuple(limits[str(layer)] for layer in layers)

    def write_rank(self, rank: int, counts: dict[str, int]) -> None:
        """Note that a process has done its part, and what its stream has counted."""
        self.write(f"{WORK}/rank_{rank}.json", _json(counts))

    def read_rank(self, rank: int) -> dict[str, int]:
        """What [`write_rank`] noted."""
        return self._read(f"rank_{rank}.json")

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.work / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SelOrthoError(f"{self.work / name} cannot be read ({error}): run the same command again") from error

    def records(self, part: str, rank: int | None = None, processes: int = 1) -> Iterator[Record]:
        """Shards that are on the disk, by number: all of them, or those of one process up to the first gap."""
        if rank is None:
            paths = sorted((self.work / part).glob("[0-9]*.safetensors"), key=lambda path: int(path.stem))
            yield from map(_read_record, paths)
            return
        number = rank
        while (path := self.work / part / f"{number:05d}.safetensors").is_file():
            yield _read_record(path)
            number += processes

    def finish(self, manifest: dict[str, Any], card: str) -> None:
        """Write manifest and card; the folder is complete with the disappearance of the work folder."""
        self.write("README.md", card.encode())
        self.write(MANIFEST, _json(manifest))
        self.work.rename(self.folder / _FINISHED)  # at once; its files go one by one
        shutil.rmtree(self.folder / _FINISHED)

    def _remove(self) -> None:
        """Remove a harvest, and nobody else's files; the work folder, there from first to last, says what goes on."""
        self.work.mkdir(exist_ok=True)
        for path in (self.work / _PLAN, self.folder / MANIFEST, self.folder / "README.md"):
            path.unlink(missing_ok=True)
        for part in (self.folder / HELD_OUT, self.folder):
            for folder in part.iterdir() if part.is_dir() else ():
                if _SHARD_FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                    _remove_shards(folder)
        if (self.folder / HELD_OUT).is_dir() and not any((self.folder / HELD_OUT).iterdir()):
            (self.folder / HELD_OUT).rmdir()
        shutil.rmtree(self.work)

    def _check_plan(self, found: dict[str, Any], plan: dict[str, Any]) -> None:
        if differing := _differing(found, plan):
            raise SelOrthoError(
                f"{self.folder} holds a harvest with other settings ({'; '.join(differing)}): use the same ones to go "
                "on, another --output_dir, or --overwrite_output_dir to replace it"
            )


def _json_object(path: Path) -> dict[str, Any] | None:
    """What a file holds; None if there is no such file or it holds something else than a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _differing(found: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """Settings of a harvest that are others than planned."""
    return [f"{key} {found.get(key)!r} -> {value!r}" for key, value in plan.items() if found.get(key) != value]


def _remove_shards(folder: Path) -> None:
    for path in folder.glob("[0-9]*.safetensors"):
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _read_record(path: Path) -> Record:
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise SelOrthoError(f"{path} is damaged ({error}): delete it and run the same command again") from error
    return Record(content["number"], content, tensors)


def _json(content: Any) -> bytes:
    """Indented, but lists of numbers on one line: a mean has thousands of them."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return (_joined_numbers(text) + "\n").encode()


def _joined_numbers(text: str) -> str:
    lines: list[str] = []
    joining = False
    for line in text.split("\n"):
        bare = line.strip()
        number = bare[:1] in "-0123456789" and bare != ""
        if joining and (number or bare in ("]", "],")):
            lines[-1] += (" " if number and not lines[-1].endswith("[") else "") + bare
            joining = number
            continue
        joining = bare.endswith("[")
        lines.append(line)
    return "\n".join(lines)
