"""The view of concepts: the features that find what a probe set is about, here and in the twin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from ..errors import SelOrthoError
from ..features.records import ConceptRow
from .address import Address
from .catalog import CatalogEntry
from .rendering import note, view

HOW_TO_GET_CONCEPTS = "selortho index ... --concepts quick"


class Concept(NamedTuple):
    """A probe set, and the features of one SAE that find it by themselves."""

    name: str
    title: str  # what the best feature finds; features of another title mark the other class
    trained_on: bool  # whether the SAE may have been trained on the texts of the set
    rows: list[ConceptRow]  # by test AUC, the best feature first

    @property
    def auc(self) -> float:
        """Test AUC of the best feature."""
        return self.rows[0].auc


def concepts_of(entry: CatalogEntry) -> dict[str, Concept]:
    """Return the concepts of an SAE by name, that which a feature finds best first; {} where none was measured."""
    rows = [] if entry.index is None else entry.index.concepts()
    by_name = sorted(rows, key=lambda row: (row.concept, -row.auc, row.rank))
    found = []
    for name, group in groupby(by_name, key=lambda row: row.concept):
        members = list(group)
        found.append(Concept(name, members[0].title, members[0].trained_on, members))
    return {concept.name: concept for concept in sorted(found, key=lambda one: (-one.auc, one.title))}


def concept_page(address: Address, entries: Sequence[CatalogEntry]) -> str:
    """Render the concepts of the first SAE, and the features that find the chosen one in each of the SAEs.

    Raises:
        SelOrthoError: there is no such concept.
    """
    measured = [concepts_of(entry) for entry in entries]
    concepts = {name: concept for one in reversed(measured) for name, concept in one.items()}
    if not measured[0]:
        what = f"No concepts were measured for {entries[0].title}: build its index with {HOW_TO_GET_CONCEPTS}"
        return note(address, "Concepts", f"{what}, which finds the features that tell labelled texts apart.")
    chosen = choose(concepts if address.concept else measured[0], address.concept)
    return view(
        "concepts.html",
        address,
        f"Concept: {chosen.title[:40]}",
        concepts=[(concepts[name], [one.get(name) for one in measured]) for name in {**measured[0], **concepts}],
        chosen=chosen,
        sides=[(entry, one.get(chosen.name)) for entry, one in zip(entries, measured, strict=True)],
    )


def choose(concepts: dict[str, Concept], name: str) -> Concept:
    """Return the concept of a name, without a name the first one.

    Raises:
        SelOrthoError: there is no such concept.
    """
    if name and name not in concepts:
        raise SelOrthoError(f"concept={name!r:.50}: expected one of {', '.join(concepts)}")
    return concepts[name] if name else next(iter(concepts.values()))
