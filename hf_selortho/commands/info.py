"""Say what an SAE is, ours or another library's, from its configs and the headers of its weights.

selortho info google/gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_small
selortho info runs/demo --json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ..formats.info import sae_info
from .arguments import parse_info


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each thing that is known, or one JSON object."""
    arguments = parse_info(argv)
    lookup = {key: getattr(arguments, key) for key in ("revision", "subfolder") if getattr(arguments, key)}
    found = sae_info(arguments.sae, lookup)
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    for key, value in found.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        sys.stdout.write(f"{key.replace('_', ' ') + ':':<18} {text if text != '' else '-'}\n")
