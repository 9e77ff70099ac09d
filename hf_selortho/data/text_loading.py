"""Opening a dataset of the Hub or a local file with `datasets`, and saying in one line why it did not work."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import datasets
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError
from datasets.naming import camelcase_to_snakecase
from pyarrow import ArrowException

from hf_selortho.data.compressed import BROKEN, open_file, refuse_bomb
from hf_selortho.errors import SelOrthoError
from hf_selortho.utils.fingerprint import fingerprint
from hf_selortho.utils.hub import LOOKUP_ERRORS, one_line, resolve_commit, unreachable

# What `datasets` raises for a missing, damaged or unexpected file. StopIteration: a json file without a row.
READ_ERRORS: tuple[type[Exception], ...] = (
    *LOOKUP_ERRORS,
    DatasetsError,
    ArrowException,
    KeyError,
    RuntimeError,
    TypeError,
    StopIteration,
    *BROKEN,
)

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
_PEEK = 100  # lines of a stream that are looked at
_COMMIT = re.compile(r"[0-9a-f]{40}")


class LoadedTexts(NamedTuple):
    dataset: Dataset | IterableDataset
    column: str  # the one with the text
    revision: str | None  # commit of a Hub dataset
    fingerprint: str | None  # of local files


def load_texts(
    name: str,
    config_name: str | None,
    split: str,
    text_column: str | None,
    revision: str | None,
    streaming: bool,
    label_column: str | None = None,
) -> LoadedTexts:
    """Open the dataset and find its text column, and the labels' if one is named; the others are in `TextSource`."""
    path = Path(name).expanduser()
    if path.exists():
        files = _local_files(path)
        arguments = _local_arguments(path, files)
        for file in files:
            if not streaming:  # else it never is on the disk as a whole
                refuse_bomb(file)
            _refuse_null_rows(file, _PEEK if streaming else None)
        commit = None
        if revision is not None:
            raise SelOrthoError(f'"{name}" is local and has no revision "{revision}": leave the revision out')
    elif _format(path) is not None or name.startswith((".", "/", "~")):
        raise SelOrthoError(f"no such file or folder of texts: {name}")
    else:
        commit, files = resolve_commit("dataset", name, revision), None
        if commit is None and not _is_cached(name):
            raise unreachable("dataset", name)
        arguments = {"path": name, "revision": commit or revision}
    try:
        identity = None if files is None else fingerprint(files)
        dataset = load_dataset(**arguments, name=config_name, split=split, streaming=streaming)
        features = dataset.features or Features({})
        if not features and isinstance(dataset, IterableDataset):
            features = Features({key: Value("string") for key in next(iter(dataset), {})})
    except READ_ERRORS as error:
        raise read_error(name, error, split) from error
    if isinstance(dataset, Dataset) and not path.exists():
        commit = _cached_commit(name, dataset, commit, revision)
    if not features or (isinstance(dataset, Dataset) and not len(dataset)):
        raise _empty(name)
    column = _text_column(name, features, text_column)
    columns = [column] if label_column is None else [column, _label_column(name, features, label_column, column)]
    return LoadedTexts(dataset.select_columns(columns), column, commit, identity)


def read_error(name: str, error: BaseException, split: str | None = None) -> SelOrthoError:
    """One line for an exception of `datasets`."""
    message = one_line(error)
    if splits := re.search(r"(?:Unknown|Bad) split.*?(\[.*\])", message):
        return SelOrthoError(f'"{name}" has no split "{split}": choose one of {splits[1]}')
    if isinstance(error, StopIteration) or "corresponds to no data" in message:
        return _empty(name)
    reason = one_line(error.__cause__) if isinstance(error, DatasetsError) and error.__cause__ else message
    return SelOrthoError(f'cannot read the dataset "{name}": {reason}')


def _empty(name: str) -> SelOrthoError:
    return SelOrthoError(f'the dataset "{name}" is empty: expected at least one row with text')


def _local_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if _format(file) and not file.name.startswith("."))
    if not files:
        raise SelOrthoError(f"the folder {path} holds no file of texts: expected {', '.join(_FORMATS)}")
    return files


