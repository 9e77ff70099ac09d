"""Names of features that are measured: the word on which a feature fires, the word beside it, the kind of either."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .firings import Firings, FiringTokens
from .records import Label
from .words import KINDS, Words

LEAST_FIRINGS = 5  # in each half of the documents
STRONG, STRONGEST = 0.5, 10  # share of the largest activation from which one is strong; so many are in any case
_WORDS, _FORMS, _TRIED = 3, 2, 8  # of a label, of one of its words, that are tried for it
_KEPT = 6  # candidates of a feature
# Another word has to raise the score so much, and to have this share of the first one's activation.
_WORTH, _SHARE = 0.02, 0.2
_Sums: TypeAlias = tuple[np.ndarray, np.ndarray]


def label_score(purity: float, coverage: float, by_chance: tuple[float, float] = (0.0, 0.0)) -> float:
    """Score a label from the share of strong activations that it explains and of its tokens that the feature marks.

    Both less what they would be by chance; one half is chance, 1 is perfect, as an area under the ROC curve. With
    equal exponents this would be (1 + Matthews' correlation coefficient) / 2; purity counts twice as much as coverage,
    as who reads a label sees where the feature fires.
    """
    p, c = (max(share - chance, 0.0) for share, chance in zip((purity, coverage), by_chance, strict=True))
    return (1 + (p * p * c) ** (1 / 3)) / 2


@dataclass(frozen=True)
class _Half:
    """Tokens of one half of the documents, by one of their properties."""

    tokens: int
    occurrences: np.ndarray  # (values,) tokens with each value

    def measure(self, sums: _Sums, values: Sequence[int]) -> tuple[float, float, float]:
        """Return score, purity and coverage of a set of values.

        Args:
            sums: strong activations (values,) and firings (values,) of a feature on the tokens with each value.
        """
        activations, firings = sums
        label, fired = float(self.occurrences[list(values)].sum()), float(firings.sum())
        both = min(float(firings[list(values)].sum()), label)
        if not label or not fired:
            return 0.5, 0.0, 0.0
        purity, coverage = float(activations[list(values)].sum() / activations.sum()), both / label
        false_alarms = (label - both) / max(self.tokens - fired, 1.0)
        missed = max(fired - both, 0.0) / max(self.tokens - label, 1.0)
        return label_score(purity, coverage, (false_alarms, missed)), purity, coverage


class TokenLabels:
    """Measures of each feature how well words and kinds of tokens, and of those beside them, say where it fires.

    What a label says is chosen on one half of the documents and scored on the other.

    Args:
        tokens: of the text. words: the same tokens, named.
    """

    def __init__(self, tokens: FiringTokens, words: Words) -> None:
        self._held_out, self._words = tokens.held_out, words
        self._columns = {
            name: (column, [self._half(column, held_out) for held_out in (False, True)])
            for name, column in vars(words).items()
            if isinstance(column, np.ndarray)
        }

    def of(self, firings: Firings) -> list[Label]:
        """Return the candidates for a feature's name, the best first; none where it fires on too few tokens."""
        held_out = self._held_out[firings.tokens]
        if min(int(held_out.sum()), int((~held_out).sum())) < LEAST_FIRINGS:
            return []
        halves = [(inside, _strong(firings.activations, inside)) for inside in (~held_out, held_out)]
        labels = [label for name in self._columns for label in self._candidates(name, firings, halves)]
        return sorted(labels, key=lambda label: -label.score)[:_KEPT]

    def _half(self, column: np.ndarray, held_out: bool) -> _Half:
        inside = column[self._held_out == held_out]
        return _Half(len(inside), np.bincount(inside, minlength=int(column.max()) + 1))

    def _candidates(
        self, name: str, firings: Firings, parts: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[Label]:
        column, halves = self._columns[name]
        values, places = np.unique(column[firings.tokens], return_inverse=True)
        sums = list[_Sums]()
        for inside, strong in parts:
            activations = np.bincount(places, firings.weights * firings.activations * strong, len(values))
            sums.append((activations, np.bincount(places, firings.weights * inside, len(values))))
        choosing, scoring = (_Half(half.tokens, half.occurrences[values]) for half in halves)
        if "kind" in name:
            scores = [choosing.measure(sums[0], [n])[0] for n in range(len(values))]
            chosen = [max(range(len(values)), key=scores.__getitem__)]
        else:
            chosen = self._set(choosing, sums[0], values)
        if text := self._text(name, [int(values[n]) for n in chosen]):
            score, purity, coverage = scoring.measure(sums[1], chosen)
            detail = (
                f"{percent(purity)} of its strong activation is there; it fires on {percent(coverage)} of such tokens"
            )
            yield Label("token" if name.startswith("own") else "context", text, score, detail)

    def _set(self, half: _Half, sums: _Sums, values: np.ndarray) -> list[int]:
        """Choose words that together say best where a feature fires: the best one, and others that raise the score."""
        tried = np.argsort(-sums[0], kind="stable")[:_TRIED].tolist()
        chosen = [max(tried, key=lambda n: half.measure(sums, [n])[0])]
        score, stems = half.measure(sums, chosen)[0], [stem(self._words.names[values[chosen[0]]])]
        for n in tried:
            own = stem(self._words.names[values[n]])
            room = stems.count(own) < _FORMS and len({*stems, own}) <= _WORDS
            room = room and sums[0][n] >= _SHARE * sums[0][chosen[0]]
            if n not in chosen and room and (wider := half.measure(sums, [*chosen, n])[0]) > score + _WORTH:
                chosen, score = [*chosen, n], wider
                stems.append(own)
        return chosen

    def _text(self, name: str, values: list[int]) -> str:
        place = ("own", "before", "after").index(name.removesuffix("_kind").removeprefix("kind_"))
        if "kind" in name:
            return list(KINDS.values())[values[0]][place]
        names, quoted = self._words.names, self._words.quoted
        if not all(names[value] for value in values):
            return ""  # beyond the ends of a text, of which the kinds tell
        forms: dict[str, list[str]] = {}
        for value in values:
            shown = f"“{names[value]}”" if place and quoted[value] else names[value]
            forms.setdefault(stem(names[value]), []).append(shown)
        text = ", ".join(" / ".join(words) for words in forms.values())
        return (text, f"after {text}", f"before {text}")[place]


def _strong(activations: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Mark those of some firings (n,) that are strong, and at least the STRONGEST of them."""
    own = activations[inside]
    return inside & (activations >= min(STRONG * own.max(), np.sort(own)[-STRONGEST:][0]))


def stem(word: str) -> str:
    """Return what the forms of an English word have in common, roughly: "place" and "places" have one stem."""
    low = word.casefold()
    for ending in ("'s", "ing", "ed", "es", "s", "e"):
        if low.endswith(ending) and len(low) - len(ending) >= 4:
            return low.removesuffix(ending)
    return low


def percent(share: float) -> str:
    """Write a share as "93%"."""
    return f"{math.floor(100 * share + 0.5)}%"
