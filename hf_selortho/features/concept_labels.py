"""What probe sets of texts say of features: which single one tells the two classes of a set apart."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from ..data.sae_probes import TRAINED_ON, probe_set_names
from ..errors import SelOrthoError
from ..evaluation.last_tokens import cache_folder
from ..evaluation.probe_sets import (
    ENCODED_ROWS,
    QUICK_SETS,
    last_token_activations,
    single_feature_aucs,
    split_rows,
)
from ..language_models.capture import ActivationCapture
from ..modeling_selortho import SelOrthoSAE
from .measured_labels import percent
from .records import ConceptRow, Label

logger = logging.getLogger(__name__)

BEST = 10  # features of a set
# A feature is named after a class if it fires on so many of the class's training texts, and so much more often on them
# than on the other class's: one that fires on full stops may tell apart texts that end in one, not what they are about.
LEAST_SHARE, LEAST_RATIO = 0.3, 3.0
RARER = 10.0  # so much less often it has to fire on all tokens of the index


@dataclass(frozen=True)
class Concepts:
    """What some probe sets say of the features of an SAE."""

    sets: list[str] = field(default_factory=list)
    rows: list[ConceptRow] = field(default_factory=list)  # by set and rank
    # by feature, each with the share of the texts of its class at whose end the feature fires
    labels: dict[int, list[tuple[float, Label]]] = field(default_factory=dict)


@functools.cache
def concept_titles() -> dict[str, list[str]]:
    """Return what the texts of class 1 and those of class 0 of each probe set are, by the name of the set."""
    titles = json.loads((files(__package__) / "concept_titles.json").read_text(encoding="utf-8"))
    return {str(name): list(of_classes) for name, of_classes in titles.items()}


def measure_concepts(
    sae: SelOrthoSAE, capture: ActivationCapture, which: str, prepend_bos: bool, progress: bool = True
) -> Concepts:
    """Find the features that tell the classes of probe sets apart, on training texts, and score them on the others.

    Args:
        which: "quick": `probe_sets.QUICK_SETS`, "all", or "none". Where the package sae-probes is missing or another
            version of it is there, a line says so and nothing is measured.
    """
    try:
        names = () if which == "none" else QUICK_SETS if which == "quick" else probe_set_names()
        read = last_token_activations(capture, names, prepend_bos=prepend_bos, cache=cache_folder(), progress=progress)
    except SelOrthoError as error:
        logger.warning("the index has no concepts: %s", error)
        return Concepts()
    concepts = Concepts(list(read))
    for name, (activations, labels) in read.items():
        _add(concepts, name, sae, activations, labels)
    return concepts


def _add(concepts: Concepts, name: str, sae: SelOrthoSAE, activations: Tensor, labels: np.ndarray) -> None:
    split = split_rows(labels)
    aucs = single_feature_aucs(sae, activations, labels, split)
    titles = concept_titles().get(name, (name, f"not {name}"))
    negated = aucs.negated.tolist()
    test = aucs.test.clamp_min(0.5).tolist()
    for rank, feature in enumerate(aucs.train.argsort(descending=True, stable=True)[:BEST].tolist()):
        title = titles[negated[feature]]
        concepts.rows.append(
            ConceptRow(name, title, name in TRAINED_ON, rank, feature, test[feature], negated[feature])
        )
    if titles[0].startswith("“"):  # texts that end in certain two words, which names no feature
        return
    shares = [_shares(sae, activations, labels, rows) for rows in split]
    inside, outside = torch.where(aucs.negated, shares[0].flip(0), shares[0])
    for feature in ((inside >= LEAST_SHARE) & (inside >= LEAST_RATIO * outside)).nonzero()[:, 0].tolist():
        title, of_classes = titles[negated[feature]], shares[1][:, feature].tolist()
        mine, other = reversed(of_classes) if negated[feature] else of_classes
        detail = (
            f"AUC {test[feature]:.2f} on test texts; it fires at the end of {percent(mine)}, of others {percent(other)}"
        )
        concepts.labels.setdefault(feature, []).append((mine, Label("concept", title, test[feature], detail)))


def _shares(sae: SelOrthoSAE, activations: Tensor, labels: np.ndarray, rows: np.ndarray) -> Tensor:
    """Return the share of the texts of class 1, and of class 0, on whose last token each feature fires, (2, d_sae)."""
    fired = torch.zeros(2, len(sae.b_enc), dtype=torch.float64)
    for part in np.array_split(rows, -(-len(rows) // ENCODED_ROWS)):
        h = sae.encode(activations[part].to(sae.device))
        fires = (h > 0).cpu()
        for place, label in enumerate((1, 0)):
            fired[place] += fires[torch.from_numpy(labels[part] == label)].sum(0)
    counts = np.bincount(labels[rows], minlength=2)[::-1].copy()
    return fired / torch.from_numpy(counts)[:, None].clamp_min(1)
