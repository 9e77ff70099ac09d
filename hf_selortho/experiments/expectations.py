"""What a model card says may be expected of a penalty: the comparison of methods, as a small file beside the cards.

`python -m hf_selortho.experiments.expectations` writes it anew from the records of the plan `demo`, in a checkout.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..command_line import run_script
from ..configuration_selortho import SelOrthoConfig
from ..hub.expectations import EXPECTATIONS, PENALTY_SETTINGS
from ..training.outputs import write_json
from .comparison import comparisons
from .findings import Findings
from .plan import load_plan
from .sections.truth import by_world, gain_over_twin
from .summaries import TWIN, Figure

_SCORES = ("mcc", "uniqueness", "f1", "absorption")
_DEFAULTS = {field.name: field.default for field in fields(SelOrthoConfig)}


def expectations(findings: Findings) -> dict[str, Any]:
    """Of every variant its settings, and mean and standard deviation of the differences from its twin.

    Returns:
        "source": language model, layer and number of seeds. "saes": one entry for each variant of the sweeps with a
        fixed coefficient and all seeds; "fvu", "correlation" and "cosine" are relative, "dead" counts features.
        "worlds": one entry for each variant on synthetic worlds, with the number of trainings, over which means and
        deviations are; "absorption" is of hierarchies alone.
    """
    plan = findings.plan
    fixed = [sweep for sweep in plan.sweeps if sweep.name in findings.pareto]
    return {
        "source": {"model": plan.harvest["model"], "layer": fixed[0].layers[0], "seeds": plan.seeds},
        "saes": [
            {
                "variant": one.summary.variant,
                "activation": sweep.arguments["activation"],
                **_penalty({**sweep.arguments, **sweep.variants[one.summary.variant]}),
                "fvu": _rounded(one.relative_excess),
                "correlation": _rounded(one.correlation),
                "cosine": _rounded(one.cosine),
                "dead": _rounded(one.dead),
            }
            for sweep in fixed
            for one in comparisons(findings.of(sweep.name))
            if len(one.fvu_excess.values) == plan.seeds
        ],
        "worlds": [found for name in _world_variants(findings) if (found := _of_worlds(findings, name)) is not None],
    }


def _rounded(figure: Figure) -> list[float]:
    return [round(figure.mean, 4), round(figure.std or 0.0, 4)]


def _penalty(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name, _DEFAULTS[name]) for name in PENALTY_SETTINGS}


def _world_variants(findings: Findings) -> dict[str, dict[str, Any]]:
    return {name: settings for run in findings.plan.worlds for name, settings in run.variants.items() if name != TWIN}


def _of_worlds(findings: Findings, variant: str) -> dict[str, Any] | None:
    """Means of a variant over all worlds and seeds; None if a run lacks it."""
    found: dict[str, Any] = {}
    for key in _SCORES:
        records = [r for r in findings.worlds if key != "absorption" or r["world"]["structure"] == "hierarchical"]
        gain = gain_over_twin(records, variant, key) if records else None
        if gain is None:
            return None
        found[key] = _rounded(gain)
    counts = {"worlds": len(by_world(findings.worlds)), "trainings": len(findings.worlds)}
    return {"variant": variant, **_penalty(_world_variants(findings)[variant]), **found, **counts}


def main() -> None:
    """Write the file of the package from the records of this checkout."""
    folder = Path(__file__).resolve().parents[2] / "results" / "demo"
    write_json(EXPECTATIONS, expectations(Findings.read(load_plan("demo"), folder)))
    sys.stdout.write(f"{EXPECTATIONS} says what {folder} has found\n")


if __name__ == "__main__":
    run_script(main)
