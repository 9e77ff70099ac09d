"""Show the features of an SAE in the browser.

python spaces_app/app.py --sae runs/demo
python spaces_app/app.py --sae org/gemma2b-l12@main
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from hf_selortho import SelOrthoError
from hf_selortho.browser.layout import HEAD, STYLE, Page, theme
from hf_selortho.browser.live import LiveModel
from hf_selortho.browser.shelf import Settings, open_shelf, settings_from
from hf_selortho.browser.views import Views
from hf_selortho.utils.command_line import run_script

EXAMPLES = (
    "The weather in Paris was cold, so the match was moved to Monday.",
    "import os\nfor name in os.listdir('.'):\n    print(name)",
    "Shares of the company fell 12 percent after the report.",
)


def parser() -> argparse.ArgumentParser:
    """Arguments of the command line; what is not given comes from the environment, then from settings.json."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sae", help="folder of an SAE or of a run, or owner/name[@revision][/subfolder] of the Hub")
    made.add_argument("--twin", help="the same of its twin, trained without the penalty; default: looked for beside it")
    made.add_argument("--lm", help="language model for live text; default: that of the training; none: no live text")
    made.add_argument(
        "--allow_other_saes", action="store_true", help="let visitors compare with any SAE of the Hub that they name"
    )
    made.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on")
    made.add_argument("--port", type=int, default=None, help="port; default: the first free one from 7860 on")
    return made


def build(settings: Settings) -> tuple[gr.Blocks, LiveModel]:
    """The page, and the language model behind it, which is not loaded yet."""
    shelf = open_shelf(settings.sae, settings.twin)
    live = LiveModel(settings, shelf)
    views = Views(shelf, live, EXAMPLES, settings.allow_other_saes)
    return Page(shelf, live, views).build(), live


def main(argv: Sequence[str] | None = None) -> None:
    """Open the SAE and serve the page until it is stopped."""
    arguments: dict[str, Any] = vars(parser().parse_args(sys.argv[1:] if argv is None else argv))
    host, port = arguments.pop("host"), arguments.pop("port")
    settings = settings_from(arguments, dict(os.environ), Path(__file__).with_name("settings.json"))
    blocks, live = build(settings)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            theme=theme(),
            css=STYLE,
            head=HEAD,
            mcp_server=True,
            ssr_mode=False,
            show_error=False,
            max_file_size=1024,  # nothing is ever uploaded here
            footer_links=["api"],
            prevent_thread_lock=True,
        )
    except OSError as error:  # the port is taken, or the address is not one of this machine
        raise SelOrthoError(f"cannot serve on {host}, port {port or 'any'} ({error}): choose another --port") from error
    live.start_loading()  # not before: Gradio gives up if its own page takes more than seconds to answer
    blocks.block_thread()


if __name__ == "__main__":
    run_script(main)
