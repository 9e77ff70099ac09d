"""Run `scripts/train.py` of the working directory up to its first picture: weights, pairs and logs are written by then.

Pictures and cards of fifty SAEs would take a minute, and so would waiting for the disk.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from matplotlib.figure import Figure


def _stop(*_: object, **__: object) -> NoReturn:
    sys.exit(0)


def train(arguments: list[str]) -> None:
    """Run the script in this process."""
    path, threads = [str(Path("scripts").resolve()), *sys.path], torch.get_num_threads()
    with (
        mock.patch.object(sys, "argv", ["scripts/train.py", *arguments]),
        mock.patch.object(sys, "path", path),
        mock.patch.object(Figure, "__init__", _stop),
        mock.patch.object(os, "fsync", lambda file: None),
    ):
        try:
            runpy.run_path("scripts/train.py", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"scripts/train.py ended with {end.code}") from end
        finally:
            torch.set_num_threads(threads)
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()


if __name__ == "__main__":
    del sys.path[0]  # this folder
    train(sys.argv[1:])
