"""How alike the SAEs of a variant are that differ in nothing but their seed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_selortho.evaluation.stability import stability, unique_features
from hf_selortho.modeling_selortho import SelOrthoSAE

THRESHOLD = 0.7  # decoder cosine from which two features count as the same one (Paulo & Belrose 2025)


def compare_seeds(folders: Sequence[Path]) -> dict[str, float]:
    """Stability over all pairs of SAEs, and how many different features all of them have together.

    Returns:
        The means over the pairs of [`stability`]'s figures; `unique_features`, and `unique_per_feature`, the same over
        the number of features of one SAE: 1 if all seeds find the same features, the number of seeds if none do.
    """
    with torch.inference_mode():
        decoders = [SelOrthoSAE.from_pretrained(str(folder)).W_dec.float() for folder in folders]
        pairs = [stability(a, b, THRESHOLD) for a, b in itertools.combinations(decoders, 2)]
        unique = unique_features(decoders, THRESHOLD)
    means = {key: statistics.fmean(pair[key] for pair in pairs) for key in pairs[0]}
    return {**means, **unique}
