"""The sections of a report, each a function from findings to Markdown; empty where there are no records for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..findings import Findings
from .glossary import glossary
from .language_model import on_the_model
from .methods import pareto
from .pairs import example_pairs
from .paper import ablations, claims, layers, limits, table_one
from .short import in_short
from .steering import adaptive
from .truth import ground_truth

Section = Callable[[Findings, Path, str], str]  # findings, folder for figures, how to link to it

ALL: tuple[Section, ...] = (
    in_short, glossary, pareto, adaptive, on_the_model, ground_truth, example_pairs, claims, table_one, ablations,
    layers, limits,
)  # fmt: skip
