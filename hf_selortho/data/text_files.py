"""Local files of texts: which files of a folder hold data, and what each is by its bytes, not by its name alone."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import logging
import lzma
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from datasets.data_files import DataFilesList, _get_data_files_patterns, sanitize_patterns
from datasets.packaged_modules.json.json import JsonConfig
from huggingface_hub import metadata_load

from ..errors import SelOrthoError
from ..utils.files import fingerprint
from ..utils.hub import listed, read_object
from .text_source import TextSource

logger = logging.getLogger(__name__)

PEEK = 1000  # rows of a stream looked at before it is read

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_FORMATS |= {".ndjson": "json", ".arrow": "arrow"}
_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    **{".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open},
    ".zst": lambda path: pyarrow.input_stream(str(path), compression="zstd"),
}
# First bytes of what is no text: what it is, and what to do.
_MAGIC = {
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save the sheet as csv"),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word document", "save it as csv or txt"),
    b"%PDF-": ("a PDF", "extract its text"),
    b"PAR1": ("parquet", "name it .parquet"),
    b"ARROW1": ("arrow", "name it .arrow"),
    b"\x1f\x8b": ("gzip", "add .gz to its name"),
    b"BZh91AY&SY": ("bzip2", "add .bz2 to its name"),
    b"\xfd7zXZ\0": ("xz", "add .xz to its name"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "add .zst to its name"),
    **dict.fromkeys((b"<!DOCTYPE html", b"<!doctype html", b"<html"), ("a web page", "download the file itself")),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself with `git lfs pull`"),
}
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # after utf-32, which starts with the same
_CONTROL = bytes({*range(32)} - {*b"\t\n\v\f\r\x1a\x1b"})
_WIDE = re.compile(r"u(tf)?[-_ ]?(16|32)", re.IGNORECASE)
_GLOB = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}  # as regular expressions
_SEPARATORS = (",", ";", "\t", "|")
_ABOUT = re.compile(  # beside the data
    r"(readme|licen[cs]e|copying|notice|changelog|authors|requirements)\.txt|(config|dataset_(infos?|dict))\.json", re.I
)
_SAMPLE = 1 << 20  # bytes looked at, decompressed
_ROWS = 100  # of a csv file looked at


def text_format(path: Path) -> str | None:
    """Return how a file of this name is read: csv, json, parquet, text or arrow; None if it is no file of texts."""
    stem = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return _FORMATS.get(stem.suffix.lower())


def local_arguments(path: Path, source: TextSource) -> tuple[dict[str, Any], str]:
    """Look at a file or folder and return the arguments of `load_dataset`, and the fingerprint of the files.

    Raises:
        SelOrthoError: it holds no texts, or a file is not what its name says.
        OSError, EOFError, ValueError, lzma.LZMAError, zlib.error: a file cannot be read or decompressed.
    """
    patterns = _card_patterns(path, source.dataset_config)
    splits = _folder_splits(path, patterns) if path.is_dir() else {"train": [path]}
    files = list(dict.fromkeys(file for part in splits.values() for file in part))
    kind = text_format(files[0]) if files else None
    if kind is None or not all(file.is_file() for file in files):
        raise SelOrthoError(f"{path} is or holds no file of texts: expected {', '.join(_FORMATS)}, also compressed")
    if place := next((str(file.absolute()) for file in files if "::" in str(file.absolute())), None):
        raise SelOrthoError(f'"{place}" has "::" in its path, the mark of a place in an archive: rename it')
    for name, kinds in (("separator", {"csv"}), ("encoding", {"csv", "json", "text"})):
        if getattr(source, name) is not None and kind not in kinds:
            raise SelOrthoError(f"--{name} is a setting of {', '.join(sorted(kinds))} files: leave it out for {path}")
    looks = {file: look for file in files if (look := _file_arguments(file, kind, source)) is not None}
    if not looks:
        raise empty(str(path))
    splits = {split: kept for split, part in splits.items() if (kept := [file for file in part if file in looks])}
    files, arguments = list(looks), _joined(path, list(looks.values()))
    identity = fingerprint(files)
    # Not as names, which `datasets` takes for patterns. Its cache keeps what it read by this list.
    found = {
        split: DataFilesList(
            [str(file.absolute()) for file in part], [(identity, str(file.stat().st_mtime_ns)) for file in part]
        )
        for split, part in splits.items()
    }
    return {"path": kind, "data_files": found, **arguments}, identity


def empty(name: str) -> SelOrthoError:
    """Make the error of a dataset without a row."""
    return SelOrthoError(f'the dataset "{name}" is empty: expected at least one row with text')


# ------------------------------------------------------------------------------------------------------- folders


def _folder_splits(folder: Path, patterns: dict[str, list[str]] | None) -> dict[str, list[Path]]:
    """Find the files of data in a folder, by split, those of the patterns if given; say which others there are."""
    if saved := _saved_to_disk(folder):
        return saved
    paths = _visible_files(folder)
    names = [name for name, path in paths.items() if text_format(path) and not _ABOUT.fullmatch(path.name)]
    if patterns:
        names = _matching(names, *itertools.chain(*patterns.values()))
    names = _main_kind(folder, [name for name in names if paths[name].stat().st_size] or names)
    patterns = patterns or (_get_data_files_patterns(partial(_matching, names)) if names else {})
    splits = {str(split): [paths[name] for name in _matching(names, *some)] for split, some in patterns.items()}
    used = {path for part in splits.values() for path in part}
    if used and (others := [name for name, path in paths.items() if path not in used]):
        logger.warning('"%s": read %s; left out %s', folder, listed(path.name for path in used), listed(others))
    return {split: part for split, part in splits.items() if part}


def _visible_files(folder: Path) -> dict[str, Path]:
    """List the files in a folder and below, also behind links, but none that is hidden, by their names in it."""
    files: list[Path] = []
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link to a folder above, or to one that has been here
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path for path in sorted(files) if path.is_file()}


def _main_kind(folder: Path, names: list[str]) -> list[str]:
    """Choose the files of one kind: tables before plain text, files named for a split, then what there is most of.

    Raises:
        SelOrthoError: there is as much of two kinds.
    """
    kinds = {kind: [name for name in names if text_format(Path(name)) == kind] for kind in _FORMATS.values()}

    def rank(part: list[str]) -> tuple[bool, bool, int]:
        named = any(re.search(r"(^|[^a-z])(train|test|valid)", name.lower()) for name in part)
        return part != kinds["text"] or 11 * len(part) > 10 * len(names), named, len(part)

    best, second, *_ = sorted(kinds.values(), key=rank, reverse=True)
    if second and rank(best) == rank(second):
        both = f"{listed(best, 3)}; {listed(second, 3)}"
        raise SelOrthoError(f'"{folder}" holds files of several kinds ({both}): name one of them as --dataset')
    return best


def _matching(names: Sequence[str], *patterns: str) -> list[str]:
    parts = [re.findall(r"\*\*/?|\[[^]]+\]|.", str(pattern).removeprefix("./")) for pattern in patterns]
    globs = ["".join(_GLOB.get(part) or _literal(part) for part in pattern) for pattern in parts]
    return [name for name in names if any(re.fullmatch(glob, name) for glob in globs)]


def _literal(part: str) -> str:
    return part.replace("[!", "[^") if len(part) > 1 else re.escape(part)


def _card_patterns(folder: Path, config: str | None) -> dict[str, list[str]] | None:
    """Read what files a configuration has, by split, off the README.md of a dataset's repository, if it says so.

    Raises:
        SelOrthoError: there is no such configuration, or several to choose from.
    """
    readme = folder / "README.md"
    try:
        rows = (metadata_load(readme) or {}).get("configs") if readme.is_file() else ()
    except Exception:  # noqa: BLE001  it is no YAML; the errors of that library are not ours to import
        rows = ()
    rows = [row for row in rows or () if isinstance(row, dict) and isinstance(row.get("data_files"), (str, list))]
    files = {str(row.get("config_name", "default")): row for row in rows}
    if not files and config is None:
        return None
    name = config or next((name for name, row in files.items() if row.get("default") or len(files) == 1), "default")
    if name not in files:
        choice = f"choose --dataset_config from {listed(files)}" if files else "leave --dataset_config out"
        raise SelOrthoError(f'"{folder}" has no configuration "{name}": {choice}')
    return sanitize_patterns(files[name]["data_files"])


def _saved_to_disk(folder: Path) -> dict[str, list[Path]]:
    """Find the files of what `datasets` saved with save_to_disk, by split, if the folder is one of these."""
    if (folder / "dataset_dict.json").is_file():
        names = read_object(folder / "dataset_dict.json").get("splits") or ()
        return {name: part for name in names for part in _saved_to_disk(folder / Path(name).name).values()}
    state = read_object(folder / "state.json") if (folder / "state.json").is_file() else {}
    files = [folder / Path(entry["filename"]).name for entry in state.get("_data_files") or ()]
    return {"train": files} if files else {}


# --------------------------------------------------------------------------------------------------------- files


def _file_arguments(path: Path, kind: str, source: TextSource) -> dict[str, Any] | None:
    """Look at the start of a file and return how `datasets` reads it, None if it is blank; raises as its caller."""
    with _open(path) as file:
        start = file.read(_SAMPLE)
    if not start:
        return None
    what, remedy = next((found for magic, found in _MAGIC.items() if start.startswith(magic)), (kind, ""))
    if what != kind:
        raise SelOrthoError(f'"{path}" looks like {what}, not {kind}: {remedy}')
    if kind in ("parquet", "arrow"):
        return {}
    text, encoding = _decode(path, start, source.encoding)
    if not text.strip():
        return None
    packed, array = path.suffix.lower() in _COMPRESSIONS, kind == "json" and text.startswith("[")
    if encoding != "utf-8" and ((packed and (array or kind == "text")) or (array and start.startswith(b"["))):
        what = "an array" if array else "compressed"  # of which `datasets` forgets the encoding
        raise SelOrthoError(f'"{path}" is {what} in {encoding}, which is not read: save it as utf-8')
    arguments: dict[str, Any] = {} if encoding == "utf-8" else {"encoding": encoding}
    if kind == "json":
        _check_json(path, text, encoding, source)
        if "parse_agent_traces" in JsonConfig.__dataclass_fields__:  # which would read chats by a library of their own
            arguments["parse_agent_traces"] = False
        if _WIDE.match(encoding):  # `datasets` cuts at a byte, not at a character
            arguments["chunksize"] = -1
    elif _holds_objects(text):
        raise SelOrthoError(f'"{path}" looks like JSON lines, not {kind}: name it .jsonl')
    elif kind == "text":
        arguments |= {"sample_by": "paragraph"} if "\n\n" in text.replace("\r", "").rstrip() else {}
    elif (separator := _separator(path, text, source)) != ",":
        arguments["sep"] = separator
    return arguments


def _open(path: Path) -> Any:
    return _COMPRESSIONS.get(path.suffix.lower(), partial(open, mode="rb"))(path)


def _joined(path: Path, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Put together how the files are read, which has to be one way."""
    joined = {key: value for part in parts for key, value in part.items()}
    for key, setting, default in (("encoding", "encoding", "utf-8"), ("sep", "separator", ",")):
        values = {part.get(key, default) for part in parts}
        if len(values - {"utf-8"} if "utf-8-sig" in values else values) > 1:  # utf-8-sig reads both
            several = f"{setting}s ({listed(map(repr, values))})"
            raise SelOrthoError(f'"{path}" holds files of several {several}: name one of them as --dataset')
    return joined