def _local_arguments(path: Path, files: list[Path]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"path": str(path)}  # datasets finds files and splits by their names
    if not path.is_dir():
        if _format(path) is None:
            raise SelOrthoError(f"{path} is of no known kind: expected one of {', '.join(_FORMATS)}")
        arguments = {"path": _format(path), "data_files": {"train": [str(path)]}}
    if not any(file.stat().st_size for file in files):
        raise _empty(str(path))
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
    """pyarrow ends the process where the rows that it reads at once begin with null (apache/arrow#47409).

    Args:
        path: a local file of any kind.
        lines: how many of its lines to look at, None for all.
    """
    if _format(path) != "json":
        return
    try:
        with open_file(path) as file:
            start = file.read(8).removeprefix(b"\xef\xbb\xbf")
            file.seek(0)
            is_null = _has_null(file.read()) if start.startswith(b"[") else _is_null_line(file, lines)
    except READ_ERRORS:
        return  # datasets says what is wrong
    if is_null:
        raise SelOrthoError(f'"{path}" has a row that is null: expected an object with the text; remove the row')


def _has_null(array: bytes) -> bool:
    return any(
        row is None or (isinstance(row, float) and not math.isfinite(row)) for row in json.loads(array, strict=False)
    )


def _is_null_line(file: BinaryIO, lines: int | None) -> bool:
    return any(line.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"null") for line in itertools.islice(file, lines))


def _is_cached(name: str) -> bool:
    owner, _, repository = name.rpartition("/")
    folder = "___".join(filter(None, [owner, camelcase_to_snakecase(repository)]))  # as load_dataset calls it
    return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


def _cached_commit(name: str, dataset: Dataset, commit: str | None, revision: str | None) -> str | None:
    """The commit, which `datasets` writes into the path of what it caches; without network it takes the latest copy."""
    if commit is None:
        found = [_COMMIT.fullmatch(part) for file in dataset.cache_files for part in Path(file["filename"]).parts]
        commit = next((match[0] for match in found if match), None)
        if revision is not None and _COMMIT.fullmatch(revision) and commit != revision:
            raise SelOrthoError(
                f'dataset "{name}" is cached at commit {commit}, not at {revision}, and the Hub cannot be reached: '
                "go online, or leave the revision out"
            )
    return commit


def _text_column(name: str, features: Features, wanted: str | None) -> str:
    # "null" is what a column is called that holds nothing; whoever asks for it learns that the texts are empty.
    kinds = _kinds(features)
    texts = [column for column, kind in kinds.items() if kind in ("string", "large_string")]
    if wanted is None:
        wanted = "text" if "text" in kinds else texts[0] if len(texts) == 1 else None
    listed = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    if wanted is None:
        raise SelOrthoError(f'which column of "{name}" holds the text? Choose --text_column from: {listed}')
    if wanted not in kinds:
        raise SelOrthoError(f'"{name}" has no column "{wanted}": choose --text_column from: {listed}')
    if wanted not in texts and kinds[wanted] != "null":
        raise SelOrthoError(f'column "{wanted}" of "{name}" holds no text: choose --text_column from: {listed}')
    return wanted


def _label_column(name: str, features: Features, wanted: str, text_column: str) -> str:
    others = {column: kind for column, kind in _kinds(features).items() if column != text_column}
    listed = ", ".join(f"{column} ({kind})" for column, kind in others.items()) or "none beside the text"
    if wanted not in others:
        raise SelOrthoError(f'"{name}" has no column "{wanted}" of labels: choose one of: {listed}')
    if not re.fullmatch(r"u?int\d+|bool|(large_)?string", others[wanted]):
        raise SelOrthoError(
            f'column "{wanted}" of "{name}" holds {others[wanted]}, no labels: expected integers, strings, booleans or '
            f"class labels; choose one of: {listed}"
        )
    return wanted


def _kinds(features: Features) -> dict[str, str]:
    return {column: getattr(feature, "dtype", type(feature).__name__) for column, feature in features.items()}
