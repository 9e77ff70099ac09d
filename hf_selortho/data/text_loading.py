"""Open a dataset of the Hub or local files with `datasets`, and say in one line why it does not work."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import math
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from datasets.naming import camelcase_to_snakecase
from pyarrow import ArrowException

from ..errors import SelOrthoError
from ..utils.files import fingerprint
from ..utils.hub import LOOKUP_ERRORS, one_line, resolve_commit, unreachable

# What `datasets` raises for a missing, damaged or unexpected file. StopIteration: a json file without a row.
READ_ERRORS: tuple[type[Exception], ...] = (
    *(*LOOKUP_ERRORS, DatasetsError, ArrowException, EOFError, lzma.LZMAError, zlib.error),
    *(KeyError, RuntimeError, TypeError, StopIteration),
)

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSIONS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}
_PEEK = 100  # lines of a stream that are looked at
_COMMIT = re.compile(r"[0-9a-f]{40}")


class LoadedDataset(NamedTuple):
    """A dataset and what tells it from others."""

    dataset: Dataset | IterableDataset
    revision: str | None  # commit of a Hub dataset
    fingerprint: str | None  # of local files


def load_texts(name: str, config_name: str | None, split: str, revision: str | None, streaming: bool) -> LoadedDataset:
    """Open a dataset of the Hub or local files; `TextSource` says what the arguments mean.

    Raises:
        SelOrthoError: no such dataset, file, split or revision; no network; an unreadable or empty file.
    """
    path, commit, identity = Path(name).expanduser(), None, None
    try:
        if path.exists():
            if revision is not None:
                raise SelOrthoError(f'"{name}" is local and has no revision "{revision}": leave the revision out')
            files = _local_files(path)
            arguments = _local_arguments(path, files)
            for file in files:
                _refuse_null_rows(file, _PEEK if streaming else None)
            identity = fingerprint(files)
        elif _format(path) is not None or name.startswith((".", "/", "~")):
            raise SelOrthoError(f"no such file or folder of texts: {name}")
        else:
            commit = resolve_commit("dataset", name, revision)
            if commit is None and not _is_cached(name):
                raise unreachable("dataset", name)
            arguments = {"path": name, "revision": commit or revision}
        dataset = load_dataset(**arguments, name=config_name, split=split, streaming=streaming)
        has_rows = bool(dataset.features or next(iter(dataset))) and (streaming or len(dataset) > 0)
    except READ_ERRORS as error:
        raise read_error(name, error, split) from error
    if not has_rows:
        raise _empty(name)
    if not path.exists() and commit is None and not streaming:
        commit = _cached_commit(name, dataset, revision)
    return LoadedDataset(dataset, commit, identity)


def read_error(name: str, error: BaseException, split: str | None = None) -> SelOrthoError:
    """Explain an exception of `datasets` in one line."""
    message = one_line(error)
    if splits := re.search(r"(?:Unknown|Bad) split.*?(\[.*\])", message):
        return SelOrthoError(f'"{name}" has no split "{split}": choose one of {splits[1]}')
    if isinstance(error, StopIteration) or "corresponds to no data" in message:
        return _empty(name)
    reason = one_line(error.__cause__) if isinstance(error, DatasetsError) and error.__cause__ else message
    return SelOrthoError(f'cannot read the dataset "{name}": {reason}')


def _empty(name: str) -> SelOrthoError:
    return SelOrthoError(f'the dataset "{name}" is empty: expected at least one row with text')


# How local files are found, and how they are read: all that depends on their names and beginnings is here.


def _local_files(path: Path) -> list[Path]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _format(file) and not file.name.startswith("."))
    if not files or _format(files[0]) is None:
        raise SelOrthoError(f"{path} is or holds no file of texts: expected {', '.join(_FORMATS)}, also compressed")
    if not any(file.stat().st_size for file in files):
        raise _empty(str(path))
    return files


def _local_arguments(path: Path, files: list[Path]) -> dict[str, Any]:
    """Make the arguments of `load_dataset`, which finds the files and splits of a folder by their names."""
    arguments: dict[str, Any] = {"path": str(path)}
    if not path.is_dir():
        arguments = {"path": _format(path), "data_files": {"train": [str(path)]}}
    suffixes = {suffix for file in files for suffix in file.suffixes}
    if ".txt" in suffixes:
        arguments["sample_by"] = "paragraph" if any(map(_has_blank_lines, files)) else "line"
    if ".tsv" in suffixes:
        arguments["sep"] = "\t"
    return arguments


def _format(path: Path) -> str | None:
    stem = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return _FORMATS.get(stem.suffix.lower())


def _has_blank_lines(path: Path) -> bool:
    if path.suffix.lower() != ".txt":
        return False
    with path.open("rb") as file:
        return b"\n\n" in file.read(1 << 20).replace(b"\r", b"").rstrip()


def _refuse_null_rows(path: Path, lines: int | None) -> None:
    """Look for null in a json file, at so many `lines` or all: pyarrow ends the process there (apache/arrow#47409)."""
    if _format(path) != "json":
        return
    try:
        with (_COMPRESSIONS.get(path.suffix.lower()) or open)(path, "rb") as file:
            is_array = file.read(8).removeprefix(b"\xef\xbb\xbf").startswith(b"[")
            file.seek(0)
            if is_array:
                rows = json.loads(file.read(), strict=False)
                has_null = any(row is None or (isinstance(row, float) and not math.isfinite(row)) for row in rows)
            else:
                has_null = any(
                    line.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"null") for line in itertools.islice(file, lines)
                )
    except READ_ERRORS:
        return  # datasets says what is wrong
    if has_null:
        raise SelOrthoError(f'"{path}" has a row that is null: expected an object with the text; remove the row')


def _is_cached(name: str) -> bool:
    owner, _, repository = name.rpartition("/")
    folder = "___".join(filter(None, [owner, camelcase_to_snakecase(repository)]))  # as load_dataset calls it
    return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


def _cached_commit(name: str, dataset: Dataset, revision: str | None) -> str | None:
    """Read the commit off the paths of what `datasets` cached; without network it takes the latest copy."""
    parts = [_COMMIT.fullmatch(part) for file in dataset.cache_files for part in Path(file["filename"]).parts]
    commit = next((match[0] for match in parts if match), None)
    if revision is not None and _COMMIT.fullmatch(revision) and commit != revision:
        raise SelOrthoError(
            f'dataset "{name}" is cached at commit {commit}, not at {revision}, and the Hub cannot be reached: '
            "go online, or leave the revision out"
        )
    return commit
