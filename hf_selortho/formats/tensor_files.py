"""Files of tensors: safetensors, npz and .pt. Headers are read first, and nothing that could run code."""

from __future__ import annotations

import lzma
import pickle
import pickletools
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import SelOrthoError
from ..utils.hub import safetensors_headers
from ..utils.library_errors import one_line

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
_LARGEST_PICKLE = 1 << 24  # bytes; that of a dict of tensors has some thousand
_INFLATION = 64  # times a compressed file that its contents may be: random weights hardly shrink
# What a dict of tensors is made of; any other name in a pickle would be imported and called.
_TENSORS_ONLY = re.compile(
    r"collections OrderedDict|torch (Float|Half|BFloat16|Double|Long|Int|Bool)Storage|torch (bfloat|float)\d+"
    r"|torch._utils _rebuild_(tensor_v2|parameter)|torch Size|torch device"
)
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
# What numpy, zipfile and torch raise over damaged files.
_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, lzma.LZMAError, pickle.UnpicklingError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file by name, none of them read before it is asked for."""

    path: Path
    headers: Mapping[str, tuple[tuple[int, ...], str]]  # shape and dtype, as safetensors writes it
    loaded: Mapping[str, Any]  # of a .pt, mapped from the disk: tensors, what makes them, and what is beside them
    fetch: Callable[[], Path] | None = None  # downloads the file, of which `path` is the name alone

    def read(self, name: str) -> Tensor:
        """Read a tensor as float32.

        Raises:
            SelOrthoError: the file is damaged.
        """
        if (found := self.loaded.get(name)) is not None:
            return (found() if callable(found) else found).detach().float()
        if self.path.suffix == ".safetensors":
            with safe_open(self.fetch() if self.fetch else self.path, framework="pt") as file:
                return file.get_tensor(name).float()
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
        except _DAMAGE as error:
            raise _damaged(self.path, error) from error
        with np.errstate(over="ignore"):  # infinity is looked for later
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    def within(self, key: str) -> TensorFile:
        """Return the dict of tensors that a .pt holds under a key.

        Raises:
            SelOrthoError: it is none.
        """
        return _of_dict(self.path, self.loaded.get(key))


def open_tensors(path: Path) -> TensorFile:
    """Read names, shapes and dtypes of the tensors of a file.

    Raises:
        SelOrthoError: it is damaged, of another kind, claims more than it holds, or would run code.
    """
    if path.suffix == ".safetensors":
        return TensorFile(path, safetensors_headers(path), {})
    try:
        return _open_npz(path) if path.suffix == ".npz" else _open_torch(path)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> SelOrthoError:
    return SelOrthoError(f"{path} is damaged or no file of arrays ({one_line(error)}): download it again")


def _check_sizes(path: Path, members: list[zipfile.ZipInfo], inflation: int) -> None:
    if sum(info.file_size for info in members) > inflation * path.stat().st_size:
        raise ValueError("it claims to hold more than fits into it")


def _open_npz(path: Path) -> TensorFile:
    headers: dict[str, tuple[tuple[int, ...], str]] = {}
    with zipfile.ZipFile(path) as archive:
        _check_sizes(path, archive.infolist(), _INFLATION)
        for info in archive.infolist():
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                reads = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = reads[version](member)
                if int(np.prod(shape, dtype=object)) * dtype.itemsize != info.file_size - member.tell():
                    raise ValueError(f"{info.filename} holds another number of bytes than its shape takes")
            kind = f"F{8 * dtype.itemsize}" if dtype.kind == "f" else str(dtype)
            headers[info.filename.removesuffix(".npy")] = (tuple(map(int, shape)), kind[:50])
    return TensorFile(path, headers, {})


def _open_torch(path: Path) -> TensorFile:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_sizes(path, members, 1)
        pickles = [info for info in members if info.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE or any(m.compress_type for m in members):
            raise ValueError("it is not as torch.save writes it")
        operations = list(pickletools.genops(archive.read(pickles[0])))
    named = [str(arg) for code, arg, _ in operations if code.name in ("GLOBAL", "INST")]
    calls = [name for name in named if not _TENSORS_ONLY.fullmatch(name)]
    calls += [code.name for code, _, _ in operations if code.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4")]
    if calls:
        raise SelOrthoError(
            f"{path} would run code when it is loaded ({calls[0].replace(' ', '.'):.100}), which is never done: "
            "expected a dict of tensors, or safetensors"
        )
    return _of_dict(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _of_dict(path: Path, content: Any) -> TensorFile:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SelOrthoError(f"{path} holds no dict of tensors: take the weights as their library wrote them")
    headers: dict[str, tuple[tuple[int, ...], str]] = {}
    for key, tensor in content.items():
        if isinstance(tensor, Tensor):
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise SelOrthoError(f"{path}: {key:.50} claims more numbers than the file holds: download it again")
            headers[key] = (tuple(tensor.shape), _DTYPES.get(tensor.dtype, str(tensor.dtype)))
    return TensorFile(path, headers, content)
