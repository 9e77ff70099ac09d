"""Read activations cached on disk or on the Hub: safetensors shards, verified against a manifest.

A folder of cached activations is also a dataset repository of the Hub:

    manifest.json                 where the activations come from, their statistics, every file with its sha256
    tokens/00000.safetensors      token_ids, document_ids, positions and context_ids of the rows of shard 0
    layer_8/00000.safetensors     activations (rows, d_in) of the same rows, one folder a layer
    held_out/...                  the same for documents that training never sees, and their contexts
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import SelOrthoError
from ..language_models.capture import ORIGIN_NAMES, TokenOrigins
from ..utils.files import target_outside
from ..utils.hub import LOOKUP_ERRORS, hub_error, one_line, resolve_commit
from .cache_manifest import HELD_OUT, MANIFEST, TRAIN, WORK, CacheError, ShardEntry, parse_manifest
from .contexts import Context

_HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Shard:
    """A shard in memory."""

    by_layer: dict[int, Tensor]  # (rows, d_in) each, as stored
    origins: TokenOrigins
    contexts: int  # number of contexts, of a held-out shard; else 0

    def __len__(self) -> int:
        return len(self.origins)


class ActivationCache:
    """Read cached activations from a local folder or from a dataset repository of the Hub.

    Args:
        source: the folder, or "hub:owner/name" or "hub:owner/name@revision" (branch, tag or commit).
        token: access token of the Hub; without it, the stored one or HF_TOKEN.

    Raises:
        CacheError: no such folder, no manifest or a damaged one, a shard that is missing, has another size than the
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
        self.revision = match["revision"] if match else None  # of a repository; the commit once the manifest is read
        self._cached_only = match is not None and resolve_commit("dataset", match["name"], self.revision, token) is None
        if self._repository is None:
            self._check_folder()
        path = self.path_of(MANIFEST)
        if self._repository is not None:
            self.revision = path.parent.name  # .../snapshots/<commit>/manifest.json
        data = self._read_bytes(MANIFEST)
        self.manifest = parse_manifest(data, f"{source}/{MANIFEST}")
        self.sha256 = hashlib.sha256(data).hexdigest()  # identifies these activations
        self._check_listing()

    def read(self, shard: ShardEntry, layers: Sequence[int], part: str = TRAIN) -> Shard:
        """Read a shard's rows at some layers, and verify every byte of them.

        Raises:
            CacheError: a file is missing or damaged.
        """
        shapes = {layer: (shard.rows, self.manifest.layer(layer).d_in) for layer in layers}
        by_layer = {
            layer: self._load(shard, shard.file(part, f"layer_{layer}"), {"activations": shape})["activations"]
            for layer, shape in shapes.items()
        }
        tokens = self._load(shard, shard.file(part, "tokens"), dict.fromkeys(ORIGIN_NAMES, (shard.rows,)))
        origins = TokenOrigins(*(tokens[name].long() for name in ORIGIN_NAMES))
        return Shard(by_layer, origins, len(tokens.get("context_lengths", ())))

    def held_out_contexts(self) -> list[Context]:
        """Return the contexts whose activations were held out, for what has to run the language model on them."""
        contexts: list[Context] = []
        for shard in self.manifest.held_out:
            path = shard.file(HELD_OUT, "tokens")
            tensors = self._load(shard, path, {})
            try:
                pieces = tensors["context_token_ids"].split(tensors["context_lengths"].tolist())
                documents = tensors["context_document_ids"].tolist()
                contexts += [Context(d, ids.tolist()) for d, ids in zip(documents, pieces, strict=True)]
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise self._fault(path, f"does not hold the contexts ({one_line(error)})") from error
        return contexts

    def path_of(self, file: str) -> Path:
        """Return the local path of a file, downloaded into the Hub's cache if need be.

        Raises:
            CacheError: it leads out of the folder, or cannot be downloaded.
        """
        if self._repository is None:
            path = self._folder / file
            if outside := target_outside(self._folder, path):
                raise self._fault(file, f"is a link or below one that leads out of the folder, to {outside}")
            return path
        lookup: dict[str, Any] = {"repo_type": "dataset", "revision": self.revision, "token": self._token}
        try:
            return Path(hf_hub_download(self._repository, file, **lookup, local_files_only=self._cached_only))
        except LOOKUP_ERRORS as error:
            reason = hub_error(error, "dataset", self._repository, self.revision, self._token)
            raise self._fault(file, f"cannot be downloaded ({reason})") from error

    def _check_folder(self) -> None:
        if not self._folder.is_dir():
            raise CacheError(
                f"no such folder of activations: {self._folder} (write one with scripts/cache_activations.py; "
                "hub:owner/name reads one from the Hub)"
            )
        if not (self._folder / MANIFEST).is_file():
            unfinished = (self._folder / WORK).exists()
            remedy = "run the same command once more" if unfinished else "write it with scripts/cache_activations.py"
            raise CacheError(
                f"{self._folder} holds no {'finished cache' if unfinished else 'cache of activations'}: {remedy}"
            )

    def _check_listing(self) -> None:
        """Refuse missing, extra and truncated shards before any is read."""
        entries = (*self.manifest.shards, *self.manifest.held_out)
        expected = {path: file.bytes for entry in entries for path, file in entry.files.items()}
        if self._cached_only:  # each file is verified when it is read
            return
        if self._repository is None:
            paths = (path for path in self._folder.rglob("*.safetensors") if path.is_file())
            listed = [path.relative_to(self._folder).as_posix() for path in paths]
        else:
            listed = self._hub_listing(self._repository)
        names = {name for name in listed if not any(part.startswith(".") for part in PurePosixPath(name).parts)}
        for path in sorted(set(expected) - names):
            raise self._fault(path, "is missing")
        for path in sorted(names - set(expected)):
            raise self._fault(path, f"is not in {MANIFEST}")
        for path, size in expected.items() if self._repository is None else ():
            if (present := self.path_of(path).stat().st_size) != size:
                raise self._fault(path, f"has {present} bytes, expected {size}")

    def _hub_listing(self, repository: str) -> list[str]:
        try:
            files = HfApi(token=self._token).list_repo_files(repository, repo_type="dataset", revision=self.revision)
        except LOOKUP_ERRORS as error:
            raise hub_error(error, "dataset", repository, self.revision, self._token) from error
        return [file for file in files if file.endswith(".safetensors")]

    def _load(self, shard: ShardEntry, path: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Read a file, compare its hash, and check that it holds tensors of these shapes."""
        data = self._read_bytes(path)
        if (sha256 := hashlib.sha256(data).hexdigest()) != shard.files[path].sha256:
            raise self._fault(path, f"is damaged: its sha256 is {sha256}, expected {shard.files[path].sha256}")
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._fault(path, f"is no safetensors file ({one_line(error)})") from error
        for name, shape in shapes.items():
            if name not in tensors or tensors[name].shape != shape:
                raise self._fault(path, f"does not hold {name} of shape {shape}")
        return tensors

    def _read_bytes(self, path: str) -> bytes:
        try:
            return self.path_of(path).read_bytes()
        except OSError as error:
            raise self._fault(path, f"cannot be read ({error.strerror or error})") from error

    def _fault(self, path: str, fault: str) -> CacheError:
        remedy = "restore it from a copy, or cache the activations again with --overwrite_output_dir"
        if self._repository is not None:
            remedy = (
                f"download it anew with `hf download {self._repository} {path} --repo-type dataset --force-download`, "
                "or use another revision"
            )
        return CacheError(f"shard {self.source}/{path} {fault}; {remedy}")
