"""Features worth a look: well named ones of many kinds, with a context of each."""

from __future__ import annotations

import heapq
import re
from typing import Any

from .records import FeatureRecord
from .words import is_wordless

LARGEST, DENSE = 24, 0.1  # features of a gallery; more frequent ones are dense
_BEFORE, _AFTER = 16, 8  # tokens shown
_WORTH = 0.2  # of a label of several words, in score
_SOURCES = ("token", "context", "concept", "model")


class Gallery:
    """Chooses the best-named features of each source of labels and of each concept, as records come in."""

    def __init__(self) -> None:
        self._groups: dict[str, list[tuple[float, int, dict[str, Any]]]] = {}

    def add(self, record: FeatureRecord) -> None:
        """Consider a feature."""
        score, top = record.label_score or 0.0, next((c for c in record.contexts if c.kind == "top"), None)
        if top is None or record.label_source not in _SOURCES or record.frequency > DENSE:
            return
        start = max(top.peak - _BEFORE, 0)
        shown = slice(start, top.peak + _AFTER + 1)
        item = {
            "feature": record.feature,
            "label": record.label,
            "source": record.label_source,
            "score": score,
            "tokens": top.tokens[shown],
            "activations": top.activations[shown],
            "peak": top.peak - start,
        }
        concept = record.label if record.label_source == "concept" else ""
        group = self._groups.setdefault(record.label_source + concept, [])
        if concept:
            group[:] = [max([*group, (score, -record.feature, item)], key=lambda entry: entry[:2])]
        elif (
            not is_wordless(record.label)
            and "punctuation" not in record.label
            and all(held["label"] != record.label for *_, held in group)
        ):
            families = len(re.split(r", | / ", record.label)) > 1  # "may, might" says more of a feature than "may"
            heapq.heappush(group, (score + _WORTH * families, -record.feature, item))
            if len(group) > LARGEST:
                heapq.heappop(group)

    def items(self) -> list[dict[str, Any]]:
        """Return the features chosen, a group in turn, each group's best first."""
        groups = [sorted(group, key=lambda entry: entry[:2], reverse=True) for group in self._groups.values()]
        rounds = max(map(len, groups), default=0)
        chosen = [group[n][2] for n in range(rounds) for group in groups if n < len(group)]
        return chosen[:LARGEST]
