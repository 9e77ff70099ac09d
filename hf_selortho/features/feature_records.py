"""Make the records of features and pairs from what a pass has gathered."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..language_models.token_text import TokenTexts
from ..sparse_ops import ActiveFeatures
from .concept_labels import RARER
from .feature_statistics import BANDS, PER_BAND, FeatureStatistics, quantiles
from .labels import choose_label, label_of_tokens
from .logit_lens import TopLogits
from .measured_labels import TokenLabels
from .neighbours import cosines, nearest_features
from .pair_statistics import PairList, PairStatistics, TwinStatistics, class_of, correlations
from .records import PAIR_TABLE, FeatureContext, FeatureRecord, JointContext, Label, PairRecord
from .top_contexts import TopContexts
from .words import words_of

_OF_TWIN = [name for name in PAIR_TABLE.names if name.startswith("twin_")]


@dataclass(frozen=True)
class Gathered:
    """All that the records are made of."""

    features: FeatureStatistics
    tokens: int  # read in all
    sample: ActiveFeatures  # for the correlations of neighbours
    pairs: PairStatistics
    twin: TwinStatistics | None
    W_dec: Tensor  # (d_sae, d_out), on the CPU
    logits: list[TopLogits]  # of each feature
    head_shares: Tensor | None  # (d_sae, heads), of an SAE that writes to attention heads
    tokenizer: PreTrainedTokenizerBase
    labels: Mapping[int, str]  # given by hand
    concepts: Mapping[int, Sequence[tuple[float, Label]]]  # of features that find what a probe set is about
    min_support: int

    @functools.cached_property
    def texts(self) -> TokenTexts:
        """Writes tokens as text."""
        return TokenTexts(self.tokenizer)


def feature_records(gathered: Gathered) -> Iterator[FeatureRecord]:
    """Yield a record of every feature, in order."""
    features = gathered.features
    features.top.cpu()
    features.sample.cpu()
    histogram = features.histogram.cpu()
    maxima, sums = features.maxima.tolist(), features.sums.tolist()
    tokens = features.firings.tokens()
    measured = TokenLabels(tokens, words_of(tokens, gathered.texts))
    firings = features.firings.by_feature()
    neighbours = nearest_features(gathered.W_dec, gathered.sample, gathered.min_support)
    for number, (by_cosine, by_correlation) in enumerate(neighbours):
        fires = int(histogram[number].sum())
        share = functools.partial(quantiles, histogram=histogram[number], largest=maxima[number])
        top = _contexts(gathered, number, features.top, "top", share)
        sample = _banded(_contexts(gathered, number, features.sample, "sample", share))
        labels = measured.of(firings[number])
        labels += [c for share, c in gathered.concepts.get(number, ()) if RARER * fires <= share * gathered.tokens]
        labels.sort(key=lambda label: -label.score)
        label, source, score = _label(gathered, number, top, labels)
        yield FeatureRecord(
            feature=number,
            label=label,
            label_source=source,
            label_score=score,
            labels=labels,
            fires=fires,
            frequency=fires / gathered.tokens,
            max_activation=maxima[number],
            mean_activation=sums[number] / fires if fires else 0.0,
            histogram=histogram[number].tolist(),
            promoted=gathered.logits[number].positive,
            suppressed=gathered.logits[number].negative,
            nearest_by_cosine=by_cosine,
            nearest_by_correlation=by_correlation,
            contexts=top + sorted(sample, key=lambda context: -context.activation),
            head_shares=[] if gathered.head_shares is None else gathered.head_shares[number].tolist(),
        )


def _label(
    gathered: Gathered, feature: int, top: list[FeatureContext], labels: list[Label]
) -> tuple[str, str, float | None]:
    if gathered.labels.get(feature):
        return gathered.labels[feature], "file", None
    if not top:
        return "", "none", None
    peaks = label_of_tokens([c.tokens[c.peak] for c in top], [c.activation for c in top])
    return choose_label(labels, peaks)


def _contexts(
    gathered: Gathered, feature: int, kept: TopContexts, kind: str, share: functools.partial[list[float]]
) -> list[FeatureContext]:
    windows = kept.of(feature)
    if not windows:
        return []
    activations = [window.activations[0][window.peak] for window in windows]
    return [
        FeatureContext(
            kind=kind,
            document_id=window.document_id,
            start=window.start,
            peak=window.peak,
            activation=activation,
            quantile=quantile,
            tokens=gathered.texts.of(window.token_ids),
            activations=window.activations[0],
        )
        for window, activation, quantile in zip(windows, activations, share(torch.tensor(activations)), strict=True)
    ]


def _banded(samples: list[FeatureContext]) -> list[FeatureContext]:
    """Return the first few of each band of quantiles: of equal width, the lowest from 0."""
    bands: list[list[FeatureContext]] = [[] for _ in range(BANDS)]
    for sample in samples:
        bands[min(int(sample.quantile * BANDS), BANDS - 1)].append(sample)
    return [sample for band in bands for sample in band[:PER_BAND]]


def pair_records(gathered: Gathered, pairs: PairList) -> Iterator[PairRecord]:
    """Yield a record of every pair, in order."""
    statistics, features = gathered.pairs, gathered.features
    for kept in statistics.contexts.values():
        kept.cpu()
    fires, support = features.fires.tolist(), statistics.support.tolist()
    squares = features.squares.cpu()
    correlation = correlations(statistics.products.cpu(), squares[pairs.a], squares[pairs.b])
    decoder_cosine = cosines(gathered.W_dec[pairs.a], gathered.W_dec[pairs.b]).tolist()
    twin = gathered.twin.columns() if gathered.twin else {name: [None] * len(pairs) for name in _OF_TWIN}
    for n, (a, b) in enumerate(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)):
        yield PairRecord(
            a=a,
            b=b,
            pair_class=class_of(fires[a], fires[b], support[n], decoder_cosine[n], gathered.min_support),
            score=pairs.scores[n] if pairs.scores else None,
            correlation=correlation[n],
            decoder_cosine=decoder_cosine[n],
            fires_a=fires[a],
            fires_b=fires[b],
            support=support[n],
            history_steps=list(pairs.history_steps),
            history=list(pairs.history[n]) if pairs.history else [],
            contexts=_joint_contexts(gathered, n),
            **{name: column[n] for name, column in twin.items()},
        )


def _joint_contexts(gathered: Gathered, pair: int) -> list[JointContext]:
    return [
        JointContext(
            kind=kind,
            document_id=window.document_id,
            start=window.start,
            peak=window.peak,
            tokens=gathered.texts.of(window.token_ids),
            activations_a=window.activations[0],
            activations_b=window.activations[1],
        )
        for kind, kept in gathered.pairs.contexts.items()
        for window in kept.of(pair)
    ]
