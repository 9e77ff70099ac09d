"""Serve the page of an SAE: what the command `selortho browse` and the app of a Space call."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gradio as gr

from ..errors import SelOrthoError
from .catalog import Settings, open_catalog, read_settings
from .live_model import LiveModel
from .page import HEAD, STYLE, Page, theme
from .views import Views

EXAMPLES = (
    "The weather in Paris was cold, so the match was moved to Monday.",
    "import os\nfor name in os.listdir('.'):\n    print(name)",
    "Shares of the company fell 12 percent after the report.",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of [`launch`] to a command line that says which SAE in its own way."""
    parser.add_argument("--twin", help="its twin, trained without the penalty; default: looked for beside it")
    parser.add_argument("--lm", help="language model for live text; default: that of the training; none: no live text")
    parser.add_argument(
        "--allow_other_saes", action="store_true", help="let visitors compare with any SAE of the Hub that they name"
    )
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    parser.add_argument("--host", default=host, help="address to listen on")
    parser.add_argument("--port", type=int, default=None, help="port; default: the first free one from 7860 on")


def launch(
    sae: str | None = None,
    *,
    twin: str | None = None,
    lm: str | None = None,
    allow_other_saes: bool = False,
    host: str = "127.0.0.1",
    port: int | None = None,
    settings_file: Path | None = None,
) -> None:
    """Open an SAE and serve its page until it is stopped.

    Args:
        sae: folder of an SAE or of a run, or owner/name[@revision][/subfolder] of the Hub. What is not given, this and
            the next three, is taken from the environment (SAE, TWIN, LM, ALLOW_OTHER_SAES), then from `settings_file`.
        twin: the same of its twin (twin baseline: the same run without the penalty); default: looked for beside it.
        lm: language model for live text; default: that of the training; "none": no live text.
        allow_other_saes: let visitors compare with any SAE of the Hub that they name.
        host: address to listen on.
        port: default: the first free one from 7860 on.
        settings_file: settings.json of a Space; there may be none.

    Raises:
        SelOrthoError: there is no such SAE, its index is damaged, or the port is taken.
    """
    arguments = {"sae": sae, "twin": twin, "lm": lm, "allow_other_saes": allow_other_saes}
    blocks, live = build(read_settings(arguments, os.environ, settings_file))
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


def build(settings: Settings) -> tuple[gr.Blocks, LiveModel]:
    """Return the page, and the language model behind it, which is not loaded yet."""
    catalog = open_catalog(settings.sae, settings.twin)
    live = LiveModel(settings, catalog)
    views = Views(catalog, live, EXAMPLES, settings.allow_other_saes)
    return Page(catalog, live, views).build(), live
