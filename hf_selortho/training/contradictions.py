"""Settings that contradict one another, and options that do nothing beside others: tables, a row each, by command."""

from __future__ import annotations

import os
from typing import Any

from ..data.text_source import EMBEDDED_TEXTS
from ..utils.options import Contradiction, acts_with


def penalised(settings: Any) -> bool:
    """Tell whether settings of an SAE, or its config, have a penalty that acts."""
    return settings.penalty != "none" and settings.ortho_coefficient > 0


def _tokens(v: Any, steps: int) -> int:
    return steps * v.gradient_accumulation_steps * v.batch_size


def _scheduled(v: Any) -> float:
    return sum(steps * v.max_steps if steps < 1 else steps for steps in (v.warmup_steps, v.decay_steps))


def _too_few_to_resample(v: Any) -> bool:
    if v.resample_every == 0:
        return False
    last = (v.max_steps - 1) // v.resample_every * v.resample_every
    return last > 0 and _tokens(v, last) < v.dead_after_tokens


def _penalises_what_is_frozen(v: Any) -> bool:
    on_activations = v.penalty == "full" or (v.penalty == "selective" and v.penalty_space == "activation")
    if not penalised(v) or (on_activations and v.penalty == "selective" and v.decoder_ratio > 0):
        return False
    return bool(v.freeze == ("encoder" if on_activations else "decoder"))


_CROSS_ENTROPY = Contradiction(
    "eval_ce_samples eval_samples",
    lambda v: "eval_ce_samples" in v.given and v.eval_ce_samples > v.eval_samples > 0,
    "they are some of those contexts; lower --eval_ce_samples or raise --eval_samples",
)
_LAYERS = Contradiction("layers", lambda v: len(set(v.layers)) < len(v.layers), "expected each layer once")


def _of_a_local_path(revision: str, name: str) -> Contradiction:
    """Make the row of a revision that somebody has typed for what is on this machine, where it says nothing."""

    def holds(v: Any) -> bool:
        pinned = (getattr(v, revision, None) or "").startswith(("local-", "gguf-"))  # which is compared
        return revision in v.given and not pinned and os.path.exists(getattr(v, name, None) or "")

    return Contradiction(revision, holds, "what is on this machine has no revisions; leave it out", True)


_MODULE = [
    Contradiction(
        "module site",
        lambda v: bool(v.module) and "site" in v.given,
        "both say where to read; leave one out",
    ),
    Contradiction(
        "module",
        lambda v: bool(v.module) and bool({"layer", "layers"} & v.given),
        "its path says in which layer it is; leave --layer and --layers out",
    ),
    *acts_with("side", "module"),
]
_NAMED = ("revision", "sae"), ("model_revision", "model"), ("dataset_revision", "dataset")
_IN_MEMORY = "it is in memory; leave --streaming out"
READING = [
    Contradiction("streaming dataset", lambda v: v.streaming and v.dataset in EMBEDDED_TEXTS, _IN_MEMORY),
    Contradiction(
        "chat_column text_column",
        lambda v: v.chat_column is not None and v.text_column is not None,
        "both say which column to read; leave one out",
    ),
    *(_of_a_local_path(revision, name) for revision, name in _NAMED),
]
EVALUATE = [
    *READING,
    _CROSS_ENTROPY,
    *acts_with("probing_texts", "label_column", harmless=True),
    *acts_with("sets", "probes"),
]
INDEX = [
    *READING,
    *acts_with("explain_url explain_model explain_features explain_budget", "explain"),
    Contradiction(
        "explain explain_url explain_model",
        lambda v: v.explain and not (v.explain_url and v.explain_model),
        "it takes an OpenAI-compatible endpoint and the name of a model there, such as --explain_url "
        "http://127.0.0.1:8000/v1 --explain_model NAME; contexts of the text are sent to that address alone",
    ),
]
_TEXT = [
    *READING,
    *acts_with("eval_samples", "held_out_fraction", harmless=True),
    Contradiction(
        "min_tokens context_length prepend_bos",
        lambda v: v.min_tokens > v.context_length - v.prepend_bos,
        "no context holds that many tokens beside BOS; lower --min_tokens or raise --context_length",
    ),
]
CACHE = [
    *_TEXT,
    Contradiction(
        "streaming max_tokens",
        lambda v: v.streaming and v.max_tokens is None,
        "a stream has no end that is known beforehand; say with --max_tokens how much to read",
    ),
    _LAYERS,
    *_MODULE,
]

