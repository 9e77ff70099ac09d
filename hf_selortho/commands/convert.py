"""Convert SAEs between formats.

selortho convert runs/demo demo-saelens --to saelens
selortho convert google/gemma-scope-2b-pt-res scope --to selortho \
    --subfolder layer_20/width_16k/average_l0_71
selortho convert runs/transcoders set --to circuit-tracer
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..formats.convert import convert
from ..utils.hub import listed
from .arguments import parse_convert


def main(argv: Sequence[str] | None = None) -> None:
    """Read one format, write another, say how to load it."""
    arguments = parse_convert(argv)
    lookup = {key: getattr(arguments, key) for key in ("revision", "subfolder") if getattr(arguments, key)}
    files = convert(
        arguments.source,
        Path(arguments.target),
        arguments.to,
        arguments.format,
        arguments.overwrite,
        approximate=arguments.approximate,
        **lookup,
    )
    names = listed(file.name for file in files)
    sys.stdout.write(f"wrote {names} to {arguments.target}; load it with: {_snippet(arguments.target, arguments.to)}\n")


def _snippet(target: str, to: str) -> str:
    if to == "circuit-tracer":
        place = str(Path(target).resolve())  # circuit-tracer takes no relative path
        return f"circuit_tracer.ReplacementModel.from_pretrained(MODEL, {place!r}, backend='nnsight')"
    if to == "saelens":
        return f"sae_lens.SAE.load_from_disk({target!r})"
    return f"hf_selortho.SelOrthoSAE.from_pretrained({target!r})"
