"""Records of a feature and of a pair of features, which are the rows of a feature index, and their parquet schemas."""

from __future__ import annotations

import types
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

SCHEMA_VERSION = 3  # version 2: without head_shares; 1: without label_score, labels and concepts
# Activations are counted in bins of equal ratio: three to a doubling, from 2^-14 to 2^16, whatever the SAE's scale.
BINS_PER_DOUBLING, FIRST_DOUBLING, LAST_DOUBLING = 3, -14, 16
BINS = BINS_PER_DOUBLING * (LAST_DOUBLING - FIRST_DOUBLING)
JOINT_KINDS = ("both", "a", "b")  # of a pair: both fire, only a, only b
# "token", "context": the word on which it fires, or beside it; "concept": a probe set; "model": a language model's
# explanation; "file": given by hand; "unclear": nothing good enough; "none": it never fired; "tokens": of version 1.
LABEL_SOURCES = ("token", "context", "concept", "model", "file", "unclear", "none", "tokens")
PAIR_CLASSES = ("duplicate", "nested", "co-occurring", "unmeasured")

# The types of the parquet columns; a dataclass of them is a row, within another one a struct.
Small: TypeAlias = Annotated[int, pa.int32()]
Count: TypeAlias = Annotated[int, pa.int64()]
Number: TypeAlias = Annotated[float, pa.float32()]
Share: TypeAlias = Annotated[float, pa.float16()]
Text: TypeAlias = Annotated[str, pa.string()]

R = TypeVar("R")


def bin_edges() -> list[float]:
    """Return the activations that bound the bins of every histogram, BINS + 1 rising numbers."""
    return [2.0 ** (FIRST_DOUBLING + number / BINS_PER_DOUBLING) for number in range(BINS + 1)]


@dataclass(frozen=True)
class TokenEffect:
    """The logit of a token, less the vocabulary's mean, if the residual stream were a feature's direction alone."""

    token_id: Small
    token: Text
    logit: Number


@dataclass(frozen=True)
class Neighbour:
    """A feature near another one."""

    feature: Small
    cosine: Number  # of the decoder directions
    correlation: Number  # uncentred, eq. 4, on the sampled tokens of the index
    support: Count  # of these, tokens on which both fire


@dataclass(frozen=True)
class FeatureContext:
    """A piece of text around a token on which a feature fires."""

    kind: Text  # "top": one of its strongest contexts; "sample": drawn from all tokens on which it fires
    document_id: Count
    start: Small  # place of the first token shown in its context, BOS being 0
    peak: Small  # the token that the context is shown for, counted from the first one shown
    activation: Number  # of the feature on it
    quantile: Number  # share of the tokens on which the feature fires at most as strongly, in (0, 1]
    tokens: list[Text]
    activations: list[Number]  # of the feature, one a token


@dataclass(frozen=True)
class Label:
    """A name of a feature, and how well it tells where the feature fires."""

    source: Text  # one of LABEL_SOURCES
    text: Text  # data of others: escape it wherever it is shown
    score: Number  # in [0, 1], see docs/feature_index.md
    detail: Text  # how the score was got, in words


@dataclass(frozen=True)
class ConceptRow:
    """A feature that tells the two classes of a probe set apart by itself."""

    concept: Text  # name of the probe set
    title: Text  # what the feature finds: "Python code"
    trained_on: Annotated[bool, pa.bool_()]  # whether the corpus "sae-probes" holds the texts of the set
    rank: Small  # among the features of the set, the best is 0
    feature: Small
    auc: Number  # area under the ROC curve on the set's test texts, at least 0.5
    negated: Annotated[bool, pa.bool_()]  # the feature marks the set's class 0


@dataclass(frozen=True)
class FeatureSummary:
    """The small columns of a feature, which the feature table holds."""

    feature: Small
    label: Text  # data of others: escape it wherever it is shown
    label_source: Text  # one of LABEL_SOURCES
    label_score: Number | None = field(default=None, kw_only=True)  # of the label, in [0, 1]; None: not measured
    fires: Count  # tokens on which it fires
    frequency: Number  # the share of all tokens
    max_activation: Number  # 0 if it never fires
    mean_activation: Number  # over the tokens on which it fires; 0 if there is none


