"""Texts and their labels out of a dataset: what SAEs are probed with."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from ..data.chats import Text
from ..data.texts import READ_ERRORS, Documents, TextSource, column_kinds, open_documents, read_error
from ..errors import SelOrthoError


def labelled_documents(
    source: TextSource, label_column: str, limit: int, seed: int = 0
) -> tuple[list[Text], list[Any]]:
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
    if source.streaming:
        raise SelOrthoError(
            f'"{source.dataset}" is streamed, and labelled texts are drawn from all rows: use streaming=False'
        )
    documents = open_documents(source)
    rows = documents.dataset
    assert isinstance(rows, Dataset)
    _check_label_column(documents, rows, label_column)
    held_out = np.array(sorted(number for number, _ in documents.held_out()), dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(held_out).tolist()
    feature = rows.features[label_column]
    drawn: list[tuple[int, Any, int]] = []  # turn, label, row
    turns: Counter[Any] = Counter()
    try:
        for row, label in zip(shuffled, rows.select_columns([label_column])[shuffled][label_column], strict=True):
            if label is not None and not (isinstance(feature, ClassLabel) and label < 0):
                label = feature.int2str(label) if isinstance(feature, ClassLabel) else label
                drawn.append((turns[label], label, row))
                turns[label] += 1
        drawn = sorted(drawn)[:limit]
        texts = documents.texts([row for _, _, row in drawn])
    except READ_ERRORS as error:
        raise read_error(source.dataset, error) from error
    if not drawn:
        raise SelOrthoError(
            f'none of the {len(held_out)} held-out documents of "{source.dataset}" (held_out_fraction '
            f'{source.held_out_fraction}) has a label in "{label_column}": expected at least one; give a larger '
            "fraction, more texts or another column"
        )
    return texts, [label for _, label, _ in drawn]


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
