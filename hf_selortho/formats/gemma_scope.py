"""The format of Gemma Scope: params.npz, in a folder that says layer, width and L0."""

from __future__ import annotations

import lzma
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SelOrthoError
from ..utils.hub import find_file, listed, one_line
from .plain import PlainSae, weight_shapes

WEIGHTS = "params.npz"
_NAMES = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_REPOSITORY = re.compile(r"(?:.*(?:/|--))?gemma-scope-(2b|9b|27b)-(pt|it)-(res|att|mlp|transcoders)(?:[-/].*)?")
_FOLDER = re.compile(r"(?:.*/)?layer_(\d{1,3})/width_\w+/\w+")
_LARGEST_HEADER = 4096  # bytes; that of an array has 128
_DENSEST = 20  # times its compressed size that an array may have, and then some: weights hardly shrink, zeros do
_SMALL = 1 << 25  # bytes
# What numpy and zipfile raise over damaged files.
_DAMAGE = (
    OSError, EOFError, ValueError, RuntimeError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip


def read_gemma_scope(name: str, lookup: Mapping[str, Any]) -> PlainSae:
    """A JumpReLU SAE of Gemma Scope. Only arrays of numbers are read, and nothing that could run code.

    Raises:
        SelOrthoError: the file is damaged, holds other arrays, claims other sizes than it has, or is a transcoder's.
    """
    facts = _facts(name, lookup)
    path = find_file(name, WEIGHTS, lookup)
    if path is None:
        raise SelOrthoError(f"{name} lacks {WEIGHTS}: expected the folder of an SAE of Gemma Scope")
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _tensors(archive, path)
    except _DAMAGE as error:
        raise SelOrthoError(f"{path} is damaged or no file of arrays ({one_line(error)}): download it again") from error
    weights: dict[str, Any] = dict(tensors)
    return PlainSae(**weights, shift=torch.zeros_like(tensors["b_dec"]), facts=facts)


def _tensors(archive: zipfile.ZipFile, path: Path) -> dict[str, Tensor]:
    """The arrays, once names, shapes, dtypes and sizes of all of them are known to be right."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if members.keys() != _NAMES or len(members) != len(archive.infolist()):
        raise SelOrthoError(f"{path} holds {listed(members) or 'nothing'}: expected {', '.join(sorted(_NAMES))}")
    if sum(info.compress_size for info in members.values()) > path.stat().st_size:
        raise SelOrthoError(f"{path}: its arrays claim more bytes than the file has: it is damaged, download it again")
    shapes = {key: _shape(archive, info, path, key) for key, info in members.items()}
    d_in, d_sae = (*shapes["W_enc"], 0, 0)[:2]
    for key, expected in weight_shapes(d_in, d_sae, True, str(path)).items():
        if shapes[key] != expected:
            raise SelOrthoError(
                f"{path}: {key} has the shape {shapes[key]}, the others give {expected}: download it again"
            )
    arrays = {}
    for key, info in members.items():
        with archive.open(info) as file, np.errstate(over="ignore"):  # infinity is looked for later
            array = np.lib.format.read_array(file, allow_pickle=False)
            arrays[key] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return arrays


def _shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, key: str) -> tuple[int, ...]:
    """Shape of an array, from its header, whose claims fit the size of the member of the archive.

    Raises:
        SelOrthoError: it holds no numbers, or more or fewer than it says, or so many that no weights shrink so far.
    """
    with archive.open(info) as file:
        shape, _, dtype = _header(file)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if dtype.kind != "f" or not size <= info.file_size <= size + _LARGEST_HEADER:
        said = f"{key} of {str(dtype)[:100]} and shape {str(shape)[:100]} has {info.file_size:,} bytes"
        raise SelOrthoError(f"{path}: {said}: it is damaged, download it again")
    if info.file_size > _DENSEST * info.compress_size + _SMALL:
        raise SelOrthoError(
            f"{path}: {key} would unpack to {info.file_size:,} bytes, from {info.compress_size:,}: expected weights of "
            "an SAE, which hardly shrink; download it again"
        )
    return shape


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _facts(name: str, lookup: Mapping[str, Any]) -> dict[str, Any]:
    """Language model and layer, from the names of repository and folder.

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
    if folder and (repository is None or repository[3] == "res"):
        facts |= {"layer": int(folder[1]), "hook_name": f"model.layers.{int(folder[1])}"}
    return facts
