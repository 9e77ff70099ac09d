"""The manifest of cached activations: where they come from, their statistics, and the sha256 of every file."""

from __future__ import annotations

import json
import re
import reprlib
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import torch

from ..errors import SelOrthoError
from ..utils.hub import one_line

FORMAT, FORMAT_VERSION = "hf_selortho.activations", 2
MANIFEST = "manifest.json"
WORK = ".unfinished"  # holds the progress of a cache that is not complete
TRAIN, HELD_OUT = "", "held_out/"
STORED_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOWEST_OCTAVE, OCTAVES, BARS_PER_OCTAVE = -24, 64, 8  # of the histogram of norms, from 2^-24 to 2^40
_FLOAT32_MAX = torch.finfo(torch.float32).max

# Types of the manifest's values, in words, and what a value has to satisfy.
Count = Annotated[int, "a whole number of at least 0", lambda value: value >= 0]
Norm = Annotated[float, "a number of at least 0", lambda value: value >= 0]
Positive = Annotated[float, "a number above 0", lambda value: value > 0]
Ratio = Annotated[float, "a number above 1", lambda value: value > 1]
Sha256 = Annotated[str, "64 hexadecimal digits", re.compile(r"[0-9a-f]{64}").fullmatch]
Dtype = Annotated[str, " or ".join(STORED_DTYPES), STORED_DTYPES.__contains__]
Histogram = Annotated[
    tuple[Count, ...], f"{OCTAVES * BARS_PER_OCTAVE} counts", lambda value: len(value) == OCTAVES * BARS_PER_OCTAVE
]


class CacheError(SelOrthoError):
    """Cached activations that are damaged, incomplete or not those of their manifest."""


@dataclass(frozen=True)
class ModelInfo:
    """The language model that computed the activations."""

    name: str
    revision: str | None
    dtype: str
    batch_tokens: Count
    device: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class TextInfo:
    """The text that the language model read."""

    dataset: str
    revision: str | None
    fingerprint: str | None  # of local files, which have no revision
    rows: Count | None
    config: str | None
    split: str
    text_column: str | None
    streaming: bool
    held_out_fraction: Norm
    seed: int


@dataclass(frozen=True)
class ContextInfo:
    """How documents were cut into contexts."""

    context_length: Count
    prepend_bos: bool
    min_tokens: Count


@dataclass(frozen=True)
class CacheSettings:
    """Everything that decides what a cache holds."""

    model: ModelInfo
    text: TextInfo
    contexts: ContextInfo
    layers: tuple[Count, ...]
    stored_dtype: Dtype
    max_norm_ratio: Ratio | None
    max_tokens: Count | None  # tokens of all contexts for training, over all processes; None: all of the text
    held_out_contexts: Count
    shard_tokens: Count  # tokens of the contexts of a shard
    processes: Count


@dataclass(frozen=True)
class Counts:
    """What was read, and what was left out."""

    rows: Count  # tokens kept
    tokens: Count  # tokens read, BOS included
    contexts: Count
    dropped_special: Count
    dropped_sinks: Count
    documents: Count = 0
    dropped_tails: Count = 0  # ends of documents that are too short
    dropped_tail_tokens: Count = 0


@dataclass(frozen=True)
class LayerSummary:
    """Statistics of a layer: norms are those of all tokens but special ones, mean and scale those of tokens kept."""

    hook_name: str
    mean: tuple[float, ...]
    scale: Positive  # root mean squared norm about the mean
    median_norm: Norm
    max_norm: Positive | None  # tokens of a larger norm are sinks
    norm_quantiles: dict[str, Norm]
    norm_histogram: Histogram
    sinks_by_position: tuple[Count, ...]

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return len(self.mean)


