"""From what a pass has gathered to the records of features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.contexts import spelling
from ..sparse_ops import ActiveFeatures
from .feature_statistics import BANDS, PER_BAND, FeatureStatistics, quantiles
from .keepers import Window
from .labels import label_of_tokens
from .neighbours import nearest_features
from .records import BINS, FeatureContext, FeatureRecord, TokenEffect


@dataclass
class FeatureFacts:
    """All that the records are made of."""

    statistics: FeatureStatistics
    tokens: int  # read in all
    sample: ActiveFeatures  # for the correlations of neighbours
    W_dec: Tensor  # (d_sae, d_in), on the CPU
    effects: list[tuple[list[TokenEffect], list[TokenEffect]]]  # promoted and suppressed tokens of each feature
    tokenizer: PreTrainedTokenizerBase
    labels: Mapping[int, str]
    min_support: int
    _spellings: dict[int, str] = field(default_factory=dict)

    def spell(self, token_ids: list[int]) -> list[str]:
        """Tokens as text."""
        for token_id in token_ids:
            if token_id not in self._spellings:
                self._spellings[token_id] = spelling(self.tokenizer, token_id)
        return [self._spellings[token_id] for token_id in token_ids]


def feature_records(facts: FeatureFacts) -> Iterator[FeatureRecord]:
    """A record of every feature, in order."""
    statistics = facts.statistics
    for kept in (statistics.top, statistics.top_windows, statistics.sample, statistics.sample_windows):
        kept.cpu()
    histogram = statistics.histogram.view(-1, BINS).cpu()
    maxima, sums = statistics.maxima.tolist(), statistics.sums.tolist()
    neighbours = nearest_features(facts.W_dec, facts.sample, facts.min_support)
    for feature, (by_cosine, by_correlation) in enumerate(neighbours):
        fires = int(histogram[feature].sum())
        promoted, suppressed = facts.effects[feature]
        contexts = _contexts(facts, feature, histogram[feature], maxima[feature])
        label, source = _label(facts, feature, contexts)
        yield FeatureRecord(
            feature=feature,
            label=label,
            label_source=source,
            fires=fires,
            frequency=fires / facts.tokens,
            max_activation=maxima[feature],
            mean_activation=sums[feature] / fires if fires else 0.0,
            histogram=histogram[feature].tolist(),
            promoted=promoted,
            suppressed=suppressed,
            nearest_by_cosine=by_cosine,
            nearest_by_correlation=by_correlation,
            contexts=contexts,
        )


def _label(facts: FeatureFacts, feature: int, contexts: list[FeatureContext]) -> tuple[str, str]:
    if facts.labels.get(feature):
        return facts.labels[feature], "file"
    top = [context for context in contexts if context.kind == "top"]
    if not top:
        return "", "none"
    return label_of_tokens([c.tokens[c.peak] for c in top], [c.activation for c in top]), "tokens"


def _contexts(facts: FeatureFacts, feature: int, histogram: Tensor, largest: float) -> list[FeatureContext]:
    statistics = facts.statistics
    top = statistics.top_windows.of(feature, statistics.top.ranked(feature))
    drawn = statistics.sample_windows.of(feature, statistics.sample.ranked(feature))
    windows = [*top, *drawn]
    if not windows:
        return []
    activations = [window.activations[0][window.peak] for window in windows]
    shares = quantiles(torch.tensor(activations), histogram, largest)
    made = [
        _context(facts, "top" if n < len(top) else "sample", windows[n], activations[n], shares[n])
        for n in range(len(windows))
    ]
    samples = sorted(_banded(made[len(top) :]), key=lambda context: -context.activation)
    return [*made[: len(top)], *samples]


def _context(facts: FeatureFacts, kind: str, window: Window, activation: float, quantile: float) -> FeatureContext:
    return FeatureContext(
        kind=kind,
        document_id=window.document_id,
        start=window.start,
        peak=window.peak,
        activation=activation,
        quantile=quantile,
        tokens=facts.spell(window.token_ids),
        activations=window.activations[0],
    )


def _banded(samples: list[FeatureContext]) -> list[FeatureContext]:
    """The first few of each band of quantiles: of equal width, the lowest from 0."""
    taken = [0] * BANDS
    kept = []
    for sample in samples:
        band = min(int(sample.quantile * BANDS), BANDS - 1)
        if taken[band] < PER_BAND:
            taken[band] += 1
            kept.append(sample)
    return kept
