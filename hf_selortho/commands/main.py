"""The command line `selortho NAME ...`: each name is a file of this folder with a function `main`.

The options are parsed before what runs is imported, which takes seconds, so that --help and slips do not wait.
"""

from __future__ import annotations

import importlib
import sys

from .. import __version__
from ..errors import SelOrthoError
from ..utils.command_line import run_script

COMMANDS = {
    "train": "train SAEs on the activations of a language model, evaluate them and write their cards",
    "cache": "write the activations of a language model to disk once, to train on them many times",
    "evaluate": "measure an SAE, ours or another library's, on held-out text",
    "index": "build the feature index of an SAE, which the browser shows",
    "browse": "show the features of an SAE in the browser",
    "push": "publish the SAEs of a run on the Hugging Face Hub",
    "space": "publish a Space that shows an SAE",
    "info": "say what an SAE is, ours or another library's, without loading its weights",
    "convert": "turn an SAE into the format of another library, or back",
}


def main() -> None:
    """Run the command that the first argument names; a user's mistake is one line and exit code 2."""
    run_script(_run)


def _run() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
    elif name == "--version":
        sys.stdout.write(f"selortho {__version__}\n")
    elif name in COMMANDS:
        sys.argv = [f"selortho {name}", *sys.argv[2:]]  # what errors and --help call the program
        importlib.import_module(".arguments", __package__).PARSERS[name](sys.argv[1:])
        importlib.import_module(f".{name}", __package__).main()  # by name: not every command needs gradio
    else:
        sys.argv[0] = "selortho"
        raise SelOrthoError(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)}")


def usage() -> str:
    """List the commands."""
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: selortho COMMAND [--help] ...", "", *lines, ""])
