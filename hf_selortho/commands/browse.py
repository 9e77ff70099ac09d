"""Show the features of an SAE in the browser.

selortho browse runs/demo
selortho browse org/gemma2b-l12@main
"""

from __future__ import annotations

from collections.abc import Sequence

from ..utils.memory import where_memory_ends
from ..utils.options import OneLineParser


@where_memory_ends("use --lm none")
def main(argv: Sequence[str] | None = None) -> None:
    """Open the SAE and serve its page until it is stopped."""
    from ..browser.app import add_options, default_of, launch  # Gradio may be missing: one line says so

    parser = OneLineParser()
    parser.add_argument(
        "sae",
        nargs="?",
        default=default_of("sae"),
        help="folder of an SAE or of a run, or owner/name[@revision][/subfolder] of the Hub",
    )
    add_options(parser)
    launch(**vars(parser.parse_args(argv)))
