"""The format of Gemma Scope: params.npz, in a folder that says layer, width and L0."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import SelOrthoError
from ...saved_files import find_file
from .plain import PlainSae, weight_shapes

WEIGHTS = "params.npz"
_NAMES = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_REPOSITORY = re.compile(r"google/gemma-scope-(2b|9b|27b)-(pt|it)-(res|att|mlp)(-.*)?")
_FOLDER = re.compile(r"(?:.*/)?layer_(\d{1,3})/width_\w+/\w+")


def read_gemma_scope(name: str, lookup: Mapping[str, Any]) -> PlainSae:
    """A JumpReLU SAE of Gemma Scope. Only arrays of numbers are read, and nothing that could run code.

    Raises:
        SelOrthoError: the file is damaged, holds other arrays, or claims other sizes than it has.
    """
    path = find_file(name, WEIGHTS, lookup)
    if path is None:
        raise SelOrthoError(f"{name} lacks {WEIGHTS}: expected the folder of an SAE of Gemma Scope")
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _tensors(archive, path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise SelOrthoError(f"{path} is damaged or no file of arrays ({error}): download it again") from error
    weights: dict[str, Any] = dict(tensors)
    return PlainSae(**weights, shift=torch.zeros_like(tensors["b_dec"]), facts=_facts(name, lookup))


def _tensors(archive: zipfile.ZipFile, path: Path) -> dict[str, Tensor]:
    """The arrays, once names, shapes, dtypes and sizes of all of them are known to be right."""
    members = {Path(info.filename).stem: info for info in archive.infolist()}
    if members.keys() != _NAMES or len(members) != len(archive.infolist()):
        raise SelOrthoError(
            f"{path} holds {', '.join(sorted(members))[:200] or 'nothing'}: expected {', '.join(sorted(_NAMES))}"
        )
    heads = {}
    for key, info in members.items():
        with archive.open(info) as file:
            heads[key] = shape, _, dtype = _header(file)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.kind != "f" or not size <= info.file_size <= size + 4096:
            raise SelOrthoError(
                f"{path}: {key} of {dtype} and shape {shape} has {info.file_size:,} bytes: it is damaged"
            )
        if info.file_size > 2000 * info.compress_size + 1_000_000:
            raise SelOrthoError(f"{path}: {key} would unpack to {info.file_size:,} bytes: expected weights of an SAE")
    d_in, d_sae = (*heads["W_enc"][0], 0, 0)[:2]
    for key, expected in weight_shapes(d_in, d_sae, True, str(path)).items():
        if heads[key][0] != expected:
            raise SelOrthoError(f"{path}: {key} has the shape {heads[key][0]}, the others give {expected}")
    arrays = {}
    for key, info in members.items():
        with archive.open(info) as file:
            arrays[key] = torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False).astype(np.float32))
    return arrays


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _facts(name: str, lookup: Mapping[str, Any]) -> dict[str, Any]:
    """Language model and layer, from the names of repository and folder."""
    facts: dict[str, Any] = {"context_length": 1024}
    repository = _REPOSITORY.fullmatch(name)
    if repository:
        facts["lm_name"] = f"google/gemma-2-{repository[1]}{'-it' if repository[2] == 'it' else ''}"
    folder = _FOLDER.fullmatch(str(lookup.get("subfolder") or name))
    reads_residual = repository is None or repository[3] == "res"
    if folder and reads_residual:
        facts |= {"layer": int(folder[1]), "hook_name": f"model.layers.{int(folder[1])}"}
    return facts
