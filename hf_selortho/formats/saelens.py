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
from ..utils.hub import is_commit, read_object, read_tensors
from . import saelens_keys
from .folders import whole_folder
from .keys import warn_of_unknown
from .names import can_be_centred, hub_name, layer_of, lens_hook, lens_name
from .plain import PlainSae, checked_k, needed_files, weight_shapes
from .saelens_keys import REGISTRY

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FILES = {CONFIG, WEIGHTS}
VERSION = "6.54.0"  # of SAELens, whose format this is
_ARGUMENTS = "model_from_pretrained_kwargs"  # with which SAELens loads the language model
_ARCHITECTURES = ("standard", "topk", "jumprelu")


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
        "reshape_activations": "none",
        "metadata": {key: value for key, value in known.items() if value is not None},
        **({"k": plain.k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}),
        **({"d_out": config.width_out} if config.is_transcoder else {}),
    }


def _lens_hook(config: SelOrthoConfig, site: str | None) -> str | None:
    return lens_hook(config.layer, site) if config.layer is not None and site is not None else None


def _module(module: str | None, side: str) -> str | None:
    return f"{module}.input" if module and side == "input" else module


def read_saelens(name: str, lookup: Mapping[str, Any]) -> PlainSae:
    """Read an SAE that SAELens has saved, of the kinds that are encoder, activation function and decoder.

    Raises:
        SelOrthoError: it is of another kind, its files are damaged or do not fit one another, or a key of its config
            changes what it computes or reads and cannot be obeyed.
    """
    config, weights = needed_files(name, (CONFIG, WEIGHTS), lookup)
    path, overrides = str(config), REGISTRY.get(name.lower(), {})
    content = read_object(config) | overrides
    metadata = content.get("metadata")
    if isinstance(metadata, dict):
        metadata = metadata | overrides
    else:  # before version 6 all was in one, and what is not said of the heads is told by the hook
        heads = "hook_z" in str(content.get("hook_name") or content.get("hook_point"))
        metadata = content = ({"reshape_activations": "hook_z"} if heads else {}) | content
    unknown = saelens_keys.CONFIG.check(content, path)
    if metadata is not content:
        unknown += saelens_keys.CONFIG.check(metadata, path, "metadata.")
    arguments = metadata.get(_ARGUMENTS) or {}
    unknown += saelens_keys.LANGUAGE_MODEL.check(arguments, path, f"{_ARGUMENTS}.")
    unknown += [key for key in saelens_keys.NAMES if not isinstance(metadata.get(key), str | None)]
    warn_of_unknown(unknown, path)
    kind, k = _kind(content, path)
    facts = _facts(metadata, arguments, path)
    shapes = weight_shapes(content.get("d_in"), content.get("d_sae"), kind == "jumprelu", name)
    tensors = {key: tensor.float() for key, tensor in read_tensors(name, [weights], shapes).items()}
    if kind == "topk" and content.get("rescale_acts_by_decoder_norm"):
        norms = tensors["W_dec"].double().norm(dim=1)
        tensors["W_enc"] = (tensors["W_enc"] * norms).float()
        tensors["b_enc"] = (tensors["b_enc"] * norms).float()
        tensors["W_dec"] = (tensors["W_dec"] / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).float()
    subtracts = content.get("apply_b_dec_to_input") in (None, True)
    shift = tensors["b_dec"] if subtracts else torch.zeros_like(tensors["b_dec"])
    return PlainSae(**tensors, shift=shift, k=k, facts=facts, metadata=metadata)


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
    if kind not in _ARCHITECTURES or function not in ("relu", "topk"):
        said = kind if kind not in _ARCHITECTURES else f"activation function {function}"
        raise SelOrthoError(f"{path}: {said!r:.80} of SAELens is not read; expected {', '.join(_ARCHITECTURES)}")
    return kind, checked_k(k, path) if kind == "topk" else None


def _facts(metadata: Mapping[str, Any], arguments: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Tell what the SAE reads, in our terms; `arguments` are those with which SAELens loads the language model.

    Raises:
        SelOrthoError: contexts or language model are not said in a way that can be obeyed.
    """
    names: dict[str, str] = {k: v for k in saelens_keys.NAMES if isinstance(v := metadata.get(k), str)}
    hook = metadata.get("hook_name") or names.get("hook_point")
    module = names.get("hf_hook_name", "").removesuffix(".output")
    context = metadata.get("context_size")
    if context is not None and not 2 <= context < 1 << 31:
        raise SelOrthoError(f"{path}: context_size={context}, expected at least 2 tokens; choose another SAE")
    lm_name = names.get("hf_model_name") or hub_name(names.get("model_name"))
    centred = arguments.get("center_writing_weights") and can_be_centred(lm_name, hook)
    facts = {
        "lm_name": lm_name,
        "lm_revision": names.get("hf_model_revision") or _revision(arguments, lm_name, path),
        "layer": layer_of(hook or module),
        "hook_name": module or hook,
        "dataset": names.get("dataset_path"),
        "context_length": context,
        "prepend_bos": metadata.get("prepend_bos"),
        "centered": True if centred else None,
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
