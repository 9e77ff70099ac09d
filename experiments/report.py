"""RESULTS.md of a plan, written from its records: every number in it comes from a JSON file under `results/`."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..training.run_folder import write_text
from . import sections
from .findings import Findings
from .plan import Plan


def write_results(plan: Plan, folder: Path, report: Path, command: str) -> Path:
    """Write the figures beside the records, and the report.

    Args:
        folder: of the records.
        report: the Markdown file; figures are linked from where it lies.
        command: that makes all of it.
    """
    findings = Findings.read(plan, folder)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    link = Path(os.path.relpath(figures, report.parent)).as_posix()
    parts = [head(findings, command, Path(link).parent.as_posix())]
    parts += [part for write in sections.ALL if (part := write(findings, figures, link))]
    report.parent.mkdir(parents=True, exist_ok=True)
    write_text(report, "\n\n".join(parts) + "\n")
    return report


def head(findings: Findings, command: str, place: str) -> str:
    """What was run, on what, how often, and how long it took."""
    records = [*findings.saes, *findings.worlds]
    machines = sorted({record["hardware"] for record in records})
    of_worlds = sum(len(world["scores"]) + len(world["peers"]) for world in findings.worlds)
    planned = sum(len(unit.sweep.variants) for unit in findings.plan.units())
    planned_worlds = sum(len(run.variants) + len(run.peers) for run in findings.plan.worlds)
    return (
        f"# Results\n\nWritten by `{command}` from the records in `{place}/`; no number is typed by hand. The speed of "
        "training steps and of the page, measured apart, is in [docs/performance.md](docs/performance.md).\n\n"
        f"{findings.plan.description} {_of(len(findings.saes), planned)} SAEs on activations, "
        f"{_of(of_worlds, planned_worlds)} on synthetic worlds, {findings.plan.seeds} seeds of each; ± is the standard "
        f"deviation over seeds, not over texts. {_times(findings)}\n\n{_source(findings)}{_sizes(findings)}"
        f"- machine: {'; '.join(machines)}\n- versions: {_versions([record['versions'] for record in records])}"
    )


def _source(findings: Findings) -> str:
    """Language model and text, so that somebody else can tell whether theirs are the same."""
    if findings.harvest is None:
        return ""
    model, text = findings.harvest["model"], findings.harvest["text"]
    rows = "" if text["rows"] is None else f", {text['rows']:,} rows"
    which = f"fingerprint `{text['fingerprint']}`" if text["fingerprint"] else f"revision `{text['revision']}`"
    return (
        f"- language model `{model['name']}` at revision `{model['revision']}`; text `{text['dataset']}`{rows}, split "
        f"`{text['split']}`, {which}\n"
    )


def _of(count: int, planned: int) -> str:
    return f"{count} of {planned}" if count < planned else str(count)


def _sizes(findings: Findings) -> str:
    """How large the compared SAEs are, how long they were trained, and on how much they were measured."""
    lines = []
    for name in findings.pareto:
        sweep = next(sweep for sweep in findings.plan.sweeps if sweep.name == name)
        own, evaluation = sweep.arguments, findings.of(name)[0].by_seed
        sparsity = f"k {own['k']}" if "k" in own else f"L1 {own.get('l1_coefficient')}"
        measured = next(iter(evaluation.values()))["evaluation"]
        counts = ", ".join(
            f"{what} on {measured[key]:,} tokens"
            for what, key in (("measured", "tokens"), ("cross-entropies", "ce_tokens"))
            if key in measured
        )
        lines.append(
            f"- `{name}`: {own['d_sae']} features, {own['activation']}, {sparsity}; {own['max_steps']} steps of "
            f"{own['batch_size']} tokens, drawn from {findings.plan.harvest.get('max_tokens', 'all')} harvested ones; "
            f"pairs selected every {own.get('selection_interval', 1)} steps{'; ' * bool(counts)}{counts}\n"
        )
    return "".join(lines)


def _times(findings: Findings) -> str:
    """How long it took; measurements that no record times count as much as the mean of the others."""
    training = sum(record.get("seconds", 0.0) for record in findings.saes)
    scores = [score for world in findings.worlds for part in ("scores", "peers") for score in world[part].values()]
    training += sum(score.get("training_seconds", 0.0) for score in scores)
    measured = [record["measuring_seconds"] for record in findings.saes if "measuring_seconds" in record]
    words = f"Training took {training / 3600:.1f} hours of one core or GPU"
    if measured:
        words += f", measuring what was trained {statistics.fmean(measured) * len(findings.saes) / 3600:.1f} hours"
    return words + "."


def _versions(found: Sequence[dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for versions in found for name in versions))
    return ", ".join(f"{name} {' / '.join(sorted({v[name] for v in found if name in v}))}" for name in names)
