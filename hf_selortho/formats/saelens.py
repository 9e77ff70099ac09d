"""The format of SAELens: cfg.json and sae_weights.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..configuration_selortho import SelOrthoConfig
from ..errors import NonFiniteError, SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.files import jsonable
from ..utils.hub import is_commit, read_object
from ..utils.sae_formats import library_of
from . import saelens_keys
from .description import LENS, Description, factors_of_one
from .folders import whole_folder
from .keys import warn_of_unknown
from .names import can_be_centred, facts_of_hooks, hub_name, lens_hook, lens_name
from .place import Place
from .plain import PlainSae, checked_k
from .registry import facts_of_repository

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FILES = {CONFIG, WEIGHTS}
VERSION = "6.54.0"  # of SAELens, whose format this is
_ARGUMENTS = "model_from_pretrained_kwargs"  # with which SAELens loads the language model
_THRESHOLD, _SKIP = {"threshold": "threshold"}, {"W_skip": "W_skip.T"}
# Of each architecture that is read: activation function, and names of the tensors beside encoder and decoder.
_ARCHITECTURES: dict[Any, tuple[str, dict[str, str]]] = {
    "standard": ("relu", {}),
    "topk": ("topk", {}),
    "abstopk": ("abstopk", {}),
    "jumprelu": ("jumprelu", _THRESHOLD),
    "gated": ("gated", {name: name for name in ("r_mag", "b_gate", "b_mag")}),
    "batchtopk": ("jumprelu", {"threshold": "topk_threshold"}),  # of checkpoints of a training, as the next
    "matryoshka_batchtopk": ("jumprelu", {"threshold": "topk_threshold"}),
    "transcoder": ("relu", {}),
    "skip_transcoder": ("relu", _SKIP),
    "jumprelu_transcoder": ("jumprelu", _THRESHOLD),
    "jumprelu_skip_transcoder": ("jumprelu", _THRESHOLD | _SKIP),
}
_REFUSED = {
    "matching_pursuit": "its features are chosen one after the other, which no encoder does at once",
    "temporal": "the features of a token depend on those of the tokens before it",
}


def write_saelens(sae: SelOrthoSAE, folder: Path, metadata: Mapping[str, Any] | None = None) -> list[Path]:
    """Write an SAE so that `sae_lens.SAE.load_from_disk` and `SAE.from_pretrained` load it, and compute the same.

    relu becomes "standard", topk "topk", batchtopk and jumprelu "jumprelu"; transcoders become "transcoder" and
    "jumprelu_transcoder", with a skip "skip_transcoder" and "jumprelu_skip_transcoder". The normalisation is folded
    into the weights, in float64; what is written is float32.

    Args:
        sae: the SAE.
        folder: new or empty.
        metadata: further entries for the metadata, such as "l0".

    Returns:
        The files: weights and config.

    Raises:
        SelOrthoError: there is no room, the folder cannot be written or holds something else, a weight is not finite,
            or it is a transcoder with topk, which SAELens has none of. Nothing is left in the folder then, nothing in
            it changed.
    """
    plain, folder = PlainSae.of(SelOrthoSAE.checked(sae)), Path(folder)
    if sae.config.is_transcoder and plain.k is not None:
        raise SelOrthoError("activation=topk: SAELens has no such transcoders; expected relu, batchtopk or jumprelu")
    tensors = {"W_enc": plain.W_enc, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    if plain.threshold is not None:
        tensors["threshold"] = plain.threshold
    if plain.W_skip is not None:
        tensors["W_skip"] = plain.W_skip.T.contiguous()
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{key} of this SAE holds NaN or infinity: export an earlier checkpoint of it")
    content = json.dumps(jsonable(_config(sae, plain, metadata or {})), indent=2) + "\n"
    with whole_folder(folder) as temporary:
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(content, encoding="utf-8")
    return [folder / name for name in (WEIGHTS, CONFIG)]


def _config(sae: SelOrthoSAE, plain: PlainSae, metadata: Mapping[str, Any]) -> dict[str, Any]:
    config = sae.config
    kind = "topk" if plain.k is not None else "standard" if plain.threshold is None else "jumprelu"
    if config.is_transcoder:
        parts = ("jumprelu" * (kind == "jumprelu"), "skip" * config.skip, "transcoder")
        kind = "_".join(filter(None, parts))
    of_lens = (config.hook_name or "").startswith(("blocks.", "hook_"))
    arguments: dict[str, Any] = {"center_writing_weights": True} if config.centered else {}
    if config.lm_revision and not is_commit(config.lm_revision) and "sha256:" not in config.lm_revision:
        arguments["revision"] = config.lm_revision  # a branch or tag: SAELens reads none of "hf_..."
    known = {
        "sae_lens_version": VERSION,
        "model_name": lens_name(config.lm_name) if config.lm_name else None,
        "hf_model_name": config.lm_name,
        "hf_model_revision": config.lm_revision,
        "hook_name": _lens_hook(config, config.site) or (config.hook_name if of_lens else None),
        "hf_hook_name": None if of_lens else _module(config.hook_name, config.hook_side),
        "hook_name_out": _lens_hook(config, config.target),
        "hf_hook_name_out": _module(config.target_hook_name, config.target_hook_side),
        "context_size": config.context_length,
        "prepend_bos": config.prepend_bos,
        "model_from_pretrained_kwargs": arguments or None,
        "exclude_special_tokens": True,
        "dataset_path": config.dataset,
        **metadata,
    }
    return {
        "architecture": kind,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not config.is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if str(known["hook_name"]).endswith("hook_z") else "none",  # heads apart
        "metadata": {key: value for key, value in known.items() if value is not None},
        **({"k": plain.k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}),
        **({"d_out": config.width_out} if config.is_transcoder else {}),
    }


def _lens_hook(config: SelOrthoConfig, site: str | None) -> str | None:
    return lens_hook(config.layer, site) if config.layer is not None and site is not None else None


def _module(module: str | None, side: str) -> str | None:
    return f"{module}.input" if module and side == "input" else module


def find(place: Place) -> str | None:
    """Return the file of weights, if this is the format; others have one of this name beside their config.json."""
    others = (library_of(place.config) or ("SAELens",))[0] != "SAELens"
    return place.has(WEIGHTS) if place.has(CONFIG) or not others else None


def describe(place: Place, file: str) -> Description:
    """Tell what an SAE or transcoder is that SAELens has saved, finished or as a checkpoint of a training.

    Raises:
        SelOrthoError: it is no encoder, activation function and decoder, its files are damaged, or a key of its config
            changes what it computes or reads and cannot be obeyed.
    """
    config = place.path(CONFIG, f"{CONFIG} and {WEIGHTS}")
    path, known = str(config), facts_of_repository(place.name)
    overrides = known.get("overrides", {})
    content = read_object(config) | overrides
    metadata = content.get("metadata")
    if isinstance(metadata, dict):
        metadata = metadata | overrides
    else:  # before version 6 all was in one
        metadata = content
    unknown = saelens_keys.CONFIG.check(content, path)
    if metadata is not content:
        unknown += saelens_keys.CONFIG.check(metadata, path, "metadata.")
    arguments = metadata.get(_ARGUMENTS) or {}
    unknown += saelens_keys.LANGUAGE_MODEL.check(arguments, path, f"{_ARGUMENTS}.")
    unknown += [key for key in saelens_keys.NAMES if not isinstance(metadata.get(key), str | None)]
    warn_of_unknown(unknown, path)
    tensors, (kind, k) = place.tensors(file), _kind(content, path)
    activation, extra = _ARCHITECTURES[kind]
    names = LENS | extra
    if "log_threshold" in tensors.headers and "threshold" in names:
        names |= {"threshold": "log_threshold"}
    if kind == "gated":
        del names["b_enc"]
    ignored = factors_of_one(tensors)
    if "scaling_factor" in tensors.headers and not ignored and content.get("finetuning_scaling_factor"):
        names["factor"] = "scaling_factor"
    factor, lost = _factor(content, known.get("factors", {}).get(place.folder), path, place.approximate)
    facts = _facts(metadata, arguments, path)
    if "target" not in facts and "transcoder" in kind:
        raise SelOrthoError(f"{path}: hook_name_out is missing: expected the hook that this transcoder predicts")
    return Description(
        tensors,
        names,
        activation,
        k=k,
        log_thresholds="log_threshold" in names.values(),
        subtracts=content.get("apply_b_dec_to_input") in (None, True) and "target" not in facts,
        unit_rows=bool(content.get("rescale_acts_by_decoder_norm")) and kind not in ("standard", "jumprelu"),
        factors=(factor, factor),
        widths=(content.get("d_in"), content.get("d_sae")),
        ignored=ignored,
        facts=facts,
        metadata=metadata,
        folded=[f"the factor {factor:.4g} of the activations"] if factor != 1 else [],
        lost=lost,
    )


def _factor(content: Mapping[str, Any], known: Any, path: str, approximate: bool) -> tuple[float, str | None]:
    """Return by what activations are multiplied, and what is lost where nobody knows.

    Raises:
        SelOrthoError: nobody does, unless what is not exact was asked for.
    """
    if content.get("normalize_activations") not in (True, "expected_average_only_in"):
        return 1.0, None
    if known is not None:
        return float(known), None
    lost = "the factor is taken as 1, so that too few or too many features fire"
    if approximate:
        return 1.0, lost
    raise SelOrthoError(
        f"{path}: normalize_activations={content['normalize_activations']!r} is not read: the activations are "
        "multiplied by a factor that is not among the weights, and known of few repositories; with --approximate "
        f"(approximate=True) {lost}"
    )


def _kind(content: Mapping[str, Any], path: str) -> tuple[str, int | None]:
    """Return architecture and k.

    Raises:
        SelOrthoError: there is more to it than encoder, activation function and decoder.
    """
    kind = content.get("architecture", "standard")
    function = content.get("activation_fn") or content.get("activation_fn_str") or "relu"  # before version 6
    k, arguments = content.get("k"), content.get("activation_fn_kwargs")
    if kind == "topk" or (kind == "standard" and function == "topk"):
        kind, k = "topk", arguments.get("k", k) if isinstance(arguments, dict) else k
    if not isinstance(kind, str) or kind not in _ARCHITECTURES or function not in ("relu", "topk"):
        said = kind if function in ("relu", "topk") else f"activation function {function}"
        why = _REFUSED.get(str(kind), f"expected {', '.join(_ARCHITECTURES)}")
        raise SelOrthoError(f"{path}: {said!r:.80} of SAELens is not read; {why}")
    return kind, checked_k(k, path) if kind in ("topk", "abstopk") else None


def _facts(metadata: Mapping[str, Any], arguments: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Tell what the SAE reads, in our terms; `arguments` are those with which SAELens loads the language model.

    Raises:
        SelOrthoError: contexts or language model are not said in a way that can be obeyed.
    """
    names: dict[str, str] = {k: v for k in saelens_keys.NAMES if isinstance(v := metadata.get(k), str)}
    hook = metadata.get("hook_name") or names.get("hook_point")
    module = names.get("hf_hook_name")
    context = metadata.get("context_size")
    if context is not None and not 2 <= context < 1 << 31:
        raise SelOrthoError(f"{path}: context_size={context}, expected at least 2 tokens; choose another SAE")
    lm_name = names.get("hf_model_name") or hub_name(names.get("model_name"))
    centred = arguments.get("center_writing_weights") and can_be_centred(lm_name, hook)
    facts = {
        "lm_name": lm_name,
        "lm_revision": names.get("hf_model_revision") or _revision(arguments, lm_name, path),
        "dataset": names.get("dataset_path"),
        "context_length": context,
        "prepend_bos": metadata.get("prepend_bos"),
        "centered": True if centred else None,
        **facts_of_hooks(hook, module, metadata.get("hook_name_out"), names.get("hf_hook_name_out")),
    }
    return {key: value for key, value in facts.items() if value is not None}


def _revision(arguments: Mapping[str, Any], lm_name: str | None, path: str) -> str | None:
    """Return the revision of the language model that SAELens loads with these arguments, if not the default one."""
    if (step := arguments.get("checkpoint_value")) is None:
        return arguments.get("revision")
    if not (lm_name or "").startswith("EleutherAI/pythia"):
        raise SelOrthoError(
            f"{path}: {_ARGUMENTS}.checkpoint_value={step} is not read: only the checkpoints of Pythia are revisions "
            "of its repository; choose an SAE of the finished language model"
        )
    return f"step{step}"
