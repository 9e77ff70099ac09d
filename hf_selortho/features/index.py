"""The feature index of an SAE: what its features and pairs do, written once and read a record at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import SelOrthoError
from ..utils.hub import LOOKUP, at_one_commit, find_file, one_line, read_object
from .index_files import HubFile, LocalFile, RangedParquet
from .index_writer import (
    FACTS,
    FEATURE_SUMMARY,
    FEATURE_TABLE_FILE,
    FEATURES_FILE,
    INDEX,
    PAIR_TABLE_FILE,
    PAIRS_FILE,
)
from .records import (
    BINS,
    FEATURE_TABLE,
    FEATURES,
    PAIR_TABLE,
    PAIRS,
    SCHEMA_VERSION,
    FeatureRecord,
    PairRecord,
    feature_record,
    pair_record,
)


class FeatureSummary(NamedTuple):
    """The small columns of a feature."""

    feature: int
    label: str
    label_source: str
    fires: int
    frequency: float
    max_activation: float
    mean_activation: float


class FeatureIndex:
    """A feature index in a folder or on the Hub; open it with [`FeatureIndex.open`].

    A feature or pair is read when it is asked for, with one request of some hundred kilobytes; the tables of small
    columns are in memory. All methods may be called from several threads.
    """

    def __init__(
        self, facts: Mapping[str, Any], features: RangedParquet, pairs: RangedParquet, tables: tuple[pa.Table, pa.Table]
    ) -> None:
        self.facts = facts  # index.json
        self._features, self._pairs = features, pairs
        self._table, self.pair_table = tables  # the second one sorted by (a, b), columns as in records.PAIR_TABLE
        self._pair_rows = {
            (a, b): row
            for row, (a, b) in enumerate(
                zip(self.pair_table["a"].to_pylist(), self.pair_table["b"].to_pylist(), strict=True)
            )
        }
        self._labels_lower = pc.utf8_lower(self._table["label"])
        self._firing: list[int] = self._table["feature"].filter(pc.greater(self._table["fires"], 0)).to_pylist()

    @classmethod
    def open(cls, name: str | os.PathLike[str], **lookup: Any) -> FeatureIndex:
        """The index of an SAE.

        Args:
            name: folder or Hub repository of the SAE, or the folder of an index itself.
            lookup: revision, subfolder, token, cache_dir, ... as for `SelOrthoSAE.from_pretrained`.

        Raises:
            SelOrthoError: there is none, it is damaged or of a later version, or the Hub gives no access to it.
        """
        name = os.fspath(name)
        if unknown := lookup.keys() - set(LOOKUP):
            raise SelOrthoError(f"{min(unknown)} says nothing about where an index is: expected {', '.join(LOOKUP)}")
        if Path(name, lookup.get("subfolder") or "", FACTS).is_file():
            where = dict(lookup)
        else:
            inner = "/".join(part for part in (lookup.get("subfolder"), INDEX) if part)
            where = at_one_commit(name, {**lookup, "subfolder": inner}, FACTS)
        facts_file = find_file(name, FACTS, where)
        if facts_file is None:
            raise SelOrthoError(
                f"{name!r} has no feature index ({where['subfolder']}/{FACTS}): build it with "
                "scripts/build_feature_index.py, and publish it with push_to_hub.py --include_index"
            )
        facts = read_object(facts_file)
        _check_facts(str(facts_file), facts)
        features, pairs = (
            RangedParquet(_ranged(name, file, where), schema, facts["rows_in_group"], facts["row_groups"][file])
            for file, schema in ((FEATURES_FILE, FEATURES), (PAIRS_FILE, PAIRS))
        )
        tables = (
            _small_table(name, FEATURE_TABLE_FILE, where, FEATURE_SUMMARY),
            _small_table(name, PAIR_TABLE_FILE, where, PAIR_TABLE),
        )
        for table, file in zip(tables, (features, pairs), strict=True):
            if len(table) != len(file):
                raise SelOrthoError(f"the feature index of {name!r} has files of several builds: build it again")
        return cls(facts, features, pairs, tables)

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
        self._check(number)
        try:
            record = feature_record(self._features.row(number))
            good = record.feature == number and len(record.histogram) == BINS and _whole(record)
        except (TypeError, KeyError) as error:  # null where a value is due
            raise self._damaged(f"feature {number}", one_line(error)) from error
        if not good:
            raise self._damaged(f"feature {number}", "its parts do not fit together")
        return record

    def pair(self, a: int, b: int) -> PairRecord:
        """All about a pair, in either order.

        Raises:
            SelOrthoError: the pair is not in the index, or its record is damaged.
        """
        for number in (a, b):
            self._check(number)
        row = self._pair_rows.get((min(a, b), max(a, b)))
        if row is None:
            raise SelOrthoError(
                f"features {a} and {b} are no pair of this index: it holds the {self.pairs} strongest of "
                f"{self.facts.get('pairs', {}).get('selected', 'the')} selected pairs"
            )
        try:
            record = pair_record(self._pairs.row(row))
            good = (record.a, record.b) == (min(a, b), max(a, b)) and _whole_pair(record)
        except (TypeError, KeyError) as error:
            raise self._damaged(f"pair {a}, {b}", one_line(error)) from error
        if not good:
            raise self._damaged(f"pair {a}, {b}", "its parts do not fit together")
        return record

    def has_pair(self, a: int, b: int) -> bool:
        """Whether the index holds the pair, in either order."""
        return (min(a, b), max(a, b)) in self._pair_rows

    def pairs_of(self, feature: int) -> list[tuple[int, int]]:
        """The pairs (a, b) of the index that a feature is in."""
        return [pair for pair in self._pair_rows if feature in pair]

    def summary(self, number: int) -> FeatureSummary:
        """The small columns of a feature, without reading its record.

        Raises:
            SelOrthoError: there is no such feature.
        """
        self._check(number)
        (row,) = self._table.slice(number, 1).select(FEATURE_TABLE.names).to_pylist()
        return FeatureSummary(**row)

    def label(self, number: int) -> str:
        """Label of a feature, "" where there is none; data of others, to be escaped where it is shown."""
        return self._table["label"][number].as_py() or ""

    def firing_features(self) -> list[int]:
        """The features that fired, in order."""
        return self._firing

    def most_frequent(self, k: int = 50) -> list[FeatureSummary]:
        """The features that fire most often, at most `k`."""
        return self._summaries(self._firing, k)

    def search_labels(self, text: str, k: int = 50) -> list[FeatureSummary]:
        """Features whose label holds a text, upper or lower case: the most frequent first, at most `k`."""
        if not text.strip():
            return []
        found = pc.match_substring(self._labels_lower, text.strip().lower())
        return self._summaries(pc.indices_nonzero(found).to_pylist(), k)

    def search_promoted(self, token: str, k: int = 50) -> list[FeatureSummary]:
        """Features that promote a token, spaces around it and case aside: those that do it before others first."""
        wanted = token.strip().lower()
        if not wanted:
            return []
        column = self._table["promotes"].combine_chunks()
        flat = pc.utf8_lower(pc.utf8_trim_whitespace(column.flatten()))
        hits = pc.indices_nonzero(pc.equal(flat, wanted)).to_pylist()
        parents, offsets = pc.list_parent_indices(column), column.offsets
        ranks: dict[int, int] = {}
        for hit in hits:
            feature = parents[hit].as_py()
            ranks.setdefault(feature, hit - offsets[feature].as_py())
        order = sorted(ranks, key=lambda feature: (ranks[feature], feature))[:k]
        return [self.summary(feature) for feature in order]

    def _summaries(self, features: list[int], k: int) -> list[FeatureSummary]:
        frequency = self._table["frequency"]
        order = sorted(features, key=lambda feature: (-frequency[feature].as_py(), feature))[:k]
        return [self.summary(feature) for feature in order]

    def _check(self, number: int) -> None:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self):
            raise SelOrthoError(f"feature {number}: expected a number from 0 to {len(self) - 1}")

    def _damaged(self, what: str, why: str) -> SelOrthoError:
        return SelOrthoError(f"{what} of the feature index is damaged ({why}): build it again")


def _whole(record: FeatureRecord) -> bool:
    """Whether the parts of a record fit together; strangers may have written it."""
    return math.isfinite(record.max_activation) and all(
        len(c.tokens) == len(c.activations) and 0 <= c.peak < len(c.tokens) and None not in (*c.tokens, *c.activations)
        for c in record.contexts
    )


def _whole_pair(record: PairRecord) -> bool:
    contexts = record.contexts
    return len(record.history) == len(record.history_steps) and all(
        len(c.tokens) == len(c.activations_a) == len(c.activations_b) and 0 <= c.peak < len(c.tokens) for c in contexts
    )


def _check_facts(path: str, facts: Mapping[str, Any]) -> None:
    version = facts.get("schema_version")
    if facts.get("kind") != INDEX or not isinstance(version, int):
        raise SelOrthoError(f"{path} is not that of a feature index: build it with scripts/build_feature_index.py")
    if version != SCHEMA_VERSION:
        raise SelOrthoError(
            f"{path} has schema_version {version}, this hf_selortho reads {SCHEMA_VERSION}: build the index again, or "
            "install the hf_selortho that wrote it"
        )
    for part in ("sae", "lm", "text", "features", "pairs", "row_groups"):
        if not isinstance(facts.get(part), dict):
            raise SelOrthoError(f"{path} lacks {part!r}: build the feature index again")
    rows, bounds = facts.get("rows_in_group"), facts["row_groups"]
    lists = [bounds.get(file) for file in (FEATURES_FILE, PAIRS_FILE)]
    whole = all(isinstance(one, list) and all(type(place) is int for place in one) for one in lists)
    if type(rows) is not int or not 0 < rows <= 1 << 16 or not whole:
        raise SelOrthoError(f"{path} does not say where its records are: build the feature index again")


def _ranged(name: str, file: str, where: Mapping[str, Any]) -> LocalFile | HubFile:
    if os.path.isdir(name):
        folder = Path(name)
        return LocalFile(folder, "/".join(part for part in (where.get("subfolder"), file) if part))
    if where.get("local_files_only"):
        path = find_file(name, file, where)
        if path is None:
            raise SelOrthoError(
                f"{file} of the feature index of {name!r} is not in the local cache: load it once online"
            )
        return LocalFile(path.parent, path.name)
    return HubFile(name, file, where)


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
