"""Keeps the tasks of a layer beside the shards, so that the language model reads them once for a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from hf_selortho.evaluation.first_letter import FirstLetterTask
from hf_selortho.evaluation.probing import LabelledTexts
from hf_selortho.evaluation.tasks import Tasks
from hf_selortho.training.run_folder import write_json

TASKS = "tasks"  # kind of the record that has the facts
PROBING, FIRST_LETTER, FACTS = "probing", "first_letter", "facts"


def save_tasks(tasks: Tasks, folder: Path, layer: int) -> None:
    """Write the tasks of a layer; the facts come last, so that their file says that all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (texts := tasks.probing) is not None:
        tensors = {"activations": texts.activations, "lengths": texts.lengths, "labels": texts.labels}
        save_file(tensors, _path(folder, PROBING, layer, "safetensors"))
        write_json(_path(folder, PROBING, layer, "json"), {"classes": texts.classes})
    if (task := tasks.first_letter) is not None:
        names = ("letters", "activations", "train", "probes", "biases")
        save_file({n: getattr(task, n).contiguous() for n in names}, _path(folder, FIRST_LETTER, layer, "safetensors"))
        rest = {
            "words": task.words, "probe_f1": task.probe_f1, "spelling_accuracy": task.spelling_accuracy,
            "left_out": list(task.left_out), "prompt": task.prompt,
        }  # fmt: skip
        write_json(_path(folder, FIRST_LETTER, layer, "json"), rest)
    write_json(_path(folder, FACTS, layer, "json"), tasks.facts)


def has_tasks(folder: Path, layer: int) -> bool:
    """Whether the tasks of a layer are there."""
    return _path(folder, FACTS, layer, "json").is_file()


def load_tasks(folder: Path, layer: int) -> Tasks:
    """The tasks of a layer that [`save_tasks`] has written."""
    probing = first_letter = None
    if (path := _path(folder, PROBING, layer, "safetensors")).is_file():
        fields: dict[str, Any] = {**load_file(path), **_read(folder, PROBING, layer)}
        probing = LabelledTexts(**fields)
    if (path := _path(folder, FIRST_LETTER, layer, "safetensors")).is_file():
        rest = _read(folder, FIRST_LETTER, layer)
        rest["probe_f1"] = [float("nan") if value is None else value for value in rest["probe_f1"]]
        rest["left_out"] = tuple(rest["left_out"])
        first_letter = FirstLetterTask(**{**load_file(path), **rest})
    return Tasks(probing, first_letter, _read(folder, FACTS, layer))


def load_facts(folder: Path, layer: int) -> dict[str, Any]:
    """What the language model reaches on the tasks of a layer."""
    return _read(folder, FACTS, layer)


def _path(folder: Path, name: str, layer: int, suffix: str) -> Path:
    return folder / f"{name}_layer{layer}.{suffix}"


def _read(folder: Path, name: str, layer: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_path(folder, name, layer, "json").read_text(encoding="utf-8"))
    return content
