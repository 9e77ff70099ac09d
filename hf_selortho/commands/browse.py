"""Show the features of an SAE in the browser.

selortho browse runs/demo
selortho browse org/gemma2b-l12@main
"""

from __future__ import annotations

from collections.abc import Sequence

from ..utils.memory import where_memory_ends
from .arguments import parse_browse


@where_memory_ends("use --lm none")
def main(argv: Sequence[str] | None = None) -> None:
    """Open the SAE and serve its page until it is stopped."""
    from ..browser.app import launch  # Gradio may be missing: one line says so

    launch(**vars(parse_browse(argv)))
