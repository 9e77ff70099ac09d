"""Section of pairs to read: what a penalty separated, rightly and wrongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..examples import MATCH
from ..findings import Findings
from ..tables import table


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
                rate = f"{facts['fires'] / found['tokens']:.0%}"
                rows.append([f"`{beside}`", name, facts["pairs"], rate, facts["apart"], facts["halved"], *shown])
    header = [
        "SAE beside the twin", "class", "pairs of the twin", "the rarer fires on", "with counterparts",
        "correlation halved", "correlation", "of the counterparts", "decoder cosine", "of the counterparts",
    ]  # fmt: skip
    control = (
        f" `{found['control']}`, without penalty, says how far counterparts differ anyway."
        if "control" in found
        else ""
    )
    return (
        f"## Pairs to read\n\nThe most correlated pairs of `{found['sweep']}/none` on held-out text, and their "
        f"counterparts in `{found['sweep']}/{found['variant']}` (seed {found['seed']}): two features of a decoder "
        f"cosine of at least {MATCH} with those of the pair. On how many tokens the rarer feature of a pair fires is a "
        f"median over all of them; the other medians are over the pairs that have counterparts.{control} *duplicate*: "
        "each fires where the other does, and they point alike; *nested*: one fires within the other.\n\n"
        f"{_duplicates(found['classes'])}\n\n{table(header, rows)}\n\nPairs that fire on much the same tokens and "
        "whose counterparts are correlated least beside them; where a feature fires on much of the text, its strongest "
        f"tokens, which stand for it here, say little:\n\n{_pairs(found['separated'], found['tokens'])}\n\n"
        "Nested pairs, one feature within the other, whose counterparts are correlated least beside them: what a "
        f"penalty should have left alone:\n\n{_pairs(found['nested'], found['tokens'])}"
    )


def duplicates_words(found: Mapping[str, Any]) -> str:
    """How many of the most correlated pairs are what the penalty is meant for, in half a sentence."""
    total = sum(facts["pairs"] for facts in found["classes"].values())
    count = found["classes"]["duplicate"]["pairs"]
    return f"of the {total} most correlated pairs without penalty, {count} are duplicates"


def _duplicates(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """How many of the most correlated pairs are of which class."""
    total = sum(facts["pairs"] for facts in classes.values())
    return (
        f"Of the twin's {total} most correlated pairs, {classes['duplicate']['pairs']} are duplicates and "
        f"{classes['nested']['pairs']} nested; the others fire together on some tokens only, or point elsewhere."
    )


def _pairs(pairs: Sequence[Mapping[str, Any]], tokens: int) -> str:
    return "\n".join(f"- {_pair(pair, tokens)}" for pair in pairs) or "(none)"


def _pair(pair: Mapping[str, Any], tokens: int) -> str:
    fires = " and ".join(f"{_label(pair[f'label_{x}'])} ({pair[f'fires_{x}'] / tokens:.0%} of tokens)" for x in "ab")
    given = f"P(a|b) {pair['a_given_b']:.2f}, P(b|a) {pair['b_given_a']:.2f}"
    correlation = f"correlation {pair['correlation']:.2f} → {pair['correlation_beside']:.2f}"
    cosine = f"decoder cosine {pair['decoder_cosine']:.2f} → {pair['decoder_cosine_beside']:.2f}"
    context = f"; both fire in “{_plain(pair['context'])}”" if pair["context"] else ""
    return f"{fires}: {correlation}, {given}, {cosine}{context}"


def _label(text: str) -> str:
    return f"“{_plain(text)}”"


def _plain(text: str) -> str:
    """Text of articles without what Markdown or HTML would make something of."""
    return "".join(" " if c in "<>|`*_[]#\\\n" else c for c in text).strip()
