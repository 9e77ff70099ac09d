"""Explain the features of an index by a language model, one by one: an interrupted command goes on where it was."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import SelOrthoError
from ..language_models.contexts import Context
from ..language_models.token_text import TokenTexts
from ..utils.files import cannot_write
from .build import Sources
from .explain import (
    EXCERPT,
    PROMPT_VERSION,
    ROOM,
    Question,
    UnreadableAnswerError,
    excerpt,
    explanation_label,
    make_question,
    plain_line,
    read_detection,
    read_explanation,
)
from .explainer_client import BudgetSpentError, ChatClient, EndpointError, tokens_of
from .gallery import DENSE, Gallery
from .index import FeatureIndex
from .index_writer import IndexWriter
from .labels import choose_label
from .records import LABEL_SOURCES, FeatureRecord, Label
from .text_pass import TextPass

logger = logging.getLogger(__name__)

MOST_FAILURES, MOST_UNREADABLE = 3, 10  # in a row, after which nothing more is asked
_SPACING, _PER_DOCUMENT = 128, 4  # of these: tokens to one excerpt, contexts of one document
_LEAST_TOKENS = 8  # of an excerpt


@dataclass(frozen=True)
class SilentExcerpts:
    """Excerpts drawn from the text, and which features fire in each."""

    texts: list[str]
    firing: Tensor  # (texts, d_sae) bool

    def of(self, feature: int) -> list[str]:
        """Return the excerpts in which a feature does not fire."""
        return [self.texts[number] for number in (~self.firing[:, feature]).nonzero()[:, 0].tolist()]

    @classmethod
    @torch.inference_mode()
    def read(cls, sources: Sources, tokens: int) -> SilentExcerpts:
        """Draw excerpts from so many tokens at the beginning of the text, few of each document."""
        draw, texts = random.Random(0), TokenTexts(sources.capture.lm.tokenizer)
        excerpts, firing = list[str](), list[Tensor]()
        for batch in TextPass(sources.sae, sources.capture).read(_few_of_each(sources.contexts()), tokens):
            for row, length in enumerate(batch.lengths.tolist()):
                for begin in range(0, length, _SPACING):
                    room = min(length - begin, _SPACING)
                    start = begin + draw.randrange(max(1, room - EXCERPT + 1))
                    end = min(start + EXCERPT, length)
                    if end - start >= _LEAST_TOKENS:
                        excerpts.append(excerpt(texts.of(batch.input_ids[row, start:end].tolist())))
                        firing.append((batch.h[:, row, start:end] > 0).any(1).cpu())
        return cls(
            excerpts, torch.stack(firing) if firing else torch.zeros(0, len(sources.sae.b_enc), dtype=torch.bool)
        )


@dataclass(frozen=True)
class AnswerFile:
    """Explanations as they come, a line of JSON each, in a file beside the index; nothing of it is ever published.

    Args:
        path: the file.
        key: names SAE, text, language model and prompts: lines of others are passed over.
    """

    path: Path
    key: str

    @classmethod
    def beside(cls, folder: Path, facts: Mapping[str, Any], model: str) -> AnswerFile:
        """Return the file of an index, for the answers of one language model."""
        settings = facts.get("settings", {})
        read = [settings.get(name) for name in ("inputs_sha256", "tokens", "seed", "top_contexts")]
        parts = [facts["sae"].get("weights_sha256"), facts["text"].get("fingerprint"), read, model, PROMPT_VERSION]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return cls(folder.with_name(f"{folder.name}.explanations.jsonl"), key)

    def read(self) -> dict[int, Label]:
        """Return the explanations by feature; lines that are damaged, as a killed command leaves the last, are skipped.

        Raises:
            SelOrthoError: the file cannot be read.
        """
        try:
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        except OSError as error:
            raise SelOrthoError(f"{self.path} cannot be read ({error.strerror}): remove it to ask anew") from error
        labels: dict[int, Label] = {}
        for line in lines:
            try:
                row = json.loads(line)
                feature, score = row["feature"], float(row["score"])
                label = Label("model", plain_line(row["label"]), score, str(row["detail"]))
                if row["key"] == self.key and type(feature) is int and label.text and 0 <= score <= 1:
                    labels[feature] = label
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return labels

    def add(self, feature: int, label: Label) -> None:
        """Append an explanation, on a line of its own even behind one that was cut off.

        Raises:
            SelOrthoError: there is no room, or the folder cannot be written.
        """
        row = {"key": self.key, "feature": feature, "label": label.text, "score": label.score, "detail": label.detail}
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            with self.path.open("a+b") as file:
                end = file.seek(0, 2)
                file.seek(max(0, end - 1))
                file.write(line if end == 0 or file.read(1) == b"\n" else b"\n" + line)
        except OSError as error:
            raise cannot_write(self.path, error) from error


def explain_index(
    folder: Path,
    sources: Sources,
    client: ChatClient,
    features: int = 100,
    silent_tokens: int = 1 << 15,
    progress: bool = True,
) -> str:
    """Add explanations by a language model to the labels of an index, and say in a line what has come of it.

    Contexts of the text are sent to the client's endpoint. Answers are kept as they come ([`AnswerFile`]); at the end
    the index is written anew with them, whole or not at all. Features are asked about in the order of
    [`features_to_explain`] until `features` of them have an explanation, earlier commands' included. Excerpts in which
    they do not fire are drawn from the first `silent_tokens` tokens of the text.

    Raises:
        SelOrthoError: the endpoint takes no request or fails repeatedly (what it has answered is in the index then),
            the index is damaged, or there is no room.
    """
    index = FeatureIndex.open(folder)
    answers = AnswerFile.beside(folder, index.facts, client.model)
    labels = {feature: label for feature, label in answers.read().items() if 0 <= feature < len(index)}
    wanted = features_to_explain(index, labels)
    failed, stopped = 0, None
    if len(labels) < features and wanted:
        silent = SilentExcerpts.read(sources, silent_tokens)
        possible = (make_question(index.feature(number), silent.of(number)) for number in wanted)
        questions = list(itertools.islice(filter(None, possible), features - len(labels)))
        logger.info("%s", _estimate(questions, client, answers.path))
        with tqdm(questions, "explaining", unit="feature", disable=not progress) as bar:
            failed, stopped = _ask_all(bar, client, answers, labels)
    if not all(_holds(index.feature(feature), label) for feature, label in labels.items()):
        _write(folder, index, labels, client.model)
    if isinstance(stopped, SelOrthoError):
        raise stopped
    return _in_words(FeatureIndex.open(folder), labels, client, failed, stopped)


def features_to_explain(index: FeatureIndex, explained: Mapping[int, Label]) -> list[int]:
    """Return the features to ask about, those whose label is unclear before others, the most frequent first.

    Left out are those that never fire, fire on more than a tenth of the tokens, are labelled by hand or are explained.
    """
    rows = index.feature_table.select(["feature", "label_source", "frequency", "fires"]).to_pylist()
    rows = [
        row
        for row in rows
        if row["fires"] and row["frequency"] <= DENSE and row["label_source"] != "file"
        if row["feature"] not in explained
    ]
    rows.sort(key=lambda row: (row["label_source"] != "unclear", -row["frequency"]))
    return [row["feature"] for row in rows]


def _few_of_each(contexts: Iterator[Context]) -> Iterator[Context]:
    for _, of_document in itertools.groupby(contexts, key=lambda context: context.document_id):
        yield from itertools.islice(of_document, _PER_DOCUMENT)


def _estimate(questions: Sequence[Question], client: ChatClient, kept: Path) -> str:
    """Say what the questions will cost."""
    prompts = [prompt for q in questions for prompt in (q.explanation_prompt(), q.detection_prompt("x" * 40))]
    return (
        f"explaining {len(questions):,} features by {client.model} at {client.url}: {len(prompts):,} requests, about "
        f"{sum(map(tokens_of, prompts)):,} tokens in and at most {len(prompts) * ROOM:,} out, more if the model thinks "
        f"aloud; --explain_budget {client.budget:,}, {client.spent:,} spent; answers are kept in {kept}"
    )


def _ask_all(
    questions: Any, client: ChatClient, answers: AnswerFile, labels: dict[int, Label]
) -> tuple[int, SelOrthoError | BudgetSpentError | None]:
    """Ask one question after another and keep the answers in `labels`, too.

    Returns:
        How many gave no readable answer, and what has ended the questions before the last, if anything has.
    """
    failed = in_a_row = 0
    for question in questions:
        try:
            label = _explained(client, question)
        except (SelOrthoError, BudgetSpentError) as error:
            return failed, error
        except (EndpointError, UnreadableAnswerError) as error:
            failed, in_a_row = failed + 1, in_a_row + 1
            if in_a_row >= (MOST_FAILURES if isinstance(error, EndpointError) else MOST_UNREADABLE):
                return failed, SelOrthoError(
                    f"--explain_url {client.url}: {in_a_row} features in a row without an explanation, the last for "
                    f"{error}; {len(labels)} are kept: run the same command again to go on, or try another "
                    "--explain_model"
                )
            continue
        in_a_row = 0
        labels[question.feature] = label
        answers.add(question.feature, label)
    return failed, None


def _explained(client: ChatClient, question: Question) -> Label:
    explanation = read_explanation(client.ask(question.explanation_prompt()))
    answer = client.ask(question.detection_prompt(explanation))
    return explanation_label(explanation, read_detection(answer, len(question.firing)), question.firing)


def _write(folder: Path, index: FeatureIndex, labels: Mapping[int, Label], model: str) -> None:
    """Write an index anew with explanations among its labels."""
    gallery, named = Gallery(), Counter[str]()
    with IndexWriter(folder) as writer:
        for record in map(index.feature, range(len(index))):
            record = _with_label(record, labels.get(record.feature))
            writer.add_features([record])
            gallery.add(record)
            named[record.label_source] += 1
        pairs = index.pair_table.select(["a", "b"]).to_pylist()
        writer.add_pairs(index.pair(**pair) for pair in pairs)
        writer.concepts = index.concepts()
        if "moved" in index.feature_table.column_names:
            writer.moved = index.feature_table["moved"].to_pylist()
        counts = {source: named[source] for source in LABEL_SOURCES if named[source]}
        writer.facts = {
            **{key: value for key, value in index.facts.items() if key not in ("schema_version", "row_groups")},
            "labels": {**index.facts.get("labels", {}), "counts": counts},
            "gallery": gallery.items(),
            "explanations": {"model": model, "features": len(labels), "prompt": PROMPT_VERSION},
        }


def _holds(record: FeatureRecord, label: Label) -> bool:
    """Tell whether a label is among those of a feature, which have their scores in single precision."""
    return replace(label, score=0.0) in [replace(one, score=0.0) for one in record.labels]


def _with_label(record: FeatureRecord, label: Label | None) -> FeatureRecord:
    """Put an explanation in place of an earlier one; the best label is shown, unless one was given by hand."""
    labels = [*(one for one in record.labels if one.source != "model"), *([label] if label else [])]
    labels.sort(key=lambda one: -one.score)
    if labels == record.labels:
        return record
    if record.label_source == "file":
        return replace(record, labels=labels)
    text, source, score = choose_label(labels, record.label)
    return replace(record, labels=labels, label=text, label_source=source, label_score=score)


def _in_words(
    index: FeatureIndex, labels: Mapping[int, Label], client: ChatClient, failed: int, stopped: object
) -> str:
    shown = sum(index.summary(feature).label_source == "model" for feature in labels)
    return (
        f"{len(labels):,} features explained by {client.model}, {shown:,} of them shown with it as the best label; "
        f"{client.spent:,} tokens"
        + (f"; {failed:,} gave no readable answer: the same command asks again" if failed else "")
        + (
            f"; --explain_budget {client.budget:,} ends it: a larger one, or the command again, goes on"
            if stopped
            else ""
        )
    )
