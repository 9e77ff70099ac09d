"""Texts to train on and texts held out: datasets of the Hub, local files, and the embedded "python-docs"."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import itertools
import json
import logging
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from datasets.naming import camelcase_to_snakecase
from pyarrow import ArrowException

from ..errors import SelOrthoError
from ..utils.files import fingerprint
from ..utils.hub import LOOKUP_ERRORS, is_commit, official_name, one_line, resolve_commit, unreachable
from ..utils.library_errors import storage_error
from .python_docs import PYTHON_DOCS, python_docs, python_docs_revision
from .text_source import TextSource

logger = logging.getLogger(__name__)

# What `datasets` raises for a missing, damaged or unexpected file. StopIteration: a json file without a row.
READ_ERRORS: tuple[type[Exception], ...] = (
    *(*LOOKUP_ERRORS, DatasetsError, ArrowException, EOFError, lzma.LZMAError, zlib.error),
    *(KeyError, RuntimeError, TypeError, StopIteration),
)

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSIONS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}
_BOM = b"\xef\xbb\xbf"
_FETCH = 256  # rows read at once: one by one, Arrow spends most of its time on the way to them
_SHUFFLE_BUFFER = 10_000  # documents that a stream holds to draw from
_PEEK = 1000  # documents of a stream looked at to find out that it holds text


class Documents:
    """Documents (id, text), some of them held out.

    Whether a document is held out depends on its words alone, not on its place, the seed or the process: the same text
    never lands on both sides. Empty texts are passed over. Ids are row numbers; a stream, which has none, uses a hash
    of the text instead.

    Attributes:
        dataset: the rows, with all their columns.
        column: the one with the text.
        name, split, held_out_fraction: as in the `TextSource`.
        revision: commit of a Hub dataset, version and hash of python-docs, None for local files.
        fingerprint: of local files, which have no revision.
        count: rows, held-out and empty ones included; None for a stream, whose length nobody knows.
    """

    def __init__(
        self, source: TextSource, dataset: Dataset | IterableDataset, revision: str | None, fingerprint: str | None
    ) -> None:
        self.dataset, self.revision, self.fingerprint = dataset, revision, fingerprint
        self.name, self.split, self.held_out_fraction = (
            official_name(source.dataset),
            source.split,
            source.held_out_fraction,
        )
        self.count = None if isinstance(dataset, IterableDataset) else len(dataset)
        if self.count == 0:
            raise _empty(self.name)
        self.column = _text_column(self.name, column_kinds(dataset), source.text_column)
        self._texts = dataset.select_columns([self.column])
        start = self._texts.take(_PEEK) if isinstance(self._texts, IterableDataset) else np.arange(len(self._texts))
        if next(self._read(start), None) is None:
            raise SelOrthoError(
                f'"{self.name}" holds no text: empty in its first {self.count or _PEEK} rows; choose another '
                "--text_column or file"
            )

    def train(self, epoch: int, seed: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, str]]:
        """Read the documents of one epoch for training, in an order drawn from seed and epoch.

        Processes (`rank` of `world_size`) get different documents, together all of them.
        """
        if isinstance(self._texts, IterableDataset):
            shuffle_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
            shuffled = self._texts.shuffle(seed=shuffle_seed, buffer_size=_SHUFFLE_BUFFER)
            return self._side(split_dataset_by_node(shuffled, rank, world_size), held_out=False)
        order = np.random.default_rng([seed, epoch]).permutation(len(self._texts))
        return self._side(order[rank::world_size], held_out=False)

    def held_out(self) -> Iterator[tuple[int, str]]:
        """Read the documents that `train` leaves out, always in the same order."""
        if isinstance(self._texts, IterableDataset):
            return self._side(self._texts, held_out=True)
        # Not in the order of the rows: the first thousand should speak for all, even where the file is sorted.
        return self._side(np.random.default_rng(0).permutation(len(self._texts)), held_out=True)

    def _side(self, rows: IterableDataset | np.ndarray, held_out: bool) -> Iterator[tuple[int, str]]:
        bound = self.held_out_fraction * 2**64
        for number, text in self._read(rows):
            digest = _digest(text)
            if (int.from_bytes(digest[:8], "big") < bound) == held_out:
                yield int.from_bytes(digest[8:16], "big") >> 1 if number is None else number, text  # int64, from 0

    def _read(self, rows: IterableDataset | np.ndarray) -> Iterator[tuple[int | None, str]]:
        """Read the texts of a stream, which have no number, or of the numbered rows."""
        try:
            streamed = isinstance(rows, IterableDataset)
            for number, text in ((None, row[self.column]) for row in rows) if streamed else self._fetched(rows):
                if text and not text.isspace():
                    yield number, text
        except READ_ERRORS as error:  # bytes that are no text, which only a look at them shows
            raise read_error(self.name, error) from error

    def _fetched(self, rows: np.ndarray) -> Iterator[tuple[int, str]]:
        for start in range(0, len(rows), _FETCH):
            numbers = rows[start : start + _FETCH].tolist()
            yield from zip(numbers, self._texts[numbers][self.column], strict=True)


def open_documents(source: TextSource) -> Documents:
    """Find the texts of `source` and check that they can be read.

    Local files are csv, tsv, json, jsonl, parquet or txt, also compressed, or a folder of them. The documents of a txt
    file are what blank lines separate or, where there are none, its lines.

    Raises:
        SelOrthoError: no such dataset, file, split, column or revision; no network; no text; an unreadable file.
    """
    name, path, revision, identity = source.dataset, Path(source.dataset), None, None
    if not 0 <= source.held_out_fraction <= 1:
        raise SelOrthoError(
            f"held_out_fraction is {source.held_out_fraction}: expected a number from 0 to 1, such as 0.1"
        )
    if name == PYTHON_DOCS:
        return Documents(source, *_python_docs(source), None)
    try:
        if path.exists():
            if source.dataset_revision is not None:
                raise SelOrthoError(
                    f'"{name}" is local and has no revision "{source.dataset_revision}": leave the revision out'
                )
            arguments, identity = _local_arguments(path, source.streaming)
        elif _format(path) is not None or name.startswith((".", "/", "~")):
            raise SelOrthoError(f"no such file or folder of texts: {name}")
        else:
            revision = resolve_commit("dataset", name, source.dataset_revision)
            if revision is None and not _is_cached(name):
                raise unreachable("dataset", name)
            arguments = {"path": name, "revision": revision or source.dataset_revision}
        dataset = load_dataset(**arguments, name=source.dataset_config, split=source.split, streaming=source.streaming)
        if identity is None and revision is None and isinstance(dataset, Dataset):
            revision = _cached_commit(source, dataset)
        return Documents(source, dataset, revision, identity)
    except READ_ERRORS as error:
        raise read_error(name, error, source.split) from error


def read_error(name: str, error: BaseException, split: str | None = None) -> SelOrthoError:
    """Explain an exception of `datasets` in one line."""
    if said := storage_error(error):
        return said
    message = " ".join(str(error).split())
    if splits := re.search(r"(?:Unknown|Bad) split.*?(\[.*\])", message):
        return SelOrthoError(f'"{name}" has no split "{split}": choose one of {splits[1]}')
    if isinstance(error, StopIteration) or "corresponds to no data" in message:
        return _empty(name)
    reason = one_line(error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error)
    return SelOrthoError(f'cannot read the dataset "{name}": {reason}')


def column_kinds(dataset: Dataset | IterableDataset) -> dict[str, str]:
    """Name the type of each column; a stream without a schema is taken to hold strings."""
    features = dataset.features or Features({column: Value("string") for column in next(iter(dataset))})
    return {column: getattr(feature, "dtype", type(feature).__name__) for column, feature in features.items()}


def _text_column(name: str, kinds: dict[str, str], wanted: str | None) -> str:
    # "null" is what a column is called that holds nothing; whoever asks for it learns that the texts are empty.
    texts = [column for column, kind in kinds.items() if kind in ("string", "large_string")]
    if wanted is None:
        wanted = "text" if "text" in kinds else texts[0] if len(texts) == 1 else None
    if wanted is None or kinds.get(wanted) not in ("string", "large_string", "null"):
        listed = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        reason = f'has no column of text "{wanted}"' if wanted else "does not say which column holds the text"
        raise SelOrthoError(f'"{name}" {reason}: choose --text_column from: {listed}')
    return wanted


def _empty(name: str) -> SelOrthoError:
    return SelOrthoError(f'the dataset "{name}" is empty: expected at least one row with text')


def _digest(text: str) -> bytes:
    """Hash the words; spaces and line ends between them do not count."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()


