"""Run a plan of experiments: what selective orthogonality does, measured with seeds, beside the paper's claims.

python -m experiments.reproduce --preset demo --results_dir mine
python -m experiments.reproduce --preset demo --results_dir mine --only pareto ground_truth --jobs 2
python -m experiments.reproduce --preset gemma2-2b --jobs 8     # one GPU a training

Run it again to go on where it was stopped: what has a record in --results_dir is not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.jobs import stop_on_sigterm
from experiments.page import write_pages
from experiments.plan import SECTIONS, list_plans, load_plan
from experiments.run import PlanRun, cache_activations, run_synthetic, run_trainings, time_steps
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
    results_dir: str = argument("experiments/results", "Folder for records, tables and figures (small); one a plan.")
    jobs: int | None = argument(None, "Trainings side by side; default: one a GPU, else 1.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what has no record yet, then write the pages.

    All layers of the plan are cached whatever is asked for: a token that is a sink at one of them is left out at all,
    so that the batches would be others.
    """
    groups: list[Any] = [ReproduceArguments]
    (arguments,) = OneLineParser(groups, allow_abbrev=False).parse_args_into_dataclasses(
        list(sys.argv[1:] if argv is None else argv)
    )
    whole = chosen_run(arguments)
    sections = [name for part in arguments.only for name in part.split(",") if name]
    if wrong := [name for name in sections if name not in SECTIONS]:
        raise SelOrthoError(f"--only {wrong[0]}: expected some of {', '.join(SECTIONS)}")
    run = replace(whole, plan=whole.plan.only(sections or SECTIONS))
    stop_on_sigterm()
    with FolderLock(run.work, "running a plan"):
        if run.plan.sweeps:
            cache_activations(whole)
            time_steps(run)
            run_trainings(run)
        run_synthetic(run)
    for page in write_pages(run.results):
        sys.stdout.write(f"{page}\n")


def chosen_run(arguments: ReproduceArguments) -> PlanRun:
    """Return the whole plan as the command line wants it.

    Raises:
        SelOrthoError: an argument is not allowed.
    """
    jobs = arguments.jobs if arguments.jobs is not None else max(1, torch.cuda.device_count())
    if jobs < 1:
        raise SelOrthoError(f"--jobs {jobs}: expected at least 1")
    plan = load_plan(arguments.preset, quick=arguments.quick, seeds=arguments.seeds)
    if arguments.dataset is not None:
        plan = replace(plan, harvest={**plan.harvest, "dataset": arguments.dataset})
    if arguments.label_column is not None:
        plan = replace(plan, label_column=arguments.label_column)
    return PlanRun(plan, Path(arguments.work_dir) / plan.name, Path(arguments.results_dir) / plan.name, jobs)


if __name__ == "__main__":
    run_script(main)
