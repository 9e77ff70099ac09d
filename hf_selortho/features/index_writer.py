"""Writes the feature index of an SAE: whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import SelOrthoError
from ..utils.files import reason, sync
from .records import (
    CONCEPTS,
    FEATURE_TABLE,
    FEATURES,
    MOVED,
    PAIR_TABLE,
    PAIRS,
    SCHEMA_VERSION,
    ConceptRow,
    FeatureRecord,
    PairRecord,
    as_row,
)

INDEX = "feature_index"  # folder of the index, beside the config.json of its SAE
FACTS = "index.json"
FEATURES_FILE, FEATURE_TABLE_FILE = "features.parquet", "feature_table.parquet"
PAIRS_FILE, PAIR_TABLE_FILE = "pairs.parquet", "pair_table.parquet"
CONCEPTS_FILE = "concepts.parquet"  # only where probe sets were read
MOVED_FILE = "moved.parquet"  # only of an SAE that was trained from another one
FILES = (FACTS, FEATURES_FILE, FEATURE_TABLE_FILE, PAIRS_FILE, PAIR_TABLE_FILE, CONCEPTS_FILE, MOVED_FILE)
ROWS_IN_GROUP = 64  # features or pairs read at once: some hundred kilobytes
# The small columns of a feature, and the tokens of its top positive logits, for the search.
FEATURE_SUMMARY = pa.schema([*FEATURE_TABLE, ("promotes", pa.list_(pa.string()))])


class IndexWriter:
    """Writes a feature index whole or not at all: `with IndexWriter(folder) as writer: ...`.

    Args:
        folder: of the index. What it holds of an earlier one is replaced when the block ends without an error.

    Raises:
        SelOrthoError: something else than an index is there, or there is no room.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self.concepts: list[ConceptRow] = []
        self.moved: Sequence[float] = ()  # by feature, see [`MOVED`]
        self._temporary = folder.with_name(f".{folder.name}.tmp")
        check_index_folder(folder)

    def __enter__(self) -> IndexWriter:
        with self._writing():
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)
            self._features = _RecordFile(self._temporary, FEATURES_FILE, FEATURES)
            self._pairs = _RecordFile(self._temporary, PAIRS_FILE, PAIRS)
        return self

    def add_features(self, records: Iterable[FeatureRecord]) -> None:
        """Append records, by rising number and with none left out.

        Raises:
            SelOrthoError: there is no room.
        """
        for record in records:
            assert record.feature == len(self._features.table_rows), f"feature {record.feature} out of order"
            summary = {name: getattr(record, name) for name in FEATURE_TABLE.names}
            with self._writing():
                self._features.add(record, {**summary, "promotes": [effect.token for effect in record.promoted]})

    def add_pairs(self, records: Iterable[PairRecord]) -> None:
        """Append records, by rising (a, b).

        Raises:
            SelOrthoError: there is no room.
        """
        for record in records:
            assert record.a < record.b, f"pair {record.a}, {record.b}"
            with self._writing():
                self._pairs.add(record, {name: getattr(record, name) for name in PAIR_TABLE.names})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            with self._writing():
                self._features.close()
                self._pairs.close()
                if error is None:
                    self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _finish(self) -> None:
        tables = [
            (FEATURE_TABLE_FILE, self._features.table_rows, FEATURE_SUMMARY),
            (PAIR_TABLE_FILE, self._pairs.table_rows, PAIR_TABLE),
        ]
        if self.concepts:
            tables.append((CONCEPTS_FILE, [as_row(row) for row in self.concepts], CONCEPTS))
        if self.moved:
            tables.append((MOVED_FILE, [{"moved": value} for value in self.moved], MOVED))
        for file, rows, schema in tables:
            table = pa.Table.from_pylist(rows, schema=schema)
            pq.write_table(table, self._temporary / file, compression="zstd", store_schema=False)
        facts = {
            "schema_version": SCHEMA_VERSION,
            "kind": INDEX,
            **self.facts,
            "rows_in_group": ROWS_IN_GROUP,
            "row_groups": {FEATURES_FILE: self._features.bounds, PAIRS_FILE: self._pairs.bounds},
        }
        text = json.dumps(facts, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        (self._temporary / FACTS).write_text(text, encoding="utf-8")
        for path in self._temporary.iterdir():
            sync(path)
        earlier = self.folder.with_name(f".{self.folder.name}.replaced.tmp")
        shutil.rmtree(earlier, ignore_errors=True)
        if self.folder.is_dir():
            self.folder.rename(earlier)
        self._temporary.rename(self.folder)
        shutil.rmtree(earlier, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SelOrthoError(
                f"cannot write the feature index {self.folder}: {reason(error)}; make room there or choose another "
                "--output"
            ) from error


class _RecordFile:
    """A parquet file of records that grows by row groups of [`ROWS_IN_GROUP`] rows, and the rows of its table."""

    def __init__(self, folder: Path, file: str, schema: pa.Schema) -> None:
        # Without statistics and the Arrow schema, the footer of 65,536 features has 3 MB; it is read once.
        options = {"compression": "zstd", "write_statistics": False, "store_schema": False}
        self._sink = pa.OSFile(str(folder / file), "wb")
        self._writer = pq.ParquetWriter(self._sink, schema, **options)
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self.table_rows: list[dict[str, Any]] = []
        self.bounds: list[int] = [self._sink.tell()]  # of the row groups, in bytes

    def add(self, record: FeatureRecord | PairRecord, table_row: dict[str, Any]) -> None:
        self._rows.append(as_row(record))
        self.table_rows.append(table_row)
        if len(self._rows) == ROWS_IN_GROUP:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()
        self._sink.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), row_group_size=ROWS_IN_GROUP)
        self._rows = []
        self.bounds.append(self._sink.tell())


def check_index_folder(folder: Path) -> None:
    """Refuse to replace what is no feature index.

    Raises:
        SelOrthoError: it is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise SelOrthoError(f"{folder} is a file: choose another folder for the feature index")
    foreign = {entry.name for entry in folder.iterdir()} - {*FILES} if folder.is_dir() else set()
    if foreign:
        raise SelOrthoError(
            f"{folder} holds {min(foreign)}, which is no part of a feature index, so nothing in it is replaced: choose "
            "another folder"
        )
