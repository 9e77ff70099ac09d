"""What a training has left in its folder, read back: one SAE or several, and what was measured of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..training.run_folder import METRICS, PICTURES, RUN
from ..utils.files import target_outside
from ..utils.hub import CONFIG, read_object
from .card_results import Measured
from .summary import TWIN, SaeReport, beside_twins

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

    def place(self, sae: SaeReport) -> Path:
        """Folder of an SAE."""
        return self.folder / sae.name

    def of(self, sae: SaeReport) -> Mapping[str, Any]:
        """The run.json of an SAE."""
        return _content(self.place(sae) / RUN)


def read_run(folder: Path) -> FinishedRun:
    """The run in a folder.

    Raises:
        SelOrthoError: it holds no SAE, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise SelOrthoError(f"{folder} is no folder: expected that of a run, such as runs/demo")
    names = [""] if holds_sae(folder) else sorted(_sub_folders(folder), key=_by_layer)
    if not names:
        raise SelOrthoError(f"cannot load the SAE {str(folder)!r}: it holds no {CONFIG}; expected the folder of a run")
    saes = [_read_sae(folder, name) for name in names]
    return FinishedRun(folder, tuple(beside_twins(saes)), _content(folder / RUN))


def with_others(run: FinishedRun, twin: Path | None, seeds: Sequence[Path]) -> FinishedRun:
    """The run, with the metrics of other runs beside its own.

    Args:
        twin: folder of the same run without the penalty, for a run of one SAE; by default the folder beside it that is
            called like it with "-twin" behind, if there is one.
        seeds: folders of the same run with other seeds; their twins are found likewise.

    Raises:
        SelOrthoError: one of them is not the same but for the penalty or the seed.
    """
    others = [_beside_own_twin(read_run(folder), None) for folder in seeds]
    run = _beside_own_twin(run, twin)
    used = {_seed(run): run.folder}
    for other in others:
        if _seed(other) in used and _seed(other) is not None:
            raise SelOrthoError(f"{other.folder} and {used[_seed(other)]} have the same seed, {_seed(other)}")
        used[_seed(other)] = other.folder
    return FinishedRun(run.folder, tuple(_beside_seeds(sae, run, others) for sae in run.saes), run.run)


def shown_name(folder: Path) -> str:
    """What the SAE of a folder is called where its folder is not seen: "layer_8" alone would say too little."""
    whole = folder.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.name.startswith("layer_") else whole.name


def twin_beside(folder: Path) -> Path | None:
    """The folder of an SAE's twin: beside it, called like it with "_twin" or "-twin" behind; None if there is none.

    It is no twin if more than the penalty tells their configs apart.
    """
    for ending in (TWIN, "-twin"):
        beside = folder.with_name(f"{folder.name}{ending}")
        if holds_sae(beside):
            config, twin = (SelOrthoConfig.from_pretrained(place / CONFIG) for place in (folder, beside))
            if _no_twin(config.own_settings(), twin.own_settings()) is None:
                return beside
    return None


def _beside_seeds(sae: SaeReport, run: FinishedRun, others: Sequence[FinishedRun]) -> SaeReport:
    same = [next((o for o in other.saes if o.name == sae.name), None) for other in others]
    for other, found in zip(others, same, strict=True):
        if found is None:
            raise SelOrthoError(f"{other.folder} has no SAE {sae.name or 'at its top'}, as {run.folder} has")
        if unlike := _differences(sae.config, found.config, _MEASURED):
            raise SelOrthoError(f"{other.folder} is not {run.folder} with another seed: {unlike}")
    measured = [found.measured for found in same if found is not None]
    twins = [m.twin for m in measured if m.twin is not None]
    return _beside(sae, seeds=[m.metrics for m in measured], twin_seeds=twins if len(twins) == len(measured) else [])


def _beside_own_twin(run: FinishedRun, twin: Path | None) -> FinishedRun:
    if len(run.saes) > 1 or run.saes[0].name:
        if twin is not None:
            raise SelOrthoError(f"--twin {twin}: {run.folder} has several SAEs, whose twins are those that it trained")
        return run
    beside = run.folder.with_name(f"{run.folder.name}-twin")
    if twin is None and not holds_sae(beside):
        return run
    other, (sae,) = read_run(twin or beside), run.saes
    unlike = "it has several SAEs" if other.saes[0].name else _no_twin(sae.config, other.saes[0].config)
    if unlike and twin is None:
        return run
    if unlike:
        raise SelOrthoError(f"--twin {twin} is not {run.folder} without the penalty: {unlike}")
    return FinishedRun(run.folder, (_beside(sae, twin=other.saes[0].metrics),), run.run)


def _no_twin(config: Mapping[str, Any], twin: Mapping[str, Any]) -> str | None:
    """Why an SAE is not the twin of another; None if it is."""
    if twin.get("penalty") != "none" and twin.get("ortho_coefficient"):
        return f"its ortho_coefficient is {twin.get('ortho_coefficient')}"
    return _differences(config, twin, _MEASURED | _OF_THE_PENALTY)


def _differences(config: Mapping[str, Any], other: Mapping[str, Any], left_out: set[str]) -> str | None:
    unlike = [key for key in config if key not in left_out and config[key] != other.get(key)]
    return ", ".join(f"{key} is {other.get(key)!r} and not {config[key]!r}" for key in unlike[:3]) or None


def _beside(sae: SaeReport, **others: Any) -> SaeReport:
    return SaeReport(sae.name, sae.config, sae.measured._replace(**others), sae.pictures)


def _seed(run: FinishedRun) -> int | None:
    return (run.run.get("arguments") or {}).get("seed")


def _read_sae(folder: Path, name: str) -> SaeReport:
    place = folder / name
    for path in _files(place):
        if outside := target_outside(folder, path):
            raise SelOrthoError(f"{path} leads out of {folder}, to {outside}: put the file itself into the folder")
    config = SelOrthoConfig.from_pretrained(place / CONFIG)
    pictures = [path.relative_to(folder).as_posix() for path in sorted((place / PICTURES).glob("*.png"))]
    drawn = _content(place / RUN).get("pictures")
    if isinstance(drawn, list):  # in the order in which the training has drawn them
        order = {f"{name}/{path}" if name else path: number for number, path in enumerate(map(str, drawn))}
        pictures.sort(key=lambda path: order.get(path, len(order)))
    return SaeReport(name, config.own_settings(), Measured(_content(place / METRICS)), pictures)


def _files(place: Path) -> Iterator[Path]:
    yield from (place / name for name in (CONFIG, WEIGHTS, METRICS, RUN))
    yield from (place / PICTURES).glob("*.png")


def _content(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def holds_sae(folder: Path) -> bool:
    """Whether an SAE of this package is saved there."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _sub_folders(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("layer_*") if holds_sae(path)]


def _by_layer(name: str) -> tuple[int, str]:
    number = name.split("_")[1]
    return (int(number) if number.isdecimal() else 1 << 30, name)
