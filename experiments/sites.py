"""Tables of SAEs at other sites than the residual stream, and of transcoders, out of the folders of their runs.

python -m experiments.sites runs/attn_z runs/mlp_out runs/gemma-3-270m-transcoders

Keeps their figures in experiments/results/sites.json, beside those of earlier runs, and fills RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hf_selortho.utils.command_line import run_script
from hf_selortho.utils.files import write_json

RECORDS = Path(__file__).parent / "results" / "sites.json"
_KEPT = (
    "fvu", "l0", "active_features", "dead_features", "top_correlation", "max_decoder_cosine", "ce_clean",
    "ce_reconstruction", "ce_zero_ablation", "loss_recovered", "kl", "top1_agreement", "tokens", "ce_tokens",
)  # fmt: skip
_COLUMNS = {
    "fvu": ("FVU", 3), "l0": ("L0", 1), "dead_features": ("dead", 0), "max_decoder_cosine": ("max decoder cosine", 3),
    "top_correlation": ("top 0.1% correlation", 3), "loss_recovered": ("loss recovered", 3), "kl": ("KL", 3),
    "top1_agreement": ("same top token", 3),
}  # fmt: skip
_ALL_LAYERS = {
    "ce": ("CE untouched", 3), "ce_replaced": ("replaced", 3), "ce_mean": ("means", 3), "ce_zero": ("zeros", 3),
    "loss_recovered_mean": ("recovered, of means", 3), "loss_recovered": ("of zeros", 3), "kl": ("KL", 3),
    "top1_agreement": ("same top token", 3),
}  # fmt: skip


def read_run(folder: Path) -> dict[str, Any]:
    """Read what is kept of a run with several SAEs: settings, what it took, and the figures of each SAE."""
    metrics, run = (json.loads((folder / name).read_text()) for name in ("metrics.json", "run.json"))
    arguments = run["arguments"]
    names = ("model", "dataset", "site", "target", "skip", "d_sae", "k", "max_steps", "batch_size", "buffer_reuse")
    return {
        "arguments": {name: arguments[name] for name in names},
        "training_seconds": run["training_seconds"],
        "peak_memory_gb": run["peak_memory_gb"],
        "saes": {
            name: {"layer": sae["layer"], "variant": sae["variant"], "trained_tokens": sae["training"]["tokens"]}
            | {key: sae["evaluation"].get(key) for key in _KEPT}
            for name, sae in metrics["saes"].items()
        },
        "all_layers": metrics.get("all_layers", {}),
    }


def site_tables(records: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Make the tables `sites`, of single layers, `transcoders`, and `all-layers`, of those trained on all of them."""
    sites, transcoders, together = [], [], []
    for record in records.values():
        target = record["arguments"]["target"]
        for sae in record["saes"].values():
            row = {"layer": sae["layer"], "penalty": "none" if sae["variant"] == "twin" else "yes"}
            row |= {heading: _rounded(sae[key], digits) for key, (heading, digits) in _COLUMNS.items()}
            if target is None:
                sites.append({"site": record["arguments"]["site"], **row})
            else:
                transcoders.append(row)
        for figures in record["all_layers"].values():
            together.append({name: _rounded(figures.get(key), digits) for key, (name, digits) in _ALL_LAYERS.items()})
    named = {"sites": (sites, ["site", "layer", "penalty"]), "transcoders": (transcoders, ["layer"])}
    tables = {name: pd.DataFrame(rows).set_index(index) for name, (rows, index) in named.items() if rows}
    if "transcoders" in tables and set(tables["transcoders"]["penalty"]) == {"yes"}:
        tables["transcoders"] = tables["transcoders"].drop(columns="penalty")
    if together:
        tables["all-layers"] = pd.DataFrame(together).set_index("CE untouched")
    return tables


def _rounded(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Keep the figures of the runs that are named, and fill the page."""
    from experiments.page import PUBLISHED, write_pages  # which reads the records

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    kept = json.loads(RECORDS.read_text()) if RECORDS.is_file() else {}
    for folder in parser.parse_args(argv).runs:
        kept[folder.name] = read_run(folder)
    write_json(RECORDS, kept)
    for page in write_pages(PUBLISHED):
        sys.stdout.write(f"{page}\n")


if __name__ == "__main__":
    run_script(main)
