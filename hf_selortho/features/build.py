"""Builds the feature index of an SAE: one pass over held-out text, then a record of every feature and every pair."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import __version__
from ..configuration_selortho import SelOrthoConfig
from ..data.contexts import Cutter, held_out_contexts
from ..data.pair_history import PairSnapshot
from ..data.texts import Documents
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..language_models.contexts import Context
from ..modeling_selortho import SelOrthoSAE
from ..pair_selection import select_pairs
from ..utils.files import sha256_of
from ..utils.progress import EstimatedBar
from .concept_labels import Concepts, measure_concepts
from .feature_records import Gathered, feature_records, pair_records
from .feature_statistics import BANDS, PER_BAND, SAMPLES, FeatureStatistics
from .gallery import Gallery
from .heads import HEADS_SITE, head_norms
from .index import FeatureIndex
from .index_writer import IndexWriter
from .labels import THRESHOLDS
from .logit_lens import find_final_norm, find_path, sae_logits
from .neighbours import CorrelationSample
from .pair_statistics import PairList, PairStatistics, TwinStatistics, pairs_of_training, rule_of_classes
from .records import LABEL_SOURCES, PAIR_CLASSES
from .text_pass import TextCounts, TextPass
from .top_contexts import WINDOW, Batch

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_PLACE = ("d_in", "layer", "site", "target")  # in which a twin is alike
PREVIEW_SHARE, PREVIEW_TOKENS = 0.05, 20_000  # of the text, from which pairs are chosen where no training has done it


@dataclass(frozen=True)
class IndexSettings:
    """How much of what an index holds."""

    tokens: int = 1_000_000  # of the text, beside BOS; fewer where there are not so many
    max_pairs: int = 5000
    top_contexts: int = 10  # of each feature
    seed: int = 0  # of the contexts drawn at random
    concepts: str = "none"  # probe sets that features are named after: "quick", "all" or "none"

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("max_pairs", 0), ("top_contexts", 1)):
            if getattr(self, name) < least:
                raise SelOrthoError(f"{name} {getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class Sources:
    """What an index is built from.

    `history` is that of the SAE's training (`pair_history.read_pair_history`), empty where there is none. `labels`
    stand in place of those made of tokens.
    """

    sae: SelOrthoSAE
    capture: ActivationCapture  # the language model at the SAE's layer
    documents: Documents
    name: str  # of the SAE
    weights_sha256: str
    twin: SelOrthoSAE | None = None  # twin baseline: the same run without the penalty
    twin_name: str = ""
    twin_weights_sha256: str = ""
    history: Sequence[PairSnapshot] = ()
    labels: Mapping[int, str] | None = None
    min_tokens: int = 8  # of a context
    text_settings: Mapping[str, Any] = field(default_factory=dict)  # that the text was opened with
    moved: Sequence[float] = ()  # by feature, where the training started from another SAE: see `records.MOVED`

    def contexts(self) -> Iterator[Context]:
        """Read the held-out contexts, from the start."""
        config = self.sae.config
        cutter = Cutter(self.capture.lm.tokenizer, config.context_length, config.prepend_bos, self.min_tokens)
        return held_out_contexts(self.documents, cutter)


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
        SelOrthoError: no text is held out, no token of it is read, the twin does not fit the SAE, or the language model
            has no final norm.
    """
    d_sae, config = len(sources.sae.b_enc), sources.sae.config
    path = find_path(config, sources.capture)
    if not path.left_out:
        find_final_norm(sources.capture.lm)  # of the logit lens: without one, no text is read
    pairs = _choose_pairs(sources, settings, progress)
    concepts = measure_concepts(sources.sae, sources.capture, settings.concepts, config.prepend_bos, progress)
    gathered, counts, sampled = _read_text(sources, settings, pairs, concepts, progress)
    gallery, named = Gallery(), Counter[str]()
    for record in tqdm(feature_records(gathered), "features", d_sae, unit="feature", disable=not progress):
        writer.add_features([record])
        gallery.add(record)
        named[record.label_source] += 1
    writer.concepts, writer.moved = concepts.rows, sources.moved
    classes: Counter[str] = Counter()
    for record in pair_records(gathered, pairs):
        writer.add_pairs([record])
        classes[record.pair_class] += 1
    facts = _plan(sources, settings)
    writer.facts = {
        **facts,
        "settings": {**facts["settings"], "concepts": settings.concepts if concepts.sets else "none"},
        "text": {**facts["text"], **vars(counts)},
        "correlation_sample_tokens": sampled,
        "features": {"never_fired": int((gathered.features.fires == 0).sum())},
        "logit_lens": path.in_words(),
        "heads": None if gathered.head_shares is None else gathered.head_shares.shape[1],
        "labels": {
            "counts": {source: named[source] for source in LABEL_SOURCES if named[source]},
            "thresholds": THRESHOLDS,
            "probe_sets": concepts.sets,
        },
        "gallery": gallery.items(),
        "pairs": {
            "source": pairs.source,
            "step": pairs.step,
            "selected": pairs.selected,
            "kept": len(pairs),
            "rule": rule_of_classes(config.min_support),
            "classes": {name: classes[name] for name in PAIR_CLASSES},
        },
        "twin": facts["twin"] if sources.twin else None,
    }
    return writer.facts


