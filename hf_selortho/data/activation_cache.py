"""Activations on disk or on the Hub: a manifest, and safetensors shards that are checked whenever they are read.

A folder of activations is also a dataset repository of the Hub:

    manifest.json                 where the activations come from, their statistics, every file with its sha256
    tokens/00000.safetensors      token_ids, document_ids, positions and context_ids of the rows of shard 0
    layer_8/00000.safetensors     activations (rows, d_in) of the same rows, one folder a layer
    held_out/...                  the same for documents that training never sees, and their contexts
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import SelOrthoError
from ..language_models.capture import ORIGIN_NAMES, TokenOrigins
from ..utils.files import target_outside
from ..utils.hub import LOOKUP_ERRORS, hub_error, one_line, resolve_commit
from .contexts import Context

FORMAT, FORMAT_VERSION = "hf_selortho.activations", 1
MANIFEST = "manifest.json"
WORK = ".harvest"  # of a harvest that is not finished
TRAIN, HELD_OUT = "", "held_out/"
LARGEST_MANIFEST = 256 << 20  # bytes, of some 500,000 shards
_FLOAT32_MAX = torch.finfo(torch.float32).max
STORED_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_FILE = re.compile(r"(held_out/)?(tokens|layer_\d{1,5})/\d{5,9}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class ShardError(SelOrthoError):
    """Activations on disk that are damaged, missing or not those of their manifest."""


@dataclass(frozen=True)
class ShardFile:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a manifest."""

    number: int
    rows: int
    files: dict[str, ShardFile]  # by path within the folder

    def file(self, part: str, folder: str) -> str:
        """Path of the shard's tokens or of a layer: `shard.file(TRAIN, "layer_8")`."""
        return shard_path(part, folder, self.number)


@dataclass(frozen=True)
class Shard:
    """A shard in memory."""

    by_layer: dict[int, Tensor]  # (rows, d_in) each, as stored
    origins: TokenOrigins
    contexts: int  # that are held out with their activations; 0 of a shard for training

    def __len__(self) -> int:
        return len(self.origins)


@dataclass(frozen=True)
class Manifest:
    """A manifest.json that has been checked."""

    content: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    held_out: tuple[ShardEntry, ...]
    sha256: str  # of the file: what identifies these activations

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(int(layer) for layer in self.content["layers"]))

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def layer(self, number: int) -> dict[str, Any]:
        """Hook, statistics and sinks of a layer."""
        return self.content["layers"][str(number)]


def shard_path(part: str, folder: str, number: int) -> str:
    """Path of a file within the folder: `shard_path(HELD_OUT, "layer_8", 3)`."""
    return f"{part}{folder}/{number:05d}.safetensors"