@dataclass(frozen=True)
class ShardFile:
    """Hash and size of a file."""

    sha256: Sha256
    bytes: Count


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it."""

    number: Count
    rows: Count
    files: dict[str, ShardFile]  # by path within the folder

    def file(self, part: str, folder: str) -> str:
        """Return the path of the shard's tokens or of a layer: `shard.file(TRAIN, "layer_8")`."""
        return shard_path(part, folder, self.number)


@dataclass(frozen=True)
class Manifest(CacheSettings):
    """The content of a manifest.json."""

    counts: Counts
    held_out_counts: Counts
    versions: dict[str, str]
    statistics: dict[str, LayerSummary]  # by layer
    shards: tuple[ShardEntry, ...]
    held_out: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        _require(set(self.statistics) == set(map(str, self.layers)), "layers", self.layers, "those of the statistics")
        _require(len(self.shards) > 0, "shards", self.shards, "at least one")
        for key, part, entries in (("shards", TRAIN, self.shards), ("held_out", HELD_OUT, self.held_out)):
            for entry in entries:
                paths = {entry.file(part, folder) for folder in ("tokens", *(f"layer_{n}" for n in self.layers))}
                _require(set(entry.files) == paths, f"files of {key} {entry.number}", sorted(entry.files), str(paths))
                most = min(file.bytes for file in entry.files.values())
                _require(0 < entry.rows <= most, f"rows of {key} {entry.number}", entry.rows, f"1 to {most}")

    @property
    def rows(self) -> int:
        """Tokens to train on."""
        return sum(shard.rows for shard in self.shards)

    def layer(self, number: int) -> LayerSummary:
        """Return the statistics of a layer."""
        return self.statistics[str(number)]


def shard_path(part: str, folder: str, number: int) -> str:
    """Return the path of a file within the folder: `shard_path(HELD_OUT, "layer_8", 3)`."""
    return f"{part}{folder}/{number:05d}.safetensors"


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Read a manifest out of its bytes.

    Raises:
        CacheError: it is no manifest, of another version, or damaged; the message says where.
    """
    try:
        content = json.loads(data)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CacheError(f'{name} is no manifest of cached activations: expected "format": "{FORMAT}"')
        if content.get("version") != FORMAT_VERSION:
            raise CacheError(
                f"{name} is of version {reprlib.repr(content.get('version'))}, this hf_selortho reads version "
                f"{FORMAT_VERSION}: cache the activations again"
            )
        return read_manifest(content)
    except (ValueError, RecursionError) as error:
        raise CacheError(
            f"{name} is damaged: {one_line(error)}; restore it from a copy, or cache the activations again"
        ) from error


def read_manifest(content: dict[str, Any]) -> Manifest:
    """Read a manifest out of its content.

    Raises:
        ValueError: "FIELD is VALUE, expected TYPE".
    """
    manifest: Manifest = _from_json(Manifest, content, "")
    return manifest


def _from_json(kind: Any, value: Any, name: str) -> Any:
    """Build a value of a type out of JSON: a dataclass, tuple, dict, optional, annotated or plain type.

    Raises:
        ValueError: "FIELD is VALUE, expected TYPE".
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner, words, holds = arguments
        result = _from_json(inner, value, name)
        _require(holds(result), name, value, words)
        return result
    if origin in (Union, UnionType):  # X | None
        return None if value is None else _from_json(arguments[0], value, name)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind, include_extras=True)
        names = {field.name: f"{name}.{field.name}".lstrip(".") for field in fields(kind)}
        for key in names.keys() - value.keys():
            raise ValueError(f"{names[key]} is missing")
        return kind(**{key: _from_json(hints[key], value[key], names[key]) for key in names})
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_json(arguments[0], item, f"{name}[{number}]") for number, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _from_json(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if kind is float and type(value) in (int, float) and abs(value) <= _FLOAT32_MAX:
        return float(value)
    plain = type(value) is kind and kind is not float and (kind is not int or abs(value) < 2**63)
    _require(plain, name or "the content", value, getattr(kind, "__name__", str(kind)))
    return value


def _require(condition: object, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected {expected}")