def _python_docs(source: TextSource) -> tuple[Dataset, str]:
    if source.split != "train":
        raise SelOrthoError(f'"{PYTHON_DOCS}" has no split "{source.split}", only "train"')
    revision = python_docs_revision()
    if source.dataset_revision not in (None, revision):
        logger.warning('"%s" of this Python is %s, not %s: other texts', PYTHON_DOCS, revision, source.dataset_revision)
    return Dataset.from_dict({"text": list(python_docs())}), revision


def _local_arguments(path: Path, streaming: bool) -> tuple[dict[str, Any], str]:
    """Return the arguments of `load_dataset` for a file or folder, and the fingerprint of the files."""
    files = [path]
    arguments: dict[str, Any] = {"path": _format(path), "data_files": {"train": [str(path)]}}
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _format(file) and not file.name.startswith("."))
        arguments = {"path": str(path)}  # `datasets` finds files and splits by their names
    if not files or _format(files[0]) is None:
        raise SelOrthoError(f"{path} is or holds no file of texts: expected {', '.join(_FORMATS)}, also compressed")
    if not any(file.stat().st_size for file in files):
        raise _empty(str(path))
    if any(map(_has_blank_lines, files)):
        arguments["sample_by"] = "paragraph"
    if any(".tsv" in file.suffixes for file in files):
        arguments["sep"] = "\t"
    for file in files:
        _refuse_null_rows(file, _PEEK if streaming else None)
    return arguments, fingerprint(files)


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
            if file.read(8).removeprefix(_BOM).startswith(b"["):
                file.seek(0)
                rows = json.loads(file.read(), strict=False)
                has_null = any(row is None or (isinstance(row, float) and not math.isfinite(row)) for row in rows)
            else:
                file.seek(0)
                starts = (line.lstrip(_BOM + b" \t\r") for line in itertools.islice(file, lines))
                has_null = any(start.startswith(b"null") for start in starts)
    except READ_ERRORS:
        return  # datasets says what is wrong
    if has_null:
        raise SelOrthoError(f'"{path}" has a row that is null: expected an object with the text; remove the row')


def _is_cached(name: str) -> bool:
    """Tell whether `load_dataset` finds a copy: without one, it would try to reach the Hub for half a minute."""
    owner, _, repository = name.rpartition("/")
    folder = "___".join(filter(None, [owner, camelcase_to_snakecase(repository)]))
    return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


def _cached_commit(source: TextSource, dataset: Dataset) -> str | None:
    """Read the commit off the paths of what `datasets` cached; without network it takes the latest copy."""
    parts = [part for file in dataset.cache_files for part in Path(file["filename"]).parts]
    commit = next(filter(is_commit, parts), None)
    if is_commit(source.dataset_revision) and commit != source.dataset_revision:
        raise SelOrthoError(
            f'dataset "{source.dataset}" is cached at commit {commit}, not at {source.dataset_revision}, and the Hub '
            "cannot be reached: go online, or leave the revision out"
        )
    return commit
