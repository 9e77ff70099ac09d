"""What a model card says may be expected of a penalty: the comparison of methods, as a small file beside the cards.

`python -m hf_selortho.experiments.expectations` writes it anew from the records of the plan `demo`, in a checkout.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configuration_selortho import SelOrthoConfig
from ..hub.expectations import EXPECTATIONS, PENALTY_SETTINGS
from ..training.run_folder import write_json
from ..utils.command_line import run_script
from .comparison import comparisons
from .findings import Findings
from .plan import load_plan
from .summaries import Figure
from .world_gains import by_recipe, gain_over_twin, price_over_twin, rules

_SCORES = ("mcc", "uniqueness", "recovered", "f1", "absorption")
_DEFAULTS = SelOrthoConfig.default_settings()


def expectations(findings: Findings) -> dict[str, Any]:
    """Of every variant its settings, and mean and standard deviation of the differences from its twin.

    Returns:
        "source": language model, layer and number of seeds. "saes": one entry for each variant of the sweeps with a
        fixed coefficient and all seeds; "fvu", "correlation" and "cosine" are relative, "dead" counts features.
        "worlds": one entry for each variant and activation function on synthetic worlds, once all of them are there,
        with the number of trainings, over which means and deviations are; "fvu" is relative, "absorption" of
        hierarchies alone.
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
        "worlds": [
            {"activation": records[0]["settings"]["activation"], **found}
            for recipe, records in by_recipe(findings.worlds).items()
            if len(records) == sum(run.recipe == recipe for run in findings.plan.worlds)
            for name in rules(records)
            if (found := _of_worlds(records, name)) is not None
        ],
    }


def _rounded(figure: Figure) -> list[float]:
    return [round(figure.mean, 6), round(figure.std or 0.0, 6)]


def _penalty(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name, _DEFAULTS[name]) for name in PENALTY_SETTINGS}


def _of_worlds(records: Sequence[dict[str, Any]], variant: str) -> dict[str, Any] | None:
    """Means of a variant over the worlds and seeds of a recipe; None if a score is missing."""
    price = price_over_twin(records, variant)
    gains = {"fvu": price} | {key: gain_over_twin(records, variant, key) for key in _SCORES}
    found = {key: _rounded(gain) for key, gain in gains.items() if gain is not None}
    if len(found) < len(gains):
        return None
    settings = {**records[0]["settings"], **records[0]["variants"].get(variant, {})}
    return {"variant": variant, **_penalty(settings), **found, "trainings": len(records)}


def main() -> None:
    """Write the file of the package from the records of this checkout."""
    folder = Path(__file__).resolve().parents[2] / "results" / "demo"
    write_json(EXPECTATIONS, expectations(Findings.read(load_plan("demo"), folder)))
    sys.stdout.write(f"{EXPECTATIONS} says what {folder} has found\n")


if __name__ == "__main__":
    run_script(main)
