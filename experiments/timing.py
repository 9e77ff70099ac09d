"""What a training step takes with each penalty at the paper's sizes: Table 1's seconds and memory.

`python -m experiments.timing request.json`, a process of its own while nothing else runs.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.cases import Case, base_config, cases_of
from benchmarks.inputs import Batches, prepare
from benchmarks.memory import peak_in_own_process
from benchmarks.rounds import rows_of, run_rounds
from benchmarks.steps import TrainingSteps
from experiments.records import Records
from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.modeling_selortho import SelOrthoSAE
from hf_selortho.training.run_folder import hardware, library_versions
from hf_selortho.utils.command_line import run_script, use_all_cores

TIMING = "timing"  # name of the record
MORE_PAIRS = 0.005  # the paper's 0.5%, against its 0.1%


def time_steps(
    activations: Tensor, *, d_sae: int, batch_size: int, l0: float, rounds: int, limit_seconds: float = 60.0
) -> dict[str, Any]:
    """Seconds and memory of a step: encoder only, no penalty, selective at every step, full.

    Args:
        activations: (tokens, d_in), of the language model.
        l0: features that fire on a token, set by the thresholds, as after a training.
        rounds: in each of them every case is timed once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = Batches(activations, batch_size, device)
    sae = _ready(base_config("relu", activations.shape[1], d_sae, 1), batches, l0)
    cases = cases_of(["selective", "full"], [1])
    with tqdm(total=len(cases) * rounds, desc="timing", unit="case") as bar:
        results = run_rounds(TrainingSteps(sae, batches), cases, rounds, limit_seconds, {}, bar)
    for result in results:
        if result.refused is None:
            result.memory_bytes = peak_in_own_process(result.case, sae, batches)
    wide = SelOrthoConfig(**{**sae.config.own_settings(), "pair_fraction": MORE_PAIRS})
    with_more = peak_in_own_process(Case("selective"), _ready(wide, batches, l0), batches)
    usual = next(result.memory_bytes for result in results if result.case.mode == "selective")
    return {
        "rows": rows_of(results, batch_size, width=d_sae, activation="relu"),
        "memory_of_more_pairs": with_more / usual if with_more and usual else None,
        "more_pairs": MORE_PAIRS,
        "batch_size": batch_size,
        "d_in": activations.shape[1],
        "hardware": hardware(device, 1),
        "versions": library_versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _ready(config: SelOrthoConfig, batches: Batches, l0: float) -> SelOrthoSAE:
    torch.manual_seed(0)
    sae: Any = SelOrthoSAE(config)
    sae.to(batches.rows.device)
    sae.set_input_statistics(*batches.statistics())
    prepare(sae, batches.rows, l0)
    return sae


def main() -> None:
    """Time what the file that is named says, and write the record."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    use_all_cores()
    store = ActivationCache(request["shards"])
    shard = store.read(store.manifest.shards[0], [request["layer"]])
    found = time_steps(shard.by_layer[request["layer"]].float(), **request["settings"])
    Records(Path(request["results"])).write(TIMING, {"kind": "timing", "layer": request["layer"], **found})


if __name__ == "__main__":
    run_script(main)
