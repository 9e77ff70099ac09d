"""Read rows of the parquet files of an index: from a folder, or from the Hub without downloading the whole files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem, constants

from ..errors import SelOrthoError
from ..utils.hub import LOOKUP_ERRORS, find_file, in_subfolder
from ..utils.library_errors import no_answer, one_line

_CACHED_GROUPS = 16
_HTTP_ERRORS = LOOKUP_ERRORS[2]  # of the HTTP library; HfHubHTTPError is one of them


class RowReader:
    """A parquet file of which one row group is read at a time, from the Hub in one request; safe in several threads.

    Args:
        opened: opens the file.
        name: of the file, for messages.
        schema: that the file has to have.
        rows: in each row group but the last.

    Raises:
        SelOrthoError: the file is damaged, of another kind, or cannot be reached.
    """

    def __init__(self, opened: Callable[[], IO[bytes]], name: str, schema: pa.Schema, rows: int) -> None:
        self._opened, self._name, self._rows = opened, name, rows
        with self._errors_named(), opened() as file:
            self._metadata = pq.ParquetFile(file).metadata
            same = self._metadata.schema.to_arrow_schema().equals(schema)
        if not same:
            raise SelOrthoError(f"{name} has other columns than a feature index of this version: build it again")
        if self._metadata.num_row_groups != -(-len(self) // rows):
            raise SelOrthoError(f"{name} has other row groups than index.json says: build the feature index again")
        self._group = functools.lru_cache(_CACHED_GROUPS)(self._read_group)

    def __len__(self) -> int:
        return int(self._metadata.num_rows)

    def row(self, number: int) -> dict[str, Any]:
        """Return a row as plain Python values."""
        with self._errors_named():
            (row,) = self._group(number // self._rows).slice(number % self._rows, 1).to_pylist()
        return dict(row)

    def _read_group(self, number: int) -> pa.Table:
        # pre_buffer joins the columns of a row group, which lie side by side, into one read
        with self._opened() as file:
            return pq.ParquetFile(file, metadata=self._metadata, pre_buffer=True).read_row_group(number)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except _HTTP_ERRORS as error:
            raise SelOrthoError(f"{self._name} cannot be read from the Hub ({no_answer(error)}): try again") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SelOrthoError(
                f"{self._name} is damaged ({one_line(error)}): build the feature index again"
            ) from error


def open_rows(name: str, file: str, lookup: Mapping[str, Any], schema: pa.Schema, rows: int) -> RowReader:
    """Open a parquet file of an index in a folder or in a repository of the Hub.

    Raises:
        SelOrthoError: as [`RowReader`], or the file is missing or is a link that leads out of the folder.
    """
    if Path(name).is_dir() or lookup.get("local_files_only") or constants.HF_HUB_OFFLINE:
        path = find_file(name, file, lookup)
        if path is None:
            raise SelOrthoError(f"the feature index of {name!r} lacks {file}: build it again, or load it once online")
        return RowReader(functools.partial(pa.OSFile, str(path), "rb"), str(path), schema, rows)
    hub = HfFileSystem(token=lookup.get("token"))
    remote = f"{name}/{in_subfolder(file, lookup)}"
    opened = functools.partial(hub.open, remote, "rb", revision=lookup.get("revision"), cache_type="none")
    return RowReader(opened, remote, schema, rows)
