"""The manifest of cached activations: where they come from, their statistics, and the sha256 of every file."""

from __future__ import annotations

import hashlib
import json
import reprlib
from dataclasses import dataclass, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

from ..errors import SelOrthoError
from ..utils.library_errors import one_line
from .text_source import TextSource

FORMAT, FORMAT_VERSION = "hf_selortho.activations", 3
MANIFEST = "manifest.json"
WORK = ".unfinished"  # holds the progress of a cache that is not complete
TRAIN, HELD_OUT = "", "held_out/"
STORED_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NORM_BINS = np.linspace(-10, 22, 513)  # edges of the histogram of norms, as powers of two
_FLOAT32_MAX = torch.finfo(torch.float32).max


class CacheError(SelOrthoError):
    """Cached activations that are damaged, incomplete or not those of their manifest."""


@dataclass(kw_only=True)
class CacheSettings(TextSource):
    """Everything that decides what a cache holds: text, language model, contexts, and what of them is stored how."""

    text_fingerprint: str | None  # of local files, which have no revision
    text_rows: int | None
    seed: int  # of the order of the documents
    lm_name: str
    lm_revision: str | None
    lm_dtype: str
    lm_batch_tokens: int
    lm_device: str
    tokenizer_sha256: str
    context_length: int
    prepend_bos: bool
    min_tokens: int
    site: str  # that is read at each layer
    target: str | None  # that is stored beside it, for transcoders
    layers: tuple[int, ...]
    stored_dtype: str
    max_norm_ratio: float | None
    max_tokens: int | None  # tokens of all contexts for training, over all processes; None: all of the text
    held_out_contexts: int
    shard_tokens: int  # tokens of the contexts of a shard
    processes: int


@dataclass(frozen=True)
class Counts:
    """What was read for training, and what was left out."""

    rows: int  # tokens kept
    tokens: int  # tokens read, BOS included
    contexts: int
    dropped_special: int
    dropped_sinks: int
    documents: int
    dropped_tails: int  # ends of documents that are too short


@dataclass(frozen=True)
class LayerSummary:
    """Statistics of a layer: norms are those of all tokens but special ones, mean and scale those of tokens kept."""

    hook_name: str
    hook_side: str
    mean: tuple[float, ...]
    scale: float  # root mean squared norm about the mean
    median_norm: float  # over the first shard of every process
    max_norm: float | None  # tokens of a larger norm are sinks
    largest_norm: float
    norm_histogram: tuple[int, ...]  # tokens between each two of `NORM_BINS`
    sinks_by_position: tuple[int, ...]

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return len(self.mean)

    def norm_quantile(self, q: float) -> float:
        """Return a quantile of the norms, right to a few percent."""
        below = np.cumsum((0, *self.norm_histogram))
        return min(self.largest_norm, float(np.exp2(np.interp(q * below[-1], below, NORM_BINS))))


@dataclass(frozen=True)
class ShardFile:
    """Hash and size of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it."""

    number: int
    rows: int
    files: dict[str, ShardFile]  # by path within the folder


