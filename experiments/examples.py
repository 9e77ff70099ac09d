"""Pairs of the twin's most correlated features, and what became of them in the SAE that was trained with the penalty.

The feature index of the twin, built with that SAE beside it, knows the counterparts of every pair: the features of the
SAE that point most like it does. From there come the counts by class and some pairs to read: pairs that fire on the
same tokens, and nested pairs, a feature within a broader one, that training should have left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.records import PAIR_CLASSES

EXAMPLES = "examples"  # name of the record
ALIKE = 0.7  # share of the tokens of either feature on which the other fires, too
MATCH = 0.9  # decoder cosine from which a feature of the SAE stands for one of the twin
SHOWN = 6  # pairs of each kind
WORDS = 24  # tokens around the strongest one


def read_examples(folder: Path) -> dict[str, Any]:
    """Say what an index knows of its pairs and their counterparts; `tokens` are those that it was built on."""
    index = FeatureIndex.open(folder)
    pairs = pair_table(index)
    nested = pairs[pairs["pair_class"] == "nested"]
    return {
        "tokens": index.facts["text"]["tokens"],
        "classes": {name: class_facts(pairs[pairs["pair_class"] == name]) for name in PAIR_CLASSES},
        "separated": [shown(index, row) for row in most_changed(pairs[pairs["alike"] >= ALIKE])],
        "nested": [shown(index, row) for row in most_changed(nested)],
    }


def pair_table(index: FeatureIndex) -> pd.DataFrame:
    """One row a pair whose correlation is known.

    `apart`: both features have a counterpart, and not the same one. `merged`: both point most like the same feature.
    `drop`: share of its correlation that the pair loses.
    """
    rows = []
    for a, b in (pair for feature in range(len(index)) for pair in index.pairs_of(feature) if pair[0] == feature):
        pair = index.pair(a, b)
        if pair.correlation is None:
            continue
        matched = min(pair.twin_match_a or 0.0, pair.twin_match_b or 0.0) >= MATCH and pair.twin_correlation is not None
        rows.append(
            {
                **vars(pair),
                "a_given_b": pair.a_given_b,
                "b_given_a": pair.b_given_a,
                "alike": min(pair.a_given_b or 0.0, pair.b_given_a or 0.0),
                "fires": min(pair.fires_a, pair.fires_b),
                "merged": pair.twin_a == pair.twin_b,
                "apart": matched and pair.twin_a != pair.twin_b,
                "drop": 1.0 - (pair.twin_correlation or 0.0) / (pair.correlation or 1.0),
            }
        )
    return pd.DataFrame(rows)


def class_facts(pairs: pd.DataFrame) -> dict[str, Any]:
    """Count pairs and counterparts, with medians; `halved`: the counterparts have at most half of the correlation."""
    apart = pairs[pairs["apart"]]
    medians = {
        "fires": pairs["fires"], "correlation": apart["correlation"], "correlation_beside": apart["twin_correlation"],
        "decoder_cosine": apart["decoder_cosine"], "decoder_cosine_beside": apart["twin_decoder_cosine"],
    }  # fmt: skip
    return {
        "pairs": len(pairs),
        "merged": int(pairs["merged"].sum()),
        "apart": len(apart),
        "halved": int((apart["drop"] >= 0.5).sum()),
        **{key: float(values.median()) if values.count() else None for key, values in medians.items()},
    }


def most_changed(pairs: pd.DataFrame) -> list[Any]:
    """Rows of the pairs whose counterparts are least correlated beside them."""
    return list(pairs[pairs["apart"]].nlargest(SHOWN, "drop").itertuples())


def shown(index: FeatureIndex, pair: Any) -> dict[str, Any]:
    """Show a pair as people read it: labels, how often, how correlated, and a context in which both fire."""
    keys = ("a", "b", "a_given_b", "b_given_a", "fires_a", "fires_b", "correlation", "decoder_cosine")
    return {
        **{key: getattr(pair, key) for key in keys},
        "label_a": index.label(pair.a),
        "label_b": index.label(pair.b),
        "correlation_beside": pair.twin_correlation,
        "decoder_cosine_beside": pair.twin_decoder_cosine,
        "context": around_peak(pair.contexts[0]) if pair.contexts else None,
    }


def around_peak(context: Any) -> str:
    """Text of some tokens around the strongest one."""
    first = max(0, min(context.peak - context.start, len(context.tokens) - 1) - WORDS // 2)
    return " ".join("".join(context.tokens[first : first + WORDS]).split())
