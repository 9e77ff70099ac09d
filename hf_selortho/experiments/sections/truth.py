"""Sections on what features stand for: known ground truth, and pairs to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import world_figure_plot
from ..findings import Findings
from ..summaries import TWIN, Figure
from ..tables import Column, table, world_table

WORLD_COLUMNS: tuple[Column, ...] = (
    ("explained variance", "explained_variance", 3),
    ("L0", "l0", 1),
    ("dead", "dead_features", 1),
    ("MCC", "mcc", 3),
    ("uniqueness", "uniqueness", 3),
    ("precision", "precision", 3),
    ("recall", "recall", 3),
    ("F1", "f1", 3),
    ("top correlation", "top_correlation", 3),
    ("max decoder cosine", "max_decoder_cosine", 3),
)
HIERARCHY_COLUMNS: tuple[Column, ...] = (("absorption", "absorption", 3), ("merged", "merged", 3))
RAISED = ("mcc", "uniqueness", "f1")  # what a selection rule is to raise


def ground_truth(findings: Findings, figures: Path, link: str) -> str:
    """Recovery of features that are known."""
    if not findings.worlds:
        return ""
    groups = by_world(findings.worlds)
    parts = [
        "## Known ground truth\n\nSynthetic activations of SAELens's models, whose features are known; "
        "MCC, uniqueness, "
        "precision, recall and F1 are theirs. *absorption*: how much more often a parent's feature is "
        "silent where a child "
        "is active than where none is; *merged*: cosine of the child's decoder direction with the "
        "parent's true one, beyond "
        "that of the true directions.",
        raised_words(groups),
    ]
    figure = world_figure_plot(groups, figures / "ground_truth.png")
    if figure is not None:
        parts.append(f"![Recovery of known features]({link}/ground_truth.png)")
    for (world, recipe), records in groups.items():
        columns = WORLD_COLUMNS + (HIERARCHY_COLUMNS if records[0]["world"]["structure"] == "hierarchical" else ())
        parts.append(f"### {world}, {recipe}\n\n{_world_words(records[0])}\n\n{world_table(records, columns)}")
    return "\n\n".join(parts)


def by_world(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of worlds by the names of world and recipe."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["world"]["name"], record["recipe"]), []).append(record)
    return groups


def _world_words(record: Mapping[str, Any]) -> str:
    world, training = record["world"], record["training"]
    tree = f", {world['roots']} roots with {world['children']} children each to depth {world['depth']}" * (
        world["structure"] == "hierarchical"
    )
    noise = f", noise {world['noise']:g}" if world["noise"] else ""
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    return (
        f"{world['features']} features in {world['dimensions']} dimensions{tree}{noise}; {settings}; "
        f"{training['steps']} "
        f"steps of {training['batch_size']} tokens."
    )


def raised_words(groups: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> str:
    """Which variants raise a score over the twin's in every seed, and by how much."""
    lines = []
    for (world, recipe), records in groups.items():
        for key in RAISED:
            found = {
                name: gain for name in records[0]["scores"] if (gain := gain_over_twin(records, name, key)) is not None
            }
            better = {name: gain for name, gain in found.items() if min(gain.values) > 0}
            worse = {name: gain for name, gain in found.items() if max(gain.values) < 0}
            if better:
                name, gain = max(better.items(), key=lambda item: item[1].mean)
                lines.append(
                    f"- {world}, {recipe}: {_NAMES[key]} is raised most by `{name}`, {gain.signed()} (every seed)."
                )
            if worse:
                name, gain = min(worse.items(), key=lambda item: item[1].mean)
                lines.append(
                    f"- {world}, {recipe}: {_NAMES[key]} is lowered most by `{name}`, {gain.signed()} (every seed)."
                )
            if not better and not worse:
                lines.append(
                    f"- {world}, {recipe}: no variant changes {_NAMES[key]} in the same direction in every seed."
                )
    return "\n".join(lines)


_NAMES = {"mcc": "MCC", "uniqueness": "uniqueness", "f1": "F1"}


def gain_over_twin(records: Sequence[Mapping[str, Any]], variant: str, key: str) -> Figure | None:
    """Difference of a score from the twin's of the same seed; None for the twin itself, or where a seed lacks it."""
    if variant == TWIN or variant.startswith(f"{TWIN}-"):
        return None
    pairs = [(r["scores"].get(variant, {}).get(key), r["scores"].get(TWIN, {}).get(key)) for r in records]
    if any(own is None or twin is None for own, twin in pairs):
        return None
    return Figure(tuple(own - twin for own, twin in pairs))


def example_pairs(findings: Findings, figures: Path, link: str) -> str:
    """Pairs of the twin that the penalty separated, rightly and wrongly."""
    found = findings.examples
    if found is None:
        return ""
    rows = []
    for name, facts in found["classes"].items():
        if facts["pairs"]:
            numbers = ["correlation", "correlation_beside", "decoder_cosine", "decoder_cosine_beside"]
            shown = ["-" if facts[key] is None else f"{facts[key]:.2f}" for key in numbers]
            rows.append([name, facts["pairs"], facts["merged"], facts["halved"], *shown])
    header = [
        "class", "pairs", "one feature in the SAE", "correlation halved", "correlation", "in the SAE", "decoder cosine",
        "in the SAE",
    ]  # fmt: skip
    return (
        f"## Pairs to read\n\nThe most correlated pairs of `{found['sweep']}/none` on held-out text, and "
        f"the features of "
        f"`{found['sweep']}/{found['variant']}` (seed {found['seed']}) that point most like theirs; "
        f"medians are over pairs "
        "whose two features have two counterparts. *duplicate*: each fires where the other does, and they point alike; "
        "*nested*: one fires within the other.\n\n"
        f"{table(header, rows)}\n\nPairs that fire on much the same tokens and that the penalty "
        f"separated:\n\n{_pairs(found['separated'])}\n\n"
        "Pairs that it separated and should have left alone, as one feature is nested in the other:\n\n"
        f"{_pairs(found['nested'])}"
    )


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> str:
    if not pairs:
        return "(none)"
    return "\n".join(
        f"- {_label(pair['label_a'])} and {_label(pair['label_b'])}: correlation {pair['correlation']:.2f} → "
        f"{pair['correlation_beside']:.2f}, P(a|b) {pair['a_given_b']:.2f}, P(b|a) "
        f"{pair['b_given_a']:.2f}, decoder cosine "
        f"{pair['decoder_cosine']:.2f} → {pair['decoder_cosine_beside']:.2f}"
        + (f"; both fire in “{_plain(pair['context'])}”" if pair["context"] else "")
        for pair in pairs
    )


def _label(text: str) -> str:
    return f"“{_plain(text)}”"


def _plain(text: str) -> str:
    """Text of articles without what Markdown or HTML would make something of."""
    return "".join(" " if c in "<>|`*_[]#\\\n" else c for c in text).strip()
