"""A Python environment like this one, but without hf_selortho: what somebody has who only knows transformers."""

from __future__ import annotations

import sysconfig
import venv
from pathlib import Path


def make_bare_environment(folder: Path) -> str:
    """Path of its Python. The installed libraries are links to those of this environment."""
    venv.create(folder, with_pip=False, symlinks=True)
    bare = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for library in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
        for path in library.iterdir():
            if "hf_selortho" not in path.name and path.suffix != ".pth":
                bare.joinpath(path.name).symlink_to(path)
    return str(folder / "bin" / "python")
