"""Run a plan of experiments: what selective orthogonality does, measured with seeds, beside the paper's claims.

python scripts/reproduce_paper.py --preset demo
python scripts/reproduce_paper.py --preset demo --only pareto ground_truth --jobs 2
python scripts/reproduce_paper.py --preset gemma2-2b --jobs 8     # one GPU a training

Run it again to go on where it was stopped: what has a record under results/ is not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.execute import run_examples, run_trainings
from experiments.plan import SECTIONS, Plan, list_plans, load_plan
from experiments.processes import Machine, stop_on_sigterm
from experiments.report import write_results
from experiments.stages import Places, harvest, local_name, prepare, run_worlds, time_steps
from hf_selortho import SelOrthoError
from hf_selortho.training.arguments import OneLineParser, argument
from hf_selortho.utils.command_line import run_script
from hf_selortho.utils.files import FolderLock


@dataclass
class ReproduceArguments:
    """Which plan, which part of it, and where."""

    preset: str = argument("demo", f"The plan: {', '.join(list_plans())}, or a .json file.")
    only: list[str] = argument([], f"Sections to run, of {', '.join(SECTIONS)}, with spaces or commas; default: all.")
    seeds: int | None = argument(None, "Seeds of every experiment; default: the plan's.")
    quick: bool = argument(False, "The plan in small, some 20 minutes: says whether it runs, not what is true.")
    dataset: str | None = argument(None, "Another text than the plan's: Hub id, local file or folder.")
    label_column: str | None = argument(None, "Its column of labels, for sparse probing; default: the plan's.")
    work_dir: str = argument("runs/experiments", "Folder for activations and trained SAEs (large); one a plan.")
    results_dir: str = argument("results", "Folder for the records, tables and figures (small); one a plan.")
    report: str | None = argument(None, "The report; default: RESULTS.md in the folder of the plan's records.")
    report_only: bool = argument(False, "Write the report of the records that there are, and run nothing.")
    jobs: int | None = argument(None, "Trainings side by side; default: one a GPU, else 1.")
    processes: int = argument(1, "Processes of each training (data parallel).")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what has no record yet, then write the report."""
    groups: list[Any] = [ReproduceArguments]
    parser = OneLineParser(groups, allow_abbrev=False)
    arguments, unknown = parser.parse_args_into_dataclasses(
        list(sys.argv[1:] if argv is None else argv), return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    plan = chosen_plan(arguments)
    jobs = arguments.jobs if arguments.jobs is not None else max(1, torch.cuda.device_count() // arguments.processes)
    results = Path(arguments.results_dir) / plan.name
    report = Path(arguments.report) if arguments.report else results / "RESULTS.md"
    if not arguments.report_only:
        work = Path(arguments.work_dir) / plan.name
        run_plan(plan, Places(work, results, Path(__file__).resolve().parents[1] / "scripts"), jobs, arguments)
    write_results(plan, results, report, shown_command(arguments))
    sys.stdout.write(f"{report} has the results, {results}/ their records\n")


def run_plan(whole: Plan, places: Places, jobs: int, arguments: ReproduceArguments) -> None:
    """Do what has no record yet, of the whole plan or of the sections that are asked for.

    All layers of the plan are harvested whatever is asked for: a token that is a sink at one of them is left out at
    all, so that the batches would be others.
    """
    plan = part_of(whole, sections(arguments))
    places.work.mkdir(parents=True, exist_ok=True)
    machine = Machine(jobs, arguments.processes)
    stop_on_sigterm()
    with FolderLock(places.work, "running a plan"):
        if plan.sweeps:
            harvest(whole, places, machine)
            time_steps(plan, places)
            prepare(plan, places, machine)
            run_trainings(plan, places, machine)
            run_examples(plan, places)
        run_worlds(plan, places, machine)


def sections(arguments: ReproduceArguments) -> list[str]:
    """The names after --only, whether commas or spaces stand between them."""
    return [name for part in arguments.only for name in part.split(",") if name]


def part_of(plan: Plan, sections: Sequence[str]) -> Plan:
    """The part that is to be run; the report always shows all records."""
    return plan.only(sections) if sections else plan


def shown_command(arguments: ReproduceArguments) -> str:
    """What somebody else types for the same records; a local text is named by its file."""
    command = f"python scripts/reproduce_paper.py --preset {Path(arguments.preset).name}"
    command += " --quick" * arguments.quick
    command += f" --seeds {arguments.seeds}" if arguments.seeds is not None else ""
    command += f" --label_column {arguments.label_column}" if arguments.label_column is not None else ""
    if arguments.dataset is not None:
        command += f" --dataset {local_name(arguments.dataset)}"
    return command


def chosen_plan(arguments: ReproduceArguments) -> Plan:
    """The plan as the command line wants it.

    Raises:
        SelOrthoError: an argument is not allowed.
    """
    for name in ("jobs", "processes", "seeds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SelOrthoError(f"--{name} {value}: expected at least 1")
    for section in sections(arguments):
        if section not in SECTIONS:
            raise SelOrthoError(f"--only {section}: expected some of {', '.join(SECTIONS)}")
    plan = load_plan(arguments.preset, quick=arguments.quick, seeds=arguments.seeds)
    if arguments.dataset is not None:
        plan = replace(plan, harvest={**plan.harvest, "dataset": arguments.dataset})
    if arguments.label_column is not None:
        plan = replace(plan, label_column=arguments.label_column)
    return plan


if __name__ == "__main__":
    run_script(main)
