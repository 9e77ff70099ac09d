"""Files that are given away stay inside of their folder."""

from __future__ import annotations

import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: object) -> bool:
    """Whether a revision is a commit of the Hub, neither a branch or tag nor the fingerprint of something local."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def snapshot_of(path: Path) -> Path | None:
    """The folder snapshots/<commit> of huggingface_hub's cache that a path is in; None if it is in none."""
    places = (path, *path.parents)
    return next((p for p in places if p.parent.name == "snapshots" and _COMMIT.fullmatch(p.name)), None)


def target_outside(folder: Path, path: Path) -> Path | None:
    """Where a file of `folder` leads, if that is out of the folder; None if it stays inside.

    In huggingface_hub's cache, snapshots/<commit>/file is a link to ../../blobs/<hash>: that counts as inside.
    """
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return path
    snapshot = snapshot_of(root)
    is_blob = snapshot is not None and target.parent == snapshot.parent.parent / "blobs"
    return None if is_blob or target.is_relative_to(root) else target
