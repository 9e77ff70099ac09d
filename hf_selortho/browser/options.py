"""Options of the page of an SAE, in a module that does not wait for Gradio."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any


def add_options(parser: argparse.ArgumentParser, stored: Mapping[str, Any] | None = None) -> None:
    """Add the options of [`app.launch`] but the SAE to a command line.

    Args:
        parser: of the command line.
        stored: defaults of `twin`, `lm`, `allow_other_saes` and `approximate`, which the environment (TWIN, LM, ...)
            goes before.
    """
    default = {name: default_of(name, stored) for name in ("twin", "lm", "allow_other_saes", "approximate")}
    parser.add_argument(
        "--twin", default=default["twin"], help="its twin, trained without the penalty; default: looked for beside it"
    )
    parser.add_argument(
        "--lm",
        default=default["lm"],
        help="language model for live text; default: that of the training; none: no live text",
    )
    parser.add_argument(
        "--allow_other_saes",
        action="store_true",
        default=str(default["allow_other_saes"]).lower() in ("1", "true", "yes"),
        help="let visitors compare with any SAE of the Hub that they name",
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        default=str(default["approximate"]).lower() in ("1", "true", "yes"),
        help="read what cannot be read exactly, such as cross-layer transcoders, and say what is lost",
    )
    parser.add_argument("--graph", help="attribution graph to show: a JSON file of circuit-tracer")
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    parser.add_argument("--host", default=host, help="address to listen on")
    parser.add_argument("--port", type=int, help="port; default: the first free one from 7860 on")


def default_of(name: str, stored: Mapping[str, Any] | None = None) -> Any:
    """Return what the environment says of an option, else what is stored."""
    return os.environ.get(name.upper()) or (stored or {}).get(name)
