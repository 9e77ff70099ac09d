"""What a model card says of an SAE and its training, ready for the template.

Every string is safe Markdown or a Python literal. What is unknown is None or absent, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..utils.hub import is_commit
from .markdown import cell, code, duration, fence, literal, mask_tokens, number, one_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

SAELENS_FOLDER = "saelens"  # of the export, beside the SAE
EMBEDDED_MODEL = "gemma-3-270m"
EMBEDDED_ORIGIN = "google/gemma-3-270m"  # the embedded model is a 4-bit copy of it


def hub_id(name: Any, revision: Any) -> str | None:
    """`name` if it is a repository that was loaded from the Hub, which a commit as its revision proves."""
    return name if isinstance(name, str) and is_commit(revision) and _HUB_ID.fullmatch(name) else None


def base_model(config: Mapping[str, Any]) -> str | None:
    """Id of the language model on the Hub, None for a local one."""
    if config.get("lm_name") == EMBEDDED_MODEL:
        return EMBEDDED_ORIGIN
    return hub_id(config.get("lm_name"), config.get("lm_revision"))


def under_gemma_terms(lm: str) -> bool:
    """Whether a language model is, by its name, one of those that come under the Gemma Terms of Use."""
    return re.search(r"gemma(?![-_]?[4-9])", lm.lower()) is not None


def model_facts(config: Mapping[str, Any], repo_id: str | None, layers: Sequence[int | None]) -> dict[str, Any]:
    """What the SAE is, or what several SAEs have in common.

    Args:
        config: the settings that all of them share.
        repo_id: where on the Hub they will be.
        layers: the different layers that they read.
    """
    lm = config.get("lm_name")
    known = [number(layer) for layer in layers if layer is not None]
    return {
        "title": code(repo_id.split("/")[-1]) if repo_id else None,
        "lm": code(lm) if lm else None,
        "embedded_origin": EMBEDDED_ORIGIN if lm == EMBEDDED_MODEL else None,
        "layer": known[0] if len(layers) == len(known) == 1 else None,
        "layers": f"{', '.join(known[:-1])} and {known[-1]}" if len(layers) == len(known) > 1 else None,
        "hook": code(config["hook_name"]) if config.get("hook_name") else None,
        "d_in": number(config["d_in"]) if config.get("d_in") else None,
        "d_sae": number(config["d_sae"]) if config.get("d_sae") else None,
        "k": number(config["k"]) if config.get("k") else None,
        "under_gemma_terms": under_gemma_terms(str(lm)),
    }


def usage_facts(
    config: Mapping[str, Any], run: Mapping[str, Any], repo_id: str | None, folder: str, saelens: bool
) -> dict[str, Any]:
    """For the code snippets, as Python literals: where the SAE is, and what is read of which language model.

    Args:
        folder: of the SAE within the repository or the run; "" if it is at the top.
        saelens: whether the repository has an export for SAELens.
    """
    place = repo_id or (run.get("arguments") or {}).get("output_dir") or "."
    readable = bool(config.get("lm_name")) and config.get("layer") is not None
    return {
        "sae": literal(str(place)),
        "subfolder": literal(folder) if folder else None,
        "reads": one_line(f"{config['lm_name']} up to layer {config['layer']}") if readable else None,
        "package": "hf_selortho[demo]" if config.get("lm_name") == EMBEDDED_MODEL else "hf_selortho",
        "d_in": int(config["d_in"]),
        "d_sae": int(config["d_sae"]),
        "published": repo_id is not None,
        "saelens": literal(f"{folder}/{SAELENS_FOLDER}" if folder else SAELENS_FOLDER) if saelens else None,
    }


def training_facts(
    config: Mapping[str, Any], metrics: Mapping[str, Any], run: Mapping[str, Any], layers: Sequence[int | None] = ()
) -> dict[str, Any]:
    """How the SAE came about: a table of facts, the command, every argument, the versions of the libraries."""
    command = one_line(run["command"]) if run.get("command") else None
    versions = run.get("versions") or {}
    arguments = mask_tokens(json.dumps(run["arguments"], indent=2)) if run.get("arguments") else None
    rows = [
        *_source_rows(config, layers),
        *_amount_rows(config, metrics),
        *_loss_rows(config),
        *_run_rows(run, metrics),
    ]
    return {
        "rows": rows,
        "command": command,
        "command_fence": fence(command or ""),
        "arguments": arguments,
        "versions": ", ".join(code(f"{name} {version}") for name, version in versions.items()) or None,
    }


def _at(revision: Any) -> str:
    return f" at revision {cell(revision)}" if revision else ""


def _source_rows(config: Mapping[str, Any], layers: Sequence[int | None]) -> Iterator[tuple[str, str]]:
    if config.get("lm_name"):
        yield "Language model", cell(config["lm_name"]) + _at(config.get("lm_revision"))
    if config.get("layer") is not None:
        hook = f", the output of {cell(config['hook_name'])}" if config.get("hook_name") else ""
        yield "Activations", f"residual stream after decoder layer {number(config['layer'])} (counted from 0){hook}"
    elif len(layers) > 1 and None not in layers:
        after = ", ".join(number(layer) for layer in layers if layer is not None)
        yield "Activations", f"residual stream after the decoder layers {after} (counted from 0), an SAE each"
    if config.get("dataset"):
        split = f", split {cell(config['dataset_split'])}" if config.get("dataset_split") else ""
        yield "Text", cell(config["dataset"]) + split + _at(config.get("dataset_revision"))
    if config.get("context_length"):
        bos = ", starting with BOS, which is not trained on" if config.get("prepend_bos") else ", without BOS"
        yield "Contexts", f"up to {number(config['context_length'])} tokens of one document{bos}"


def _amount_rows(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    training, data = metrics.get("training") or {}, metrics.get("data") or {}
    if training.get("tokens"):
        steps = f" in {number(training['steps'], 'count')} steps" if training.get("steps") else ""
        yield "Trained on", f"{number(training['tokens'], 'count')} tokens{steps}"
    if data.get("tokens_kept"):
        contexts = f" from {number(data['contexts'], 'count')} contexts" if data.get("contexts") else ""
        yield "Activations computed", f"{number(data['tokens_kept'], 'count')} tokens{contexts}"
    if data.get("dropped_sinks") is not None:
        ratio = config.get("max_norm_ratio")
        limit = f" (norm above {number(ratio, 'exact')} times the median)" if ratio else ""
        special = data.get("dropped_special")
        others = f"; {number(special, 'count')} special tokens such as BOS" if special is not None else ""
        yield "Tokens left out", f"{number(data['dropped_sinks'], 'count')} sink tokens{limit}{others}"


def _loss_rows(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if config.get("activation"):
        k = f", k = {number(config['k'])}" if config.get("k") else ""
        yield "Activation function", f"{cell(config['activation'])}{k}"
    if config.get("activation") == "relu" and config.get("l1_coefficient") is not None:
        yield "L1 coefficient", number(config["l1_coefficient"], "exact")
    if config.get("penalty"):
        yield "Decorrelation penalty", _penalty(config)
    normalization = {"standard": "centred, scaled to a mean squared norm of 1; undone by `decode`", "none": "none"}
    if config.get("input_normalization") in normalization:
        yield "Input normalisation", normalization[config["input_normalization"]]


def _penalty(config: Mapping[str, Any]) -> str:
    if config["penalty"] == "none" or not config.get("ortho_coefficient"):
        return "none"
    coefficient = f"coefficient {number(config['ortho_coefficient'], 'exact')}"
    if config["penalty"] == "ortsae":
        return f"{cell('ortsae')}: squared decoder cosine of each feature with its nearest one, {coefficient}"
    squared = f"squared correlation ({cell(config['correlation'])})"
    pairs = "all pairs of features"
    if config["penalty"] == "selective":
        squared = _SQUARED.get(str(config.get("penalty_space")), squared)
        pairs = f"the {number(100 * config['pair_fraction'], 'exact')}% most correlated pairs of features"
        if config.get("selection_space", "same") == "same" and config.get("penalty_space") in _SQUARED:
            pairs = f"the {number(100 * config['pair_fraction'], 'exact')}% of pairs where it is largest"
    words = f"{cell(config['penalty'])}: {cell(config['reduction'])} of the {squared} of {pairs}, {coefficient}"
    if config["penalty"] == "selective" and config.get("decoder_ratio"):
        ratio = number(config["decoder_ratio"], "exact")
        nearest = config.get("decoder_pairs") == "nearest"
        beside = "each feature and its nearest one" if nearest else "the pairs most alike"
        words += f"; beside it, {ratio} times as strong, that of the squared decoder cosine of {beside}"
    return words


_SQUARED = {
    "decoder": "squared decoder cosine",
    "redundancy": "squared product of co-firing and decoder cosine",
    "exclusion": "squared decoder cosine, weighted by how rarely the two fire together,",
}


def _run_rows(run: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    arguments = run.get("arguments") or {}
    if arguments.get("learning_rate"):
        batch = f", batches of {number(arguments['batch_size'], 'count')} tokens" if arguments.get("batch_size") else ""
        yield "Optimiser", f"Adam, learning rate {number(arguments['learning_rate'], 'exact')}{batch}"
    if arguments.get("seed") is not None:
        yield "Seed", number(arguments["seed"])
    if run.get("hardware"):
        yield "Hardware", cell(run["hardware"])
    if run.get("wall_seconds"):
        per_step = (metrics.get("training") or {}).get("seconds_per_step")
        step = f", {number(per_step)} s a step" if per_step else ""
        yield "Time", f"{duration(run['wall_seconds'])} for the whole run{step}"
    if run.get("peak_memory_gb"):
        yield "Peak memory", f"{number(run['peak_memory_gb'], 'exact')} GB"
    if run.get("started"):
        yield "Started", cell(run["started"])
