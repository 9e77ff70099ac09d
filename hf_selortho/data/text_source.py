"""Which texts to read, in a module that command lines import before the libraries that read them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import SelOrthoError
from ..utils.names import located
from .python_docs import PYTHON_DOCS

SAE_PROBES = "sae-probes"
EMBEDDED_TEXTS = (PYTHON_DOCS, SAE_PROBES)  # not on the Hub


def _setting(default: Any, description: str) -> Any:
    return field(default=default, metadata={"help": description})


@dataclass
class TextSource:
    """Which texts to read; also the arguments of this name of a command line."""

    dataset: str = _setting(
        "fancyzhx/ag_news",
        "Hub id, local csv/json/jsonl/parquet/txt file or folder, or what is embedded: sae-probes or python-docs.",
    )
    dataset_config: str | None = _setting(None, "Configuration of the dataset, where it has several.")
    dataset_revision: str | None = _setting(None, "Branch, tag or commit of the dataset; its commit is recorded.")
    split: str = _setting("train", "Split of the dataset; a part of its documents is held out for the evaluation.")
    text_column: str | None = _setting(
        None, "Column that holds the text, a.b within a: messages.content; default: text, or the only text column."
    )
    chat_column: str | None = _setting(
        None, "Column of chats, lists of {role, content}, to read by the tokenizer's chat template, not --text_column."
    )
    chat_roles: list[str] | None = _setting(
        None, "Roles whose messages are trained on, such as assistant; default: all, and what the template adds."
    )
    separator: str | None = _setting(None, r"Separator of csv files, such as ; or \t; default: what the file shows.")
    encoding: str | None = _setting(None, "Encoding of csv, json and txt files, such as cp1252; default: utf-8.")
    streaming: bool = _setting(False, "Read the dataset as a stream, for what does not fit on the disk.")
    held_out_fraction: float = _setting(0.1, "Share of the documents that training never sees.")

    def __post_init__(self) -> None:
        self.dataset, lookup = located(self.dataset, {"revision": self.dataset_revision}, "dataset")
        self.dataset_revision = lookup["revision"]
        if not 0 <= self.held_out_fraction <= 1:
            raise SelOrthoError(f"held_out_fraction is {self.held_out_fraction}: expected a number from 0 to 1")
        self.separator = {r"\t": "\t", "tab": "\t"}.get(self.separator or "", self.separator)
        if self.separator is not None and len(self.separator) != 1:
            raise SelOrthoError(f"--separator {self.separator!r}: expected one character, such as ; or \\t")
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError as error:
            raise SelOrthoError(
                f"--encoding {self.encoding!r}: expected an encoding of text, such as utf-8, utf-16 or cp1252"
            ) from error
        if self.streaming and re.search(r"[\[+]", self.split):
            raise SelOrthoError(
                f'--split "{self.split}": a stream cannot be cut or joined; leave --streaming out, or name one split'
            )
