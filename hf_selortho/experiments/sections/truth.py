"""Sections on what features stand for: known ground truth, and pairs to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from ..examples import MATCH
from ..figures import SCORES, world_figure_plot
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
HIERARCHY_COLUMNS: tuple[Column, ...] = (
    ("absorption", "absorption", 3),
    ("of pairs", "absorption_pairs", 0),
    ("merged", "merged", 3),
)


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
        raised_words(findings.worlds),
        over_worlds_table(findings.worlds),
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


def rules(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Variants with a penalty that every one of the trainings has."""
    names = list(records[0]["scores"]) if records else []
    return [name for name in names if all(gain_over_twin([record], name, "mcc") is not None for record in records)]


def raised_words(records: Sequence[Mapping[str, Any]]) -> str:
    """Which rules raise a score over the twin's, and which lower it, by a sign test over all trainings."""
    names = rules(records)
    if not names:
        return ""
    lines = []
    for key, score in SCORES.items():
        told = []
        for word, sign in (("raise", 1), ("lower", -1)):
            found = []
            for name in names:
                gain = gain_over_twin(records, name, key)
                if gain is not None and consistent(gain, sign, len(names)):
                    found.append(f"`{name}` ({gain.signed()})")
            told.append(f"{', '.join(found) or 'none'} {word} it")
        lines.append(f"- {score}: {'; '.join(told)}.")
    return (
        f"Of the {len(names)} rules, these change a score in the same direction in more of the {len(records)} "
        f"trainings than chance would (sign test, {_LEVEL:.0%} divided by the number of rules); means over worlds and "
        "seeds, ± over trainings. Seeds of a world share its features and the tokens of the scores.\n\n"
        + "\n".join(lines)
    )


_LEVEL = 0.05


def consistent(gain: Figure, sign: int, tried: int) -> bool:
    """Whether a gain has a sign in more of the trainings than chance would, when so many rules were tried."""
    agreeing = sum(value * sign > 0 for value in gain.values)
    return bool(binomtest(agreeing, len(gain.values), alternative="greater").pvalue < _LEVEL / tried)


def over_worlds_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Gains of every rule over its twin, over all worlds and seeds, and in how many trainings there is one."""
    over, rows = (*SCORES, "absorption"), []
    for name in rules(records):
        row = [f"`{name}`"]
        for key in over:
            having = [r for r in records if key != "absorption" or r["world"]["structure"] == "hierarchical"]
            gain = gain_over_twin(having, name, key) if having else None
            raised = "" if gain is None else f" ({sum(value > 0 for value in gain.values)} of {len(gain.values)})"
            row.append("-" if gain is None else gain.signed() + raised)
        rows.append(row)
    return table(["rule", *(f"{SCORES.get(key, key)} (raised in)" for key in over)], rows)


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
    names = {found["variant"]: found["classes"]}
    if "control" in found:
        names[found["control"]] = found["control_classes"]
    rows = []
    for beside, classes in names.items():
        for name, facts in classes.items():
            if facts["pairs"]:
                numbers = ["correlation", "correlation_beside", "decoder_cosine", "decoder_cosine_beside"]
                shown = ["-" if facts[key] is None else f"{facts[key]:.2f}" for key in numbers]
                rows.append([f"`{beside}`", name, facts["pairs"], facts["apart"], facts["halved"], *shown])
    header = [
        "SAE beside the twin", "class", "pairs of the twin", "with counterparts", "correlation halved", "correlation",
        "of the counterparts", "decoder cosine", "of the counterparts",
    ]  # fmt: skip
    control = (
        f" `{found['control']}`, without penalty, says how far counterparts differ anyway."
        if "control" in found
        else ""
    )
    return (
        f"## Pairs to read\n\nThe most correlated pairs of `{found['sweep']}/none` on held-out text, and their "
        f"counterparts in `{found['sweep']}/{found['variant']}` (seed {found['seed']}): two features of a decoder "
        f"cosine of at least {MATCH} with those of the pair. Medians are over the pairs that have counterparts."
        f"{control} *duplicate*: each fires where the other does, and they point alike; *nested*: one fires within the "
        f"other.\n\n{_duplicates(found['classes'])}\n\n{table(header, rows)}\n\nPairs that fire on much the same "
        f"tokens and whose counterparts are correlated least beside them:\n\n{_pairs(found['separated'])}\n\n"
        "Nested pairs, one feature within the other, whose counterparts are correlated least beside them: what a "
        f"penalty should have left alone:\n\n{_pairs(found['nested'])}"
    )


def _duplicates(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """How many of the most correlated pairs are what the penalty is meant for."""
    total = sum(facts["pairs"] for facts in classes.values())
    return (
        f"Of the twin's {total} most correlated pairs, {classes['duplicate']['pairs']} are duplicates and "
        f"{classes['nested']['pairs']} nested; the others fire together and point elsewhere."
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
