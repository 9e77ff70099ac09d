"""Read back what a training has left in its folder: one SAE or several, and what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..training.run_folder import METRICS, PICTURES, RUN
from ..utils.files import refuse_outside
from ..utils.hub import CONFIG, read_object
from ..utils.names import local_path
from .card_results import TWIN, SaeReport, beside_twins

WEIGHTS = "model.safetensors"
# What tells one SAE of a comparison from its twin without the penalty.
_OF_THE_PENALTY = {
    "penalty", "penalty_space", "selection_space", "ortho_coefficient", "decoder_ratio", "decoder_pairs",
    "pair_fraction", "correlation_threshold", "correlation", "reduction", "min_support", "selection_interval",
    "penalty_schedule", "carry_decay", "ortsae_chunk",
}  # fmt: skip
_MEASURED = {"max_norm"}  # settings that come out of the data, a little different for each seed


@dataclass(frozen=True)
class FinishedRun:
    """The folder of a run whose SAEs are saved."""

    folder: Path
    saes: tuple[SaeReport, ...]  # each beside its twin, if the run has trained one
    run: Mapping[str, Any]  # content of run.json; empty if there is none
    all_layers: Mapping[str, Any] = field(default_factory=dict)  # of metrics.json, of transcoders of several layers

    @property
    def seed(self) -> int | None:
        """Of the run's arguments, if they are known."""
        return (self.run.get("arguments") or {}).get("seed")


def read_run(folder: Path) -> FinishedRun:
    """Read the run in a folder.

    Raises:
        SelOrthoError: it holds no SAE, or a file of it is damaged.
    """
    folder = Path(local_path(folder, "run"))
    if not folder.is_dir():
        raise SelOrthoError(f"{folder} is no folder: expected that of a run, such as runs/demo")
    layers = (path.name for path in folder.glob("layer_*") if holds_sae(path))
    names = [""] if holds_sae(folder) else sorted(layers, key=_by_layer)
    if not names:
        raise SelOrthoError(f"cannot load the SAE {str(folder)!r}: it holds no {CONFIG}; expected the folder of a run")
    saes = [_read_sae(folder, name) for name in names]
    all_layers = _content(folder / METRICS).get("all_layers") or {}
    return FinishedRun(folder, tuple(beside_twins(saes)), _content(folder / RUN), all_layers)


def with_others(run: FinishedRun, twin: Path | None, seeds: Sequence[Path]) -> FinishedRun:
    """Add the metrics of other runs beside the run's own.

    Args:
        run: the run.
        twin: folder of the same run without the penalty, for a run of one SAE; by default that of [`twin_beside`].
        seeds: folders of the same run with other seeds; their twins are looked for likewise.

    Raises:
        SelOrthoError: one of them is not the same but for the penalty or the seed.
    """
    others = [_with_twin(read_run(folder), None) for folder in seeds]
    run = _with_twin(run, twin)
    used = {run.seed: run.folder}
    for other in others:
        if other.seed in used and other.seed is not None:
            raise SelOrthoError(f"{other.folder} and {used[other.seed]} have the same seed, {other.seed}")
        used[other.seed] = other.folder
    return replace(run, saes=tuple(_with_seeds(sae, run, others) for sae in run.saes))


def holds_sae(folder: Path) -> bool:
    """Return whether an SAE of this package is saved there."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def shown_name(folder: Path) -> str:
    """Return what to call the SAE of a folder where its folder is not seen: "layer_8" alone would say too little."""
    whole = folder.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.name.startswith("layer_") else whole.name


def twin_beside(folder: Path) -> Path | None:
    """Return the folder of an SAE's twin: beside it, called like it with "_twin" or "-twin" behind; else None.

    It is no twin if more than the penalty tells their configs apart.
    """
    for ending in (TWIN, "-twin"):
        beside = folder.resolve().with_name(f"{folder.resolve().name}{ending}")
        if holds_sae(beside):
            config, twin = (SelOrthoConfig.from_pretrained(place / CONFIG) for place in (folder, beside))
            if _no_twin(config.own_settings(), twin.own_settings()) is None:
                return beside
    return None


def _with_twin(run: FinishedRun, twin: Path | None) -> FinishedRun:
    if len(run.saes) > 1 or run.saes[0].name:
        if twin is not None:
            raise SelOrthoError(f"--twin {twin}: {run.folder} has several SAEs, whose twins are those that it trained")
        return run
    twin = twin or twin_beside(run.folder)
    if twin is None:
        return run
    (sae,), other = run.saes, read_run(twin).saes[0]
    unlike = "it has several SAEs" if other.name else _no_twin(sae.config, other.config)
    if unlike:
        raise SelOrthoError(f"--twin {twin} is not {run.folder} without the penalty: {unlike}")
    return replace(run, saes=(replace(sae, twin=other.metrics),))


def _with_seeds(sae: SaeReport, run: FinishedRun, others: Sequence[FinishedRun]) -> SaeReport:
    same = []
    for other in others:
        found = next((candidate for candidate in other.saes if candidate.name == sae.name), None)
        if found is None:
            raise SelOrthoError(f"{other.folder} has no SAE {sae.name or 'at its top'}, as {run.folder} has")
        if unlike := _differences(sae.config, found.config, _MEASURED):
            raise SelOrthoError(f"{other.folder} is not {run.folder} with another seed: {unlike}")
        same.append(found)
    twins = [found.twin for found in same if found.twin is not None]
    return replace(sae, seeds=[found.metrics for found in same], twin_seeds=twins if len(twins) == len(same) else [])


def _no_twin(config: Mapping[str, Any], twin: Mapping[str, Any]) -> str | None:
    """Return why an SAE is not the twin of another; None if it is."""
    if twin.get("penalty") != "none" and twin.get("ortho_coefficient"):
        return f"its ortho_coefficient is {twin.get('ortho_coefficient')}"
    return _differences(config, twin, _MEASURED | _OF_THE_PENALTY)


def _differences(config: Mapping[str, Any], other: Mapping[str, Any], left_out: set[str]) -> str | None:
    unlike = [key for key in config if key not in left_out and config[key] != other.get(key)]
    return ", ".join(f"{key} is {other.get(key)!r} and not {config[key]!r}" for key in unlike[:3]) or None


def _read_sae(folder: Path, name: str) -> SaeReport:
    place = folder / name
    drawn = sorted((place / PICTURES).glob("*.png"))
    for path in (*(place / file for file in (CONFIG, WEIGHTS, METRICS, RUN)), *drawn):
        refuse_outside(folder, path)
    order = _content(place / RUN).get("pictures")  # in which the training has drawn them
    if isinstance(order, list):
        drawn.sort(key=lambda path: (*map(str, order), f"{PICTURES}/{path.name}").index(f"{PICTURES}/{path.name}"))
    config = SelOrthoConfig.from_pretrained(place / CONFIG)
    pictures = [path.relative_to(folder).as_posix() for path in drawn]
    return SaeReport(name, config.own_settings(), _content(place / METRICS), pictures)


def _content(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _by_layer(name: str) -> tuple[int, str]:
    number = name.split("_")[1]
    return (int(number) if number.isdecimal() else 1 << 30, name)
