"""The folder of an SAE, on this machine or on the Hub: the names in it, its configs and its file of weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub import errors as hub

from ..errors import SelOrthoError
from ..utils.hub import (
    CONFIG,
    LOOKUP_ERRORS,
    find_file,
    hub_error,
    in_subfolder,
    listed,
    patiently,
    read_object,
    unreachable,
    within_reach,
)
from ..utils.library_errors import one_line
from .tensor_files import SUFFIXES, TensorFile, open_tensors

_MOST_NAMES = 20_000


@dataclass(frozen=True)
class Place:
    """Where an SAE is: a folder of a repository or of this machine, and the file in it, where that was named."""

    name: str  # the folder or repository
    lookup: Mapping[str, Any]
    file: str | None
    approximate: bool = False  # whether what is not exact is read all the same
    headers_only: bool = False  # whether weights on the Hub are left there where their headers can be had alone

    @classmethod
    def of(cls, name: str, lookup: Mapping[str, Any], **how: bool) -> Place:
        """Split the name of a file off a sub-folder; without a network, look into the cache alone.

        Raises:
            SelOrthoError: there is no such repository or revision, or it gives no access.
        """
        path = PurePosixPath(lookup.get("subfolder") or "")
        if path.suffix not in SUFFIXES:
            return cls(name, within_reach(name, lookup), None, **how)
        parent = str(path.parent) if path.parent.name else None
        return cls(name, within_reach(name, {**lookup, "subfolder": parent}), path.name, **how)

    @property
    def folder(self) -> str:
        """The sub-folder, or nothing."""
        return self.lookup.get("subfolder") or ""

    def __str__(self) -> str:
        return str(PurePosixPath(Path(self.name).as_posix(), self.folder))

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of files and folders that are there.

        Raises:
            SelOrthoError: the Hub does not say.
        """
        local, revision = self.name, self.lookup.get("revision")
        try:
            if os.path.isdir(self.name):
                pass
            elif self.lookup.get("local_files_only") or constants.HF_HUB_OFFLINE:
                cache = self.lookup.get("cache_dir")
                local = snapshot_download(self.name, revision=revision, cache_dir=cache, local_files_only=True)
            else:
                tree = HfApi(token=self.lookup.get("token")).list_repo_tree
                ask = partial(tree, self.name, self.folder or None, revision=revision)
                entries = patiently(lambda: list(islice(ask(), _MOST_NAMES)))
                return frozenset(PurePosixPath(entry.path).name for entry in entries)
        except hub.LocalEntryNotFoundError as error:
            raise unreachable("SAE", self.name) from error
        except hub.EntryNotFoundError:
            return frozenset()
        except LOOKUP_ERRORS as error:
            raise hub_error(error, "SAE", self.name, revision) from error
        path = os.path.join(local, self.folder)
        return frozenset(os.listdir(path)) if os.path.isdir(path) else frozenset()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json, or nothing where there is none."""
        return self.json(CONFIG) if CONFIG in self.names else {}

    def has(self, file: str) -> str | None:
        """Return the name of a file if it is there."""
        return file if file in self.names else None

    def one(self, pattern: str) -> str | None:
        """Return the file of this pattern: the one that was named, or the only one.

        Raises:
            SelOrthoError: there are several, and none was named.
        """
        if self.file is not None:
            return self.file if re.fullmatch(pattern, self.file) else None
        found = sorted(name for name in self.names if re.fullmatch(pattern, name))
        if len(found) > 1:
            raise SelOrthoError(
                f"{self} holds {len(found)} files of weights ({listed(found, 3)}): name one, such as "
                f"{PurePosixPath(self.folder, found[0])} as the subfolder"
            )
        return found[0] if found else None

    def path(self, file: str, expected: str = "") -> Path:
        """Return the path of a file, downloaded if need be; raises a SelOrthoError if there is none."""
        if path := find_file(self.name, file, self.lookup):
            return path
        raise SelOrthoError(f"{self.name} lacks {file}: expected {expected or file} in the folder of an SAE")

    def json(self, file: str, expected: str = "") -> dict[str, Any]:
        """Read a config; raises a SelOrthoError if it is missing or damaged."""
        return read_object(self.path(file, expected))

    def tensors(self, file: str, expected: str = "") -> TensorFile:
        """Open a file of weights, of which the header is read; raises as [`open_tensors`]."""
        asks_nobody = os.path.isdir(self.name) or self.lookup.get("local_files_only") or constants.HF_HUB_OFFLINE
        if not self.headers_only or asks_nobody or not file.endswith(".safetensors"):
            return open_tensors(self.path(file, expected))
        api, revision = HfApi(token=self.lookup.get("token")), self.lookup.get("revision")
        parse = partial(api.parse_safetensors_file_metadata, revision=revision)
        try:
            found = patiently(lambda: parse(self.name, in_subfolder(file, self.lookup))).tensors
        except hub.SafetensorsParsingError as error:
            raise SelOrthoError(f"{self}: {file} is damaged ({one_line(error)}): choose another SAE") from error
        except LOOKUP_ERRORS as error:
            raise hub_error(error, "SAE", self.name, revision) from error
        headers = {key: (tuple(tensor.shape), str(tensor.dtype)) for key, tensor in found.items()}
        return TensorFile(Path(file), headers, {}, partial(self.path, file))