class ActivationStore:
    """The activations of a local folder or of a dataset repository of the Hub.

    Args:
        source: the folder, or "hub:org/name" or "hub:org/name@revision" (branch, tag or commit).
        token: access token of the Hub; without it, the stored one or HF_TOKEN.

    Raises:
        ShardError: no such folder, no manifest or a damaged one, a shard that is missing, has another size than the
            manifest says or does not belong there; the message names it.
        SelOrthoError: the repository is unknown, gated or unreachable.
    """

    def __init__(self, source: str, token: str | None = None) -> None:
        self.source, self._token = source, token
        match = _HUB.fullmatch(source)
        if source.startswith("hub:") and match is None:
            raise SelOrthoError(f'activations "{source}": expected hub:owner/name or hub:owner/name@revision')
        self._repository = match["name"] if match else None
        self._folder = Path(source).expanduser()
        self.revision: str | None = None  # the commit of a repository
        self._cached_only = False  # nobody answers
        if match:
            self._cached_only = resolve_commit("dataset", match["name"], match["revision"], token) is None
            self.revision = match["revision"]  # so that the cache learns what a branch stands for; then the commit
        self.manifest = self._read_manifest()
        self._check_listing()

    def read(self, shard: ShardEntry, layers: Sequence[int], part: str = TRAIN) -> Shard:
        """A shard's rows at some layers, once every byte read is known to be what the manifest says.

        Raises:
            ShardError: a file is missing or damaged.
        """
        tokens = self._load(shard, shard.file(part, "tokens"))
        by_layer = {}
        for layer in layers:
            path = shard.file(part, f"layer_{layer}")
            by_layer[layer] = self._activations(self._load(shard, path), shard, layer, path)
        if any(name not in tokens or tokens[name].shape != (shard.rows,) for name in ORIGIN_NAMES):
            raise self._fault(
                shard.file(part, "tokens"), f"does not hold {', '.join(ORIGIN_NAMES)} of {shard.rows} rows"
            )
        contexts = len(tokens.get("context_lengths", ()))
        return Shard(by_layer, TokenOrigins(*(tokens[name].long() for name in ORIGIN_NAMES)), contexts)

    def held_out_contexts(self) -> list[Context]:
        """The contexts whose activations were held out, for what has to run the language model on them."""
        contexts: list[Context] = []
        for shard in self.manifest.held_out:
            path = shard.file(HELD_OUT, "tokens")
            tensors = self._load(shard, path)
            try:
                pieces = tensors["context_token_ids"].split(tensors["context_lengths"].tolist())
                documents = tensors["context_document_ids"].tolist()
                contexts += [Context(d, ids.tolist()) for d, ids in zip(documents, pieces, strict=True)]
            except (KeyError, RuntimeError, ValueError) as error:
                raise self._fault(path, f"does not hold the contexts ({error})") from error
        return contexts

    def path_of(self, file: str) -> Path:
        """A file of the folder, downloaded into the Hub's cache if need be.

        Raises:
            ShardError: it leads out of the folder, or cannot be downloaded.
        """
        if self._repository is None:
            path = self._folder / file
            if outside := target_outside(self._folder, path):
                raise self._fault(file, f"is a link or below one that leads out of the folder, to {outside}")
            return path
        name, revision, token = self._repository, self.revision, self._token
        try:
            return Path(
                hf_hub_download(
                    name, file, repo_type="dataset", revision=revision, token=token, local_files_only=self._cached_only
                )
            )
        except LOOKUP_ERRORS as error:
            reason = hub_error(error, "dataset", name, revision, token)
            if file == MANIFEST:
                raise reason from error
            raise self._fault(file, f"cannot be downloaded ({reason})") from error

    def _load(self, shard: ShardEntry, path: str) -> dict[str, Tensor]:
        expected = shard.files[path]
        try:
            data = self.path_of(path).read_bytes()
        except OSError as error:
            raise self._fault(path, f"cannot be read ({error.strerror or error})") from error
        if len(data) != expected.bytes:
            raise self._fault(path, f"has {len(data)} bytes, expected {expected.bytes}")
        found = hashlib.sha256(data).hexdigest()
        if found != expected.sha256:
            raise self._fault(path, f"is damaged: its sha256 is {found}, expected {expected.sha256}")
        try:
            return load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._fault(path, f"is no safetensors file ({one_line(error)})") from error

    def _activations(self, tensors: dict[str, Tensor], shard: ShardEntry, layer: int, path: str) -> Tensor:
        found = tensors.get("activations")
        shape = (shard.rows, self.manifest.layer(layer)["d_in"])
        dtype = STORED_DTYPES[self.manifest.content["stored_dtype"]]
        if found is None or tuple(found.shape) != shape or found.dtype != dtype:
            described = "no activations" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            raise self._fault(path, f"holds {described}, expected {shape} of {dtype}")
        return found

    def _read_manifest(self) -> Manifest:
        folder = self._folder
        if self._repository is None:
            if not folder.is_dir():
                raise ShardError(
                    f"no such folder of activations: {folder} (write one with scripts/cache_activations.py; "
                    "hub:owner/name reads one from the Hub)"
                )
            if (folder / WORK).exists():
                raise ShardError(
                    f"the harvest into {folder} is not finished: run its scripts/cache_activations.py command once more"
                )
            if not (folder / MANIFEST).is_file():
                raise ShardError(f"{folder} holds no {MANIFEST}: expected a folder of scripts/cache_activations.py")
        path = self.path_of(MANIFEST)
        if self._repository is not None:
            self.revision = path.parent.name  # .../snapshots/<commit>/manifest.json, offline too
        return parse_manifest(manifest_bytes(path), f"{self.source}/{MANIFEST}")

    def _check_listing(self) -> None:
        """Refuse missing and extra shards before anything is read."""
        expected = {path: file.bytes for shard in self._all() for path, file in shard.files.items()}
        if self._repository is None:
            present = {
                path.relative_to(self._folder).as_posix(): path.stat().st_size
                for path in self._folder.rglob("*.safetensors")
                if path.is_file() and not _is_hidden(path.relative_to(self._folder))  # no link to a file that is gone
            }
            for path, size in expected.items():
                self.path_of(path)  # refuses links that lead elsewhere
                if path in present and present[path] != size:
                    raise self._fault(path, f"has {present[path]} bytes, expected {size}")
            names = set(present)
        else:
            names = self._hub_listing(set(expected))
        if missing := sorted(set(expected) - names):
            raise self._fault(missing[0], f"is missing{_and_more(missing)}")
        if extra := sorted(names - set(expected)):
            raise self._fault(extra[0], f"is not in {MANIFEST}{_and_more(extra)}")

    def _hub_listing(self, expected: set[str]) -> set[str]:
        assert self._repository is not None
        if self._cached_only:  # the cache holds what was downloaded, and each file is checked
            return expected
        try:
            files = HfApi(token=self._token).list_repo_files(
                self._repository, repo_type="dataset", revision=self.revision
            )
        except LOOKUP_ERRORS as error:
            raise hub_error(error, "dataset", self._repository, self.revision, self._token) from error
        return {file for file in files if file.endswith(".safetensors") and not _is_hidden(PurePosixPath(file))}

    def _all(self) -> Iterator[ShardEntry]:
        yield from self.manifest.shards
        yield from self.manifest.held_out

    def _fault(self, path: str, fault: str) -> ShardError:
        remedy = "restore it from a copy, or harvest again with --overwrite_output_dir"
        if self._repository is not None:
            cached = try_to_load_from_cache(self._repository, path, revision=self.revision, repo_type="dataset")
            remedy = "the repository itself is at fault: tell its owner, or use another revision"
            if isinstance(cached, str):
                remedy = f"delete {cached} and run again to download it anew; if that does not help, {remedy}"
        return ShardError(f"shard {self.source}/{path} {fault}; {remedy}")


