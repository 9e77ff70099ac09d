"""Read activations cached on disk or on the Hub: safetensors shards, verified against a manifest.

A folder of cached activations is also a dataset repository of the Hub:

    manifest.json                 where the activations come from, their statistics, every file with its sha256
    tokens/00000.safetensors      token_ids, document_ids, positions and context_ids of the rows of shard 0
    layer_8/00000.safetensors     activations (rows, d_in) of the same rows, one folder a layer
    held_out/...                  the same for documents that training never sees, and their contexts
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import SelOrthoError
from ..language_models.capture import ORIGIN_NAMES, TokenOrigins
from ..language_models.contexts import Context
from ..utils.files import target_outside
from ..utils.hub import LOOKUP_ERRORS, hub_error, listed, resolve_commit
from ..utils.library_errors import one_line
from ..utils.names import RepoRef, activations_of
from .cache_manifest import HELD_OUT, MANIFEST, TRAIN, WORK, CacheError, ShardEntry, parse_manifest, shard_path


@dataclass(frozen=True)
class Shard:
    """A shard in memory."""

    by_layer: dict[int, Tensor]  # (rows, d_in) each, as stored
    origins: TokenOrigins
    contexts: int  # number of contexts, of a held-out shard; else 0
    targets: dict[int, Tensor] = field(default_factory=dict)  # (rows, d_out) each, where they were asked for

    def __len__(self) -> int:
        return len(self.origins)


class ActivationCache:
    """Read cached activations from a local folder or from a dataset repository of the Hub.

    Args:
        source: the folder, or "hub:owner/name" or "hub:owner/name@revision" (branch, tag or commit).
        token: access token of the Hub; without it, the stored one or HF_TOKEN.

    Raises:
        CacheError: no cache is there, its manifest is damaged, or a shard is missing, has another size than the
            manifest says or does not belong there; the message names it.
        SelOrthoError: the repository is unknown, gated or unreachable.
    """

    def __init__(self, source: str, token: str | None = None) -> None:
        source = activations_of(source)
        self.source, self._token, self._folder = source, token, Path(source)
        is_remote = source.startswith("hub:")
        ref = RepoRef.parse(source.removeprefix("hub:"), local=False, kind="dataset") if is_remote else RepoRef("")
        self._repository, self.revision = ref.name, ref.revision  # none of a folder
        self._offline = is_remote and resolve_commit("dataset", ref.name, ref.revision, token) is None
        if not is_remote and not (self._folder / MANIFEST).is_file():
            state, remedy = "", "write one with selortho cache; hub:owner/name reads one from the Hub"
            if (self._folder / WORK).exists():
                state, remedy = "finished ", "run the same command once more"
            raise CacheError(f"{self._folder} holds no {state}cache of activations: {remedy}")
        if is_remote:
            self.revision = self._path(MANIFEST).parent.name  # .../snapshots/<commit>/manifest.json
        data = self._read_bytes(MANIFEST)
        self.manifest = parse_manifest(data, f"{source}/{MANIFEST}")
        self.sha256 = hashlib.sha256(data).hexdigest()  # identifies these activations
        if not self._offline:
            self._check_listing()

    def check_sites(self, layers: Sequence[int], site: str | None = None, target: str | None = None) -> None:
        """See that the shards hold these layers and sites.

        Raises:
            SelOrthoError: they do not; names those that they hold.
        """
        manifest = self.manifest
        if missing := [layer for layer in layers if layer not in manifest.layers]:
            raise SelOrthoError(
                f"{self.source} holds no layer {listed(map(str, missing))}: choose from "
                f"{', '.join(map(str, manifest.layers))}"
            )
        held = [name for name in (manifest.site, manifest.target) if name]
        for name in (site, target):
            if name is not None and name not in held:
                raise SelOrthoError(
                    f"{self.source} holds the site{'s' * (len(held) > 1)} {' and '.join(held)}, not {name}: choose "
                    f"{'one of these' if len(held) > 1 else 'that'}, or cache the activations again with --site and "
                    "--target"
                )
        if target is not None and (site, target) != (manifest.site, manifest.target):
            raise SelOrthoError(
                f"{self.source} holds what {manifest.site} becomes at {manifest.target}, not {site} at {target}: "
                f"choose --site {manifest.site} --target {manifest.target}"
            )

    def read(
        self,
        shard: ShardEntry,
        layers: Sequence[int],
        part: str = TRAIN,
        site: str | None = None,
        target: str | None = None,
    ) -> Shard:
        """Read a shard's rows at some layers, and verify every byte of them.

        Args:
            site: which of the sites that [`check_sites`] allows; default: the one that was cached as such.
            target: the site of the targets; None: there are none.

        Raises:
            CacheError: a file is missing or damaged.
        """

        def rows(layer: int, name: str | None) -> Tensor:
            shape = (shard.rows, self.manifest.layer(layer, name).d_in)
            return self._load(shard, part, self.manifest.folder(layer, name), {"activations": shape})["activations"]

        by_layer = {layer: rows(layer, site) for layer in layers}
        targets = {layer: rows(layer, target) for layer in layers} if target else {}
        tokens = self._load(shard, part, "tokens", dict.fromkeys(ORIGIN_NAMES, (shard.rows,)))
        origins = TokenOrigins.of(**{name: tokens[name] for name in ORIGIN_NAMES})
        return Shard(by_layer, origins, len(tokens.get("context_lengths", ())), targets)

    def held_out_contexts(self) -> list[Context]:
        """Return the contexts whose activations were held out, for what has to run the language model on them."""
        contexts: list[Context] = []
        for shard in self.manifest.held_out:
            tensors = self._load(shard, HELD_OUT, "tokens", {})
            try:
                pieces = tensors["context_token_ids"].split(tensors["context_lengths"].tolist())
                documents = tensors["context_document_ids"].tolist()
                trained: list[list[bool] | None] = [None] * len(pieces)
                if (mask := tensors.get("context_trained")) is not None:
                    trained = [part.tolist() for part in mask.split(tensors["context_lengths"].tolist())]
                contexts += [Context(d, i.tolist(), t) for d, i, t in zip(documents, pieces, trained, strict=True)]
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                path = shard_path(HELD_OUT, "tokens", shard.number)
                raise self._fault(path, f"does not hold the contexts ({one_line(error)})") from error
        return contexts

    def _check_listing(self) -> None:
        """Refuse missing, extra and truncated shards before any is read."""
        entries = (*self.manifest.shards, *self.manifest.held_out)
        expected = {path: file.bytes for entry in entries for path, file in entry.files.items()}
        present = self._sizes()
        for path in sorted(expected.keys() ^ present.keys()):
            raise self._fault(path, "is missing" if path in expected else f"is not in {MANIFEST}")
        for path, size in expected.items():
            if present[path] != size:
                raise self._fault(path, f"has {present[path]} bytes, expected {size}")

    def _sizes(self) -> dict[str, int]:
        """List the safetensors files that are there, hidden ones aside, with their bytes."""
        if self._repository:
            tree = HfApi(token=self._token).list_repo_tree
            try:
                entries = list(tree(self._repository, recursive=True, repo_type="dataset", revision=self.revision))
            except LOOKUP_ERRORS as error:
                raise hub_error(error, "dataset", self._repository, self.revision) from error
            sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
        else:
            paths = [path for path in self._folder.rglob("*.safetensors") if path.is_file()]
            sizes = {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in paths}
        return {path: n for path, n in sizes.items() if path.endswith(".safetensors") and "/." not in f"/{path}"}

    def _load(self, shard: ShardEntry, part: str, folder: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Read a file of a shard, compare its hash, and check that it holds tensors of these shapes."""
        path = shard_path(part, folder, shard.number)
        data, expected = self._read_bytes(path), shard.files[path].sha256
        if (sha256 := hashlib.sha256(data).hexdigest()) != expected:
            raise self._fault(path, f"is damaged: its sha256 is {sha256}, expected {expected[:64]}")
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
            return self._path(path).read_bytes()
        except OSError as error:
            raise self._fault(path, f"cannot be read ({error.strerror or error})") from error

    def _path(self, file: str) -> Path:
        """Return the local path of a file, downloaded into the Hub's cache if need be."""
        if not self._repository:
            path = self._folder / file
            if outside := target_outside(self._folder, path):
                raise self._fault(file, f"is a link or below one that leads out of the folder, to {outside}")
            return path
        lookup: dict[str, Any] = {"repo_type": "dataset", "revision": self.revision, "token": self._token}
        try:
            return Path(hf_hub_download(self._repository, file, **lookup, local_files_only=self._offline))
        except LOOKUP_ERRORS as error:
            reason = hub_error(error, "dataset", self._repository, self.revision)
            raise CacheError(f"shard {self.source}/{file} cannot be downloaded: {reason}") from error

    def _fault(self, path: str, fault: str) -> CacheError:
        remedy = "restore it from a copy, or cache the activations again with --overwrite_output_dir"
        if self._repository:
            command = f"hf download {self._repository} {path} --repo-type dataset --revision {self.revision}"
            online = "go online, then " if self._offline else ""
            remedy = f"{online}download it anew with `{command} --force-download`, or use another revision"
        return CacheError(f"shard {self.source}/{path} {fault}; {remedy}")
