"""Section that explains the names of settings and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..figures import LOOKS, family
from ..findings import Findings
from ..summaries import TWIN, is_twin
from ..tables import table

WORDS = {  # by family of variants
    "activation": "the paper's penalty as a mean over the pairs",
    "activation-seldom": "the paper's penalty with pairs selected every 12 steps",
    "activation-wide": "a penalty on the correlations of 1% of the pairs",
    "full": "the penalty on the correlations of all pairs",
    "decoder": "a penalty on decoder cosines",
    "decoder-wide": "a penalty on the decoder cosines of 1% of the pairs",
    "both": "a penalty on correlations and decoder cosines",
    "both-nearest": "a penalty on correlations and each feature's nearest direction",
    "both-nearest-wide": "a penalty on the correlations of 1% of the pairs and each feature's nearest direction",
    "redundancy": "a penalty on the decoder cosines of pairs that fire together",
    "exclusion": "a penalty on the decoder cosines of pairs that do not fire together",
    "exclusion-wide": "a penalty on the decoder cosines of pairs that do not fire together, 1% of all",
    "ortsae": "OrtSAE",
}
FIGURES = (
    "*FVU*: share of the variance that the reconstruction leaves unexplained. *L0*: features active on a token. *Top "
    "0.1% correlation*: mean of the 0.1% largest correlations between two features' activations, over the pairs of a "
    "batch of held-out tokens; *peak*: the largest. *Max decoder cosine*: of a feature's direction with the one most "
    "like it, mean over the features. *Dead*: features that fire on no held-out token. *Loss recovered*: of the "
    "cross-entropy that zeroing the layer costs, the share that the reconstruction in its place avoids. "
    "[docs/metrics.md](docs/metrics.md) has all of them."
)


def glossary(findings: Findings, figures: Path, link: str) -> str:
    """What the names of settings mean, and the figures of most tables."""
    found = settings_by_family(findings)
    if not found:
        return ""
    order = {name: number for number, name in enumerate(LOOKS)}
    rows = [
        [f"`{name}`", WORDS.get(name, "-"), words or "-"]
        for name, words in sorted(found.items(), key=lambda item: order.get(item[0], len(order)))
    ]
    aligned = table(["name", "what it is", "settings beside the coefficient"], rows).replace("|--:|--:|", "|:--|:--|")
    return (
        "## Names\n\nThe number in a name is `--ortho_coefficient`, which multiplies the penalty. "
        f"`{TWIN}` is the twin without penalty; `{TWIN}-k...` and `{TWIN}-l...` are twins of another k or L1."
        f"\n\n{aligned}\n\n{FIGURES}"
    )


def settings_by_family(findings: Findings) -> dict[str, str]:
    """What the variants of each family set besides their coefficient, as code for the command line."""
    compared = [sweep.variants for sweep in findings.plan.sweeps if sweep.name in findings.pareto]
    variants: dict[str, Mapping[str, Any]] = {}
    for one in [*compared, *(run.variants for run in findings.plan.worlds)]:
        variants |= {name: settings for name, settings in one.items() if name not in variants}
    found: dict[str, list[str]] = {}
    for name, settings in variants.items():
        if not is_twin(name):
            told = [f"--{key} {value}" for key, value in settings.items() if key != "ortho_coefficient"]
            known = found.setdefault(family(name), [])
            known += [" ".join(told)] * (" ".join(told) not in known)
    return {name: " or ".join(f"`{one}`" for one in told if one) for name, told in found.items()}