def holds_index(folder: Path, sources: Sources, settings: IndexSettings, *, replace: bool = False) -> bool:
    """Tell whether the index in a folder is the very one that these sources and settings give.

    Raises:
        SelOrthoError: it is another one, or damaged; never if it is to be replaced then (`replace`).
    """
    try:
        present = _flat(FeatureIndex.open(folder).facts)
    except SelOrthoError as error:
        if replace:
            return False
        raise SelOrthoError(f"{error}; --overwrite replaces it") from error
    planned = _flat(_plan(sources, settings))
    changes = [f"{name} {present.get(name)!r} -> {new!r}" for name, new in planned.items() if present.get(name) != new]
    if changes and not replace:
        raise SelOrthoError(
            f"{folder} holds an index of other settings ({'; '.join(changes)}): use the same ones to keep it, "
            "--overwrite to replace it, or another --output"
        )
    return not changes


def in_words(facts: Mapping[str, Any]) -> str:
    """Say in a line what has been built."""
    text, pairs, features, labels = (facts[part] for part in ("text", "pairs", "features", "labels"))
    named = sum(number for source, number in labels["counts"].items() if source not in ("unclear", "none"))
    classes = ", ".join(f"{number:,} {name}" for name, number in pairs["classes"].items() if number)
    return (
        f"{facts['sae']['d_sae']:,} features, {features['never_fired']:,} of which never fired, {named:,} with a clear "
        f"label; {pairs['kept']:,} pairs"
        f"{f' ({classes})' if classes else ''}; from {text['tokens']:,} tokens of {text['documents']:,} documents"
    )


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    """Name each value of nested objects by the keys that lead to it: "text.split"."""
    if not isinstance(content, Mapping):
        return {name: content}
    inner = (_flat(value, f"{name}.{key}" if name else key) for key, value in content.items())
    return {key: value for part in inner for key, value in part.items()}


def weights_sha256(sae: SelOrthoSAE, folder: Path | None = None) -> str:
    """Return a sha256 that names the weights of an SAE.

    That of the bytes of its model.safetensors, as the Hub shows it, where the SAE comes from a folder that holds it;
    else of name, dtype, shape and bytes of every tensor, by name.
    """
    if folder is not None and (folder / WEIGHTS).is_file():
        return sha256_of(folder / WEIGHTS)
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_text(
    sources: Sources, settings: IndexSettings, pairs: PairList, concepts: Concepts, progress: bool
) -> tuple[Gathered, TextCounts, int]:
    """Read the text once; return what its tokens say of features and pairs, their counts, and those of the sample.

    Raises:
        SelOrthoError: no token is read, or the twin does not fit the SAE.
    """
    sae, config = sources.sae, sources.sae.config
    features = FeatureStatistics(
        len(sae.b_enc), config.context_length, settings.top_contexts, settings.seed, sae.device
    )
    pair_statistics, twin = PairStatistics(pairs, sae.device), _twin_statistics(sources, pairs)
    sample = CorrelationSample(len(sae.b_enc))
    text = TextPass(sae, sources.capture)
    for batch in _with_bar(text.read(sources.contexts(), settings.tokens), "reading", settings.tokens, progress):
        features.add(batch)
        pair_statistics.add(batch)
        sample.add(batch)
        if twin is not None:
            twin.add(batch)
    counts = text.counts
    if counts.tokens == 0:
        raise SelOrthoError(
            "no held-out token is left once special and sink tokens are dropped: give longer texts, or more of them"
        )
    if counts.tokens + counts.dropped_special + counts.dropped_sinks < settings.tokens:
        logger.warning("the held-out text is exhausted: %d tokens, %d were asked for", counts.tokens, settings.tokens)
    gathered = Gathered(
        features=features,
        tokens=counts.tokens,
        sample=sample.active(),
        pairs=pair_statistics,
        twin=twin,
        W_dec=sae.W_dec.float().cpu(),
        logits=sae_logits(sae, sources.capture, progress),
        head_shares=_head_shares(sources) if config.written_site == HEADS_SITE else None,
        tokenizer=sources.capture.lm.tokenizer,
        labels=sources.labels or {},
        concepts=concepts.labels,
        min_support=config.min_support,
    )
    return gathered, counts, sample.tokens


