"""What a Hub keeps: repositories as histories of commits over content-addressed files. No network in here."""

from __future__ import annotations

import hashlib
import posixpath
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LARGE = 10 * 1024 * 1024  # bytes from which a file goes to large-file storage
LARGE_SUFFIXES = (".safetensors", ".npz", ".parquet", ".png", ".bin", ".whl")


class StoredFile(NamedTuple):
    """A file of a commit."""

    oid: str  # git's sha1: of the content, or of the pointer of a large file
    size: int
    sha256: str | None  # of a large file

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    parent: str | None
    title: str
    message: str = ""
    files: Mapping[str, StoredFile] = field(default_factory=dict, repr=False)


@dataclass
class Repo:
    """A repository with its branches, tags and pull requests."""

    name: str
    kind: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None  # of a space
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1 -> commit
    commits: dict[str, Commit] = field(default_factory=dict)
    proposals: dict[int, str] = field(default_factory=dict)  # number -> title

    def resolve(self, revision: str) -> Commit | None:
        """The commit of a branch, tag, ref or commit id."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        return self.commits.get(revision)

    def history(self, revision: str) -> list[Commit]:
        """Commits up to a revision, newest first."""
        found, commit = [], self.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found


class Storage:
    """Repositories, and the bytes of their files."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # by git's sha1, of large files by sha256

    def create(
        self, name: str, kind: str = "model", private: bool = False, gated: bool = False, sdk: str | None = None
    ) -> Repo:
        """A new repository with one commit, as the Hub makes it: that of a space says which SDK it is for."""
        repo = self.repos[kind, name] = Repo(name, kind, private, gated, sdk)
        files = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if kind == "space":
            title = name.split("/")[-1]
            files["README.md"] = f"---\ntitle: {title}\nemoji: 🏃\nsdk: {sdk}\npinned: false\n---\n".encode()
        first = self.make_commit(repo, "initial commit", files, None)
        repo.refs["refs/heads/main"] = first.oid
        return repo

    def make_commit(
        self,
        repo: Repo,
        title: str,
        files: Mapping[str, bytes | StoredFile],
        parent: Commit | None,
        message: str = "",
    ) -> Commit:
        """A commit on top of another; no branch points to it yet."""
        content = dict(parent.files) if parent else {}
        content |= {path: self.keep(path, data) if isinstance(data, bytes) else data for path, data in files.items()}
        words = f"{parent.oid if parent else ''} {title} {sorted(content.items())} {time.time_ns()}"
        commit = Commit(hashlib.sha1(words.encode()).hexdigest(), parent and parent.oid, title, message, content)
        repo.commits[commit.oid] = commit
        return commit

    def keep(self, path: str, data: bytes) -> StoredFile:
        """Store the bytes of a file."""
        if is_large(path, len(data)):
            digest = hashlib.sha256(data).hexdigest()
            self.blobs[digest] = data
            return large_file(digest, len(data))
        oid = git_hash(data)
        self.blobs[oid] = data
        return StoredFile(oid, len(data), None)

    def read(self, file: StoredFile) -> bytes:
        return self.blobs[file.etag]


def is_large(path: str, size: int) -> bool:
    return size > 0 and (size >= LARGE or path.endswith(LARGE_SUFFIXES))


def large_file(sha256: str, size: int) -> StoredFile:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return StoredFile(git_hash(pointer.encode()), size, sha256)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def folders_of(paths: Iterable[str]) -> list[str]:
    """Every folder that the paths are in."""
    found = set()
    for path in paths:
        while path := posixpath.dirname(path):
            found.add(path)
    return sorted(found)


def content_of(data: bytes | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data
