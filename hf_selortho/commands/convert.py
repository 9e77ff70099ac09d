"""Convert SAEs between formats.

selortho convert runs/demo demo-saelens --to saelens
selortho convert google/gemma-scope-2b-pt-res scope --to selortho \
    --subfolder layer_20/width_16k/average_l0_71
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..formats import FORMATS
from ..formats.convert import TARGETS, convert
from ..utils.options import OneLineParser


def main(argv: Sequence[str] | None = None) -> None:
    """Read one format, write another, say how to load it."""
    parser = OneLineParser()
    parser.add_argument("source", metavar="SRC", help="Folder or Hub id of the SAE (access token: HF_TOKEN).")
    parser.add_argument("target", metavar="DST", help="Folder to write: new or empty.")
    parser.add_argument("--to", required=True, choices=TARGETS, help="Format to write.")
    parser.add_argument(
        "--from", dest="format", default="auto", choices=("auto", *FORMATS), help="Format of SRC; auto: by its files."
    )
    parser.add_argument("--revision", help="Branch, tag or commit of the SAE.")
    parser.add_argument("--subfolder", help="Folder of the SAE within its repository.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a converted SAE that is in DST.")
    arguments = parser.parse_args(argv)
    lookup = {key: getattr(arguments, key) for key in ("revision", "subfolder") if getattr(arguments, key)}
    files = convert(
        arguments.source, Path(arguments.target), arguments.to, arguments.format, arguments.overwrite, **lookup
    )
    names = ", ".join(file.name for file in files)
    sys.stdout.write(f"wrote {names} to {arguments.target}; load it with: {_snippet(arguments.target, arguments.to)}\n")


def _snippet(target: str, to: str) -> str:
    if to == "saelens":
        return f"sae_lens.SAE.load_from_disk({target!r})"
    return f"hf_selortho.SelOrthoSAE.from_pretrained({target!r})"
