"""Texts and labels out of files of several kinds."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation.labelled_text import labelled_documents


def _jsonl(path: Path, rows: list[dict[str, object]]) -> TextSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TextSource(dataset=str(path), held_out_fraction=1.0)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_labels_are_those_of_their_texts_and_the_texts_are_held_out(kind, sample_text_files, sample_documents):
    source = TextSource(dataset=str(getattr(sample_text_files, kind)), held_out_fraction=0.3)
    texts, labels = labelled_documents(source, "label", limit=1000)
    assert labels == [sample_documents.index(text) % 4 for text in texts]
    assert sorted(texts) == sorted(text for _, text in open_documents(source).held_out())
    assert 80 < len(texts) < 160


def test_a_draw_is_balanced_and_depends_on_the_seed_alone(sample_text_files):
    source = TextSource(dataset=str(sample_text_files.csv), held_out_fraction=0.5)
    texts, labels = labelled_documents(source, "label", limit=42)
    assert len(set(texts)) == len(texts) == 42
    assert sorted(Counter(labels).values()) == [10, 10, 11, 11]
    assert labelled_documents(source, "label", limit=42, seed=0) == (texts, labels)
    other, _ = labelled_documents(source, "label", limit=42, seed=1)
    assert 0 < len(set(other) & set(texts)) < 42


def test_a_rare_label_gives_all_that_it_has(tmp_path, sample_documents):
    rows = [{"text": text, "kind": "rare" if n < 3 else "often"} for n, text in enumerate(sample_documents[:40])]
    _, labels = labelled_documents(_jsonl(tmp_path / "a.jsonl", rows), "kind", limit=20)
    assert Counter(labels) == {"rare": 3, "often": 17}


def test_class_labels_have_names(tmp_path, sample_documents):
    features = Features({"text": Value("string"), "topic": ClassLabel(names=["World", "Sports"])})
    topics = [(-1, 0, 1, None)[number % 4] for number in range(40)]
    data = Dataset.from_dict({"text": sample_documents[:40], "topic": topics}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    source = TextSource(dataset=str(tmp_path / "a.parquet"), held_out_fraction=1.0)
    texts, labels = labelled_documents(source, "topic", limit=100)
    assert Counter(labels) == {"World": 10, "Sports": 10}
    assert labels == ["_ World Sports _".split()[sample_documents.index(text) % 4] for text in texts]


def test_booleans_and_numbers_below_zero_are_labels_and_missing_ones_are_not(tmp_path):
    rows = [{"text": f"text {n}", "good": n % 2 == 0, "score": -(n % 3)} for n in range(12)]
    rows += [{"text": "none", "good": None, "score": None}, {"text": " ", "good": True, "score": 1}]
    source = _jsonl(tmp_path / "a.jsonl", rows)
    assert Counter(labelled_documents(source, "good", limit=99)[1]) == {True: 6, False: 6}
    assert Counter(labelled_documents(source, "score", limit=99)[1]) == {0: 4, -1: 4, -2: 4}


@pytest.mark.parametrize(
    ("settings", "column", "message"),
    [
        ({}, "label", r'no column "label" of labels: choose one of: kind \(\w*string\), share'),
        ({}, "text", 'no column "text" of labels'),
        ({}, "share", 'column "share" .* holds float64, no labels: expected integers'),
        ({"held_out_fraction": 0.0}, "kind", "none of the 0 held-out documents .*held_out_fraction 0.0"),
        ({"streaming": True}, "kind", "is streamed.*streaming=False"),
        ({"dataset": "python-docs"}, "label", "none beside the text"),
    ],
)
def test_what_has_no_labels_is_refused(settings, column, message, tmp_path):
    rows = [{"text": f"text {n}", "kind": None if n else "a", "share": 0.5} for n in range(8)]
    source = _jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(SelOrthoError, match=message):
        labelled_documents(dataclasses.replace(source, **settings), column, limit=9)
