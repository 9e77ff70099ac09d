"""The feature index of an SAE: what its features and pairs do, written once and read a record at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..checks import name_of, text_of, whole_number
from ..errors import SelOrthoError
from ..utils.hub import LOOKUP, at_one_commit, find_file, read_object
from ..utils.library_errors import one_line
from ..utils.names import located
from .index_files import RowReader, open_rows
from .index_writer import (
    CONCEPTS_FILE,
    FACTS,
    FEATURE_SUMMARY,
    FEATURE_TABLE_FILE,
    FEATURES_FILE,
    INDEX,
    MOVED_FILE,
    PAIR_TABLE_FILE,
    PAIRS_FILE,
)
from .records import (
    BINS,
    CONCEPTS,
    FEATURE_TABLE,
    FEATURES,
    MOVED,
    PAIR_TABLE,
    PAIRS,
    SCHEMA_VERSION,
    ConceptRow,
    FeatureContext,
    FeatureRecord,
    FeatureSummary,
    JointContext,
    PairRecord,
    from_row,
    of_version,
)

R = TypeVar("R")


class FeatureIndex:
    """A feature index in a folder or on the Hub; open it with [`FeatureIndex.open`].

    A feature or pair is read when it is asked for, with one request of some hundred kilobytes; the tables of small
    columns are in memory. All methods may be called from several threads.
    """

    def __init__(
        self,
        facts: Mapping[str, Any],
        features: RowReader,
        pairs: RowReader,
        tables: tuple[pa.Table, pa.Table],
        concepts: list[ConceptRow],
    ) -> None:
        self.facts = facts  # index.json
        self._features, self._pairs, self._concepts = features, pairs, concepts
        # a row for each feature in order, columns as in index_writer.FEATURE_SUMMARY and, where the training started
        # from another SAE, "moved"; for each pair sorted by (a, b), columns as in records.PAIR_TABLE
        self.feature_table, self.pair_table = tables
        keys = zip(self.pair_table["a"].to_pylist(), self.pair_table["b"].to_pylist(), strict=True)
        self._pair_rows = {pair: row for row, pair in enumerate(keys)}
        table = self.feature_table
        self._labels_lower = pc.utf8_lower(table["label"])
        self._firing: list[int] = table["feature"].filter(pc.greater(table["fires"], 0)).to_pylist()
        unclear = pc.is_in(table["label_source"], pa.array(["unclear", "none"])).to_numpy()
        self._order = np.lexsort((-table["frequency"].to_numpy(), unclear))  # as features are listed

    @classmethod
    def open(cls, name: str | os.PathLike[str], **lookup: Any) -> FeatureIndex:
        """The index of an SAE.

        Args:
            name: folder or Hub repository of the SAE, or the folder of an index itself.
            lookup: revision, subfolder, token, cache_dir, ... as for `SelOrthoSAE.from_pretrained`.

        Raises:
            SelOrthoError: there is none, it is damaged or of a later version, or the Hub gives no access to it.
        """
        name = name_of(name, "the SAE or its index")
        if unknown := lookup.keys() - set(LOOKUP):
            raise SelOrthoError(f"{min(unknown)} says nothing about where an index is: expected {', '.join(LOOKUP)}")
        name, lookup = located(name, lookup)
        if Path(name, lookup.get("subfolder") or "", FACTS).is_file():
            where = dict(lookup)
        else:
            inner = "/".join(part for part in (lookup.get("subfolder"), INDEX) if part)
            where = at_one_commit(name, {**lookup, "subfolder": inner}, FACTS)
        facts_file = find_file(name, FACTS, where)
        if facts_file is None:
            raise SelOrthoError(
                f"{name!r} has no feature index ({where['subfolder']}/{FACTS}): build it with "
                "selortho index, and publish it with selortho push --include_index"
            )
        facts = read_object(facts_file)
        _check_facts(str(facts_file), facts)
        rows = facts["rows_in_group"]
        version = facts["schema_version"]
        features = open_rows(name, FEATURES_FILE, where, of_version(FEATURES, version), rows)
        pairs = open_rows(name, PAIRS_FILE, where, PAIRS, rows)
        feature_table = _small_table(name, FEATURE_TABLE_FILE, where, of_version(FEATURE_SUMMARY, version))
        if version == 1:
            feature_table = feature_table.append_column("label_score", pa.nulls(len(feature_table), pa.float32()))
        pair_table = _small_table(name, PAIR_TABLE_FILE, where, PAIR_TABLE)
        if find_file(name, MOVED_FILE, where):
            moved = _small_table(name, MOVED_FILE, where, MOVED)
            feature_table = feature_table.append_column("moved", moved["moved"].slice(0, len(feature_table)))
        if (len(feature_table), len(pair_table)) != (len(features), len(pairs)):
            raise SelOrthoError(f"the feature index of {name!r} has files of several builds: build it again")
        concepts = _concepts(name, where, len(features)) if version > 1 else []
        return cls(facts, features, pairs, (feature_table, pair_table), concepts)

    def __len__(self) -> int:
        """Number of features, those that never fire included."""
        return len(self._features)

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    def feature(self, number: int) -> FeatureRecord:
        """All about a feature.

        Raises:
            SelOrthoError: there is no such feature, or the record is damaged.
        """
        number = self._check(number)
        row = {
            "label_score": None,
            "labels": [],
            "head_shares": [],
            **self._features.row(number),
        }  # of earlier versions
        return _checked(FeatureRecord, row, {"feature": number}, _fits)

    def pair(self, a: int, b: int) -> PairRecord:
        """All about a pair, in either order.

        Raises:
            SelOrthoError: the pair is not in the index, or its record is damaged.
        """
        a, b = self._check(a), self._check(b)
        row = self._pair_rows.get((min(a, b), max(a, b)))
        if row is None:
            raise SelOrthoError(
                f"features {a} and {b} are no pair of this index: it holds the {self.pairs} strongest of "
                f"{self.facts.get('pairs', {}).get('selected', 'the')} selected pairs"
            )
        return _checked(PairRecord, self._pairs.row(row), {"a": min(a, b), "b": max(a, b)}, _pair_fits)

    @property
    def logit_lens(self) -> str:
        """How decoder directions came to the residual stream: "direct", "through MODULES", or "left out: WHY"."""
        return str(self.facts.get("logit_lens") or "direct")

    def concepts(self) -> list[ConceptRow]:
        """The features that find what the probe sets are about, by set and rank; empty where none was measured."""
        return self._concepts

    def has_pair(self, a: int, b: int) -> bool:
        """Whether the index holds the pair, in either order."""
        a, b = self._check(a), self._check(b)
        return (min(a, b), max(a, b)) in self._pair_rows

    def pairs_of(self, feature: int) -> list[tuple[int, int]]:
        """The pairs (a, b) of the index that a feature is in."""
        feature = self._check(feature)
        return [pair for pair in self._pair_rows if feature in pair]

    def summary(self, number: int) -> FeatureSummary:
        """The small columns of a feature, without reading its record.

        Raises:
            SelOrthoError: there is no such feature.
        """
        number = self._check(number)
        (row,) = self.feature_table.slice(number, 1).select(FEATURE_TABLE.names).to_pylist()
        return FeatureSummary(**row)

    def label(self, number: int) -> str:
        """Label of a feature, "" where there is none; data of others, to be escaped where it is shown."""
        return self.feature_table["label"][self._check(number)].as_py() or ""

    def firing_features(self) -> list[int]:
        """The features that fired, in order."""
        return self._firing

    def most_frequent(self, k: int = 50) -> list[FeatureSummary]:
        """The features that fire most often, those without a good label last, at most `k`."""
        return self._summaries(self._firing, k)

    def search_labels(self, text: str, k: int = 50) -> list[FeatureSummary]:
        """Features whose label holds a text, upper or lower case, at most `k`.

        The most frequent come first, those whose label is unclear last.
        """
        if not text_of(text, "text").strip():
            return []
        found = pc.match_substring(self._labels_lower, text.strip().lower())
        return self._summaries(pc.indices_nonzero(found).to_pylist(), k)

    def search_promoted(self, token: str, k: int = 50) -> list[FeatureSummary]:
        """Features that promote a token, spaces around it and case aside: those that do it before others first."""
        wanted, k = text_of(token, "token").strip().lower(), whole_number(k, "k", 1)
        if not wanted:
            return []
        column = self.feature_table["promotes"].combine_chunks()
        hits = pc.indices_nonzero(pc.equal(pc.utf8_lower(pc.utf8_trim_whitespace(column.flatten())), wanted))
        features = pc.list_parent_indices(column).take(hits)
        ranks = pc.subtract(hits.cast("int64"), column.offsets.take(features).cast("int64"))
        first = dict(zip(reversed(features.to_pylist()), reversed(ranks.to_pylist()), strict=True))
        return [self.summary(feature) for feature in sorted(first, key=lambda f: (first[f], f))[:k]]

    def _summaries(self, features: list[int], k: int) -> list[FeatureSummary]:
        k = whole_number(k, "k", 1)
        order = self._order[np.isin(self._order, features)][:k]
        return [self.summary(feature) for feature in order.tolist()]

    def _check(self, number: int) -> int:
        return whole_number(number, "feature", end=len(self))


def _checked(kind: type[R], row: dict[str, Any], key: dict[str, int], fits: Callable[[R], bool]) -> R:
    """Make a record of a row that strangers may have written.

    Raises:
        SelOrthoError: the row is another one than `key` says, or its parts do not fit together.
    """
    try:
        record = from_row(kind, row)
        damaged = not (all(row[name] == value for name, value in key.items()) and fits(record))
    except (TypeError, KeyError):  # null where a value is due
        damaged = True
    if damaged:
        which = ", ".join(map(str, key.values()))
        raise SelOrthoError(f"record {which} of the feature index is damaged: build it again")
    return record


def _fits(record: FeatureRecord) -> bool:
    return (
        len(record.histogram) == BINS
        and math.isfinite(record.max_activation)
        and all(None not in vars(label).values() for label in record.labels)
        and all(_context_fits(context, context.activations) for context in record.contexts)
    )


def _pair_fits(record: PairRecord) -> bool:
    return len(record.history) == len(record.history_steps) and all(
        _context_fits(context, context.activations_a, context.activations_b) for context in record.contexts
    )


def _context_fits(context: FeatureContext | JointContext, *activations: list[float]) -> bool:
    parts: list[list[Any]] = [context.tokens, *activations]
    return 0 <= context.peak < len(context.tokens) and all(
        len(part) == len(context.tokens) and None not in part for part in parts
    )


def _check_facts(path: str, facts: Mapping[str, Any]) -> None:
    version = facts.get("schema_version")
    if facts.get("kind") != INDEX or not isinstance(version, int):
        raise SelOrthoError(f"{path} is not that of a feature index: build it with selortho index")
    if not 1 <= version <= SCHEMA_VERSION:
        raise SelOrthoError(
            f"{path} has schema_version {version}, this hf_selortho reads 1 to {SCHEMA_VERSION}: build the index "
            "again, or install the hf_selortho that wrote it"
        )
    for part in ("sae", "lm", "text", "features", "pairs"):
        if not isinstance(facts.get(part), dict):
            raise SelOrthoError(f"{path} lacks {part!r}: build the feature index again")
    rows = facts.get("rows_in_group")
    if type(rows) is not int or not 0 < rows <= 1 << 16:
        raise SelOrthoError(f"{path} does not say how its rows are grouped: build the feature index again")
    _check_gallery(path, facts.get("gallery", []))


def _check_gallery(path: str, gallery: Any) -> None:
    """Refuse a gallery that cannot be shown."""
    try:
        for item in gallery:
            tokens, activations = item["tokens"], item["activations"]
            fits = 0 <= item["peak"] < len(tokens) == len(activations) and 0 <= item["feature"]
            texts, numbers = [item["label"], item["source"], *tokens], [item["score"], *activations]
            typed = all(isinstance(text, str) for text in texts) and all(type(n) in (int, float) for n in numbers)
            if not (fits and typed and type(item["peak"]) is type(item["feature"]) is int):
                raise TypeError
    except (TypeError, KeyError) as error:
        raise SelOrthoError(f"{path} has a damaged gallery: build the feature index again") from error


def _concepts(name: str, where: Mapping[str, Any], features: int) -> list[ConceptRow]:
    if find_file(name, CONCEPTS_FILE, where) is None:
        return []
    rows = _small_table(name, CONCEPTS_FILE, where, CONCEPTS).to_pylist()
    if any(None in row.values() or not 0 <= row["feature"] < features for row in rows):
        raise SelOrthoError(f"{CONCEPTS_FILE} of the feature index of {name!r} is damaged: build it again")
    return [ConceptRow(**row) for row in sorted(rows, key=lambda row: (row["concept"], row["rank"]))]


def _small_table(name: str, file: str, where: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    path = find_file(name, file, where)
    if path is None:
        raise SelOrthoError(f"the feature index of {name!r} lacks {file}: build it again")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SelOrthoError(f"{path} is damaged ({one_line(error)}): build the feature index again") from error
    if not table.schema.equals(schema):
        raise SelOrthoError(f"{path} has other columns than a feature index of this version: build it again")
    return table
