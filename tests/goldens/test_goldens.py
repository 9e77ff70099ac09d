"""Trainings give the numbers that they gave before: losses, weights and selected pairs, recorded in goldens.json.

`python -m tests.goldens.test_goldens` writes goldens.json anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.goldens import trainings
from tests.goldens.train_without_report import train

ROOT = Path(__file__).parents[2]
GOLDENS = Path(__file__).with_name("goldens.json")
TOLERANCE = 1e-4  # relative
COUNTS = {"l0": 0.05, "dead_features": 1.0}  # absolute: a feature more or less may fire on a token
PAIR_SHARE = 0.06  # of the selected pairs, which may differ: correlations that are nearly equal change places


def run_one_process(folder: Path) -> dict[str, Any]:
    """Numbers of the runs by name, in this process."""
    inputs = trainings.write_inputs(folder)
    for name, settings in trainings.RUNS.items():
        train(trainings.command_line(folder / name, inputs, settings))
    return {name: trainings.read_numbers(folder / name) for name in trainings.RUNS}


def run_two_processes(folder: Path) -> dict[str, Any]:
    arguments = trainings.command_line(folder / "run", trainings.write_inputs(folder), trainings.TWO_PROCESSES)
    trainings.train_in_processes(ROOT, arguments, processes=2)
    return {"two-processes": trainings.read_numbers(folder / "run")}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for every number that is not as expected."""
    lines = []
    for run_name, saes in expected.items():
        lines += [f"{run_name}: {name} is missing" for name in saes.keys() - found[run_name].keys()]
        for name in saes.keys() & found[run_name].keys():
            lines += [f"{run_name}, {name}: {line}" for line in _differences(found[run_name][name], saes[name])]
    return sorted(lines)


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    pairs = [
        (f"{figure} of step {step}", found["steps"][step][figure], value, COUNTS.get(figure, TOLERANCE * abs(value)))
        for step, figures in expected["steps"].items()
        for figure, value in figures.items()
    ]
    lines = [] if found["weights"].keys() == expected["weights"].keys() else [f"tensors {sorted(found['weights'])}"]
    for name in expected["weights"].keys() & found["weights"].keys():
        (norm, wave), (norm_before, wave_before) = found["weights"][name], expected["weights"][name]
        pairs += [
            (f"norm of {name}", norm, norm_before, TOLERANCE * norm_before),
            (f"wave of {name}", wave, wave_before, TOLERANCE * norm_before),
        ]
    lines += [f"{what} {a} was {b}" for what, a, b, allowed in pairs if abs(a - b) > allowed + 1e-9]
    return lines + _different_pairs(found.get("pairs"), expected.get("pairs"))


def _different_pairs(found: dict[str, Any] | None, expected: dict[str, Any] | None) -> list[str]:
    if found is None or expected is None:
        return [] if found == expected else [f"pairs {found} were {expected}"]
    now, before = (set(zip(pairs["i"], pairs["j"], strict=True)) for pairs in (found, expected))
    allowed = max(2, round(PAIR_SHARE * len(before)))
    lines = [f"pairs of step {found['step']}, before {expected['step']}"] if found["step"] != expected["step"] else []
    if abs(found["count"] - expected["count"]) > PAIR_SHARE * expected["count"]:
        lines.append(f"{found['count']} pairs, before {expected['count']}")
    if len(before - now) > allowed:
        lines.append(f"pairs that are gone: {sorted(before - now)}")
    return lines


def check(found: dict[str, Any]) -> None:
    recorded = json.loads(GOLDENS.read_text())
    wrong = differences(found, {name: recorded[name] for name in found})
    assert not wrong, f"{len(wrong)} numbers differ from {GOLDENS.name}:\n" + "\n".join(wrong[:40])


def test_trainings_of_one_process_give_the_recorded_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(run_one_process(tmp_path))


@pytest.mark.slow
def test_trainings_of_two_processes_give_the_recorded_numbers(tmp_path: Path) -> None:
    check(run_two_processes(tmp_path))


def write_goldens() -> None:
    """Write goldens.json, one line an SAE."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        runs = {**run_one_process(Path(one)), **run_two_processes(Path(two))}
    blocks = [
        f'"{name}": {{\n'
        + ",\n".join(f'"{sae}": {json.dumps(numbers)}' for sae, numbers in sorted(saes.items()))
        + "\n}"
        for name, saes in runs.items()
    ]
    GOLDENS.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    sys.stdout.write(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes\n")


if __name__ == "__main__":
    write_goldens()
