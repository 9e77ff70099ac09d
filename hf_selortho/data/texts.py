"""Texts to train on and texts held out: datasets of the Hub, local files, and the embedded "python-docs"."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from hf_selortho.data.python_docs import PYTHON_DOCS, python_docs, python_docs_revision
from hf_selortho.data.text_loading import READ_ERRORS, load_texts, read_error
from hf_selortho.errors import SelOrthoError

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


class Documents(ABC):
    """Documents (id, text), some of them held out.

    Whether a document is held out depends on its words alone, not on its place, the seed or the process: the same text
    never lands on both sides. Empty texts are passed over. Ids are row numbers; a stream, which has none, uses a hash
    of the text instead.
    """

    name: str
    revision: str | None  # commit of a Hub dataset, version and hash of python-docs, None for local files
    split: str
    fingerprint: str | None = None  # of local files, which have no revision
    count: int | None = None  # rows, held-out and empty ones included; None: a stream, nobody knows

    def __init__(self, name: str, revision: str | None, split: str, held_out_fraction: float) -> None:
        self.name, self.revision, self.split = name, revision, split
        self.held_out_fraction = held_out_fraction

    @abstractmethod
    def train(self, epoch: int, seed: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, str]]:
        """The documents of one epoch for training, in an order drawn from seed and epoch.

        Processes (`rank` of `world_size`) get different documents, together all of them.
        """

    @abstractmethod
    def held_out(self) -> Iterator[tuple[int, str]]:
        """The documents that `train` leaves out, always in the same order."""

    def _side(self, documents: Iterable[tuple[int, str]], held_out: bool) -> Iterator[tuple[int, str]]:
        bound = self.held_out_fraction * 2**64
        for number, text in documents:
            if (int.from_bytes(_digest(text)[:8], "big") < bound) == held_out:
                yield number, text


class _RowDocuments(Documents):
    """Documents that can be read in any order."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        split: str,
        held_out_fraction: float,
        count: int,
        fetch: Callable[[list[int]], list[str | None]],
    ) -> None:
        super().__init__(name, revision, split, held_out_fraction)
        self.count, self._fetch = count, fetch
        if next(self._read(np.arange(count)), None) is None:
            raise _no_text(name, f"{count} rows")

    def train(self, epoch: int, seed: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, str]]:
        order = np.random.default_rng([seed, epoch]).permutation(self.count or 0)
        return self._side(self._read(order[rank::world_size]), held_out=False)

    def held_out(self) -> Iterator[tuple[int, str]]:
        # Not in the order of the rows: the first thousand should speak for all, even where the file is sorted.
        return self._side(self._read(np.random.default_rng(0).permutation(self.count or 0)), held_out=True)

    def _read(self, rows: np.ndarray) -> Iterator[tuple[int, str]]:
        for start in range(0, len(rows), _FETCH):
            numbers = rows[start : start + _FETCH].tolist()
            try:
                texts = self._fetch(numbers)
            except READ_ERRORS as error:  # bytes that are no text, which only a look at them shows
                raise read_error(self.name, error) from error
            for number, text in zip(numbers, texts, strict=True):
                if text and not text.isspace():
                    yield number, text


class _StreamDocuments(Documents):
    """Documents that come one after another and are never all there."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        split: str,
        held_out_fraction: float,
        dataset: IterableDataset,
        column: str,
    ) -> None:
        super().__init__(name, revision, split, held_out_fraction)
        self._dataset, self._column = dataset, column
        if next(self._read(dataset.take(_PEEK)), None) is None:
            raise _no_text(name, f"its first {_PEEK} rows or fewer")

    def train(self, epoch: int, seed: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, str]]:
        shuffle_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        shuffled = self._dataset.shuffle(seed=shuffle_seed, buffer_size=_SHUFFLE_BUFFER)
        share = split_dataset_by_node(shuffled, rank=rank, world_size=world_size) if world_size > 1 else shuffled
        return self._side(self._read(share), held_out=False)

    def held_out(self) -> Iterator[tuple[int, str]]:
        return self._side(self._read(self._dataset), held_out=True)

    def _read(self, dataset: IterableDataset) -> Iterator[tuple[int, str]]:
        try:
            for row in dataset:
                text = row[self._column]
                if text and not text.isspace():
                    yield int.from_bytes(_digest(text)[8:16], "big") >> 1, text  # a non-negative int64
        except READ_ERRORS as error:
            raise read_error(self.name, error) from error


def open_documents(source: TextSource) -> Documents:
    """Find the texts of `source` and check that they can be read.

    Local files are csv, tsv, json, jsonl, parquet or txt, also compressed, or a folder of them. The documents of a txt
    file are what blank lines separate or, where there are none, its lines.

    Raises:
        SelOrthoError: no such dataset, file, split, column or revision; no network; no text; an unreadable file.
    """
    fraction = source.held_out_fraction
    if not 0 <= fraction <= 1:
        raise SelOrthoError(f"held_out_fraction is {fraction}: expected a number from 0 to 1, such as 0.1")
    if source.dataset == PYTHON_DOCS:
        return _open_python_docs(source)
    loaded = load_texts(
        source.dataset, source.config_name, source.split, source.text_column, source.revision, source.streaming
    )
    shared = (source.dataset, loaded.revision, source.split, fraction)
    rows, column = loaded.dataset, loaded.column
    documents: Documents
    if isinstance(rows, IterableDataset):
        documents = _StreamDocuments(*shared, rows, column)
    else:
        documents = _RowDocuments(*shared, len(rows), lambda numbers: rows[numbers][column])
    documents.fingerprint = loaded.fingerprint
    return documents


def _open_python_docs(source: TextSource) -> Documents:
    if source.split != "train":
        raise SelOrthoError(f'"{PYTHON_DOCS}" has no split "{source.split}", only "train"')
    if source.text_column not in (None, "text"):
        raise SelOrthoError(f'"{PYTHON_DOCS}" has no column "{source.text_column}", only "text"')
    texts, revision = python_docs(), python_docs_revision()
    if source.revision not in (None, revision):
        logger.warning('"%s" of this Python is %s, not %s: other texts', PYTHON_DOCS, revision, source.revision)
    return _RowDocuments(
        PYTHON_DOCS, revision, "train", source.held_out_fraction, len(texts), lambda rows: [texts[row] for row in rows]
    )


def _digest(text: str) -> bytes:
    """Hash of the words; spaces and line ends between them do not count."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()


def _no_text(name: str, looked_at: str) -> SelOrthoError:
    return SelOrthoError(f'"{name}" holds no text: empty in {looked_at}; choose another --text_column or file')
