"""Texts to train on and texts held out: datasets of the Hub, local files, and the embedded "python-docs"."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from datasets.distributed import split_dataset_by_node

from ..errors import SelOrthoError
from .python_docs import PYTHON_DOCS, python_docs, python_docs_revision
from .text_loading import READ_ERRORS, LoadedDataset, load_texts, read_error

logger = logging.getLogger(__name__)

_FETCH = 256  # rows read at once: one by one, Arrow spends most of its time on the way to them
_SHUFFLE_BUFFER = 10_000  # documents that a stream holds to draw from
_PEEK = 1000  # documents of a stream looked at to find out that it holds text


@dataclass(frozen=True)
class TextSource:
    """Which texts to read."""

    dataset: str = "fancyzhx/ag_news"  # Hub id, local file or folder, or "python-docs" (embedded)
    config_name: str | None = None  # of a Hub dataset that has several
    split: str = "train"
    text_column: str | None = None  # None: "text", or else the only column of strings
    revision: str | None = None  # branch, tag or commit of a Hub dataset
    streaming: bool = False  # read while training instead of downloading first
    held_out_fraction: float = 0.1  # of the documents, never trained on


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

    def __init__(self, source: TextSource, loaded: LoadedDataset) -> None:
        self.dataset, self.revision, self.fingerprint = loaded
        self.name, self.split, self.held_out_fraction = source.dataset, source.split, source.held_out_fraction
        self.column = _text_column(self.name, column_kinds(self.dataset), source.text_column)
        self._texts = self.dataset.select_columns([self.column])
        self.count = None if isinstance(self.dataset, IterableDataset) else len(self.dataset)
        start = self._texts.take(_PEEK) if isinstance(self._texts, IterableDataset) else np.arange(self.count or 0)
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
            if (int.from_bytes(_digest(text)[:8], "big") < bound) == held_out:
                yield number, text

    def _read(self, rows: IterableDataset | np.ndarray) -> Iterator[tuple[int, str]]:
        """Read the texts of a stream, or of the numbered rows."""
        texts = self._streamed(rows) if isinstance(rows, IterableDataset) else self._fetched(rows)
        while True:
            try:
                number, text = next(texts)
            except StopIteration:
                return
            except READ_ERRORS as error:  # bytes that are no text, which only a look at them shows
                raise read_error(self.name, error) from error
            if text and not text.isspace():
                yield number, text

    def _streamed(self, rows: IterableDataset) -> Iterator[tuple[int, str]]:
        for row in rows:
            text = row[self.column] or ""
            yield int.from_bytes(_digest(text)[8:16], "big") >> 1, text  # a non-negative int64

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
    if not 0 <= source.held_out_fraction <= 1:
        raise SelOrthoError(
            f"held_out_fraction is {source.held_out_fraction}: expected a number from 0 to 1, such as 0.1"
        )
    if source.dataset != PYTHON_DOCS:
        loaded = load_texts(source.dataset, source.config_name, source.split, source.revision, source.streaming)
        return Documents(source, loaded)
    if source.split != "train":
        raise SelOrthoError(f'"{PYTHON_DOCS}" has no split "{source.split}", only "train"')
    revision = python_docs_revision()
    if source.revision not in (None, revision):
        logger.warning('"%s" of this Python is %s, not %s: other texts', PYTHON_DOCS, revision, source.revision)
    return Documents(source, LoadedDataset(Dataset.from_dict({"text": list(python_docs())}), revision, None))


def _digest(text: str) -> bytes:
    """Hash the words; spaces and line ends between them do not count."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()


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
