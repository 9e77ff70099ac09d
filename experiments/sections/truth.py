"""Section on synthetic worlds, whose features are known."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import recovery_figure
from ..findings import Findings
from ..summaries import NAMES, TWIN
from ..tables import Column, table, world_table
from ..world_gains import (
    LEVEL,
    SCORES,
    by_recipe,
    by_world,
    enough,
    gain_over_twin,
    hierarchies,
    price_over_twin,
    raised_and_lowered,
    rules,
)
from ..world_scores import RECOVERED
from ..worlds import BATCH_SIZE, LEARNING_RATE

WORLD_COLUMNS: tuple[Column, ...] = (
    ("explained variance", "explained_variance", 3),
    ("L0", "l0", 1),
    ("dead", "dead_features", 1),
    ("MCC", "mcc", 3),
    ("uniqueness", "uniqueness", 3),
    ("recovered", "recovered", 3),
    ("precision", "precision", 3),
    ("recall", "recall", 3),
    ("F1", "f1", 3),
    ("top correlation", "top_correlation", 3),
    ("max decoder cosine", "max_decoder_cosine", 3),
)
HIERARCHY_COLUMNS: tuple[Column, ...] = (
    ("absorption", "absorption", 3),
    ("of pairs", "absorption_pairs", 0),
    ("merged", "merged", 3),
)


def ground_truth(findings: Findings, figures: Path, link: str) -> str:
    """Recovery of features that are known."""
    if not findings.worlds:
        return ""
    parts = [
        "## Known ground truth\n\nSynthetic activations of SAELens's models, whose features are known. *MCC*: mean "
        "cosine of the best one-to-one matching of features and true ones; *uniqueness*: how many different true "
        "ones are nearest to a feature, over the number of features; "
        f"*recovered*: share of the true ones that a feature points like, with a cosine of at least {RECOVERED}; "
        "*precision*, *recall* and *F1*: of features as detectors of the true ones nearest to them. *absorption*: how "
        "much more often a parent's feature is silent where a child is active than where none is; *merged*: cosine of "
        "the child's decoder direction with the parent's true one, beyond that of the true directions. MCC, "
        "uniqueness, precision, recall, F1, explained variance, L0 and dead features are SAELens's figures."
    ]
    for recipe, records in by_recipe(findings.worlds).items():
        words = raised_words(records)
        parts += [f"### All worlds, {NAMES.get(recipe, recipe)}", words, over_worlds_table(records)] if words else []
        parts += filter(None, [beside_peers(records)])
    if recovery_figure(by_recipe(findings.worlds), figures / "ground_truth.png") is not None:
        parts.append(f"![Recovery of known features]({link}/ground_truth.png)")
    for (world, recipe), records in by_world(findings.worlds).items():
        columns = WORLD_COLUMNS + (HIERARCHY_COLUMNS if hierarchies(records) else ())
        parts.append(f"### {world}, {recipe}\n\n{_world_words(records)}\n\n{world_table(records, columns)}")
    return "\n\n".join(parts)


def _world_words(records: Sequence[Mapping[str, Any]]) -> str:
    world = records[0]["world"]
    training = {"batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, **records[0]["training"]}
    seeds = len({record["world"].get("seed") for record in records})
    own = "; each seed has features of its own" * (seeds == len(records) > 1)
    tree = f", {world['roots']} roots with {world['children']} children each to depth {world['depth']}" * (
        world["structure"] == "hierarchical"
    )
    noise = f", noise {world['noise']:g}" if world["noise"] else ""
    settings = ", ".join(f"{key} {value}" for key, value in records[0]["settings"].items())
    words = (
        f"{world['features']} features in {world['dimensions']} dimensions{tree}{noise}{own}; {settings}; "
        f"{training['steps']} steps of {training['batch_size']} tokens, learning rate {training['learning_rate']:g}."
    )
    peers = [name for record in records for name in record["peers"]]
    return words + " SAELens's SAEs start from the mean of the activations, which ours take off." * bool(peers)


def raised_words(records: Sequence[Mapping[str, Any]]) -> str:
    """Which rules raise a score over the twin's, and which lower it."""
    names = rules(records)
    if not names:
        return ""
    if not enough(records):
        return f"{len(records)} trainings are too few to tell a rise of a score from chance."
    lines = []
    for key, score in SCORES.items():
        told = []
        for word, found in zip(("raised", "lowered"), raised_and_lowered(records, key), strict=True):
            listed = [f"`{name}` ({gain.mean:+.3f})" for name, gain in found.items()]
            told.append(f"{word} by {', '.join(listed) or 'none'}")
        lines.append(f"- {score}: {'; '.join(told)}.")
    lines += absorption_words(records)
    return (
        f"Of the {len(names)} rules, those whose change of a score has the same sign in more of the {len(records)} "
        f"trainings than chance would have it (sign test, {LEVEL:.0%} over all rules and these {len(SCORES)} scores), "
        "with their mean change; below, the mean change of all, and in how many trainings it is a rise. Rules differ "
        "in price: read a score beside FVU and L0.\n\n" + "\n".join(lines)
    )


def absorption_words(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rules under which a parent's feature is silent more often, or less often, in every hierarchy."""
    having = hierarchies(records)
    gains = {name: gain_over_twin(records, name, "absorption") for name in rules(records)}
    told = []
    for word, sign in (("higher", 1), ("lower", -1)):
        found = [n for n, gain in gains.items() if gain is not None and gain.agrees(sign)]
        told.append(f"{word} in all of them with {', '.join(f'`{name}`' for name in found) or 'none'}")
    return [f"- absorption, in the {len(having)} trainings on hierarchies: {'; '.join(told)}."] if having else []


def beside_peers(records: Sequence[Mapping[str, Any]]) -> str:
    """How well SAELens's SAEs find the features, beside ours without penalty."""
    ours = {TWIN: [record["scores"].get(TWIN) for record in records]}
    names = list(dict.fromkeys(name for record in records for name in record["peers"]))
    theirs = {f"SAELens `{name}`": [record["peers"].get(name) for record in records] for name in names}
    told = []
    for name, scores in {**ours, **theirs}.items():
        known = [score for score in scores if score is not None]
        if len(known) == len(scores) and all(score.get(key) is not None for score in known for key in ("mcc", "f1")):
            mcc, f1 = (statistics.fmean(score[key] for score in known) for key in ("mcc", "f1"))
            told.append(f"{name if name != TWIN else 'ours without penalty'} {mcc:.3f} and {f1:.3f}")
    if len(told) < 2:
        return ""
    return f"MCC and F1, mean over the {len(records)} trainings, on the same tokens and steps: {', '.join(told)}."


def over_worlds_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Mean change of every rule over its twin, over all worlds and seeds, and in how many trainings it is a rise."""
    digits = {"l0": 1, **dict.fromkeys((*SCORES, "precision", "absorption"), 3)}
    rows = []
    for name in rules(records):
        price = price_over_twin(records, name)
        row = [f"`{name}`", "-" if price is None else f"{price.mean:+.1%}"]
        for key, count in digits.items():
            gain = gain_over_twin(records, name, key)
            raised = "" if gain is None else f" ({sum(value > 0 for value in gain.values)} of {len(gain.values)})"
            row.append("-" if gain is None else f"{gain.mean:+.{count}f}{raised * (key != 'l0')}")
        rows.append(row)
    return table(["rule", "FVU", "L0", *(SCORES.get(key, key) for key in list(digits)[1:])], rows)
