"""Names of features, from tokens and from a file."""

from __future__ import annotations

import json

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.features.labels import label_of_tokens, read_labels


@pytest.mark.parametrize(
    ("tokens", "activations", "label"),
    [
        ([" import", "import", " from", " as", "x"], [1, 2, 2.5, 1, 0.5], "import, from, as"),
        ([" The", "the"], [1, 2], "the, The"),
        (["\n", "  ", "\t"], [3, 2, 1], "line break, indentation, tab"),
        (["\u202e", "a"], [2, 1], "punctuation ‹202E›, a"),
        (["x" * 60], [1], "x" * 39 + "…"),
        (["x" * 30, "y" * 30, "z"], [3, 2, 1], "x" * 30),
        ([], [], ""),
    ],
)
def test_label_of_tokens(tokens, activations, label) -> None:
    assert label_of_tokens(tokens, activations) == label
    assert len(label) <= 40


def test_labels_of_a_file(tmp_path) -> None:
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"0": " two\nlines\u0007 ", "7": "<b>bold</b>", "3": "\u202ereversed"}))
    assert read_labels(file, 8) == {0: "two lines", 7: "<b>bold</b>", 3: "reversed"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds list: expected an object"),
        ("{", "cannot be read"),
        ('{"8": "x"}', "'8' is no feature of this SAE: expected 0 to 7"),
        ('{"²": "x"}', "is no feature"),
        ('{"1": 3}', "the label of feature 1 is 3: expected a text"),
        ('{"1": "' + "x" * 201 + '"}', "has 201 characters: expected at most 200"),
    ],
)
def test_bad_labels(tmp_path, content, message) -> None:
    file = tmp_path / "labels.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SelOrthoError, match=message) as raised:
        read_labels(file, 8)
    assert "\n" not in str(raised.value) and "--labels" in str(raised.value)
