"""The SAEs that the page shows, each with its feature index and what its training has measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import SelOrthoConfig, SelOrthoError
from ..features.index import FeatureIndex
from ..features.index_writer import INDEX
from ..hub.run_folder import shown_name, twin_beside
from ..training.run_folder import CARD, METRICS, METRICS_LOG, read_rows
from ..utils.hub import CONFIG, RepoRef, at_one_commit, find_file, read_object

logger = logging.getLogger("hf_selortho.space")

MAIN, TWIN = "main", "twin"


@dataclass(frozen=True)
class Shown:
    """An SAE on the page; its weights are loaded only where there is a language model."""

    key: str  # "main" or "twin"
    title: str
    place: RepoRef
    config: SelOrthoConfig | None  # None: in the format of another library, its weights have to be read for it
    index: FeatureIndex | None
    metrics: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    card: str  # the model card, Markdown; "" if there is none


def open_shelf(sae: str, twin: str | None) -> dict[str, Shown]:
    """The SAE and its twin without the penalty, where there is one.

    Args:
        sae: folder of an SAE or of a run, or owner/name[@revision][/subfolder].
        twin: the same of its twin; None: looked for beside it.

    Raises:
        SelOrthoError: there is no such SAE, or its index is damaged.
    """
    place = _sae_within(RepoRef.parse(sae))
    other = RepoRef.parse(twin) if twin else _twin_of(place)
    shelf = {MAIN: open_shown(MAIN, place)}
    if other is not None:
        shelf[TWIN] = open_shown(TWIN, other)
    return shelf


def open_shown(key: str, place: RepoRef) -> Shown:
    """What is known of an SAE, without its weights; all of it from the same commit."""
    place = _pinned(place)
    config_file = find_file(place.name, CONFIG, place.lookup)
    config = None if config_file is None else SelOrthoConfig.from_pretrained(place.name, **place.lookup)
    return Shown(
        key=key,
        title=_title(place),
        place=place,
        config=config,
        index=_index(place),
        metrics=_object(place, METRICS),
        rows=_rows(place),
        card=_text(place, CARD) or _text(RepoRef(place.name, place.revision), CARD),
    )


def _pinned(place: RepoRef) -> RepoRef:
    if place.is_local:
        return place
    lookup = at_one_commit(place.name, place.lookup)
    return RepoRef(place.name, lookup.get("revision"), place.subfolder)


def _title(place: RepoRef) -> str:
    """A short name, without the folders of this machine."""
    if place.is_local:
        return shown_name(Path(place.name, place.subfolder or ""))
    return f"{place.name}/{place.subfolder}" if place.subfolder else place.name


def _index(place: RepoRef) -> FeatureIndex | None:
    if find_file(place.name, f"{INDEX}/index.json", place.lookup) is None:
        logger.warning("%s has no feature index: the page shows live text only", place)
        return None
    return FeatureIndex.open(place.name, **place.lookup)


def _sae_within(place: RepoRef) -> RepoRef:
    """The SAE itself, where a run of several was given: the first one that was trained with the penalty."""
    if not place.is_local or Path(place.name, CONFIG).is_file():
        return place
    members = sorted(path for path in Path(place.name).glob("layer_*") if (path / CONFIG).is_file())
    chosen = [path for path in members if not path.name.endswith("_twin")] or members
    if not chosen:
        return place
    if len(chosen) > 1:
        logger.warning("%s holds %d SAEs: showing %s", place, len(members), chosen[0].name)
    return RepoRef(str(chosen[0]))


def _twin_of(place: RepoRef) -> RepoRef | None:
    """layer_8_twin beside layer_8, or runs/demo-twin beside runs/demo."""
    if place.is_local:
        beside = twin_beside(Path(place.name).resolve())
        return None if beside is None else RepoRef(str(beside))
    if not place.subfolder:
        return None
    twin = RepoRef(place.name, place.revision, f"{place.subfolder}_twin")
    return twin if find_file(twin.name, CONFIG, twin.lookup) else None


def _object(place: RepoRef, file: str) -> dict[str, Any]:
    path = find_file(place.name, file, place.lookup)
    return {} if path is None else read_object(path)


def _rows(place: RepoRef) -> list[dict[str, Any]]:
    path = find_file(place.name, METRICS_LOG, place.lookup)
    return [] if path is None else read_rows(path)


def _text(place: RepoRef, file: str) -> str:
    path = find_file(place.name, file, place.lookup)
    if path is None or path.stat().st_size > 1 << 20:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Settings:
    """What the owner of the page decides: arguments of the command line, variables of a Space, or settings.json."""

    sae: str
    twin: str | None = None
    lm: str = "auto"  # the one of the training; "none": no live text; or another name
    allow_other_saes: bool = False  # visitors may compare with any SAE of the Hub


def settings_from(given: dict[str, Any], environment: dict[str, str], file: Path) -> Settings:
    """The first that says something: the command line, the environment (SAE, TWIN, LM, ALLOW_OTHER_SAES), the file.

    Raises:
        SelOrthoError: nobody says which SAE, or the file is damaged.
    """
    stored = read_object(file) if file.is_file() else {}
    unknown = stored.keys() - set(Settings.__dataclass_fields__)
    if unknown:
        raise SelOrthoError(f"{file.name} holds {min(unknown)!r}: expected {', '.join(Settings.__dataclass_fields__)}")
    found: dict[str, Any] = dict(stored)
    for name in Settings.__dataclass_fields__:
        if environment.get(name.upper()):
            found[name] = environment[name.upper()]
        if given.get(name):
            found[name] = given[name]
    if isinstance(found.get("allow_other_saes"), str):
        found["allow_other_saes"] = found["allow_other_saes"].lower() in ("1", "true", "yes")
    if not found.get("sae"):
        raise SelOrthoError(
            "which SAE? pass --sae with a folder such as runs/demo or owner/name of the Hub, or set the variable SAE"
        )
    return Settings(**found)
