"""The command line of a plan's run, and where the files of a plan are."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments.plan import SECTIONS, Plan, Unit, list_plans, load_plan
from experiments.records import Records
from hf_selortho.errors import SelOrthoError
from hf_selortho.training.run_folder import RUN
from hf_selortho.utils.environment import own_cores
from hf_selortho.utils.options import argument, parse_options


@dataclass
class PlanArguments:
    """Which plan, which part of it, and where."""

    preset: str = argument("demo", f"The plan: {', '.join(list_plans())}, or a .json file.")
    only: list[str] = argument([], f"Sections to run, of {', '.join(SECTIONS)}, with spaces or commas; default: all.")
    seeds: int | None = argument(None, "Seeds of every experiment; default: the plan's.")
    quick: bool = argument(False, "The plan in small, some 20 minutes: says whether it runs, not what is true.")
    dataset: str | None = argument(None, "Another text than the plan's: Hub id, local file or folder.")
    label_column: str | None = argument(None, "Its column of labels, for sparse probing; default: the plan's.")
    work_dir: str = argument("runs/experiments", "Folder for activations and trained SAEs (large); one a plan.")
    results_dir: str = argument("experiments/results", "Folder for records, tables and figures (small); one a plan.")
    jobs: int | None = argument(None, "Trainings side by side; default: one a GPU, else 1.")


@dataclass(frozen=True)
class PlanRun:
    """A plan and where its files are."""

    plan: Plan
    work: Path  # activations, trained SAEs: large
    results: Path  # records, figures: small
    jobs: int = 1  # trainings side by side
    sections: tuple[str, ...] = ()  # that are asked for; none: all
    argv: tuple[str, ...] = ()  # the command line that it comes from, for the processes that do a part of it

    @property
    def part(self) -> PlanRun:
        """The sections that are asked for."""
        return replace(self, plan=self.plan.only(self.sections)) if self.sections else self

    @property
    def records(self) -> Records:
        """What has been found out."""
        return Records(self.results)

    @property
    def activations(self) -> Path:
        """The cache of activations."""
        return self.work / "activations"

    @property
    def threads(self) -> int:
        """Threads of each process on a CPU."""
        return max(1, own_cores() // self.jobs)

    def folder(self, unit: Unit) -> Path:
        """Where a unit is trained."""
        return self.work / "units" / unit.name

    def trained_folder(self, unit: Unit, variant: str) -> Path | None:
        """Folder of a trained SAE; None if it is not there (any more)."""
        for path in sorted(self.folder(unit).glob("*/saes.json")):
            folder = saes_of(path.parent).get(variant)
            if folder is not None and (folder / RUN).is_file():
                return folder
        return None


def saes_of(attempt: Path) -> dict[str, Path]:
    """Return the folders of the SAEs of a training by variant."""
    content: dict[str, str] = json.loads((attempt / "saes.json").read_text(encoding="utf-8"))
    return {variant: attempt / folder for variant, folder in content.items()}


def parse_run(argv: Sequence[str] | None = None) -> PlanRun:
    """Return the whole plan as a command line wants it.

    Raises:
        SelOrthoError: an argument is not allowed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, _ = parse_options(PlanArguments, argv)
    jobs = arguments.jobs if arguments.jobs is not None else max(1, torch.cuda.device_count())
    if jobs < 1:
        raise SelOrthoError(f"--jobs {jobs}: expected at least 1")
    sections = tuple(name for part in arguments.only for name in part.split(",") if name)
    if wrong := [name for name in sections if name not in SECTIONS]:
        raise SelOrthoError(f"--only {wrong[0]}: expected some of {', '.join(SECTIONS)}")
    plan = load_plan(arguments.preset, quick=arguments.quick, seeds=arguments.seeds)
    if arguments.dataset is not None:
        plan = replace(plan, harvest={**plan.harvest, "dataset": arguments.dataset})
    if arguments.label_column is not None:
        plan = replace(plan, label_column=arguments.label_column)
    work, results = Path(arguments.work_dir) / plan.name, Path(arguments.results_dir) / plan.name
    return PlanRun(plan, work, results, jobs, sections, tuple(argv))