def _decode(path: Path, start: bytes, given: str | None) -> tuple[str, str]:
    """Decode the start of a file; return it with the encoding, that of a byte-order mark if there is one."""
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    encoding = marked or given or "utf-8"
    if marked and given and not codecs.lookup(given).name.startswith(marked.removesuffix("-sig")):
        raise SelOrthoError(f'"{path}" has the byte-order mark of {marked}, not of {given}: leave --encoding out')
    encoding = "utf-8" if codecs.lookup(encoding).name == "utf-8" else encoding
    wide = _WIDE.match(encoding) is not None
    if wide and not marked and b"\0" not in start:
        raise SelOrthoError(f'"{path}" does not look like {encoding}: choose another --encoding, or leave it out')
    if not wide and len(start) - len(start.translate(None, _CONTROL)) > len(start) / 100:
        zeros = {end: start[odd::2].count(0) for odd, end in enumerate(("be", "le"))}
        end = max(zeros, key=zeros.__getitem__)
        wide = zeros[end] > max(len(start) / 5, 10 * min(zeros.values()))
        remedy = f"--encoding utf-16-{end} may read it" if wide else "expected text"
        raise SelOrthoError(f'"{path}" holds control characters, not {encoding}: {remedy}')
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(start, len(start) < _SAMPLE)
    except UnicodeDecodeError as error:
        raise wrong_encoding(str(path), error) from error
    return text, encoding


