"""Run a plan of experiments: what selective orthogonality does, measured with seeds, beside the paper's claims.

python -m experiments.reproduce --preset demo --results_dir mine
python -m experiments.reproduce --preset demo --results_dir mine --only pareto ground_truth --jobs 2
python -m experiments.reproduce --preset gemma2-2b --jobs 8     # one GPU a training

Run it again to go on where it was stopped: what has a record in --results_dir is not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.jobs import stop_on_sigterm
from experiments.page import write_pages
from experiments.plan_run import parse_run
from experiments.run import cache_activations, run_synthetic, run_trainings, time_steps
from hf_selortho.utils.command_line import run_script
from hf_selortho.utils.files import FolderLock


def main(argv: Sequence[str] | None = None) -> None:
    """Run what has no record yet, then write the pages.

    All layers of the plan are cached whatever is asked for: a token that is a sink at one of them is left out at all,
    so that the batches would be others.
    """
    whole = parse_run(argv)
    run = whole.part
    stop_on_sigterm()
    with FolderLock(run.work, "running a plan"):
        if run.plan.sweeps:
            cache_activations(whole)
            time_steps(run)
            run_trainings(run)
        run_synthetic(run)
    for page in write_pages(run.results):
        sys.stdout.write(f"{page}\n")


if __name__ == "__main__":
    run_script(main)
