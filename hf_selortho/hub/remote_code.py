"""The source that a repository carries so that `trust_remote_code=True` works where this package is not installed."""

from __future__ import annotations

import re
from pathlib import Path

from .. import modeling_selortho

# What config.json says of it. transformers looks for these files at the top of the repository, also for the SAE of a
# sub-folder.
AUTO_MAP = {
    "AutoConfig": "configuration_selortho.SelOrthoConfig",
    "AutoModel": "modeling_selortho.SelOrthoSAE",
}
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def source_files() -> list[Path]:
    """The file of the model, and every file that it imports, directly or not: all of one folder."""
    model = Path(modeling_selortho.__file__)
    found: dict[str, Path] = {}
    waiting = [model.stem]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = model.with_name(f"{name}.py")
            waiting += _RELATIVE_IMPORT.findall(found[name].read_text(encoding="utf-8"))
    return [found[name] for name in sorted(found)]
