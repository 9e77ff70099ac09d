"""Pairs of the twin's most correlated features, and what became of them in the SAE that was trained with the penalty.

The feature index of the twin, built with the SAE beside it, has for every pair the features of the SAE that point most
like it does. From there come the counts by class and some pairs to read: pairs that fire on the same tokens and that
training separated, and nested pairs, a feature within a broader one, that it should have left alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.records import PAIR_CLASSES, PairRecord

EXAMPLES = "examples"  # name of the record
ALIKE = 0.7  # share of the tokens of either feature
SHOWN = 6  # pairs of each kind
MATCH = 0.9  # decoder cosine from which a feature of the SAE beside it stands for one of the twin
_WORDS = 24  # tokens around the strongest one


def examples(index: FeatureIndex) -> dict[str, Any]:
    """What an index says about its pairs and those of the SAE beside it; `tokens` are those that it was built on."""
    pairs = [pair for pair in every_pair(index) if pair.correlation is not None]
    by_class = {name: [pair for pair in pairs if pair.pair_class == name] for name in PAIR_CLASSES}
    return {
        "tokens": index.facts["text"]["tokens"],
        "classes": {name: class_facts(found) for name, found in by_class.items()},
        "separated": [shown(index, pair) for pair in most_changed([pair for pair in pairs if fires_alike(pair)])],
        "nested": [shown(index, pair) for pair in most_changed(by_class.get("nested", []))],
    }


def fires_alike(pair: PairRecord) -> bool:
    """Whether each of the two fires where the other does: two features for one thing, wherever they point."""
    return min(pair.a_given_b or 0.0, pair.b_given_a or 0.0) >= ALIKE


def every_pair(index: FeatureIndex) -> Iterator[PairRecord]:
    """All pairs of an index, each once."""
    for feature in range(len(index)):
        for a, b in index.pairs_of(feature):
            if a == feature:
                yield index.pair(a, b)


def class_facts(pairs: Sequence[PairRecord]) -> dict[str, Any]:
    """How many pairs there are, and how correlated they and their counterparts are, in the median.

    `merged`: both features of the pair point most like one and the same feature of the other SAE. `apart`: each has a
    counterpart of its own, of a decoder cosine of at least 0.9. `halved`: the correlation of the counterparts is at
    most half of the pair's. `fires`: tokens on which the rarer of the two fires, in the median of all pairs.
    """
    known = [pair for pair in pairs if pair.twin_correlation is not None and has_counterparts(pair)]
    apart = [pair for pair in known if pair.twin_a != pair.twin_b]
    return {
        "pairs": len(pairs),
        "merged": sum(pair.twin_a == pair.twin_b for pair in pairs),
        "apart": len(apart),
        "fires": _median([min(pair.fires_a, pair.fires_b) for pair in pairs]),
        "halved": sum(_drop(pair) >= 0.5 for pair in apart),
        "correlation": _median([pair.correlation for pair in apart]),
        "correlation_beside": _median([pair.twin_correlation for pair in apart]),
        "decoder_cosine": _median([pair.decoder_cosine for pair in apart]),
        "decoder_cosine_beside": _median([pair.twin_decoder_cosine for pair in apart]),
    }


def most_changed(pairs: Sequence[PairRecord]) -> list[PairRecord]:
    """Pairs whose counterparts are least correlated beside them; those that were merged into one feature are left out.

    Counterparts have to point like the features that they stand for.
    """
    clear = [
        pair
        for pair in pairs
        if pair.twin_a != pair.twin_b and pair.twin_correlation is not None and has_counterparts(pair)
    ]
    return sorted(clear, key=_drop, reverse=True)[:SHOWN]


def has_counterparts(pair: PairRecord) -> bool:
    """Whether features of the SAE beside it stand for both."""
    return min(pair.twin_match_a or 0.0, pair.twin_match_b or 0.0) >= MATCH


def shown(index: FeatureIndex, pair: PairRecord) -> dict[str, Any]:
    """A pair as people read it: labels, how often, how correlated, and a context in which both fire."""
    context = next(iter(pair.contexts), None)
    return {
        "a": pair.a,
        "b": pair.b,
        "label_a": index.label(pair.a),
        "label_b": index.label(pair.b),
        "a_given_b": pair.a_given_b,
        "b_given_a": pair.b_given_a,
        "fires_a": pair.fires_a,
        "fires_b": pair.fires_b,
        "correlation": pair.correlation,
        "correlation_beside": pair.twin_correlation,
        "decoder_cosine": pair.decoder_cosine,
        "decoder_cosine_beside": pair.twin_decoder_cosine,
        "context": None if context is None else _around(context.tokens, context.peak - context.start),
    }


def read_examples(folder: Path) -> dict[str, Any]:
    """[`examples`] of the index in a folder."""
    return examples(FeatureIndex.open(folder))


def _around(tokens: Sequence[str], peak: int) -> str:
    first = max(0, min(peak, len(tokens) - 1) - _WORDS // 2)
    return " ".join("".join(tokens[first : first + _WORDS]).split())


def _drop(pair: PairRecord) -> float:
    """By which share of it the correlation falls."""
    return 1.0 - (pair.twin_correlation or 0.0) / (pair.correlation or 1.0)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
