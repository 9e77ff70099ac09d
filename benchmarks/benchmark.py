"""Time training steps under every penalty side by side, on real activations or synthetic ones.

python -m benchmarks.benchmark --activations activations.safetensors --widths 2304 10240 65536
python -m benchmarks.benchmark --model gemma-3-270m --layer 8 --widths 2304 --selection_interval 1 10 --memory
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.cases import ACTIVATIONS, MODES, base_config, cases_of
from benchmarks.inputs import (
    Batches,
    check_l0,
    load_activations,
    make_sae,
    synthetic_activations,
    time_language_model,
)
from benchmarks.memory import peak_in_own_process
from benchmarks.report import plot_times, report
from benchmarks.steps import TrainingSteps, rows_of, run_rounds
from hf_selortho import SelOrthoConfig, SelOrthoError
from hf_selortho.language_models.loading import load_language_model
from hf_selortho.utils.command_line import run_script
from hf_selortho.utils.environment import hardware, library_versions, use_all_cores
from hf_selortho.utils.files import write_json, write_text
from hf_selortho.utils.options import Range, argument, check_values, parse_options

SYNTHETIC_BATCHES = 8
_DEFAULTS = SelOrthoConfig(d_in=1, d_sae=1)

Count = Annotated[int, Range(lambda v: v >= 1, "at least 1")]
Seconds = Annotated[float, Range(lambda v: v > 0, "a number above 0")]


@dataclass
class BenchmarkArguments:
    """What is timed, on what, and where the results go."""

    activations: str | None = argument(None, "A .safetensors file with a tensor (tokens, d_in).")
    model: str | None = argument(None, "Language model to time too; without --activations, its own are used.")
    layer: int | None = argument(None, "Its decoder layer, counted from 0.")
    dataset: str = argument("python-docs", "What the language model reads: Hub id, local file, or python-docs.")
    d_in: Count = argument(640, "Width of synthetic activations.")
    widths: list[int] = argument([2304, 10240, 65536], "Numbers of features.")
    activation: list[str] = argument(list(ACTIVATIONS), f"Some of {', '.join(ACTIVATIONS)}.")
    k: Count = argument(32, "Active features a token of topk.")
    l0: float = argument(150.0, "Mean active features a token that the thresholds of relu are set to.")
    batch: Count = argument(2048, "Tokens of a batch.")
    steps: Count = argument(10, "Rounds; in each of them every case is timed once (fewer times over long intervals).")
    selection_interval: list[int] = argument([_DEFAULTS.selection_interval], "Steps between two selections.")
    pair_fraction: float = argument(_DEFAULTS.pair_fraction, "Share of the pairs of features that is selected.")
    only: list[str] = argument([], f"Some of {', '.join(MODES)}; default: all. The first two always are.")
    limit_seconds: Seconds = argument(60.0, "A case with a longer step is timed once.")
    memory: bool = argument(False, "Measure the peak memory of every case, in a process of its own.")
    output: str = argument("runs/benchmark", "Folder for benchmark.json, benchmark.md and benchmark.png.")
    seed: int = argument(0, "Seed of weights, thresholds and synthetic activations.")
    cpu: bool = argument(False, "Use the CPU even where there is a GPU.")
    cpu_threads: int | None = argument(None, "Threads on a CPU; default: all cores.")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the three files, print the report."""
    arguments, _ = parse_options(BenchmarkArguments, argv)
    check(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    if device.type == "cpu":
        use_all_cores(arguments.cpu_threads)
    activations, source, supply = find_activations(arguments, device)
    batches = Batches(activations, arguments.batch, device, arguments.seed)
    output = make_folder(arguments.output)
    content = {
        "schema_version": 2, "hardware": hardware(device, 1), "threads": torch.get_num_threads(),
        "versions": library_versions(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": source, "d_in": activations.shape[1], "batch": arguments.batch, "steps": arguments.steps,
        "notes": notes(arguments), "arguments": dataclasses.asdict(arguments), "supply": supply, "rows": [],
    }  # fmt: skip
    for width in sorted(set(arguments.widths)):
        for activation in dict.fromkeys(arguments.activation):
            content["rows"] += measure(arguments, activation, width, batches)
            write_json(output / "benchmark.json", content)  # a run that is stopped leaves what it has measured
    write_text(output / "benchmark.md", report(content))
    plot_times(content["rows"], output / "benchmark.png")
    sys.stdout.write(f"\n{report(content)}\n{output}/ holds benchmark.json, benchmark.md and benchmark.png\n")


def check(arguments: BenchmarkArguments) -> None:
    """Refuse what cannot work before anything is loaded."""
    a = arguments
    check_values(a)
    cases_of(a.only, a.selection_interval)
    if any(r < 1 for r in a.selection_interval):
        raise SelOrthoError("--selection_interval: expected numbers of at least 1")
    if wrong := [name for name in a.activation if name not in ACTIVATIONS]:
        raise SelOrthoError(f"--activation {' '.join(wrong)}: expected some of {', '.join(ACTIVATIONS)}")
    if (a.model is None) != (a.layer is None):
        raise SelOrthoError("--model and --layer belong together: the decoder layer to read, counted from 0")
    if (narrow := min(a.widths)) < max(2, a.k if "topk" in a.activation else 2):
        raise SelOrthoError(f"--widths {narrow}: expected at least 2 features, and for topk at least --k {a.k}")
    if "relu" in a.activation:
        check_l0(narrow, a.l0)


def make_folder(path: str) -> Path:
    """Make the output folder, and see that it is writable."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise SelOrthoError(f"cannot write to {folder}: choose another --output")
    return folder


def find_activations(arguments: BenchmarkArguments, device: torch.device) -> tuple[Tensor, str, dict[str, Any] | None]:
    """Return activations (tokens, d_in), where they come from in words, and the speed of the language model."""
    found, source, supply = None, "", None
    if arguments.activations is not None:
        found = load_activations(arguments.activations)
        source = f"{Path(arguments.activations).name}, {len(found):,} tokens"
    if arguments.model is not None and arguments.layer is not None:
        lm = load_language_model(arguments.model, device=device)
        captured, speeds = time_language_model(lm, arguments.layer, arguments.dataset, arguments.batch)
        supply = {"model": lm.name, "layer": arguments.layer, "dataset": arguments.dataset, **speeds}
        if found is None:
            found, source = captured, f"{lm.name}, layer {arguments.layer}, on {Path(arguments.dataset).name}"
    if found is None:
        found = synthetic_activations(SYNTHETIC_BATCHES * arguments.batch, arguments.d_in, arguments.seed)
        source = f"synthetic, {len(found):,} tokens of a sparse feature model (give --activations for real ones)"
    return found, source, supply


def measure(arguments: BenchmarkArguments, activation: str, width: int, batches: Batches) -> list[dict[str, Any]]:
    """Return the rows of all cases on one SAE."""
    config = base_config(activation, batches.rows.shape[1], width, arguments.k, pair_fraction=arguments.pair_fraction)
    sae = make_sae(config, batches, arguments.l0 if activation == "relu" else None, arguments.seed)
    steps = TrainingSteps(sae, batches)
    cases = cases_of(arguments.only, sorted(set(arguments.selection_interval)))
    with tqdm(total=len(cases) * arguments.steps, desc=f"{width:,} features, {activation}", unit="case") as bar:
        results = run_rounds(steps, cases, arguments.steps, arguments.limit_seconds, bar)
    if arguments.memory:
        for result in tqdm([r for r in results if r.refused is None], desc="peak memory", unit="case"):
            result.memory_bytes = peak_in_own_process(result.case, sae, config, batches)
    return rows_of(results, batches.size, steps.l0(), width=width, activation=activation)


def notes(arguments: BenchmarkArguments) -> list[str]:
    """Say what a reader of the table has to know about the SAEs."""
    described = {
        "topk": f"topk: k={arguments.k}, freshly initialised",
        "relu": f"relu: thresholds set so that L0 = {arguments.l0:g}, not trained",
        "relu-dense": "relu-dense: freshly initialised, about half of the features active",
    }
    return [described[name] for name in dict.fromkeys(arguments.activation)]


if __name__ == "__main__":
    run_script(main)