def _head_shares(sources: Sources) -> torch.Tensor:
    """Return the share of the squared norm of each decoder direction within each head, (d_sae, heads) on the CPU."""
    squares = head_norms(sources.sae, sources.capture.lm).square()
    return (squares / squares.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).cpu()


def _choose_pairs(sources: Sources, settings: IndexSettings, progress: bool) -> PairList:
    """Choose the pairs that the index is about, see [`build_feature_index`]."""
    d_sae, config = len(sources.sae.b_enc), sources.sae.config
    if sources.history:
        return pairs_of_training(sources.history, d_sae, settings.max_pairs)
    if settings.max_pairs == 0 or d_sae < 2:
        nothing = torch.zeros(0, dtype=torch.int64)
        return PairList(nothing, nothing, "none", 0)
    tokens = min(settings.tokens, max(PREVIEW_TOKENS, int(PREVIEW_SHARE * settings.tokens)))
    sample = CorrelationSample(d_sae)
    batches = TextPass(sources.sae, sources.capture).read(sources.contexts(), tokens)
    for batch in _with_bar(batches, "choosing pairs", tokens, progress):
        sample.add(batch)
    chosen = select_pairs(sample.active(), config.pair_fraction, config.min_support)
    a, b = chosen.i[: settings.max_pairs], chosen.j[: settings.max_pairs]
    order = (a * d_sae + b).argsort()
    return PairList(a[order], b[order], "held_out" if len(a) else "none", len(chosen))


def _twin_statistics(sources: Sources, pairs: PairList) -> TwinStatistics | None:
    if sources.twin is None:
        return None
    mine, other = ({n: getattr(sae.config, n) for n in _PLACE} for sae in (sources.sae, sources.twin))
    if different := [name for name in _PLACE if mine[name] != other[name]]:
        theirs, own = (", ".join(f"{name}={config[name]}" for name in different) for config in (other, mine))
        raise SelOrthoError(
            f"the twin {sources.twin_name} has {theirs}, the SAE {own}: name the SAE that was trained beside it "
            "without the penalty"
        )
    return TwinStatistics(sources.sae, sources.twin, pairs) if len(pairs) else None


def _with_bar(batches: Iterator[Batch], name: str, tokens: int, progress: bool) -> Iterator[Batch]:
    with EstimatedBar(total=tokens, desc=name, unit="token", unit_scale=True, disable=not progress) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.activations))


def _sites(config: SelOrthoConfig, capture: ActivationCapture) -> dict[str, Any]:
    read, target = capture.sites[capture.layer], capture.target_sites.get(capture.layer)
    facts = {"site": config.site, "target": config.target, "hook_name": read.module, "hook_side": read.side}
    return facts | ({"target_hook_name": target.module, "target_hook_side": target.side} if target else {})


def _plan(sources: Sources, settings: IndexSettings) -> dict[str, Any]:
    """Return what an index is built from, on which alone its content depends."""
    sae, documents, capture = sources.sae, sources.documents, sources.capture
    labels = json.dumps(sorted(sources.labels.items())) if sources.labels else ""
    read = json.dumps([sae.config.own_settings(), dict(sources.text_settings)], sort_keys=True, default=str)
    return {
        "hf_selortho": __version__,
        "sae": {
            "d_sae": len(sae.b_enc),
            "d_in": sae.config.d_in,
            "layer": capture.layer,
            **_sites(sae.config, capture),
            "activation": sae.config.activation,
            "weights_sha256": sources.weights_sha256,
            "name": sources.name,
        },
        "lm": {"name": capture.lm.name, "revision": capture.lm.revision, "dtype": str(capture.lm.model.dtype)},
        "text": {
            "dataset": documents.name,
            "config": sources.text_settings.get("dataset_config"),
            "split": documents.split,
            "revision": documents.revision,
            "fingerprint": documents.fingerprint,
            "held_out_fraction": documents.held_out_fraction,
        },
        "settings": {
            "context_window": WINDOW,
            "top_contexts": settings.top_contexts,
            "samples": SAMPLES,
            "bands": BANDS,
            "samples_per_band": PER_BAND,
            "max_pairs": settings.max_pairs,
            "seed": settings.seed,
            "tokens": settings.tokens,
            "concepts": settings.concepts,
            "min_tokens": sources.min_tokens,
            "inputs_sha256": hashlib.sha256(read.encode()).hexdigest(),  # of the SAE's config and how the text is read
            "labels_sha256": hashlib.sha256(labels.encode()).hexdigest() if labels else None,
        },
        "twin": {"name": sources.twin_name or None, "weights_sha256": sources.twin_weights_sha256 or None},
    }
