from __future__ import annotations

import gzip
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hf_selortho.data import python_docs as docs
from hf_selortho.data.texts import Documents, TextSource, open_documents
from hf_selortho.errors import SelOrthoError


def _everything(documents: Documents) -> list[str]:
    return [text for side in (documents.train(0, 0), documents.held_out()) for _, text in side]


def _jsonl(path: Path, texts: list[object]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_every_format_gives_every_document_once(
    kind: str, streaming: bool, sample_text_files, sample_documents
) -> None:
    source = TextSource(dataset=str(getattr(sample_text_files, kind)), streaming=streaming)
    documents = open_documents(source)
    assert sorted(_everything(documents)) == sorted(sample_documents)
    assert (documents.revision, documents.split) == (None, "train")


def test_other_shapes_of_local_text(tmp_path, sample_documents) -> None:
    few = sample_documents[:20]
    (tmp_path / "texts.tsv").write_text("label\tbody\n" + "".join(f"1\t{text}\n" for text in few))
    (tmp_path / "prose.txt").write_text("\n\n".join(text.replace(". ", ".\n") for text in few) + "\n")
    with gzip.open(tmp_path / "texts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in few)
    folder = tmp_path / "folder"
    folder.mkdir()
    _jsonl(folder / "a.jsonl", few[:7])
    _jsonl(folder / "b.jsonl", few[7:])
    for name in ("texts.tsv", "prose.txt", "texts.jsonl.gz", "folder"):
        texts = _everything(open_documents(TextSource(dataset=str(tmp_path / name))))
        assert sorted(" ".join(text.split()) for text in texts) == sorted(few), name


def test_held_out_texts_are_the_same_in_any_order_and_any_file(tmp_path, sample_documents) -> None:
    """And a text that occurs often never lands on both sides."""
    shuffled = random.Random(1).sample(sample_documents, len(sample_documents))
    spaced = [text.replace(" ", "  ") for text in shuffled]
    held_out = []
    for number, texts in enumerate((sample_documents, spaced, [*sample_documents, *shuffled])):
        for streaming in (False, True):
            path = str(_jsonl(tmp_path / f"{number}.jsonl", [*texts]))
            documents = open_documents(TextSource(dataset=path, streaming=streaming))
            held_out.append({" ".join(text.split()) for _, text in documents.held_out()})
            assert not held_out[-1] & {" ".join(text.split()) for _, text in documents.train(0, 0)}
    assert all(texts == held_out[0] for texts in held_out)
    assert 20 <= len(held_out[0]) <= 60  # one in ten of 400


@pytest.mark.parametrize("streaming", [False, True])
def test_order_depends_on_seed_and_epoch_alone_and_ranks_share_it(
    streaming: bool, sample_text_files, sample_documents
) -> None:
    documents = open_documents(TextSource(dataset=str(sample_text_files.jsonl), streaming=streaming))
    orders = {key: list(documents.train(*key)) for key in ((0, 0), (1, 0), (0, 1))}
    assert orders[0, 0] == list(documents.train(0, 0))
    assert orders[0, 0] != orders[1, 0] != orders[0, 1] != orders[0, 0]
    assert all(sorted(order) == sorted(orders[0, 0]) for order in orders.values())
    assert streaming or all(sample_documents[number] == text for number, text in orders[0, 0])  # ids are rows

    shares = [list(documents.train(0, 0, rank, 3)) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(orders[0, 0])
    assert min(map(len, shares)) > 100


def test_held_out_texts_are_not_the_first_ones(tmp_path) -> None:
    path = _jsonl(tmp_path / "sorted.jsonl", [f"text number {number}" for number in range(3000)])
    numbers = [number for number, _ in open_documents(TextSource(dataset=str(path))).held_out()]
    assert len(set(numbers)) == len(numbers) > 200
    assert 1000 < sum(numbers[:100]) / 100 < 2000


def test_text_column_is_found_or_the_columns_are_listed(tmp_path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("title,body,stars\nOne,First words,5\nTwo,Second words,4\n")
    with pytest.raises(
        SelOrthoError, match=r"which column holds the text.* title \(\w*string\), body \(\w*string\), stars \(int64\)"
    ):
        open_documents(TextSource(dataset=str(path)))
    with pytest.raises(SelOrthoError, match='no column of text "content": choose --text_column from: title'):
        open_documents(TextSource(dataset=str(path), text_column="content"))
    with pytest.raises(SelOrthoError, match='no column of text "stars"'):
        open_documents(TextSource(dataset=str(path), text_column="stars"))
    documents = open_documents(TextSource(dataset=str(path), text_column="body"))
    assert sorted(_everything(documents)) == ["First words", "Second words"]

    path.write_text("body,stars\nFirst words,5\nSecond words,4\n")
    assert len(_everything(open_documents(TextSource(dataset=str(path))))) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", "is empty"),
        ("header.csv", "text,label\n", "is empty"),
        ("empty.txt", "", "is empty"),
        ("blank.jsonl", '{"text": ""}\n{"text": "  "}\n{"text": null}\n', "holds no text"),
        ("broken.json", '{"text": "a', "is not JSON as expected"),
        ("first.jsonl", 'null\n{"text": "a"}\n', "has a row that is null"),
        ("array.json", '[null, {"text": "a"}]', "has a row that is null"),
        ("nan.json", '[NaN, {"text": "a"}]', "has a row that is null"),
        ("broken.parquet", "PAR1 not at all", "cannot read the dataset"),
        ("mixed.jsonl", '{"text": "a"}\n{"text": 3}\n', "has no column of text"),
        ("picture.png", "PNG", "is or holds no file of texts: expected .csv"),
    ],
)
def test_unusable_file_is_one_line(name: str, content: str, message: str, streaming: bool, tmp_path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SelOrthoError, match=message) as caught:
        open_documents(TextSource(dataset=str(tmp_path / name), streaming=streaming))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(("suffix", "opened"), [("gz", gzip.open), ("xz", lzma.open)])
def test_compressed_files_are_looked_into(suffix, opened, tmp_path) -> None:
    path = tmp_path / f"rows.jsonl.{suffix}"
    with opened(path, "wb") as file:
        file.write(b'{"text": "First words"}\n{"text": "null"}\n')
    assert sorted(_everything(open_documents(TextSource(dataset=str(path))))) == ["First words", "null"]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SelOrthoError, match="is cut off or not compressed"):
        open_documents(TextSource(dataset=str(path)))
    with opened(path, "wb") as file:
        file.write(b'null\n{"text": "First words"}\n')
    with pytest.raises(SelOrthoError, match="has a row that is null"):
        open_documents(TextSource(dataset=str(path)))


def test_bytes_that_are_no_text_are_named_when_they_are_read(tmp_path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 20] * 500}), tmp_path / "a.parquet", compression="none")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"a" * 20, b"a" * 19 + b"\xff"))
    with pytest.raises(SelOrthoError, match=r"cannot read the dataset .*a.parquet.*: 'utf-8' codec can't decode"):
        _everything(open_documents(TextSource(dataset=str(tmp_path / "a.parquet"))))


