"""Bytes of an index's files, a range at a time: in a folder, or in a repository of the Hub without downloading it."""

from __future__ import annotations

import io
import re
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ..errors import SelOrthoError
from ..utils.files import target_outside
from ..utils.hub import LOOKUP_ERRORS, hub_error, in_subfolder, one_line, patiently

_TAIL = 1 << 16  # bytes at the end of a file that are asked for first: they hold the footer of a small one
_LARGEST_FOOTER = 1 << 27
_LARGEST_GROUP = 1 << 28
_CACHED_GROUPS = 16
_CONTENT_RANGE = re.compile(r"bytes \d+-\d+/(\d+)")


class RangedFile(ABC):
    """A file that is read a piece at a time."""

    def __init__(self, name: str) -> None:
        self.name = name  # for messages

    @abstractmethod
    def tail(self, length: int) -> tuple[bytes, int]:
        """The last bytes, at most `length`, and the size of the whole file."""

    @abstractmethod
    def read(self, start: int, end: int) -> bytes:
        """Bytes from `start` up to `end`."""


class LocalFile(RangedFile):
    """A file of a local folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        super().__init__(str(self.path))
        if outside := target_outside(folder, self.path):
            raise SelOrthoError(f"{self.path} leads out of {folder}, to {outside}: put the file itself into the folder")

    def tail(self, length: int) -> tuple[bytes, int]:
        """As [`RangedFile.tail`]."""
        size = self._sized()
        return self.read(max(0, size - length), size), size

    def read(self, start: int, end: int) -> bytes:
        """As [`RangedFile.read`]."""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise SelOrthoError(f"{self.path} cannot be read ({error.strerror})") from error

    def _sized(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise SelOrthoError(f"{self.path} cannot be read ({error.strerror})") from error


class HubFile(RangedFile):
    """A file of a repository of models on the Hub, at a commit."""

    def __init__(self, repo_id: str, file: str, lookup: Mapping[str, Any]) -> None:
        super().__init__(f"{repo_id}/{in_subfolder(file, lookup)}")
        self._repo_id, self._lookup = repo_id, lookup
        self._url = hf_hub_url(repo_id, in_subfolder(file, lookup), revision=lookup.get("revision"))

    def tail(self, length: int) -> tuple[bytes, int]:
        """As [`RangedFile.tail`]."""
        data, size = self._get(f"bytes=-{length}")
        return data[-length:], size

    def read(self, start: int, end: int) -> bytes:
        """As [`RangedFile.read`], in one request."""
        data, _ = self._get(f"bytes={start}-{end - 1}")
        return data

    def _get(self, bytes_range: str) -> tuple[bytes, int]:
        headers = {**build_hf_headers(token=self._lookup.get("token")), "Range": bytes_range}

        def request() -> tuple[bytes, int]:
            response = get_session().get(self._url, headers=headers, follow_redirects=True, timeout=30)
            hf_raise_for_status(response)
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status_code != 206 or found is None:
                raise SelOrthoError(
                    f"{self.name} does not come in parts (HTTP status {response.status_code} to a request of a range): "
                    "download the repository and give its folder"
                )
            return response.content, int(found[1])

        try:
            return patiently(request)
        except LOOKUP_ERRORS as error:
            raise hub_error(error, "SAE", self._repo_id, self._lookup.get("revision")) from error


class RangedParquet:
    """A parquet file of which one row group is read at a time, each in one range; safe to use from several threads.

    Where its row groups are is not asked of the file itself: pyarrow ends the process over some damaged footers.

    Args:
        file: its bytes.
        schema: that it has to have.
        rows: in each row group but the last.
        bounds: where its row groups begin, and where the last one ends, as its writer has noted.

    Raises:
        SelOrthoError: it is damaged, or another kind of file.
    """

    def __init__(self, file: RangedFile, schema: pa.Schema, rows: int, bounds: Sequence[int]) -> None:
        self._file, self._rows, self._bounds = file, rows, tuple(bounds)
        self._metadata = self._footer()
        try:
            same = self._metadata.schema.to_arrow_schema().equals(schema)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from error
        if not same:
            raise SelOrthoError(f"{file.name} has other columns than a feature index of this version: build it again")
        groups = -(-len(self) // rows)
        if self._metadata.num_row_groups != groups or len(self._bounds) != groups + 1:
            raise SelOrthoError(f"{file.name} has other row groups than index.json says: build the feature index again")
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._metadata.num_rows)

    def row(self, number: int) -> dict[str, Any]:
        """A row as plain Python values."""
        try:
            (row,) = self._group(number // self._rows).slice(number % self._rows, 1).to_pylist()
        except (pa.ArrowException, ValueError) as error:  # bytes that are no text, a group without the row
            raise self._damaged(error) from error
        return dict(row)

    def byte_range(self, group: int) -> tuple[int, int]:
        """Where a row group is in the file."""
        return self._bounds[group], self._bounds[group + 1]

    def _group(self, number: int) -> pa.Table:
        with self._lock:
            if number in self._groups:
                self._groups.move_to_end(number)
                return self._groups[number]
        start, end = self.byte_range(number)
        if not 0 <= start < end <= start + _LARGEST_GROUP:
            raise self._damaged(ValueError(f"a row group from byte {start} to {end}"))
        piece = _Piece(self._file.read(start, end), start)
        try:
            table = pq.ParquetFile(pa.PythonFile(piece, "r"), metadata=self._metadata).read_row_group(number)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from error
        with self._lock:
            self._groups[number] = table
            if len(self._groups) > _CACHED_GROUPS:
                self._groups.popitem(last=False)
        return table

    def _footer(self) -> pq.FileMetaData:
        data, size = self._file.tail(_TAIL)
        length = int.from_bytes(data[-8:-4], "little") + 8
        if data[-4:] != b"PAR1" or length > min(size, _LARGEST_FOOTER):
            raise SelOrthoError(f"{self._file.name} is not a whole parquet file: build the feature index again")
        if length > len(data):
            data = self._file.read(size - length, size)
        try:
            return pq.ParquetFile(pa.PythonFile(_Piece(data, size - len(data)), "r")).metadata
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> SelOrthoError:
        return SelOrthoError(f"{self._file.name} is damaged ({one_line(error)}): build the feature index again")


class _Piece(io.RawIOBase):
    """A file of which only the bytes of one piece are there."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._start, self._place = data, start, 0
        self._size = start + len(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._place + size, self._size)
        if self._place < self._start:
            raise OSError(f"byte {self._place} lies outside of the piece that was read")
        data = self._data[self._place - self._start : end - self._start]
        self._place += len(data)
        return data
