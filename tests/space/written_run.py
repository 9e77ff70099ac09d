"""A run with its twin and feature indexes, written in a second: invented features with labels of every kind."""

from __future__ import annotations

import json
import random
from pathlib import Path

from hf_selortho.features.index_writer import INDEX, IndexWriter
from hf_selortho.features.records import (
    BINS,
    ConceptRow,
    FeatureContext,
    FeatureRecord,
    Label,
    Neighbour,
    PairRecord,
    TokenEffect,
)
from tests.finished_run import save_run

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
WORDS = "river bridge market winter question engine phone match coast vote season minister committee price".split()
KINDS = ("token", "context", "concept", "model", "unclear")
FEATURES, DEAD, DENSE = 240, 7, 3  # features; those that never fire; the one that fires on a fifth of the tokens
CONCEPTS = {"158_code_Python": ("Python code", False), "110_aimade": ("text of a model", True), "7_x": (HOSTILE, True)}
DETAIL = "on ' {}' in 93% of the tokens it fires on; it fires on 71% of them"


def label_of(feature: int) -> str:
    """The label of a feature; feature 11 is named by an attacker, 12 after a line break."""
    rng = random.Random(feature)
    words = {11: HOSTILE, 12: "↵"}
    return words.get(feature, "" if feature == DEAD else ", ".join(rng.sample(WORDS, 2)) + f" {feature}")


def record_of(feature: int, hostile: bool = True) -> FeatureRecord:
    """An invented feature; the higher its number, the rarer it fires."""
    rng = random.Random(feature)
    dead, label = feature == DEAD, label_of(feature)
    source = "none" if dead else KINDS[feature % len(KINDS)]
    score = None if dead else round(rng.uniform(0.2, 0.5) if source == "unclear" else rng.uniform(0.7, 1.0), 3)
    frequency = 0.0 if dead else 0.2 if feature == DENSE else 0.05 * 0.97**feature
    tokens = [f" {rng.choice(WORDS)}" for _ in range(30)]
    activations = [0.0] * 30
    activations[14:17] = [2.0, 5.0, 1.0]
    labels = [] if score is None else [Label(source, label, score, DETAIL.format(label.split(",")[0]))]
    if score is not None:
        labels.append(Label("context", f"after '{WORDS[feature % 14]}'", score / 2, HOSTILE if hostile else "rarely"))
    return FeatureRecord(
        feature=feature,
        label=label,
        label_source=source,
        label_score=score,
        labels=labels,
        fires=round(frequency * 1e6),
        frequency=frequency,
        max_activation=0.0 if dead else 5.0 + feature / 10,
        mean_activation=0.0 if dead else 2.0,
        histogram=[0 if dead else max(0, 40 - (bin - 45) ** 2) for bin in range(BINS)],
        promoted=[TokenEffect(n, f" {WORDS[n]}", 3.0 - n / 4) for n in range(8)],
        suppressed=[TokenEffect(n, f" {WORDS[n]}", n / 4 - 3.0) for n in range(8)],
        nearest_by_cosine=[Neighbour((feature + 1) % FEATURES, 0.4, 0.1, 12)],
        nearest_by_correlation=[Neighbour((feature + 4) % FEATURES, 0.1, 0.3, 40)],
        contexts=[] if dead else [FeatureContext("top", 3, 0, 15, 5.0, 1.0, tokens, activations)],
    )


def write_run(folder: Path, *, concepts: bool = True, gallery: bool = True) -> Path:
    """Write `layer_2` and `layer_2_twin` into a folder, without a selection of pairs.

    Args:
        folder: of the run. concepts: whether some were measured. gallery: whether the index has one.
    """
    for folder_name, seed in (("layer_2", 0), ("layer_2_twin", 1)):
        settings = {} if seed == 0 else {"penalty": "none"}
        save_run(folder / folder_name, seed, 0.103 + seed / 50, d_sae=FEATURES, dataset="org/texts", **settings)
        _add_probes(folder / folder_name / "metrics.json", seed)
        with IndexWriter(folder / folder_name / INDEX) as writer:
            records = [record_of(feature) for feature in range(FEATURES)]
            writer.add_features(records)
            writer.add_pairs([PairRecord(0, 1, "nested", None, 0.4, 1, 2, 0.9, 0.8, 0.3, 0.2, 0.1, 9, 9, 5)])
            if concepts:
                writer.concepts = [
                    ConceptRow(
                        name, "the rest" if rank == 2 else title, seen, rank, 10 * place + rank,
                        0.95 - rank / 40 - place / 9, rank == 2,
                    )
                    for place, (name, (title, seen)) in enumerate(CONCEPTS.items())
                    if seed == 0 or place != 1
                    for rank in range(10)
                ]  # fmt: skip
            facts: dict[str, object] = {part: {} for part in ("sae", "lm", "text", "features", "pairs")}
            writer.facts = {**facts, "gallery": [_card(record) for record in records[8:32]]} if gallery else facts
    return folder


def _card(record: FeatureRecord) -> dict[str, object]:
    context = record.contexts[0]
    return {
        "feature": record.feature, "label": record.label, "source": record.label_source, "score": record.label_score,
        "tokens": context.tokens, "activations": context.activations, "peak": context.peak,
    }  # fmt: skip


def _add_probes(path: Path, seed: int) -> None:
    metrics = json.loads(path.read_text())

    def kept(mean: float) -> dict[str, dict[str, float]]:
        return {"clean": {"mean": mean - seed / 20, "low": 0.7, "high": 0.9, "sets": 6}, "trained_on": {"mean": 0.9}}

    metrics["evaluation"] |= {"max_decoder_cosine": 0.189 + seed / 40, "loss_recovered": 0.983}
    metrics["evaluation"]["probes"] = {
        "sets": "quick", "k": {"1": kept(0.781), "16": kept(0.874)}, "dense": kept(0.953), "per_set": [],
    }  # fmt: skip
    path.write_text(json.dumps(metrics))