def wrong_encoding(name: str, error: UnicodeDecodeError) -> SelOrthoError:
    """Make the error of bytes that are no text in the encoding that was tried."""
    said = f'"{name}" is not {error.encoding} text (byte 0x{error.object[error.start]:02x})'
    return SelOrthoError(f"{said}: say its --encoding, such as cp1252 (Windows) or latin-1")


def _holds_objects(text: str) -> bool:
    """Tell whether the first lines are JSON objects, or there is an array of them."""
    if re.match(r"\s*\[\s*\{\s*\"", text):
        return True
    lines = [line for line in itertools.islice(io.StringIO(text), 20) if line.strip()]
    try:
        return bool(lines) and all(isinstance(json.loads(line), dict) for line in lines[: max(1, len(lines) - 1)])
    except (ValueError, RecursionError):
        return False


def _check_json(path: Path, text: str, encoding: str, source: TextSource) -> None:
    """Look for null rows, where pyarrow ends the process (apache/arrow#47409), and for shapes, in a stream's start.

    Raises:
        SelOrthoError: a row is null, or the file is one object that holds a whole table, or no JSON.
    """
    most = PEEK if source.streaming else None
    with _open(path) as file:
        lines = io.TextIOWrapper(file, encoding=encoding)
        try:
            if text.startswith("["):
                rows = json.loads(lines.read(), strict=False)
                null = any(row is None or (isinstance(row, float) and not math.isfinite(row)) for row in rows)
            else:
                null = any(line.lstrip(" \t\r").startswith("null") for line in itertools.islice(lines, most))
        except (ValueError, RecursionError):
            return  # `datasets` says what is wrong
    if null:
        raise SelOrthoError(f'"{path}" has a row that is null: expected an object with the text; remove the row')
    start = text.lstrip()
    if start[0] not in "[{":
        raise SelOrthoError(f'"{path}" is not JSON: expected an object a line, or an array of them; see its first line')
    try:
        table, end = json.JSONDecoder(strict=False).raw_decode(start)
    except (ValueError, RecursionError):
        return
    whole = table if isinstance(table, dict) and not start[end:].strip() else {}
    if (
        whole
        and "." not in (source.text_column or "")
        and not source.chat_column
        and all(isinstance(value, (dict, list)) for value in whole.values())
    ):
        said = f'"{path}" is one object of {listed(whole)}, not one a row'
        raise SelOrthoError(f"{said}: save it as JSON lines, an object with the text a line, or as an array of them")


