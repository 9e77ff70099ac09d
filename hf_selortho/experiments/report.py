"""RESULTS.md of a plan, written from its records: every number in it comes from a JSON file under `results/`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..training.outputs import write_text
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
    saes = findings.saes
    machines = sorted({record["hardware"] for record in [*saes, *findings.worlds]})
    versions = _versions([record["versions"] for record in [*saes, *findings.worlds]])
    seconds = sum(record.get("seconds", 0.0) for record in saes)
    seconds += sum(
        score.get("training_seconds", 0.0)
        for w in findings.worlds
        for p in ("scores", "peers")
        for score in w[p].values()
    )
    of_worlds = sum(len(world["scores"]) + len(world["peers"]) for world in findings.worlds)
    counts = f"{len(saes)} SAEs on activations, {of_worlds} on synthetic worlds"
    planned = sum(len(unit.sweep.variants) for unit in findings.plan.units())
    missing = f" ({planned - len(saes)} of the plan are missing)" if planned > len(saes) else ""
    return (
        f"# Results\n\nWritten by `{command}` from the records in `{place}/`; no "
        f"number is typed by "
        "hand. The speed of training steps and of the page, measured apart, is in "
        "[docs/performance.md](docs/performance.md).\n\n"
        f"{findings.plan.description} {counts}{missing}; {findings.plan.seeds} seeds; ± is the standard deviation over "
        f"seeds. Training took {seconds / 3600:.1f} hours of one core or GPU, measurements not counted.\n\n"
        f"- machine: {'; '.join(machines)}\n- versions: {versions}"
    )


def _versions(found: Sequence[dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for versions in found for name in versions))
    return ", ".join(f"{name} {' / '.join(sorted({v[name] for v in found if name in v}))}" for name in names)
