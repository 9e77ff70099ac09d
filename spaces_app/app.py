"""Show the features of an SAE in the browser; on a Space, settings.json says of which.

python spaces_app/app.py --sae runs/demo
python spaces_app/app.py --sae org/gemma2b-l12@main
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_selortho.utils.command_line import run_script
from hf_selortho.utils.hub import read_object
from hf_selortho.utils.options import OneLineParser

SETTINGS = Path(__file__).with_name("settings.json")  # of a Space: sae, twin, lm, allow_other_saes, approximate


def main(argv: Sequence[str] | None = None) -> None:
    """Open the SAE and serve the page until it is stopped."""
    from hf_selortho.browser.app import launch  # Gradio may be missing: one line says so
    from hf_selortho.browser.options import add_options, default_of

    stored = read_object(SETTINGS) if SETTINGS.is_file() else {}
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sae",
        default=default_of("sae", stored),
        help="folder of an SAE or of a run, or owner/name[@revision][/subfolder] of the Hub",
    )
    add_options(parser, stored)
    launch(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_script(main)
