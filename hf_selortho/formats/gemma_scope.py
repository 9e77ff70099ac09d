"""The format of Gemma Scope: params.npz, in a folder that says layer, width and L0."""

from __future__ import annotations

import logging
import lzma
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ..errors import SelOrthoError
from ..utils.hub import listed
from ..utils.library_errors import one_line
from .plain import PlainSae, needed_files, weight_shapes

logger = logging.getLogger(__name__)

WEIGHTS = "params.npz"
_NAMES = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_REPOSITORY = re.compile(r"(?:.*(?:/|--))?gemma-scope-(2b|9b|27b)-(pt|it)-(res|att|mlp|transcoders)(?:[-/].*)?")
_FOLDER = re.compile(r"(?:.*/)?layer_(\d{1,3})/width_\w+/\w+")
_EMBEDDING = re.compile(r"(?:.*/)?embedding/width_\w+/\w+")
_MODULES = {"att": ".self_attn.o_proj.input", "mlp": ".post_feedforward_layernorm"}
# What numpy and zipfile raise over damaged files.
_DAMAGE = (
    ArithmeticError, EOFError, LookupError, MemoryError, NotImplementedError, OSError, RuntimeError, SyntaxError,
    TypeError, ValueError, lzma.LZMAError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_gemma_scope(name: str, lookup: Mapping[str, Any]) -> PlainSae:
    """Read a JumpReLU SAE of Gemma Scope. Only arrays of numbers are read, and nothing that could run code.

    Raises:
        SelOrthoError: the file is damaged, holds other arrays, or is a transcoder's.
    """
    facts = _facts(name, lookup)
    (path,) = needed_files(name, (WEIGHTS,), lookup)
    try:
        arrays = _arrays(path)
    except _DAMAGE as error:
        raise SelOrthoError(f"{path} is damaged or no file of arrays ({one_line(error)}): download it again") from error
    d_in, d_sae = (*arrays["W_enc"].shape, 0, 0)[:2]
    for key, shape in weight_shapes(d_in, d_sae, True, str(path)).items():
        array = arrays[key]
        if array.shape != shape or array.dtype.kind != "f":
            raise SelOrthoError(
                f"{path}: {key} of {array.dtype!s:.100} has the shape {array.shape}, the others give {shape} of float: "
                "download it again"
            )
    with np.errstate(over="ignore"):  # infinity is looked for later
        weights: dict[str, Any] = {
            key: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for key, array in arrays.items()
        }
    return PlainSae(**weights, shift=torch.zeros_like(weights["b_dec"]), facts=facts)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if sorted(names) != sorted(_NAMES):
            raise SelOrthoError(f"{path} holds {listed(names) or 'nothing'}: expected {', '.join(sorted(_NAMES))}")
        arrays = {}
        for info in archive.infolist():
            with archive.open(info) as file:
                arrays[info.filename.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def _facts(name: str, lookup: Mapping[str, Any]) -> dict[str, Any]:
    """Tell language model and layer from the names of repository and folder.

    Raises:
        SelOrthoError: these are of a transcoder, whose arrays look like those of an SAE.
    """
    facts: dict[str, Any] = {"context_length": 1024}
    place = str(PurePosixPath(Path(name).as_posix(), str(lookup.get("subfolder") or "")))
    repository, folder = _REPOSITORY.fullmatch(place), _FOLDER.fullmatch(place)
    if repository:
        size, kind, site = repository.groups()
        if site == "transcoders":
            raise SelOrthoError(
                f"{place} is a transcoder, which is not read; expected an SAE, as of gemma-scope-2b-pt-res"
            )
        facts["lm_name"] = f"google/gemma-2-{size}{'-it' if kind == 'it' else ''}"
    if folder is None:
        if _EMBEDDING.fullmatch(place):
            logger.warning("%s reads embeddings before they are multiplied by the root of d_model", place)
            facts["hook_name"] = "model.embed_tokens"
        return facts
    module, site = f"model.layers.{int(folder[1])}", repository[3] if repository else None
    if site is None:
        logger.warning(
            "%s is taken for an SAE of the output of %s: its path does not name the repository, which may be that of "
            "another site (att, mlp) or of transcoders, and tells its language model",
            place,
            module,
        )
    if site in (None, "res"):
        return facts | {"layer": int(folder[1]), "hook_name": module}
    return facts | {"hook_name": module + _MODULES[site]}
