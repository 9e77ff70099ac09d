"""Section on what SAEs are worth inside the language model: probing, absorption, and how alike seeds are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..findings import Findings
from ..summaries import NAMES, TWIN, Summary, is_twin, paired, twin_among
from ..tables import MODEL_COLUMNS, in_order, seeds_table, summary_table

LETTERS_F1 = 0.5  # of the main features, below which absorption means little


def on_the_model(findings: Findings, figures: Path, link: str) -> str:
    """Probing, absorption and stability."""
    if not findings.pareto:
        return ""
    parts = ["## On the language model", _task_words(findings)]
    for sweep in findings.pareto:
        summaries = [s for s in findings.of(sweep) if s.variant == TWIN or not is_twin(s.variant)]
        shown = {summary.variant for summary in summaries}
        records = [r for r in findings.seeds if r["sweep"] == sweep and r["variant"] in shown]
        parts.append(f"### {NAMES.get(sweep, sweep)} inside the model\n\n{summary_table(summaries, MODEL_COLUMNS)}")
        parts += filter(None, [changed_words(summaries)])
        twin = twin_among(summaries)
        if twin is not None and (f1 := twin.figure("first_letter_f1")) is not None and f1.mean < LETTERS_F1:
            parts.append(
                f"The features that stand best for a letter reach a mean F1 of {f1.text(2)} without penalty: an SAE of "
                "this size has few features of letters that could be absorbed, so the absorption figures say little "
                "here."
            )
        if records:
            parts.append(
                "How alike the seeds are (decoder cosines; features are shared if their matched cosine exceeds 0.7; "
                "distinct directions: 1 if all seeds find the same, the number of seeds if none do).\n\n"
                + seeds_table(records)
            )
    return "\n\n".join(parts)


TASKS = {
    "probing_accuracy_k1": "probing with one feature", "probing_accuracy_k5": "with five",
    "first_letter_f1": "first-letter F1",
}  # fmt: skip


def changed_words(summaries: Sequence[Summary]) -> str:
    """Which variants differ from the twin on the tasks in every seed."""
    twin = twin_among(summaries)
    if twin is None:
        return ""
    lines = []
    for key, words in TASKS.items():
        changes = {s.variant: paired(s, twin, key) for s in in_order(summaries) if s is not twin}
        known = {name: change for name, change in changes.items() if change is not None and len(change.values) > 2}
        told = []
        for word, sign in (("higher", 1), ("lower", -1)):
            found = {name: change for name, change in known.items() if change.agrees(sign)}
            listed = ", ".join(f"`{name}` ({change.mean:+.3f})" for name, change in found.items())
            told.append(f"{word}: {listed or 'none'}")
        lines += [f"- {words}, {'; '.join(told)}."] * bool(known)
    if not lines:
        return ""
    return (
        "Higher or lower than the twin in every seed, with the mean difference; of three seeds, chance alone would "
        "have a quarter of all variants agree:\n\n" + "\n".join(lines)
    )


def _task_words(findings: Findings) -> str:
    lines = []
    for layer, facts in sorted(findings.tasks.items()):
        if "probing_accuracy_lm" in facts:
            lines.append(
                f"Layer {layer}: {facts['probing_texts']} texts of {facts['probing_classes']} classes; a probe on the "
                f"activations themselves reaches {facts['probing_accuracy_lm']:.3f} (balanced accuracy, one class "
                "against the rest)."
            )
        elif "no_probing" in facts:
            lines.append(f"Layer {layer}: no sparse probing, {facts['no_probing']}.")
        if "spelling_accuracy" in facts:
            lines.append(
                f"First letters, layer {layer}: the language model names that of {facts['spelling_accuracy']:.0%} of "
                f"the words; linear probes reach a mean F1 of {facts['first_letter_probe_f1']:.2f}. "
                + (facts.get("first_letter_caution") or "")
            )
        elif "no_first_letter" in facts:
            lines.append(f"Layer {layer}: no absorption, {facts['no_first_letter']}.")
    return "\n".join(f"- {line.strip()}" for line in lines)
