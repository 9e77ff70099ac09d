"""Graphs of circuit-tracer, which has an environment of its own: `make test-circuits` makes it and names its Python."""

from __future__ import annotations

import os

collect_ignore = [] if "CIRCUITS_PYTHON" in os.environ else ["test_graphs.py"]
