"""Deploy a Space that shows the features of SAEs: its app, its requirements and what it shows, sent as one commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, SpaceCard, constants
from packaging.requirements import Requirement

from .. import __version__
from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..features.index_writer import INDEX
from ..utils.hub import LOOKUP_ERRORS, hub_error, patiently
from ..utils.library_errors import one_line, storage_error
from ..utils.names import RepoRef
from .model_card import EMBEDDED_MODEL, base_model
from .publication import Publication
from .push import Pushed, push_folder
from .run_folder import WEIGHTS

PACKAGE = "hf_selortho"
APP, SETTINGS, REQUIREMENTS, README = "app.py", "settings.json", "requirements.txt", "README.md"
MESSAGE = "Deploy the feature browser with hf_selortho"
_ROLES = {"sae": "SAE", "twin": "Twin, trained without the penalty"}


@dataclass(frozen=True)
class PinnedSae:
    """An SAE on the Hub, at the commit that was there at the deployment."""

    place: RepoRef
    config: SelOrthoConfig
    has_index: bool
    restricted: bool  # private or gated: nobody reads it without a token

    @property
    def language_model(self) -> str | None:
        """Its id on the Hub; None for one of a local folder."""
        return base_model(self.config.own_settings())


def pin_sae(name: str, token: str | None = None) -> PinnedSae:
    """Look up the SAE that `owner/name[@revision][/subfolder]` means on the Hub now.

    Raises:
        SelOrthoError: there is no such repository, revision or SAE, or no access to it.
    """
    if os.path.isdir(name):
        raise SelOrthoError(
            f"{name} is a folder of this machine, which a Space cannot read: publish it with selortho push, "
            "then name its repository"
        )
    place = RepoRef.parse(name, local=False)
    try:
        info = patiently(lambda: HfApi(token=token).model_info(place.name, revision=place.revision))
    except LOOKUP_ERRORS as error:
        raise hub_error(error, "SAE", place.name, place.revision) from error
    pinned = RepoRef(place.name, info.sha, place.subfolder)
    config = SelOrthoConfig.from_pretrained(place.name, token=token, **pinned.lookup)
    folder = PurePosixPath(place.subfolder or "")
    files = {file.rfilename for file in info.siblings or []}
    if not files & {str(folder / WEIGHTS), str(folder / f"{WEIGHTS}.index.json")}:
        raise SelOrthoError(f"{name} has an SAE's config without its weights ({folder / WEIGHTS}): publish it again")
    return PinnedSae(pinned, config, str(folder / INDEX / "index.json") in files, bool(info.private or info.gated))


def assemble_space(
    folder: Path,
    saes: Mapping[str, PinnedSae],
    *,
    app: Path | None = None,
    title: str | None = None,
    wheel_url: str | None = None,
    from_index: bool = False,
) -> Publication:
    """Put together what a Space holds: the app, README.md, requirements.txt, settings.json with the SAEs, our package.

    Args:
        folder: an empty folder to put it together in.
        saes: what the page shows: "sae", and "twin" if there is one.
        app: folder of the app; default: the one of this package.
        title: of the Space; default: that of the app's README.md.
        wheel_url: address of a wheel to install this package from, in place of a copy in the Space.
        from_index: install this version of the package from an index of packages, in place of a copy.

    Raises:
        SelOrthoError: the app is not there, a package it needs is not installed, or there is no room.
    """
    app = app or _default_app()
    for name in (APP, README):
        if not (app / name).is_file():
            raise SelOrthoError(f"{app} holds no {name}: expected the folder of the feature browser's app")
    extras = {"space", "demo"} if any(sae.config.lm_name == EMBEDDED_MODEL for sae in saes.values()) else {"space"}
    requirements = _requirements(extras, wheel_url, from_index)
    card = _card((app / README).read_text(encoding="utf-8"), saes, title)
    settings = {role: str(sae.place) for role, sae in saes.items()}
    try:
        shutil.copytree(app, folder, ignore=_left_out, dirs_exist_ok=True)
        if not (wheel_url or from_index):
            own = shutil.ignore_patterns(".*", "__pycache__", "*.pyc")
            shutil.copytree(Path(__file__).parents[1], folder / PACKAGE, ignore=own)
        (folder / REQUIREMENTS).write_text("\n".join([*requirements, ""]), encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (folder / README).write_text(str(card), encoding="utf-8")
    except (OSError, shutil.Error) as error:
        said = f"cannot put the Space together in {folder}: {one_line(error)}"
        raise storage_error(error) or SelOrthoError(said) from error
    return Publication(folder, card)


def deploy_space(publication: Publication, space: str, *, private: bool = False, **options: Any) -> Pushed:
    """Make a Space hold what [`assemble_space`] has put together; options and errors as [`push_folder`]."""
    options["commit_message"] = options.get("commit_message") or MESSAGE
    return push_folder(publication.folder, space, kind="space", private=private or None, space_sdk="gradio", **options)


def check_wheel_url(url: str) -> None:
    """Raise a SelOrthoError unless it is the address of a wheel of this version, without a password in it."""
    wheel = rf"{PACKAGE}-{re.escape(__version__)}-[^/\s]+\.whl"
    if not re.fullmatch(rf"https?://[^\s/@]+/(\S*/)?{wheel}(#\S+)?", url):
        raise SelOrthoError(
            f"--wheel_url: expected https://.../{PACKAGE}-{__version__}-....whl, a wheel of the version of this page, "
            "without a password, which everybody who sees the Space could read"
        )


def advice(saes: Mapping[str, PinnedSae], token: str | None = None) -> Iterator[str]:
    """Tell the owner of the Space what to know or do, a sentence each."""
    for sae in saes.values():
        if not sae.has_index:
            yield (
                f"{sae.place} has no {INDEX}/, so the page will have live text only, and nothing about a feature or a "
                "pair: build it with selortho index, publish it with selortho push --include_index, "
                "and deploy again"
            )
    hub_models = {str(sae.language_model) for sae in saes.values() if sae.language_model}
    closed = [sae.place.name for sae in saes.values() if sae.restricted]
    if not all(sae.config.lm_name == EMBEDDED_MODEL for sae in saes.values()):
        closed += [name for name in sorted(hub_models) if _is_restricted(name, token)]
    if closed:
        yield (
            f"private or gated: {', '.join(closed)}; give the Space a token that may read this, as the secret HF_TOKEN "
            "in its settings"
        )
    unknown = {sae.config.lm_name for sae in saes.values() if sae.config.lm_name and sae.language_model is None}
    if unknown:
        yield (
            f"the language model {', '.join(sorted(map(str, unknown)))} was not loaded from the Hub when the SAE was "
            "trained: if it is not there either, live text and steering will be missing"
        )


def _requirements(extras: Collection[str], wheel_url: str | None, from_index: bool) -> list[str]:
    """Return the lines of requirements.txt: this package, or what its copy in the Space needs; gradio as it is here."""
    try:
        gradio = f"gradio[mcp]=={importlib.metadata.version('gradio')}"
        needed = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError as error:
        raise SelOrthoError(f"{error.name} is not installed here: pip install '{PACKAGE}[space]'") from error
    name = f"{PACKAGE}[{','.join(sorted(extras))}]"
    if wheel_url or from_index:
        return [f"{name} @ {wheel_url}" if wheel_url else f"{name}=={__version__}", gradio]
    needed = [
        line for line in needed if not line.marker or any(line.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    for line in needed:
        line.marker = None
    return [*sorted(str(line) for line in needed if line.name != "gradio"), gradio]


def _card(template: str, saes: Mapping[str, PinnedSae], title: str | None) -> SpaceCard:
    """Make README.md of a Space: the app's own with the versions that are installed here and what the page shows."""
    try:
        card = SpaceCard(template)
    except ValueError as error:
        raise SelOrthoError(f"the header of the app's README.md cannot be read ({one_line(error)}): mend it") from error
    models = [name for sae in saes.values() for name in (sae.place.name, sae.language_model) if name]
    header: dict[str, Any] = {
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": APP,
        "models": list(dict.fromkeys(models)),
        **({"title": title} if title else {}),
    }
    for key, value in header.items():
        card.data[key] = value
    lines = []
    for role, sae in saes.items():
        where = "/".join(filter(None, (sae.place.name, "tree", sae.place.revision, sae.place.subfolder)))
        name = RepoRef(sae.place.name, str(sae.place.revision)[:12], sae.place.subfolder)
        lines.append(f"- {_ROLES[role]}: [{name}]({constants.ENDPOINT}/{where})")
    shown = "\n".join([*lines, f"- Version {__version__} of {PACKAGE}"])
    card.text = f"{card.text.rstrip()}\n\n## What is shown here\n\n{shown}\n"
    return card


def _default_app() -> Path:
    """Return the folder of the app in an installed package, else at the top level of a checkout."""
    within = Path(__file__).parents[1] / "spaces_app"
    return within if within.is_dir() else Path(__file__).parents[2] / "spaces_app"


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Return what is not copied of the app: hidden files, caches, links, and what is made for each Space."""
    links = {name for name in names if Path(folder, name).is_symlink()}
    return links | shutil.ignore_patterns(".*", "__pycache__", "*.pyc", SETTINGS, REQUIREMENTS)(folder, names)


def _is_restricted(name: str, token: str | None) -> bool:
    try:
        info = patiently(lambda: HfApi(token=token).model_info(name))
    except LOOKUP_ERRORS:  # advice is no reason to fail
        return False
    return bool(info.private or info.gated)
