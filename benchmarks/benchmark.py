"""Time training steps under every penalty side by side, on real activations or synthetic ones.

python scripts/benchmark.py --activations activations.safetensors --widths 2304 10240 65536
python scripts/benchmark.py --model gemma-3-270m --layer 8 --widths 2304 --selection_interval 1 10 --memory
python scripts/benchmark.py --sae runs/demo --activations activations.safetensors --only selective full
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.cases import ACTIVATIONS, MODES, Case, base_config, cases_of
from benchmarks.inputs import Batches, check_l0, load_activations, prepare, synthetic_activations
from benchmarks.memory import peak_in_own_process
from benchmarks.pipeline import measure_supply
from benchmarks.plot import plot_times
from benchmarks.report import load_peers, report
from benchmarks.rounds import rows_of, run_rounds
from benchmarks.steps import TrainingSteps
from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.language_models.loading import load_language_model
from hf_selortho.training.arguments import OneLineParser, argument
from hf_selortho.training.run_folder import hardware, library_versions, write_json, write_text
from hf_selortho.utils.command_line import run_script, use_all_cores

SYNTHETIC_BATCHES = 8
D_IN = 640  # of synthetic activations


@dataclass
class BenchmarkArguments:
    """What is timed, on what, and where the results go."""

    activations: str | None = argument(None, "A .safetensors or .pt file with a tensor (tokens, d_in).")
    tensor: str | None = argument(None, "Its name in the file; default: activations, or the only one.")
    model: str | None = argument(None, "Language model to time too; without --activations, its own are used.")
    layer: int | None = argument(None, "Its decoder layer, counted from 0.")
    dataset: str = argument("python-docs", "What the language model reads: Hub id, local file, or python-docs.")
    d_in: int | None = argument(None, f"Width of the activations; default: theirs, {D_IN} for synthetic ones.")
    widths: list[int] = argument([], "Numbers of features; default: 2304 10240 65536.")
    activation: list[str] = argument([], f"Which of {', '.join(ACTIVATIONS)}; default: all.")
    sae: str | None = argument(None, "Folder or Hub id of a trained SAE, in place of --widths and --activation.")
    k: int = argument(32, "Active features a token of topk.")
    l0: float = argument(150.0, "Mean active features a token that the thresholds of relu are set to.")
    batch: int = argument(2048, "Tokens of a batch.")
    steps: int = argument(10, "Rounds; in each of them every case is timed once (fewer times over long intervals).")
    selection_interval: list[int] = argument([], "Steps between two selections, one or several; default: the config's.")
    only: list[str] = argument([], f"Some of {', '.join(MODES)}; default: all. The first two always are.")
    limit_seconds: float = argument(
        60.0, "A case with a longer step is timed once, and left out where that is foreseen."
    )
    memory: bool = argument(False, "Measure the peak memory of every case, in a process of its own.")
    peers: str | None = argument(None, 'JSON file of other implementations\' timings: {"name": seconds a step}.')
    output: str = argument("results/benchmark", "Folder for benchmark.json, benchmark.md and benchmark.png.")
    seed: int = argument(0, "Seed of weights, thresholds and synthetic activations.")
    cpu: bool = argument(False, "Use the CPU even where there is a GPU.")
    cpu_threads: int | None = argument(None, "Threads on a CPU; default: all cores.")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the three files, print the report."""
    groups: list[Any] = [BenchmarkArguments]
    parser = OneLineParser(groups, allow_abbrev=False)
    arguments, unknown = parser.parse_args_into_dataclasses(
        list(sys.argv[1:] if argv is None else argv), return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    check(arguments)
    peers = load_peers(arguments.peers) if arguments.peers else []
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    if device.type == "cpu":
        use_all_cores(arguments.cpu_threads)
    trained = load_trained(arguments.sae) if arguments.sae else None
    d_in = arguments.d_in if trained is None else trained.config.d_in
    read = read_activations(arguments, d_in)
    output = make_folder(arguments.output)
    activations, source, supply = find_activations(arguments, read, d_in, device)
    batches = Batches(activations, arguments.batch, device, arguments.seed)
    content = {
        "schema_version": 1, "hardware": hardware(device, 1), "threads": torch.get_num_threads(),
        "versions": library_versions(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": source, "d_in": activations.shape[1], "batch": arguments.batch, "steps": arguments.steps,
        "notes": notes(arguments), "arguments": dataclasses.asdict(arguments), "supply": supply, "peers": peers,
        "rows": [],
    }  # fmt: skip
    del activations, read
    for config in configs(arguments, batches.rows.shape[1], trained):
        content["rows"] += measure(arguments, config, batches, trained, content["rows"])
        write_json(output / "benchmark.json", content)  # a run that is stopped leaves what it has measured
    write_text(output / "benchmark.md", report(content))
    plot_times(content["rows"], peers, output / "benchmark.png")
    sys.stdout.write(f"\n{report(content)}\n{output}/ holds benchmark.json, benchmark.md and benchmark.png\n")


def write_times(
    output: Path,
    name: str,
    arguments: BenchmarkArguments,
    rows: Sequence[Mapping[str, Any]],
    result: str,
    device: torch.device,
) -> None:
    """Write what was measured with a language model as name.json and name.md, and print it."""
    content = {
        "schema_version": 1, "hardware": hardware(device, 1), "threads": torch.get_num_threads(),
        "versions": library_versions(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": dataclasses.asdict(arguments), "rows": rows,
    }  # fmt: skip
    words = (
        f"{content['hardware']}, {content['threads']} threads; {arguments.model}, layer {arguments.layer}, on "
        f"{Path(arguments.dataset).name}; {result}"
    )
    write_json(output / f"{name}.json", content)
    write_text(output / f"{name}.md", words)
    sys.stdout.write(f"\n{words}\n{output}/ holds {name}.json and {name}.md\n")


def check(arguments: BenchmarkArguments) -> None:
    """Refuse what cannot work before anything is loaded, and fill in the defaults."""
    a = arguments
    for name in ("batch", "steps", "k", "d_in", "cpu_threads"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise SelOrthoError(f"--{name} {value}: expected at least 1")
    if not a.limit_seconds > 0:
        raise SelOrthoError(f"--limit_seconds {a.limit_seconds:g}: expected a number above 0")
    if any(r < 1 for r in a.selection_interval):
        raise SelOrthoError("--selection_interval: expected numbers of at least 1")
    if any(n < 2 for n in a.widths):
        raise SelOrthoError("--widths: expected numbers of at least 2")
    wrong = [name for name in a.activation if name not in ACTIVATIONS]
    if wrong:
        raise SelOrthoError(f"--activation {' '.join(wrong)}: expected some of {', '.join(ACTIVATIONS)}")
    if a.sae and (a.widths or a.activation or a.d_in):
        raise SelOrthoError("--sae brings its own sizes: leave out --widths, --activation and --d_in")
    if (a.model is None) != (a.layer is None):
        raise SelOrthoError("--model and --layer belong together: the decoder layer to read, counted from 0")
    a.widths = sorted(set(a.widths)) or [2304, 10240, 65536]
    a.activation = list(dict.fromkeys(a.activation)) or list(ACTIVATIONS)
    a.selection_interval = sorted(set(a.selection_interval)) or [SelOrthoConfig(d_in=1, d_sae=1).selection_interval]
    cases(a)
    too_narrow = [n for n in a.widths if n < a.k]
    if "topk" in a.activation and too_narrow and not a.sae:
        raise SelOrthoError(f"--k {a.k}: more than the {too_narrow[0]} features of --widths")
    if "relu" in a.activation and not a.sae:
        check_l0(a.widths[0], a.l0)


def cases(arguments: BenchmarkArguments) -> list[Case]:
    """What is timed for every SAE."""
    return cases_of(arguments.only or None, arguments.selection_interval)


def make_folder(path: str) -> Path:
    """The output folder, there and writable."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SelOrthoError(f"cannot write to {folder} ({error.strerror}): choose another --output") from error
    if not os.access(folder, os.W_OK):
        raise SelOrthoError(f"cannot write to {folder} (no permission): choose another --output")
    return folder


def load_trained(name: str) -> SelOrthoSAE:
    """A trained SAE."""
    try:
        return SelOrthoSAE.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SelOrthoError(f"cannot load the SAE {name!r}: {error}") from error


def read_activations(arguments: BenchmarkArguments, d_in: int | None) -> Tensor | None:
    """The activations of the file, of width `d_in` if that is known; None without a file."""
    if arguments.activations is None:
        return None
    found = load_activations(arguments.activations, arguments.tensor)
    if d_in is not None and found.shape[1] != d_in:
        raise SelOrthoError(f"--activations {arguments.activations} are {found.shape[1]} wide, expected d_in={d_in}")
    return found


def find_activations(
    arguments: BenchmarkArguments, read: Tensor | None, d_in: int | None, device: torch.device
) -> tuple[Tensor, str, dict[str, Any] | None]:
    """Activations (tokens, d_in), where they come from in words, and the speed of the language model."""
    supply = measured = None
    if arguments.model is not None and arguments.layer is not None:
        lm = load_language_model(arguments.model, device=device)
        measured = measure_supply(lm, arguments.layer, arguments.dataset, arguments.batch)
        supply = {"model": lm.name, "layer": arguments.layer, "dataset": arguments.dataset}
        supply |= {name: getattr(measured, name) for name in ("lm_tokens_per_second", "buffer_tokens_per_second")}
    if read is not None:
        return read, f"{Path(str(arguments.activations)).name}, {len(read):,} tokens", supply
    if measured is None:
        made = synthetic_activations(SYNTHETIC_BATCHES * arguments.batch, d_in or D_IN, arguments.seed)
        return (
            made,
            f"synthetic, {len(made):,} tokens of a sparse feature model (give --activations for real ones)",
            None,
        )
    if d_in is not None and measured.activations.shape[1] != d_in:
        raise SelOrthoError(f"activations of {arguments.model} are {measured.activations.shape[1]} wide, not {d_in}")
    return measured.activations, f"{arguments.model}, layer {arguments.layer}, on {arguments.dataset}", supply


def configs(arguments: BenchmarkArguments, d_in: int, trained: SelOrthoSAE | None) -> list[tuple[str, SelOrthoConfig]]:
    """The SAEs to time, by the name of their activation setting."""
    if trained is not None:
        return [(f"{trained.config.activation}, trained", trained.config)]
    a = arguments
    return [(name, base_config(name, d_in, n, a.k)) for n in a.widths for name in a.activation]


def measure(
    arguments: BenchmarkArguments,
    config: tuple[str, SelOrthoConfig],
    batches: Batches,
    trained: SelOrthoSAE | None,
    earlier: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Rows of all cases on one SAE; `earlier` are those of narrower ones."""
    name, settings = config
    torch.manual_seed(arguments.seed)
    sae: Any = SelOrthoSAE(settings) if trained is None else trained
    sae.to(batches.rows.device)
    if trained is None:
        sae.set_input_statistics(*batches.statistics())
    if name == "relu":
        prepare(sae, batches.rows, arguments.l0, arguments.seed)
    wanted = cases(arguments)
    known = {
        Case(row["mode"], row["interval"]): (row["width"], row["seconds_per_step"])
        for row in earlier
        if row["activation"] == name and "seconds_per_step" in row
    }
    with tqdm(total=len(wanted) * arguments.steps, desc=f"{settings.d_sae:,} features, {name}", unit="case") as bar:
        results = run_rounds(TrainingSteps(sae, batches), wanted, arguments.steps, arguments.limit_seconds, known, bar)
    if arguments.memory:
        for result in tqdm([r for r in results if r.refused is None], desc="peak memory", unit="case"):
            result.memory_bytes = peak_in_own_process(result.case, sae, batches)
    return rows_of(results, batches.size, width=settings.d_sae, activation=name)


def notes(arguments: BenchmarkArguments) -> list[str]:
    """What a reader of the tables has to know about the SAEs."""
    if arguments.sae:
        return [f"SAE: {arguments.sae}, as it was trained"]
    described = {
        "topk": f"topk: k={arguments.k}, freshly initialised",
        "relu": f"relu: thresholds set so that L0 = {arguments.l0:g}, not trained",
        "relu-dense": "relu-dense: freshly initialised, about half of the features active",
    }
    return [described[name] for name in arguments.activation]


if __name__ == "__main__":
    run_script(main)