_SCHEDULES = [
    Contradiction(
        "warmup_steps decay_steps max_steps",
        lambda v: _scheduled(v) > v.max_steps * (1 + 1e-9),
        "the learning rate would never reach its peak; lower --warmup_steps or --decay_steps, or raise --max_steps",
    ),
    Contradiction(
        "resample_every max_steps",
        lambda v: "resample_every" in v.given and v.resample_every >= v.max_steps,
        "no step before the last would resample; lower --resample_every or raise --max_steps",
    ),
    Contradiction(
        "resample_every dead_after_tokens max_steps batch_size",
        _too_few_to_resample,
        "no feature could count as dead by the last resampling; lower --dead_after_tokens or raise --max_steps",
    ),
    Contradiction(
        "dead_after_tokens max_steps batch_size",
        lambda v: "dead_after_tokens" in v.given and v.dead_after_tokens > _tokens(v, v.max_steps),
        "no feature could ever count as dead; lower --dead_after_tokens or raise --max_steps",
        harmless=True,
    ),
    Contradiction(
        "selection_interval max_steps",
        lambda v: "selection_interval" in v.given and penalised(v) and v.selection_interval > v.max_steps,
        "pairs would be selected once, with the weight of more steps than there are; lower --selection_interval",
        everywhere=True,
        harmless=True,
    ),
    Contradiction(
        "buffer_reuse refresh_every max_steps",
        lambda v: (
            "buffer_reuse" in v.given
            and v.buffer_reuse > 1
            and v.refresh_every * v.batch_size >= _tokens(v, v.max_steps)
        ),
        "the run ends before the buffer is refreshed; lower --refresh_every or leave --buffer_reuse out",
        harmless=True,
    ),
]
_SIZES = [
    Contradiction(
        "refresh_every batch_size buffer_contexts context_length",
        lambda v: v.activations is None and v.refresh_every * v.batch_size > v.buffer_contexts * v.context_length,
        "the buffer holds fewer tokens than the batches between two refreshes; raise --buffer_contexts or lower "
        "--refresh_every or --batch_size",
    ),
    Contradiction(
        "min_support batch_size",
        lambda v: v.min_support > v.batch_size and v.carry_decay == 0,
        "no feature can fire on that many tokens of a batch, so that no pair is left; lower --min_support",
    ),
    Contradiction(
        "d_sae penalty",
        lambda v: v.d_sae == 1 and v.penalty != "none",
        "a single feature makes no pair; raise --d_sae or use --penalty none",
    ),
    _CROSS_ENTROPY,
]
_CHOICES = [
    _LAYERS,
    *_MODULE,
    Contradiction(
        "layer layers",
        lambda v: {"layer", "layers"} <= v.given and bool(v.layers),
        "both say which layers to train on; leave one out",
    ),
    Contradiction(
        "twin penalty ortho_coefficient",
        lambda v: v.twin and not penalised(v),
        "a twin is trained without the penalty, and there is none; leave --twin out, or choose a penalty",
        everywhere=True,
    ),
    Contradiction(
        "push_to_hub hub_model_id",
        lambda v: v.push_to_hub != bool(v.hub_model_id),
        "publishing needs both, as in --push_to_hub --hub_model_id org/name",
    ),
    Contradiction(
        "report_to", lambda v: "none" in v.report_to and len(v.report_to) > 1, "none is no tracker; leave it out"
    ),
    Contradiction(
        "probes activations",
        lambda v: {"probes", "activations"} <= v.given and v.probes != "none" and "model" not in v.given,
        "the language model has to read other texts; give it as --model, or leave --probes out",
    ),
    *acts_with("probes", "eval_samples"),
    *acts_with("probes", "held_out_fraction"),
    *acts_with("refresh_every buffer_reuse streaming", "activations", None, harmless=True),
    *acts_with(
        "model_revision lm_dtype lm_batch_tokens", "model", harmless=True
    ),  # which cached activations do without
    *acts_with("hub_private hub_revision hub_license model_id dataset_id", "push_to_hub"),
    *acts_with("keep_checkpoints", "checkpoint_every", harmless=True),
    *acts_with("max_skipped", "non_finite", "skip", harmless=True),
    *acts_with("l1_coefficient", "activation", "relu"),
    *acts_with("l0_coefficient jumprelu_bandwidth jumprelu_threshold", "activation", "jumprelu"),
    *acts_with("aux_k aux_coefficient", "activation", "topk", "batchtopk"),
    *acts_with("ortho_coefficient selection_interval ortho_budget", "penalty", "selective", "full", "ortsae"),
    *acts_with("reduction", "penalty", "selective", "full"),
    *acts_with("penalty_space selection_space correlation_threshold carry_decay", "penalty", "selective"),
    *acts_with("penalty_schedule decoder_ratio", "penalty", "selective"),
    *acts_with("decoder_pairs", "decoder_ratio"),
    *acts_with("ortho_budget_value", "ortho_budget", "gradient"),
]
_START = [
    *acts_with("input_statistics", "init_from"),
    Contradiction(
        "init_from",
        lambda v: bool(v.init_from) and "input_normalization" in v.given,
        "it says how activations are scaled; leave --input_normalization out, or use --input_statistics measured",
    ),
    Contradiction(
        "init_from jumprelu_threshold",
        lambda v: bool(v.init_from) and "jumprelu_threshold" in v.given,
        "its thresholds are kept; leave one out",
    ),
    Contradiction(
        "freeze resample_every",
        lambda v: v.freeze != "none" and v.resample_every > 0,
        "a dead feature cannot be drawn anew by half; leave one out",
    ),
    Contradiction(
        "freeze aux_coefficient",
        lambda v: v.freeze != "none" and bool({"aux_k", "aux_coefficient"} & v.given) and v.aux_k != 0,
        "the auxiliary loss cannot revive a dead feature by half; leave one out",
    ),
    Contradiction(
        "freeze penalty",
        _penalises_what_is_frozen,
        "the penalty would move only what is frozen; use --penalty none or another --penalty_space, or leave it free",
    ),
]
TRAIN = [*_TEXT, *_SCHEDULES, *_SIZES, *_CHOICES, *_START]

_PROPOSAL = Contradiction(
    "create_pr overwrite",
    lambda v: v.create_pr and v.overwrite,
    "a pull request replaces nothing; leave --overwrite out",
)
PUSH = [_PROPOSAL, *acts_with("license_link", "license")]
SPACE = [
    _PROPOSAL,
    Contradiction(
        "wheel_url from_index",
        lambda v: v.wheel_url and v.from_index,
        "both say where hf_selortho comes from; choose one",
    ),
    Contradiction("sae twin", lambda v: v.sae and v.sae == v.twin, "an SAE is no twin of itself; leave --twin out"),
]
