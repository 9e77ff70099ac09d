"""Builds the feature index of an SAE: one pass over held-out text, then a record of every feature and every pair."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import __version__
from ..errors import SelOrthoError
from ..pair_selection import select_pairs
from .correlation_sample import CorrelationSample
from .feature_records import FeatureFacts, feature_records
from .feature_statistics import BANDS, PER_BAND, SAMPLES, FeatureStatistics
from .index_writer import IndexWriter
from .keepers import WINDOW
from .pair_records import pair_records
from .pair_statistics import PairList, PairStatistics, pairs_of_training, rule_of_classes
from .records import PAIR_CLASSES, PairRecord
from .sources import IndexSettings, Sources
from .text_pass import TextCounts, TextPass, taken
from .token_effects import token_effects
from .twin import TwinStatistics

logger = logging.getLogger(__name__)

PREVIEW_SHARE, PREVIEW_TOKENS = 0.05, 20_000  # of the text, from which pairs are chosen where no training has done it


@torch.inference_mode()
def build_feature_index(
    sources: Sources, settings: IndexSettings, writer: IndexWriter, progress: bool = True
) -> dict[str, Any]:
    """Read the text, write the records into `writer` and return the facts that it got.

    Every number but the correlations of neighbours counts all tokens that are read: of features, of pairs, of the twin.
    Neighbours come from every s-th token ([`CorrelationSample`]), and take both features firing on at least
    `min_support` of these (of the SAE's config, 4 by default). Pairs are those of the last selection of the training;
    without one, the text is begun once more: from its first 5% (at least 20,000 tokens) the most correlated pairs are
    chosen, as many as the config's `pair_fraction` says, and the pass over the whole text then counts them.

    The same sources and settings give the same bytes on the same machine.

    Raises:
        SelOrthoError: no text is held out, no token of it is read, or the twin does not fit the SAE.
    """
    sae = sources.sae
    pairs = chosen_pairs(sources, settings, progress)
    found = gathered(sources, settings, pairs)
    counts = gather(sources, settings, found, progress)
    scale = sae.input_scale.to(sae.W_dec.device)
    facts = FeatureFacts(
        statistics=found.features,
        tokens=counts.tokens,
        sample=found.sample.active(),
        W_dec=sae.W_dec.float().cpu(),
        effects=token_effects(sources.capture.lm, sae.W_dec.float() * scale, progress=progress),
        tokenizer=sources.capture.lm.tokenizer,
        labels=sources.labels or {},
        min_support=sae.config.min_support,
    )
    with tqdm(total=len(sae.b_enc), desc="features", unit="feature", disable=not progress) as bar:
        writer.add_features(_counted(feature_records(facts), bar))
    records = list(pair_records(pairs, found.pairs, facts, found.twin))
    writer.add_pairs(records)
    writer.facts = _facts(sources, settings, pairs, found, counts, records)
    return writer.facts


@dataclass
class Gathered:
    """What grows while the text is read."""

    features: FeatureStatistics
    pairs: PairStatistics
    sample: CorrelationSample
    twin: TwinStatistics | None = None


def gathered(sources: Sources, settings: IndexSettings, pairs: PairList) -> Gathered:
    """Nothing yet.

    Raises:
        SelOrthoError: the twin does not fit the SAE.
    """
    sae = sources.sae
    device, d_sae = sae.device, len(sae.b_enc)
    features = FeatureStatistics(d_sae, sae.config.context_length, settings.top_contexts, settings.seed, device)
    twin = _twin_statistics(sources, pairs)
    return Gathered(features, PairStatistics(pairs, device), CorrelationSample(d_sae), twin)


@torch.inference_mode()
def gather(sources: Sources, settings: IndexSettings, found: Gathered, progress: bool = True) -> TextCounts:
    """Read the text up to `settings.tokens` tokens, adding to what has been found."""
    bos = sources.sae.config.prepend_bos
    reader = TextPass(sources.sae, sources.capture)
    with tqdm(total=settings.tokens, desc="reading", unit="token", unit_scale=True, disable=not progress) as bar:
        for read in reader.read(taken(sources.contexts(), settings.tokens, bos), bar):
            peaks = read.batch.h.amax(2)  # (d_sae, b)
            found.features.add(read.batch, peaks)
            found.sample.add(read.batch)
            found.pairs.add(read.batch, peaks)
            if found.twin is not None:
                found.twin.add(read)
    counts = reader.counts
    if counts.tokens == 0:
        raise SelOrthoError(
            "no held-out token is left once special and sink tokens are dropped: give longer texts, or more of them"
        )
    if counts.tokens + counts.dropped_special + counts.dropped_sinks < settings.tokens:
        logger.warning("the held-out text is exhausted: %d tokens, %d were asked for", counts.tokens, settings.tokens)
    return counts


@torch.inference_mode()
def chosen_pairs(sources: Sources, settings: IndexSettings, progress: bool = True) -> PairList:
    """The pairs that the index is about, see [`build_feature_index`]."""
    d_sae = len(sources.sae.b_enc)
    if sources.history:
        return pairs_of_training(sources.history, d_sae, settings.max_pairs)
    nothing = torch.zeros(0, dtype=torch.int64)
    if settings.max_pairs == 0 or d_sae < 2:
        return PairList(nothing, nothing, "none")
    config = sources.sae.config
    tokens = min(settings.tokens, max(PREVIEW_TOKENS, int(PREVIEW_SHARE * settings.tokens)))
    sample = CorrelationSample(d_sae)
    with tqdm(total=tokens, desc="choosing pairs", unit="token", unit_scale=True, disable=not progress) as bar:
        contexts = taken(sources.contexts(), tokens, config.prepend_bos)
        for read in TextPass(sources.sae, sources.capture).read(contexts, bar):
            sample.add(read.batch)
    chosen = select_pairs(sample.active(), config.pair_fraction, config.min_support)
    a, b = chosen.i[: settings.max_pairs], chosen.j[: settings.max_pairs]
    order = (a * d_sae + b).argsort()
    return PairList(
        a[order], b[order], "held_out" if len(a) else "none", len(chosen), None, [None] * len(a), (), [[]] * len(a)
    )


def _twin_statistics(sources: Sources, pairs: PairList) -> TwinStatistics | None:
    if sources.twin is None:
        return None
    mine, other = sources.sae.config, sources.twin.config
    if (mine.d_in, mine.layer) != (other.d_in, other.layer):
        raise SelOrthoError(
            f"the twin {sources.twin_name} reads layer {other.layer} (d_in={other.d_in}), the SAE layer {mine.layer} "
            f"(d_in={mine.d_in}): name the SAE that was trained beside it without the penalty"
        )
    return TwinStatistics(sources.sae, sources.twin, pairs)


def _counted(records: Iterable[Any], bar: tqdm) -> Iterator[Any]:
    for record in records:
        yield record
        bar.update()


def _facts(
    sources: Sources,
    settings: IndexSettings,
    pairs: PairList,
    found: Gathered,
    counts: TextCounts,
    records: Sequence[PairRecord],
) -> dict[str, Any]:
    sae, documents, lm = sources.sae, sources.documents, sources.capture.lm
    classes = [record.pair_class for record in records]
    return {
        "hf_selortho": __version__,
        "sae": {
            "d_sae": len(sae.b_enc),
            "d_in": sae.config.d_in,
            "layer": sources.capture.layer,
            "hook_name": sources.capture.sites[sources.capture.layer].module,
            "activation": sae.config.activation,
            "weights_sha256": sources.weights_sha256,
            "name": sources.name,
        },
        "lm": {"name": lm.name, "revision": lm.revision},
        "text": {
            "dataset": documents.name,
            "config": sources.dataset_config,
            "split": documents.split,
            "revision": documents.revision,
            "fingerprint": documents.fingerprint,
            "held_out_fraction": documents.held_out_fraction,
            **vars(counts),
        },
        "settings": {
            "context_window": WINDOW,
            "top_contexts": settings.top_contexts,
            "samples": SAMPLES,
            "bands": BANDS,
            "samples_per_band": PER_BAND,
            "max_pairs": settings.max_pairs,
            "seed": settings.seed,
        },
        "correlation_sample_tokens": found.sample.tokens,
        "features": {"never_fired": int((found.features.fires == 0).sum())},
        "pairs": {
            "source": pairs.source,
            "step": pairs.step,
            "selected": pairs.selected,
            "kept": len(pairs),
            "rule": rule_of_classes(sae.config.min_support),
            "classes": {name: classes.count(name) for name in PAIR_CLASSES},
        },
        "twin": None
        if sources.twin is None
        else {"name": sources.twin_name, "weights_sha256": sources.twin_weights_sha256},
    }
