"""From what a pass has gathered to the records of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .feature_records import FeatureFacts
from .neighbours import cosines
from .pair_statistics import PairList, PairStatistics, class_of, correlations
from .records import JOINT_KINDS, JointContext, PairRecord
from .twin import TwinStatistics


def pair_records(
    pairs: PairList, statistics: PairStatistics, facts: FeatureFacts, twin: TwinStatistics | None
) -> Iterator[PairRecord]:
    """A record of every pair, in order."""
    for kind in JOINT_KINDS:
        statistics.keepers[kind].cpu()
        statistics.windows[kind].cpu()
    squares, fires = facts.statistics.squares, facts.statistics.fires.tolist()
    found = correlations(statistics.products, squares[statistics.a], squares[statistics.b])
    decoder_cosines = cosines(facts.W_dec[pairs.a], facts.W_dec[pairs.b]).tolist()
    support = statistics.support.tolist()
    of_twin = _of_twin(twin, len(pairs))
    for n, (a, b) in enumerate(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)):
        yield PairRecord(
            a=a,
            b=b,
            pair_class=class_of(fires[a], fires[b], support[n], decoder_cosines[n], facts.min_support),
            score=pairs.scores[n],
            correlation=found[n],
            decoder_cosine=decoder_cosines[n],
            fires_a=fires[a],
            fires_b=fires[b],
            support=support[n],
            history_steps=list(pairs.history_steps),
            history=list(pairs.history[n]),
            contexts=_joint_contexts(statistics, n, facts),
            **of_twin[n],
        )


def _of_twin(twin: TwinStatistics | None, pairs: int) -> list[dict[str, Any]]:
    names = ("twin_a", "twin_b", "twin_match_a", "twin_match_b", "twin_decoder_cosine", "twin_correlation")
    if twin is None:
        return [dict.fromkeys(names)] * pairs
    parts = (twin.a, twin.b, twin.match_a, twin.match_b, twin.decoder_cosine)
    columns = [*(part.tolist() for part in parts), twin.correlations()]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _joint_contexts(statistics: PairStatistics, pair: int, facts: FeatureFacts) -> list[JointContext]:
    contexts = []
    for kind in JOINT_KINDS:
        for window in statistics.windows[kind].of(pair, statistics.keepers[kind].ranked(pair)):
            contexts.append(
                JointContext(
                    kind=kind,
                    document_id=window.document_id,
                    start=window.start,
                    peak=window.peak,
                    tokens=facts.spell(window.token_ids),
                    activations_a=window.activations[0],
                    activations_b=window.activations[1],
                )
            )
    return contexts
