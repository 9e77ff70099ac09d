"""What to type next: the commands that are shown at the end of another, each fit for what that one has left."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ..data.cache_manifest import Manifest
from ..features.index_writer import INDEX
from ..hub.run_folder import twin_beside
from ..training.arguments import HubArguments, RunArguments
from ..training.contradictions import penalised
from ..training.run import TrainingRun
from ..utils.command_line import changed_command, program

# Options of a run that its twin baseline does without: where it is published, and how the penalty is steered.
_NOT_OF_TWIN = (
    "push_to_hub", "hub_model_id", "model_id", "dataset_id", "hub_private", "hub_revision", "hub_license",
    "overwrite_output_dir", "ortho_budget", "ortho_budget_value",
)  # fmt: skip


def after_training(run: TrainingRun, command: str) -> str:
    """List what can be done with the SAEs of a finished run, which `command` has started."""
    data, first = run.arguments.data, run.output / run.variants[0].name
    options = ["--streaming"] * (data.streaming and run.store is None) + ["--cpu"] * run.arguments.run.cpu
    again = ["--overwrite"] * any((run.output / variant.name / INDEX).exists() for variant in run.variants)
    lines, note = [], ""
    if data.held_out_fraction > 0:  # else there is no text to do it on
        lines.append(_typed("evaluate", first, *options))
        lines.append(_typed("index", run.output, *options, *again))
    lines.append(_typed("browse", run.output))
    here = first if first.name else first.absolute()
    config, twin = run.configs[0], here.with_name(f"{here.name}-twin")
    if not run.variants[0].name and penalised(config) and not twin.exists() and twin_beside(first) is None:
        changes = {"ortho_coefficient": "0", "output_dir": str(twin)}
        lines.append(as_typed(changed_command(command, **changes, **dict.fromkeys(_NOT_OF_TWIN))))
        note = "The last one trains its twin baseline, the same run without the penalty.\n"
    return "".join(f"  {line}\n" for line in lines) + note


def after_caching(folder: Path, manifest: Manifest, cpu: bool) -> str:
    """List what can be done with a complete cache of activations."""
    options, batch = ["--cpu"] * cpu, RunArguments().batch_size
    if manifest.rows < batch:
        options += ["--batch_size", str(1 << manifest.rows.bit_length() - 1)]
    layers = map(str, manifest.layers)
    report = f"{program('python')} -m hf_selortho.data.cache_report {shlex.quote(str(folder))} --output norms.png"
    output = ["--output_dir", _free_folder("runs/sae")]
    training = _typed("train", "--activations", folder, "--layers", *layers, "--twin", *options, *output)
    return f"  {training}\n  {report}\n"


def to_go_on(command: str) -> str:
    """Return the command by which a stopped run goes on."""
    return as_typed(changed_command(command, resume_from_checkpoint="auto"))


def to_publish(output: Path, hub: HubArguments) -> str:
    """Return the command that publishes a finished run as its own arguments would have."""
    named = {"--repo_id": hub.hub_model_id, "--revision": hub.hub_revision, "--license": hub.hub_license}
    named |= {"--model_id": hub.model_id, "--dataset_id": hub.dataset_id}
    options = [part for name, value in named.items() if value for part in (name, value)]
    return _typed("push", output, *options, *["--private"] * hub.hub_private)


def as_typed(command: str) -> str:
    """Return a command line with `selortho` as it can be called here."""
    return re.sub("^selortho ", lambda _: f"{program('selortho')} ", command)


def _typed(command: str, *words: str | Path) -> str:
    return f"{program('selortho')} {command} {shlex.join(map(str, words))}"


def _free_folder(name: str) -> str:
    """Return a name of a folder that is not there yet."""
    number = 1
    while Path(free := name if number == 1 else f"{name}-{number}").exists():
        number += 1
    return free