@dataclass(frozen=True)
class FeatureRecord(FeatureSummary):
    """All that an index knows of a feature."""

    labels: list[Label] = field(default_factory=list, kw_only=True)  # all candidates for its label, the best first
    histogram: list[
        Count
    ]  # tokens by activation, BINS counts between `bin_edges`; the outer ones take what lies beyond
    promoted: list[TokenEffect]  # top positive logits, the largest first
    suppressed: list[TokenEffect]  # top negative logits, the smallest first
    nearest_by_cosine: list[Neighbour]
    nearest_by_correlation: list[Neighbour]
    contexts: list[FeatureContext]  # "top" ones by falling activation, then samples by falling activation
    # of the squared norm of its decoder direction, by attention head; [] where the SAE does not write to heads
    head_shares: list[Share] = field(default_factory=list, kw_only=True)


@dataclass(frozen=True)
class JointContext:
    """A piece of text on which two features fire, or one of them alone."""

    kind: Text  # "both", "a" or "b"
    document_id: Count
    start: Small
    peak: Small
    tokens: list[Text]
    activations_a: list[Number]
    activations_b: list[Number]


@dataclass(frozen=True)
class PairSummary:
    """The small columns of a pair of features, a < b, which the pair table holds.

    Correlations are uncentred (eq. 4); None where they are not defined.
    """

    a: Small
    b: Small
    pair_class: Text  # one of PAIR_CLASSES, by the rule in the index's facts
    score: Number | None  # by which the training's last selection chose the pair; None: not from a training
    correlation: Number | None  # on the text of the index
    twin_a: Small | None  # the feature of the twin whose decoder direction is nearest to that of a
    twin_b: Small | None
    twin_match_a: Number | None  # the cosine of the two
    twin_match_b: Number | None
    twin_correlation: Number | None  # of twin_a and twin_b on the same text; 1 if they are the same feature
    decoder_cosine: Number
    twin_decoder_cosine: Number | None
    fires_a: Count
    fires_b: Count
    support: Count  # tokens on which both fire


@dataclass(frozen=True)
class PairRecord(PairSummary):
    """All that an index knows of a pair of features."""

    history_steps: list[Small] = field(default_factory=list)  # of the training, at which the selection was kept
    history: list[Number | None] = field(default_factory=list)  # its score there; None: it was not among the selected
    contexts: list[JointContext] = field(default_factory=list)

    @property
    def a_given_b(self) -> float | None:
        """P(a | b): share of the tokens with b on which a fires, too."""
        return self.support / self.fires_b if self.fires_b else None

    @property
    def b_given_a(self) -> float | None:
        """P(b | a)."""
        return self.support / self.fires_a if self.fires_a else None


def schema_of(record: type) -> pa.Schema:
    """Return the parquet schema of a record, a column for each field in order."""
    return pa.schema([(name, _arrow(hint)) for name, hint in get_type_hints(record, include_extras=True).items()])


def as_row(record: Any) -> dict[str, Any]:
    """Return a record as a row of plain lists and dictionaries."""
    return {
        name: [vars(part) for part in value] if isinstance(value, list) and value and is_dataclass(value[0]) else value
        for name, value in vars(record).items()
    }


def from_row(record: type[R], row: dict[str, Any]) -> R:
    """Make a record of a row as pyarrow reads it.

    Raises:
        TypeError: null where a list or struct is due.
        KeyError: a field is missing.
    """
    hints = get_type_hints(record)
    values = {}
    for one in fields(record):  # type: ignore[arg-type]
        (part, *_) = get_args(hints[one.name]) or (None,)
        value = row[one.name]
        nested = isinstance(part, type) and is_dataclass(part)
        values[one.name] = [part(**item) for item in value] if nested else value
    return record(**values)


def _arrow(hint: Any) -> pa.DataType:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return arguments[1]
    if origin in (Union, types.UnionType):  # with None: every column may hold nulls
        return _arrow(arguments[0])
    if origin is list:
        return pa.list_(_arrow(arguments[0]))
    return pa.struct(list(schema_of(hint)))


FEATURE_TABLE, FEATURES = schema_of(FeatureSummary), schema_of(FeatureRecord)
PAIR_TABLE, PAIRS = schema_of(PairSummary), schema_of(PairRecord)
CONCEPTS = schema_of(ConceptRow)
# 1 less the cosine of a feature's decoder direction with that of the feature that its training started from
MOVED = pa.schema([("moved", pa.float32())])
_NEW_IN = {"label_score": 2, "labels": 2, "head_shares": 3}


def of_version(schema: pa.Schema, version: int) -> pa.Schema:
    """Return the schema of a feature file as an earlier version of the index wrote it."""
    return pa.schema([column for column in schema if _NEW_IN.get(column.name, 1) <= version])
