"""Trains and scores the variants of one world, recipe and seed.

`python -m experiments.world_run request.json`, a process of its own, like every training of a plan. What a
record has already is not done again.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from experiments.plan import WorldRun
from experiments.records import Records
from experiments.world_peers import peer_settings, run_peers
from experiments.world_training import run_world
from experiments.worlds import World
from hf_selortho.training.run_folder import hardware, library_versions
from hf_selortho.utils.command_line import run_script, use_all_cores


def missing_scores(run: WorldRun, records: Records) -> tuple[list[str], list[str]]:
    """Variants and peers that the record of a run does not have.

    Raises:
        SelOrthoError: the record is of another world, or of other settings.
    """
    known = records.read(run.name) if records.has(run.name) else {}
    if known:
        _check_same(run, known, records)
    variants = [name for name in run.variants if name not in known.get("scores", {})]
    peers = [name for name in run.peers if name not in known.get("peers", {})]
    return variants, peers


def _check_same(run: WorldRun, known: dict[str, Any], records: Records) -> None:
    shared = run.variants.keys() & known["variants"].keys()
    facts = [
        ("the world", known["world"], World.from_json(run.world).to_json()),
        ("the settings", known["settings"], run.settings),
        ("the training", known["training"], run.training),
        ("the variants", {n: known["variants"][n] for n in shared}, {n: run.variants[n] for n in shared}),
    ]
    records.refuse_other(run.name, facts)


def score_world(run: WorldRun, records: Records, samples: int) -> None:
    """Train what the record does not have, and write it with what it had."""
    variants, peers = missing_scores(run, records)
    world = World.from_json(run.world)
    for name in peers:
        peer_settings(name, run.settings, 1.0)  # what they cannot do without is known before anything is trained
    if variants:
        settings = {name: run.variants[name] for name in variants}
        found = run_world(world, run.settings, settings, seed=run.seed, samples=samples, **run.training)
        add_scores(run, records, samples, "scores", found)
    if peers:
        found = run_peers(world, peers, run.settings, seed=run.seed, samples=samples, **run.training)
        add_scores(run, records, samples, "peers", found)


def add_scores(run: WorldRun, records: Records, samples: int, part: str, found: dict[str, dict[str, float]]) -> None:
    """Write the record with what it had and what has been found."""
    known: dict[str, Any] = records.read(run.name) if records.has(run.name) else {}
    parts = {"scores": known.get("scores", {}), "peers": known.get("peers", {})}
    parts[part] = {**parts[part], **found}
    records.write(
        run.name,
        {
            "kind": "world", "world": World.from_json(run.world).to_json(), "recipe": run.recipe, "seed": run.seed,
            "settings": run.settings, "variants": {**known.get("variants", {}), **run.variants},
            "training": run.training, "samples": samples, **parts,
            "hardware": hardware(torch.device("cpu"), 1),
            "versions": {**library_versions(), "sae-lens": version("sae-lens")},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    )  # fmt: skip


def main() -> None:
    """Score what the file that is named says."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    use_all_cores(request["threads"])
    run = WorldRun(**{**request["run"], "peers": tuple(request["run"]["peers"])})
    score_world(run, Records(Path(request["results"])), request["samples"])


if __name__ == "__main__":
    run_script(main)