# ----------------------------------------------------------------------------------------------------------- csv


def _separator(path: Path, text: str, source: TextSource) -> str:
    """Find the separator of a csv file that makes the text a column, and check its header.

    Raises:
        SelOrthoError: it seems to be another one than its name says, or there is no header.
    """
    usual = source.separator or ("\t" if ".tsv" in map(str.lower, path.suffixes) else ",")
    wanted = source.text_column or "text"
    tables = {separator: _table(text, separator) for separator in dict.fromkeys((usual, *_SEPARATORS))}
    if wanted not in tables[usual][0] and source.separator is None:
        fitting = [s for s, rows in tables.items() if len(rows[0]) > 1 and {len(row) for row in rows} == {len(rows[0])}]
        certain = [s for s in fitting if wanted in tables[s][0]]
        if len(certain) == 1:
            logger.warning('"%s": read with --separator %r, which has a column %s', path, certain[0], wanted)
            return certain[0]
        if fitting and usual not in fitting:
            said = f'"{path}" looks separated by {fitting[0]!r} (columns {listed(tables[fitting[0]][0])})'
            raise SelOrthoError(f"{said}, not by {usual!r}: say --separator {fitting[0]!r}")
    header, *rows = tables[usual]
    if wanted not in header and (strange := next(filter(_is_no_name, header), None)):
        said = f'"{path}" seems to have no header: its first line should name the columns, but holds {strange[:60]!r}'
        raise SelOrthoError(f"{said}; put a line such as text,label on top, or name the column with --text_column")
    if longer := next((row for row in rows if len(row) > len(header)), None):  # pandas takes the first for an index
        said = f'"{path}" has {len(header)} columns and a row of {len(longer)} ({usual.join(longer)[:60]!r})'
        raise SelOrthoError(f"{said}: put texts that hold {usual!r} into quotes, or say another --separator")
    return usual


def _table(text: str, separator: str) -> list[list[str]]:
    """Read the first rows as a csv file with this separator, without one that may be cut."""
    rows: list[list[str]] = []
    try:
        for row in itertools.islice(csv.reader(io.StringIO(text, newline=""), delimiter=separator), _ROWS):
            rows += [row] if row else []
    except csv.Error:  # a longer field than Python's csv reads
        pass
    return rows[:-1] if len(rows) in range(2, _ROWS) and len(text.encode()) >= _SAMPLE - 4 else rows or [[""]]


def _is_no_name(name: str) -> bool:
    """Tell whether a cell of the first line is a value or a sentence rather than the name of a column."""
    return bool(re.fullmatch(r"[-+]?\d+(\.\d+)?", name.strip())) or len(name) > 60 or len(name.split()) > 5
