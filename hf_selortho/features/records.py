"""What is known of a feature and of a pair of features: the rows of a feature index."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1
# Activations are counted in bins of equal ratio: three to a doubling, from 2^-14 to 2^16, whatever the SAE's scale.
BINS_PER_DOUBLING, FIRST_DOUBLING, LAST_DOUBLING = 3, -14, 16
BINS = BINS_PER_DOUBLING * (LAST_DOUBLING - FIRST_DOUBLING)
JOINT_KINDS = ("both", "a", "b")  # of a pair: both fire, only a, only b
PAIR_CLASSES = ("duplicate", "nested", "co-occurring", "unmeasured")


def bin_edges() -> list[float]:
    """Activations that bound the bins of every histogram, BINS + 1 rising numbers."""
    return [2.0 ** (FIRST_DOUBLING + number / BINS_PER_DOUBLING) for number in range(BINS + 1)]


@dataclass(frozen=True)
class TokenEffect:
    """The logit of a token, less the vocabulary's mean, if the residual stream were a feature's direction alone."""

    token_id: int
    token: str
    logit: float


@dataclass(frozen=True)
class Neighbour:
    """A feature near another one."""

    feature: int
    cosine: float  # of the decoder directions
    correlation: float  # uncentred, eq. 4, on the sampled tokens of the index
    support: int  # of these, tokens on which both fire


@dataclass(frozen=True)
class FeatureContext:
    """A piece of text around a token on which a feature fires."""

    kind: str  # "top": one of its strongest contexts; "sample": drawn from all tokens on which it fires
    document_id: int
    start: int  # place of the first token shown in its context, BOS being 0
    peak: int  # the token that the context is shown for, counted from the first one shown
    activation: float  # of the feature on it
    quantile: float  # share of the tokens on which the feature fires at most as strongly, in (0, 1]
    tokens: list[str]
    activations: list[float]  # of the feature, one a token


@dataclass(frozen=True)
class FeatureRecord:
    """All that an index knows of a feature."""

    feature: int
    label: str  # data of others: escape it wherever it is shown
    label_source: str  # "tokens": from its strongest tokens; "file": given by hand; "none": it never fired
    fires: int  # tokens on which it fires
    frequency: float  # the share of all tokens
    max_activation: float  # 0 if it never fires
    mean_activation: float  # over the tokens on which it fires; 0 if there is none
    histogram: list[int]  # tokens by activation, BINS counts between `bin_edges`; the outer ones take what lies beyond
    promoted: list[TokenEffect]  # largest logits first
    suppressed: list[TokenEffect]  # smallest logits first
    nearest_by_cosine: list[Neighbour]
    nearest_by_correlation: list[Neighbour]
    contexts: list[FeatureContext]  # "top" ones by falling activation, then samples by falling activation


@dataclass(frozen=True)
class JointContext:
    """A piece of text on which two features fire, or one of them alone."""

    kind: str  # "both", "a" or "b"
    document_id: int
    start: int
    peak: int
    tokens: list[str]
    activations_a: list[float]
    activations_b: list[float]


@dataclass(frozen=True)
class PairRecord:
    """All that an index knows of a pair of features, a < b. Correlations are uncentred (eq. 4); None: not defined."""

    a: int
    b: int
    pair_class: str  # one of PAIR_CLASSES, by the rule in the index's facts
    score: (
        float | None
    )  # of the last selection of the training, by which the pair was chosen; None: not from a training
    correlation: float | None  # on the text of the index
    twin_a: int | None  # the feature of the twin whose decoder direction is nearest to that of a
    twin_b: int | None
    twin_match_a: float | None  # the cosine of the two
    twin_match_b: float | None
    twin_correlation: float | None  # of twin_a and twin_b on the same text; 1 if they are the same feature
    decoder_cosine: float
    twin_decoder_cosine: float | None
    fires_a: int
    fires_b: int
    support: int  # tokens on which both fire
    history_steps: list[int] = field(default_factory=list)  # steps of the training at which the selection was kept
    history: list[float | None] = field(default_factory=list)  # its score there; None: it was not among the selected
    contexts: list[JointContext] = field(default_factory=list)

    @property
    def a_given_b(self) -> float | None:
        """P(a | b): share of the tokens with b on which a fires, too."""
        return self.support / self.fires_b if self.fires_b else None

    @property
    def b_given_a(self) -> float | None:
        """P(b | a)."""
        return self.support / self.fires_a if self.fires_a else None


_NESTED = ("promoted", "suppressed", "nearest_by_cosine", "nearest_by_correlation", "contexts")
_EFFECTS = pa.list_(pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("logit", pa.float32())]))
_NEIGHBOURS = pa.list_(
    pa.struct(
        [("feature", pa.int32()), ("cosine", pa.float32()), ("correlation", pa.float32()), ("support", pa.int64())]
    )
)
_PLACE = [("document_id", pa.int64()), ("start", pa.int32()), ("peak", pa.int32())]
_FEATURE_CONTEXTS = pa.list_(
    pa.struct(
        [
            ("kind", pa.string()),
            *_PLACE,
            ("activation", pa.float32()),
            ("quantile", pa.float32()),
            ("tokens", pa.list_(pa.string())),
            ("activations", pa.list_(pa.float32())),
        ]
    )
)
_JOINT_CONTEXTS = pa.list_(
    pa.struct(
        [
            ("kind", pa.string()),
            *_PLACE,
            ("tokens", pa.list_(pa.string())),
            ("activations_a", pa.list_(pa.float32())),
            ("activations_b", pa.list_(pa.float32())),
        ]
    )
)

# The small columns, which the tables hold alone and the files of whole records begin with.
FEATURE_TABLE = pa.schema(
    [
        ("feature", pa.int32()),
        ("label", pa.string()),
        ("label_source", pa.string()),
        ("fires", pa.int64()),
        ("frequency", pa.float32()),
        ("max_activation", pa.float32()),
        ("mean_activation", pa.float32()),
    ]
)
FEATURES = pa.schema(
    [
        *FEATURE_TABLE,
        ("histogram", pa.list_(pa.int64())),
        ("promoted", _EFFECTS),
        ("suppressed", _EFFECTS),
        ("nearest_by_cosine", _NEIGHBOURS),
        ("nearest_by_correlation", _NEIGHBOURS),
        ("contexts", _FEATURE_CONTEXTS),
    ]
)
PAIR_TABLE = pa.schema(
    [
        ("a", pa.int32()),
        ("b", pa.int32()),
        ("pair_class", pa.string()),
        ("score", pa.float32()),
        ("correlation", pa.float32()),
        ("twin_a", pa.int32()),
        ("twin_b", pa.int32()),
        ("twin_match_a", pa.float32()),
        ("twin_match_b", pa.float32()),
        ("twin_correlation", pa.float32()),
        ("decoder_cosine", pa.float32()),
        ("twin_decoder_cosine", pa.float32()),
        ("fires_a", pa.int64()),
        ("fires_b", pa.int64()),
        ("support", pa.int64()),
    ]
)
PAIRS = pa.schema(
    [
        *PAIR_TABLE,
        ("history_steps", pa.list_(pa.int32())),
        ("history", pa.list_(pa.float32())),
        ("contexts", _JOINT_CONTEXTS),
    ]
)


def as_row(record: FeatureRecord | PairRecord) -> dict[str, Any]:
    """A record as a row of its file, of plain lists and dictionaries."""
    nested = {name: [vars(part) for part in getattr(record, name)] for name in _NESTED if hasattr(record, name)}
    return {**vars(record), **nested}


def feature_record(row: dict[str, Any]) -> FeatureRecord:
    """A row of `features.parquet` as a record."""
    return FeatureRecord(
        **{name: row[name] for name in _plain(FeatureRecord)},
        promoted=[TokenEffect(**effect) for effect in row["promoted"]],
        suppressed=[TokenEffect(**effect) for effect in row["suppressed"]],
        nearest_by_cosine=[Neighbour(**one) for one in row["nearest_by_cosine"]],
        nearest_by_correlation=[Neighbour(**one) for one in row["nearest_by_correlation"]],
        contexts=[FeatureContext(**context) for context in row["contexts"]],
    )


def pair_record(row: dict[str, Any]) -> PairRecord:
    """A row of `pairs.parquet` as a record."""
    return PairRecord(
        **{name: row[name] for name in _plain(PairRecord)},
        contexts=[JointContext(**context) for context in row["contexts"]],
    )


def _plain(record: type) -> list[str]:
    return [f.name for f in fields(record) if f.name not in _NESTED]