def manifest_bytes(path: Path) -> bytes:
    """The content of a manifest.json.

    Raises:
        ShardError: it cannot be read, is larger than any manifest, or a link that leads out of its folder.
    """
    if outside := target_outside(path.parent, path):
        raise ShardError(f"{path} is a link that leads out of the folder, to {outside}: restore it from a copy")
    try:
        if (size := path.stat().st_size) > LARGEST_MANIFEST:
            raise ShardError(
                f"{path} has {size:,} bytes, a manifest at most {LARGEST_MANIFEST:,}: restore it from a copy, or "
                "harvest the activations again"
            )
        return path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror or error}): restore it from a copy") from error


def parse_manifest(data: bytes, name: str) -> Manifest:
    """A manifest out of its bytes.

    Raises:
        ShardError: it is no manifest, of a newer version, or contradicts itself; the message says where.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{name} is damaged: not valid JSON ({error}); harvest the activations again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ShardError(f'{name} is no manifest of activations: expected "format": "{FORMAT}"')
    if content.get("version") != FORMAT_VERSION:
        raise ShardError(
            f"{name} is of version {reprlib.repr(content.get('version'))}, this hf_selortho reads {FORMAT_VERSION}: "
            "update with pip install -U hf_selortho"
        )
    try:
        shards, held_out = (_entries(content, key, part) for key, part in (("shards", TRAIN), ("held_out", HELD_OUT)))
        _check_content(content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"no {one_line(error)}" if isinstance(error, KeyError) else one_line(error)
        raise ShardError(f"{name} is damaged: {what}; harvest the activations again") from error
    if not shards:
        raise ShardError(f"{name} lists no shard: harvest the activations again, from more text")
    return Manifest(content, shards, held_out, hashlib.sha256(data).hexdigest())


def _entries(content: Mapping[str, Any], key: str, part: str) -> tuple[ShardEntry, ...]:
    folders = ["tokens", *(f"layer_{layer}" for layer in content["layers"])]
    entries = []
    for row in content[key]:
        number, rows = row["number"], row["rows"]
        if type(number) is not int or type(rows) is not int or number < 0 or rows < 1:
            raise ValueError(f"a shard numbered {number!r} of {rows!r} rows")
        expected = {shard_path(part, folder, number) for folder in folders}
        if set(row["files"]) != expected or not all(map(_FILE.fullmatch, expected)):
            raise ValueError(f"shard {number} has the files {sorted(row['files'])}, expected {sorted(expected)}")
        files = {path: ShardFile(str(file["sha256"]), int(file["bytes"])) for path, file in row["files"].items()}
        if not all(_SHA256.fullmatch(file.sha256) for file in files.values()):
            raise ValueError(f"shard {number} has a file without a sha256 of 64 hexadecimal digits")
        if rows > min(file.bytes for file in files.values()):  # so that no size is believed that no file has
            raise ValueError(f"shard {number} of {rows} rows has a file of fewer bytes")
        entries.append(ShardEntry(number, rows, files))
    if len({entry.number for entry in entries}) != len(entries):
        raise ValueError(f"a number occurs twice in {key}")
    return tuple(entries)


def _check_content(content: Mapping[str, Any]) -> None:
    """The parts that a training relies on are there and have the right types."""
    if content["stored_dtype"] not in STORED_DTYPES:
        raise ValueError(f"stored_dtype is {content['stored_dtype']!r}, expected one of {', '.join(STORED_DTYPES)}")
    for number, layer in content["layers"].items():
        if not (number.isdecimal() and str(int(number)) == number):
            raise ValueError(f"a layer {number!r}")
        d_in, mean = layer["d_in"], layer["mean"]
        finite = all(isinstance(value, (int, float)) and abs(value) <= _FLOAT32_MAX for value in mean)
        if type(d_in) is not int or len(mean) != d_in or not finite:
            raise ValueError(f"the mean of layer {number} is not {d_in!r} numbers")
        numbers_valid = 0 < layer["scale"] <= _FLOAT32_MAX and 0 <= layer["median_norm"] <= _FLOAT32_MAX
        if not isinstance(layer["hook_name"], str) or not numbers_valid:
            raise ValueError(f"hook_name, scale or median_norm of layer {number}")
        if layer["max_norm"] is not None and not 0 < layer["max_norm"] <= _FLOAT32_MAX:
            raise ValueError(f"max_norm of layer {number} is {layer['max_norm']!r}")
    ratio = content["max_norm_ratio"]
    if ratio is not None and not 1 < ratio <= _FLOAT32_MAX:
        raise ValueError(f"max_norm_ratio is {ratio!r}")
    for group, names in _NEEDED.items():
        for name in names:
            content[group][name]


_NEEDED = {
    "model": ("name", "revision", "dtype"),
    "text": ("dataset", "revision", "config", "split", "text_column", "held_out_fraction"),
    "contexts": ("context_length", "prepend_bos", "min_tokens"),
    "counts": ("documents", "contexts", "rows", "dropped_special", "dropped_sinks", "dropped_tails"),
}


def _is_hidden(path: PurePath) -> bool:
    """Such as `.harvest-finished` or `.cache`: no part of the activations."""
    return any(part.startswith(".") for part in path.parts)


def _and_more(names: Sequence[str]) -> str:
    return "" if len(names) == 1 else f" (and {len(names) - 1} more)"