@dataclass(kw_only=True)
class Manifest(CacheSettings):
    """The content of a manifest.json."""

    counts: Counts
    versions: dict[str, str]
    statistics: dict[str, LayerSummary]  # by layer
    target_statistics: dict[str, LayerSummary]  # likewise, of the targets: those of the tokens kept
    shards: tuple[ShardEntry, ...]
    held_out: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        _require(self.stored_dtype in STORED_DTYPES, "stored_dtype", self.stored_dtype, " or ".join(STORED_DTYPES))
        _require(set(self.statistics) == set(map(str, self.layers)), "layers", self.layers, "those of the statistics")
        targets = set(self.statistics) if self.target else set()
        _require(set(self.target_statistics) == targets, "target_statistics", [*self.target_statistics], str(targets))
        for number, layer in [*self.statistics.items(), *self.target_statistics.items()]:
            _require(layer.scale > 0, f"statistics.{number}.scale", layer.scale, "a number above 0")
            bins = len(NORM_BINS) - 1
            _require(len(layer.norm_histogram) == bins, f"bins of statistics.{number}", layer.norm_histogram, str(bins))
        _require(len(self.shards) > 0, "shards", self.shards, "at least one")
        for key, part, entries in (("shards", TRAIN, self.shards), ("held_out", HELD_OUT, self.held_out)):
            for entry in entries:
                kinds = ("layer", "target") if self.target else ("layer",)
                folders = ("tokens", *(f"{kind}_{layer}" for kind in kinds for layer in self.layers))
                paths = {shard_path(part, folder, entry.number) for folder in folders}
                _require(set(entry.files) == paths, f"files of {key} {entry.number}", sorted(entry.files), str(paths))
                most = min(file.bytes for file in entry.files.values())
                _require(entry.rows <= most, f"rows of {key} {entry.number}", entry.rows, f"at most {most}")

    @property
    def rows(self) -> int:
        """Tokens to train on."""
        return sum(shard.rows for shard in self.shards)

    @property
    def held_out_rows(self) -> int:
        """Tokens held out."""
        return sum(shard.rows for shard in self.held_out)

    def layer(self, number: int, site: str | None = None) -> LayerSummary:
        """Return the statistics of a layer at a site; default: the one that is read."""
        at_target = site == self.target and site is not None
        return (self.target_statistics if at_target else self.statistics)[str(number)]

    def folder(self, number: int, site: str | None = None) -> str:
        """Name the folder of the shards of a layer at a site."""
        return f"{'target' if site == self.target and site is not None else 'layer'}_{number}"


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
        manifest: Manifest = from_json(Manifest, of_today(content))
    except (ValueError, RecursionError) as error:
        raise CacheError(
            f"{name} is damaged: {one_line(error)}; restore it from a copy, or cache the activations again"
        ) from error
    return manifest


def of_today(content: dict[str, Any]) -> dict[str, Any]:
    """Add what a manifest lacks that was written before there were these settings."""
    absent: dict[str, Any] = dict.fromkeys(("separator", "encoding", "target", "chat_column", "chat_roles"))
    absent |= {"site": "resid_post", "target_statistics": {}, **content}
    if isinstance(layers := absent.get("statistics"), dict):
        absent["statistics"] = {
            number: {"hook_side": "output", **layer} if isinstance(layer, dict) else layer
            for number, layer in layers.items()
        }
    return absent


def tokenizer_hash(tokenizer: Any, chats: bool = False) -> str:
    """Hash what a tokenizer of transformers does: vocabulary, merges, special tokens, for `chats` its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    text += str(tokenizer.chat_template) if chats else ""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def from_json(kind: Any, value: Any, name: str = "") -> Any:
    """Build a dataclass, tuple, dict, optional or plain value out of JSON.

    Raises:
        ValueError: "FIELD is VALUE, expected TYPE".
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # X | None
        return None if value is None else from_json(arguments[0], value, name)
    if is_dataclass(kind) and isinstance(value, dict):
        types = get_type_hints(kind)
        if missing := types.keys() - value.keys():
            raise ValueError(f"{name}.{min(missing)} is missing".lstrip("."))
        return kind(**{key: from_json(types[key], value[key], f"{name}.{key}".lstrip(".")) for key in types})  # type: ignore[operator]
    if origin in (tuple, list):
        _require(isinstance(value, (list, tuple)), name, value, "a list")
        return origin(from_json(arguments[0], item, f"{name}[{number}]") for number, item in enumerate(value))
    if origin is dict:
        _require(isinstance(value, dict), name, value, "an object")
        return {key: from_json(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if kind is float:
        _require(type(value) in (int, float) and abs(value) <= _FLOAT32_MAX, name, value, "a finite number")
        return float(value)
    holds = 0 <= value < 2**63 if type(value) is kind is int else type(value) is kind
    _require(holds, name, value, "a whole number of at least 0" if kind is int else kind.__name__)
    return value


def _require(condition: object, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected {expected}")
