"""Serve the page of an SAE: what the command `selortho browse` and the app of a Space call."""

from __future__ import annotations

import errno
import socket

from ..errors import SelOrthoError
from .address import MAIN
from .catalog import open_catalog
from .graph_view import open_graphs
from .live_model import LiveModel
from .page import HEAD, STYLE, Page, theme
from .views import Views


def _check_port(host: str, port: int | None) -> None:
    """Raise a SelOrthoError unless a page can be served there: the port is taken, or the host is not this machine."""
    if port is not None and not 0 < port < 1 << 16:
        raise SelOrthoError(f"--port {port}: expected a number from 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except (OSError, UnicodeError) as error:  # the latter: a host that no name can be
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise SelOrthoError(f"--port {port} of {host} is in use: choose another --port, or none") from error
        if number == errno.EACCES:
            raise SelOrthoError(f"--port {port} is not open to you: choose a --port from 1024 on") from error
        raise SelOrthoError(f"--host {host} is not this machine: choose 127.0.0.1, or 0.0.0.0 for all") from error


def launch(
    sae: str | None,
    *,
    twin: str | None = None,
    lm: str | None = None,
    allow_other_saes: bool = False,
    approximate: bool = False,
    graph: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> None:
    """Open an SAE and serve its page until it is stopped.

    Args:
        sae: folder of an SAE or of a run, or owner/name[@revision][/subfolder] of the Hub.
        twin: the same of its twin (twin baseline: the same run without the penalty); default: looked for beside it.
        lm: language model for live text; default: that of the training; "none": no live text.
        allow_other_saes: let visitors compare with any SAE of the Hub that they name.
        approximate: read what cannot be read exactly, and say in the log what is lost.
        graph: attribution graph to show, a JSON file of circuit-tracer; those in the folder graphs of a run are, too.
        host: address to listen on.
        port: default: the first free one from 7860 on.

    Raises:
        SelOrthoError: there is no such SAE, its index is damaged, or the port is taken.
    """
    if not sae:
        raise SelOrthoError(
            "which SAE? pass --sae with a folder such as runs/demo or owner/name of the Hub, or set the variable SAE"
        )
    _check_port(host, port)
    catalog = open_catalog(sae, twin)
    live = LiveModel(catalog, lm or "auto", allow_other_saes, approximate)
    blocks = Page(Views(catalog, live, graphs=open_graphs(sae, graph, catalog[MAIN]))).build()
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
    except OSError as error:  # no port is free
        said = f"port {port} of {host} is in use" if port else f"no port from 7860 on is free on {host}"
        raise SelOrthoError(f"{said}: choose a --port") from error
    live.start_loading()  # not before: Gradio gives up if its own page takes more than seconds to answer
    blocks.block_thread()
