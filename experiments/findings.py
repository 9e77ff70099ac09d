"""All records of a plan, read once, as the sections of a report ask for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .claims import Evidence
from .examples import EXAMPLES
from .plan import Plan
from .records import HARVEST, Records
from .summaries import Summary, summarise
from .task_files import TASKS
from .timing import TIMING


@dataclass
class Findings:
    """All records of a plan, read once."""

    plan: Plan
    folder: Path  # of the records
    saes: list[dict[str, Any]]
    worlds: list[dict[str, Any]]
    seeds: list[dict[str, Any]]
    tasks: dict[int, dict[str, Any]]  # facts by layer
    timing: dict[str, Any] | None
    examples: dict[str, Any] | None
    harvest: dict[str, Any] | None = None
    summaries: dict[tuple[str, int, str], Summary] = field(default_factory=dict)

    @classmethod
    def read(cls, plan: Plan, folder: Path) -> Findings:
        """Read every record of the folder."""
        records = Records(folder)
        saes = list(records.all("sae"))
        return cls(
            plan,
            folder,
            saes,
            list(records.all("world")),
            list(records.all("seeds")),
            {record["layer"]: record for record in records.all(TASKS)},
            records.read(TIMING) if records.has(TIMING) else None,
            records.read(EXAMPLES) if records.has(EXAMPLES) else None,
            records.read(HARVEST) if records.has(HARVEST) else None,
            summarise(saes),
        )

    def of(self, sweep: str, layer: int | None = None) -> list[Summary]:
        """Summaries of a sweep, at one layer or at its first."""
        layers = sorted({key[1] for key in self.summaries if key[0] == sweep})
        chosen = layers[0] if layer is None and layers else layer
        return [summary for key, summary in self.summaries.items() if key[0] == sweep and key[1] == chosen]

    @property
    def pareto(self) -> list[str]:
        """Names of the sweeps that compare methods at fixed coefficients."""
        compared = [sweep.name for sweep in self.plan.sweeps if "pareto" in sweep.sections and sweep.referred is None]
        return [name for name in compared if self.of(name)]

    @property
    def evidence(self) -> Evidence:
        """What the paper's claims are judged by."""
        main = next((sweep.layers[0] for sweep in self.plan.sweeps if sweep.name == "paper"), 0)
        return Evidence(self.summaries, main, tuple(self.plan.layers), self.timing)
