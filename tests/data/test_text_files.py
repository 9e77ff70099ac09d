"""Local files of texts: the file that is named is the one that is read, and as what its bytes are, or refused."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from hf_selortho.data.texts import Documents, TextSource, open_documents
from hf_selortho.errors import SelOrthoError

TEXTS = ["First words, here.", "Second; words", "Thïrd words"]
CSV = "text\n" + "".join(f'"{text}"\n' for text in TEXTS)
ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def _read(path: Path | str, **settings: object) -> Documents:
    return open_documents(TextSource(dataset=str(path), held_out_fraction=0.0, **settings))  # type: ignore[arg-type]


def _texts(documents: Documents) -> list[str]:
    return sorted(text for _, text in documents.train(0, 0))


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("xl/workbook.xml", CSV)
    return data.getvalue()


def _parquet() -> bytes:
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), data)
    return data.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name",
    ["texts[1].csv", "a*.csv", "a?b.csv", "{a,b}.csv", "f[o]l/x.csv", ".hidden/x.csv", "sp ace #%20.csv", "zip:/x.csv"],
)
def test_a_path_is_read_as_it_stands(name: str, streaming: bool, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("texts1.csv", "ab.csv", "axb.csv", "a.csv", "fol/x.csv", "x.csv"):
        _write(tmp_path / other, "text\nANOTHER FILE\n")
    path = _write(tmp_path / name, CSV)
    documents = _read(path, streaming=streaming)
    assert _texts(documents) == sorted(TEXTS)
    assert documents.fingerprint != _read(tmp_path / "texts1.csv").fingerprint
    monkeypatch.chdir(path.parent)
    assert _texts(_read(path.name, streaming=streaming)) == sorted(TEXTS)
    if path.parent != tmp_path:
        assert _texts(_read(path.parent, streaming=streaming)) == sorted(TEXTS)
        (tmp_path / "link").symlink_to(path.parent)
        assert _texts(_read(tmp_path / "link")) == sorted(TEXTS)


def test_paths_that_the_reader_of_files_would_take_apart_are_refused(tmp_path) -> None:
    _write(tmp_path / "a", "text\nANOTHER FILE\n")
    with pytest.raises(SelOrthoError, match=r'has "::" in its path.*rename it'):
        _read(_write(tmp_path / "a::b.csv", CSV))
    with pytest.raises(SelOrthoError, match="neither on the Hub nor a local path"):
        _read(tmp_path / "*.csv")


def _array(rows: list[dict[str, str]]) -> str:
    return json.dumps(rows, ensure_ascii=False)


CHATS = "".join(
    json.dumps({"messages": [{"role": "user", "content": text}], "meta": {"source": "web"}}) + "\n" for text in TEXTS
)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        *((f"bom.{kind}", text.encode("utf-8-sig"), {}) for kind, text in (("csv", CSV), ("jsonl", LINES))),
        ("bom.json", _array(ROWS).encode("utf-8-sig"), {}),
        ("bom.txt", "\n".join(TEXTS).encode("utf-8-sig"), {}),
        *((f"u16.{kind}", text.encode("utf-16"), {}) for kind, text in (("csv", CSV), ("jsonl", LINES))),
        ("u16.txt", "\n\n".join(TEXTS).encode("utf-16"), {}),
        ("latin.csv", CSV.encode("latin-1"), {"encoding": "latin-1"}),
        ("latin.jsonl", LINES.encode("latin-1"), {"encoding": "cp1252"}),
        ("latin.txt", "\n".join(TEXTS).encode("latin-1"), {"encoding": "latin-1"}),
        ("unmarked.csv", CSV.encode("utf-16-le"), {"encoding": "utf-16-le"}),
        *((f"by{ord(s)}.csv", f"id{s}text\n" + "".join(f'1{s}"{t}"\n' for t in TEXTS), {}) for s in ";\t|"),
        ("named.csv", "a;b\n" + "".join(f'1;"{t}"\n' for t in TEXTS), {"text_column": "b"}),
        ("given.csv", "a#b\n" + "".join(f'"1"#"{t}"\n' for t in TEXTS), {"text_column": "b", "separator": "#"}),
        ("given.tab.csv", "a\tb\n" + "".join(f'1\t"{t}"\n' for t in TEXTS), {"text_column": "b", "separator": r"\t"}),
        ("lines.json", LINES, {}),
        ("array.jsonl", _array(ROWS), {}),
        ("strings.json", json.dumps(TEXTS), {}),
        ("paragraphs.txt.gz", gzip.compress("\n\n".join(TEXTS).encode(), mtime=0), {}),
        ("chats.jsonl", CHATS, {"text_column": "messages.content"}),
        ("body.ndjson", "".join(json.dumps({"doc": {"body": t, "n": 1}}) + "\n" for t in TEXTS), {}),
        ("traces.jsonl", "".join(json.dumps({"type": "user", "text": t, "message": {}}) + "\n" for t in TEXTS), {}),
        ("u16.json", _array(ROWS).encode("utf-16"), {}),
        ("part.csv", CSV, {"split": "train[:3]"}),
    ],
)
def test_what_is_certain_is_read(name: str, content: str | bytes, settings, streaming: bool, tmp_path) -> None:
    if streaming and "split" in settings:
        with pytest.raises(SelOrthoError, match=r'--split "train\[:3\]": a stream .*leave --streaming out'):
            _read(_write(tmp_path / name, content), streaming=True, **settings)
    else:
        assert _texts(_read(_write(tmp_path / name, content), streaming=streaming, **settings)) == sorted(TEXTS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("sheet.csv", _zip(), {}, "looks like a zip archive or an Excel workbook, not csv: unpack it"),
        ("table.jsonl", _parquet(), {}, "looks like parquet, not json: name it .parquet"),
        ("packed.txt", gzip.compress(b"words", mtime=0), {}, "looks like gzip, not text: add .gz"),
        ("plain.csv.gz", CSV, {}, "plain.csv.gz.*not compressed as its name says"),
        ("pointer.parquet", "version https://git-lfs.github.com/spec/v1\n", {}, "Git LFS.*git lfs pull"),
        ("lines.csv", LINES, {}, "looks like JSON lines, not csv: name it .jsonl"),
        ("lines.txt", LINES, {}, "looks like JSON lines, not text: name it .jsonl"),
        ("table.json", CSV, {}, "is not JSON: expected an object a line"),
        ("zeros.csv", bytes(1000), {}, "holds control characters"),
        ("noise.txt", bytes(range(256)) * 9, {"encoding": "latin-1"}, "holds control characters"),
        ("unmarked.txt", "words ".encode("utf-16-le"), {}, "--encoding utf-16-le may read it"),
        ("mark.csv", "\ufeff \n", {}, "is empty"),
        *((f"latin.{kind}", CSV.encode("latin-1"), {}, "not utf-8 text.*--encoding") for kind in ("csv", "txt")),
        ("latin.json", _array(ROWS).encode("latin-1"), {}, "not utf-8 text.*--encoding"),
        ("bom.txt.gz", gzip.compress(CSV.encode("utf-8-sig"), mtime=0), {}, "is compressed in utf-8-sig.*as utf-8"),
        ("latin.json", _array(ROWS).encode("cp1252"), {"encoding": "cp1252"}, "an array in cp1252, .*save it as utf-8"),
        ("late.csv", "text\n" + "words\n" * 200_000 + "\udce9\n", {}, "not utf-8 text.*--encoding"),
        ("bom.csv", CSV.encode("utf-8-sig"), {"encoding": "latin-1"}, "byte-order mark.*leave --encoding out"),
        ("x.csv", CSV, {"encoding": "utf-16"}, "does not look like utf-16"),
        ("x.csv", CSV, {"encoding": "nope"}, "--encoding 'nope': expected an encoding of text"),
        ("x.csv", CSV, {"separator": ";;"}, "--separator ';;': expected one character"),
        ("x.jsonl", LINES, {"separator": ";"}, "--separator is a setting of csv files"),
        ("x.csv", CSV, {"dataset_config": "en"}, "has no configuration.*leave --dataset_config out"),
        ("semi.csv", "title;body\na;b\nc;d\n", {}, "looks separated by ';' .*say --separator ';'"),
        ("data.csv", "3,Wall St. Bears,Short sellers\n4,b,c\n", {}, "seems to have no header.*such as text,label"),
        ("loose.csv", "text\nHello, world\nBye, moon\n", {}, "1 columns and a row of 2.*into quotes"),
        ("late.csv", "text\n" + "Hello\n" * 300 + "Bye, moon\n", {}, "rows that do not fit its header.*into quotes"),
        ("whole.json", json.dumps({"text": TEXTS}), {}, "is one object of text, not one a row: save it as JSON lines"),
        ("chats.jsonl", CHATS, {"text_column": "messages"}, r"--text_column from: messages.role .*messages.content"),
        ("ids.jsonl", '{"id": "a", "messages": [{"content": "b"}]}\n' * 2, {}, "which column.*messages.content"),
        ("type.jsonl", '{"type": "user", "message": {"content": "b"}}\n' * 2, {}, "which column.*type .*message"),
        ("squad.json", '{"version": "v2", "data": [{"title": "b"}]}', {}, "which column .*version .*data.title"),
        ("lists.jsonl", '{"text": ["a"]}\n{"text": ["b"]}\n', {}, "which column holds the text: choose --text_column"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_its_name_says_is_refused_with_what_reads_it(
    name: str, content: str | bytes, settings, message: str, streaming: bool, tmp_path
) -> None:
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with pytest.raises(SelOrthoError, match=message) as caught:
        _texts(_read(_write(tmp_path / name, data), streaming=streaming, **settings))
    assert "\n" not in str(caught.value)


CARD = "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: fr\n  data_files: fr/*.jsonl\n---\n"
ENGLISH, FRENCH = {"en/a.jsonl": LINES}, {"fr/b.jsonl": '{"text": "bonjour"}\n'}


@pytest.mark.parametrize(
    ("files", "settings", "said"),
    [
        ({"LICENSE.txt": "A\n\nB", "train.csv": CSV, ".DS_Store": b"", ".git/x.csv": "y"}, {}, "left out LICENSE.txt"),
        ({"a.csv": CSV, "b.xlsx": _zip(), "terms.txt": "x"}, {}, "read a.csv; left out b.xlsx, terms.txt"),
        ({"train.csv": CSV, "statistics.json": "{}"}, {}, "left out statistics.json"),
        ({"train.csv": "text\nno\n", "test.csv": CSV, "more.csv": CSV}, {"split": "test"}, "left out more.csv"),
        ({"a.csv": "", "b.csv": CSV}, {}, "left out a.csv"),
        ({"a.csv": CSV, "b.csv": "text\n".encode("utf-8-sig")}, {}, ""),
        ({"a.csv": CSV, "b.jsonl": LINES}, {}, SelOrthoError("files of several kinds .*a.csv; b.jsonl.*name one")),
        ({"a.csv": CSV, "b.csv": CSV.encode("utf-16")}, {}, SelOrthoError("files of several encodings")),
        ({"a.csv": "id,text\n1,a\n", "b.tsv": "id\ttext\n1\ta\n"}, {}, SelOrthoError("files of several separators")),
        ({"a.csv": "text,x\na,1\n", "b.csv": "text,y\na,1\n"}, {}, SelOrthoError("files whose columns differ")),
        ({"a.csv": ""}, {}, SelOrthoError("is empty")),
        ({"README.md": CARD, **ENGLISH, **FRENCH}, {"dataset_config": "en"}, "left out README.md, fr/b.jsonl"),
        ({"README.md": CARD, **ENGLISH, "x.csv": CSV}, {"dataset_config": "en"}, "left out README.md, x.csv"),
        ({"README.md": "---\nconfigs: [\n---\n", "x.csv": CSV}, {}, "left out README.md"),
        ({"README.md": "---\nconfigs: [a, {data_files: 3}]\n---\n", "x.csv": CSV}, {}, "left out README.md"),
        ({"README.md": CARD, **ENGLISH, **FRENCH}, {}, SelOrthoError("choose --dataset_config from en, fr")),
    ],
)
def test_of_a_folder_the_files_of_data_are_read_and_the_others_named(
    files: dict[str, str | bytes], settings, said: str | SelOrthoError, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in files.items():
        _write(tmp_path / name, content)
    if isinstance(said, SelOrthoError):
        with pytest.raises(SelOrthoError, match=str(said)):
            _read(tmp_path, **settings)
        return
    with caplog.at_level(logging.WARNING):
        assert _texts(_read(tmp_path, **settings)) == sorted(TEXTS)
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_datasets_saved_to_disk_is_read(streaming: bool, tmp_path) -> None:
    saved = Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(tmp_path / "one[1]")
    DatasetDict({"train": saved.select([0]), "held_back": saved}).save_to_disk(tmp_path / "many")
    assert _texts(_read(tmp_path / "one[1]", streaming=streaming)) == sorted(TEXTS)
    assert _texts(_read(tmp_path / "many", streaming=streaming)) == TEXTS[:1]
    assert _texts(_read(tmp_path / "many", streaming=streaming, split="held_back")) == sorted(TEXTS)
    with pytest.raises(SelOrthoError, match=r"no split \"test\": choose one of \['train', 'held_back'\]"):
        _read(tmp_path / "many", streaming=streaming, split="test")
    os.remove(tmp_path / "one[1]" / "data-00000-of-00001.arrow")
    with pytest.raises(SelOrthoError, match="is or holds no file of texts"):
        _read(tmp_path / "one[1]", streaming=streaming)