def test_what_does_not_exist_is_named(tmp_path, sample_text_files) -> None:
    local = str(sample_text_files.csv)
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ({"dataset": str(tmp_path / "no.csv")}, "neither on the Hub nor a local path"),
        ({"dataset": "texts/no.jsonl"}, "no such file or folder"),
        ({"dataset": str(tmp_path / "empty")}, "is or holds no file of texts"),
        ({"dataset": local, "split": "test"}, r"no split \"test\": choose one of \['train'\]"),
        ({"dataset": local, "split": "test", "streaming": True}, r"no split \"test\": choose one of \['train'\]"),
        ({"dataset": local, "dataset_revision": "v1"}, "is local and has no revision"),
        ({"dataset": local, "held_out_fraction": 1.1}, "held_out_fraction is 1.1"),
        ({"dataset": "python-docs", "split": "test"}, "no split"),
        ({"dataset": "python-docs", "text_column": "body"}, "no column"),
    ]:
        with pytest.raises(SelOrthoError, match=message):
            open_documents(TextSource(**arguments))


def test_python_docs_are_much_english_prose() -> None:
    documents = open_documents(TextSource(dataset="python-docs"))
    texts = docs.python_docs()
    assert sorted(_everything(documents)) == sorted(texts)
    assert sum(map(len, texts)) > 2_000_000  # about four characters a token
    assert len(texts) == len(set(texts)) > 3000
    assert sum(len(text) > 2000 for text in texts) > 200
    assert max(map(len, texts)) < 30_000
    assert any("The :term:" in text or "An expression" in text for text in texts)  # help topics
    assert any("Return the absolute value of the argument." in text for text in texts)  # built-in, C
    paragraphs = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    assert len(paragraphs) - len(set(paragraphs)) < 0.001 * len(paragraphs)
    assert documents.revision is not None and documents.revision.startswith(sys.implementation.name)


def test_python_docs_import_no_module_of_the_library_and_agree_between_processes() -> None:
    code = """
import sys, sysconfig
from hf_selortho.data import python_docs as docs
sysconfig.get_paths()  # reads a module of its own
before = set(sys.modules)
docs.python_docs()
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(docs.python_docs_revision(), *(new - {"pydoc_data", "encodings"} - set(sys.builtin_module_names)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [docs.python_docs_revision()]


def test_python_docs_do_without_what_an_installation_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    whole = docs.python_docs()
    (tmp_path / "good.py").write_text('"""This is the documentation of a module that is in good order."""\n')
    (tmp_path / "python2.py").write_text('"""This is the documentation of an old one."""\nprint "no"\n')
    (tmp_path / "latin.py").write_bytes(b'"""This is the documentation of one in caf\xe9."""\n')
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # as if not installed
    monkeypatch.setattr(docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    texts = docs.python_docs.__wrapped__()
    assert "This is the documentation of a module that is in good order." in texts
    assert not any("old one" in text or "caf" in text for text in texts)
    assert 100 < len(texts) < len(whole)

    monkeypatch.setattr(docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nowhere")})
    assert docs.python_docs.__wrapped__()
