"""The source that a repository carries so that `trust_remote_code=True` works where this package is not installed."""

from __future__ import annotations

from pathlib import Path

from .. import modeling_selortho

# What config.json says of it. transformers looks for these files at the top of the repository, also for the SAE of a
# sub-folder.
AUTO_MAP = {
    "AutoConfig": "configuration_selortho.SelOrthoConfig",
    "AutoModel": "modeling_selortho.SelOrthoSAE",
}
_FILES = ("activation_functions.py", "configuration_selortho.py", "modeling_selortho.py")


def source_files() -> list[Path]:
    """Return the file of the model and those that it imports from its folder."""
    return [Path(modeling_selortho.__file__).with_name(name) for name in _FILES]
