"""The format of SAELens: cfg.json and sae_weights.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import NonFiniteError, SelOrthoError
from ..modeling_selortho import SelOrthoSAE, sae_of
from ..utils.files import jsonable
from ..utils.hub import read_object, read_tensors
from .folders import whole_folder
from .names import hub_name, layer_of, lens_hook, lens_name
from .plain import PlainSae, checked_k, needed_files, weight_shapes

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FILES = {CONFIG, WEIGHTS}
VERSION = "6.54.0"  # of SAELens, whose format this is
_ARCHITECTURES = ("standard", "topk", "jumprelu")


def write_saelens(sae: SelOrthoSAE, folder: Path, metadata: Mapping[str, Any] | None = None) -> list[Path]:
    """Write an SAE so that `sae_lens.SAE.load_from_disk` and `SAE.from_pretrained` load it, and compute the same.

    relu becomes "standard", topk "topk", batchtopk and jumprelu "jumprelu". The input normalisation is folded into the
    weights, in float64; what is written is float32.

    Args:
        sae: the SAE.
        folder: new or empty.
        metadata: further entries for the metadata, such as "l0".

    Returns:
        The files: weights and config.

    Raises:
        SelOrthoError: there is no room, the folder cannot be written or holds something else, or a weight is not
            finite. Nothing is left in the folder then, nothing in it changed.
    """
    plain, folder = PlainSae.of(sae_of(sae)), Path(folder)
    tensors = {"W_enc": plain.W_enc, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    if plain.threshold is not None:
        tensors["threshold"] = plain.threshold
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
    known = {
        "sae_lens_version": VERSION,
        "model_name": lens_name(config.lm_name) if config.lm_name else None,
        "hf_model_name": config.lm_name,
        "hf_model_revision": config.lm_revision,
        "hook_name": None if config.layer is None else lens_hook(config.layer),
        "hf_hook_name": config.hook_name,
        "context_size": config.context_length,
        "prepend_bos": config.prepend_bos,
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
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {key: value for key, value in known.items() if value is not None},
        **({"k": plain.k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}),
    }


def read_saelens(name: str, lookup: Mapping[str, Any]) -> PlainSae:
    """Read an SAE that SAELens has saved, of the kinds that are encoder, activation function and decoder.

    Raises:
        SelOrthoError: it is of another kind, its files are damaged, or do not fit one another.
    """
    path, weights = needed_files(name, (CONFIG, WEIGHTS), lookup)
    content = read_object(path)
    metadata = content.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else content  # before version 6 all was in one
    kind, k = _kind(content, str(path))
    shapes = weight_shapes(content.get("d_in"), content.get("d_sae"), kind == "jumprelu", name)
    tensors = {key: tensor.float() for key, tensor in read_tensors(name, [weights], shapes).items()}
    if kind == "topk" and content.get("rescale_acts_by_decoder_norm"):
        norms = tensors["W_dec"].double().norm(dim=1)
        tensors["W_enc"] = (tensors["W_enc"] * norms).float()
        tensors["b_enc"] = (tensors["b_enc"] * norms).float()
        tensors["W_dec"] = (tensors["W_dec"] / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).float()
    subtracts = content.get("apply_b_dec_to_input", True)
    shift = tensors["b_dec"] if subtracts else torch.zeros_like(tensors["b_dec"])
    return PlainSae(**tensors, shift=shift, k=k, facts=_facts(metadata), metadata=metadata)


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
    hook = content.get("hook_name") or content.get("hook_point")  # before version 6; it decides if nothing else does
    of_hook = "hook_z" if isinstance(hook, str) and "hook_z" in hook else "none"
    for key, plain in (("normalize_activations", "none"), ("reshape_activations", "none")):
        value = content.get(key) or (of_hook if key == "reshape_activations" else plain)
        if value != plain:
            raise SelOrthoError(
                f"{path}: {key}={value!r:.80} is not read, as it is no part of the weights; fold it into them with "
                f"SAELens and save the SAE again with {key}={plain!r}"
            )
    if content.get("finetuning_scaling_factor"):
        raise SelOrthoError(f"{path}: finetuning_scaling_factor is not read; save the SAE again with SAELens 6")
    return kind, checked_k(k, path) if kind == "topk" else None


def _facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Tell what we know of its training, in our terms; whatever is of another type than expected is left out."""

    def known(key: str, kind: type) -> Any:
        return metadata[key] if type(metadata.get(key)) is kind else None

    hook = known("hook_name", str) or known("hook_point", str)
    module = (known("hf_hook_name", str) or "").removesuffix(".output")
    context = known("context_size", int)
    facts = {
        "lm_name": known("hf_model_name", str) or hub_name(metadata.get("model_name")),
        "lm_revision": known("hf_model_revision", str),
        "layer": layer_of(hook or module),
        "hook_name": module or hook,
        "dataset": known("dataset_path", str),
        "context_length": context if context and 2 <= context < 1 << 31 else None,
        "prepend_bos": known("prepend_bos", bool),
    }
    return {key: value for key, value in facts.items() if value is not None}
