"""Run `scripts/train.py` of the working directory up to its first picture: weights, pairs and logs are written by then.

Pictures and cards of fifty SAEs would take a minute, and so would waiting for the disk.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from matplotlib.figure import Figure


def stop(*_: object, **__: object) -> NoReturn:
    sys.exit(0)


Figure.__init__ = stop
os.fsync = lambda file: None
sys.argv[0] = "scripts/train.py"
sys.path[0] = str(Path("scripts").resolve())
runpy.run_path("scripts/train.py", run_name="__main__")
