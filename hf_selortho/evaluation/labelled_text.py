"""Texts and their labels out of a dataset: what SAEs are probed with."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from ..data.python_docs import PYTHON_DOCS
from ..data.texts import READ_ERRORS, Documents, TextSource, column_kinds, open_documents, read_error
from ..errors import SelOrthoError


def labelled_documents(source: TextSource, label_column: str, limit: int, seed: int = 0) -> tuple[list[str], list[Any]]:
    """Texts and labels of held-out documents, as evenly many of each label as there are.

    Args:
        source: the texts. What is drawn is never trained on with the same `held_out_fraction`.
        label_column: a column of integers, strings, booleans or class labels. Documents without a label (a missing
            value, or -1 for a class label) are left out.
        limit: how many to draw at most. One of each label is drawn in turn until there are so many or none is left.
        seed: of the draw.

    Returns:
        Texts and, for each, its label: the name of a class label, else the value of the column.

    Raises:
        SelOrthoError: the errors of `open_documents`; no such column, or one of another kind; a stream; no held-out
            document with a label.
    """
    if limit < 1:
        raise SelOrthoError(f"limit is {limit}: expected at least 1 labelled text to draw")
    if source.dataset == PYTHON_DOCS:
        raise SelOrthoError(f'"{PYTHON_DOCS}" has no labels: choose a dataset that has some, such as fancyzhx/ag_news')
    if source.streaming:
        raise SelOrthoError(
            f'"{source.dataset}" is streamed, and labelled texts are drawn from all rows: use streaming=False'
        )
    documents = open_documents(source)
    rows = documents.dataset
    assert isinstance(rows, Dataset)
    _check_label_column(documents, rows, label_column)
    held_out = [number for number, _ in documents.held_out()]
    try:
        by_label = _by_label(rows, label_column, held_out, seed)
        if not by_label:
            raise SelOrthoError(
                f'none of the {len(held_out)} held-out documents of "{source.dataset}" (held_out_fraction '
                f'{source.held_out_fraction}) has a label in "{label_column}": expected at least one; give a larger '
                "fraction, more texts or another column"
            )
        turns = itertools.zip_longest(*([(row, label) for row in by_label[label]] for label in sorted(by_label)))
        drawn = list(itertools.islice((pair for turn in turns for pair in turn if pair is not None), limit))
        texts = list(rows.select_columns([documents.column])[[row for row, _ in drawn]][documents.column])
    except READ_ERRORS as error:
        raise read_error(source.dataset, error) from error
    return texts, [label for _, label in drawn]


def _check_label_column(documents: Documents, rows: Dataset, label_column: str) -> None:
    others = {column: kind for column, kind in column_kinds(rows).items() if column != documents.column}
    listed = ", ".join(f"{column} ({kind})" for column, kind in others.items()) or "none beside the text"
    if label_column not in others:
        raise SelOrthoError(f'"{documents.name}" has no column "{label_column}" of labels: choose one of: {listed}')
    if not re.fullmatch(r"u?int\d+|bool|(large_)?string", others[label_column]):
        raise SelOrthoError(
            f'column "{label_column}" of "{documents.name}" holds {others[label_column]}, no labels: expected '
            f"integers, strings, booleans or class labels; choose one of: {listed}"
        )


def _by_label(rows: Dataset, column: str, numbers: list[int], seed: int) -> dict[Any, list[int]]:
    """Those of the rows that have a label, by it, in an order drawn from the seed."""
    shuffled = np.random.default_rng(seed).permutation(np.array(sorted(numbers), dtype=np.int64)).tolist()
    feature = rows.features[column]
    by_label: dict[Any, list[int]] = {}
    for number, value in zip(shuffled, rows.select_columns([column])[shuffled][column], strict=True):
        if value is None or (isinstance(feature, ClassLabel) and value < 0):
            continue
        label = feature.int2str(value) if isinstance(feature, ClassLabel) else value
        by_label.setdefault(label, []).append(number)
    return by_label
