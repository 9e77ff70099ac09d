"""What pip installs in a Space: this package, and everything that it needs at the versions that are installed here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import hf_hub_url
from packaging.metadata import parse_email
from packaging.requirements import Requirement
from packaging.version import Version

from .. import __version__
from ..errors import SelOrthoError
from ..utils.files import sha256_of
from ..utils.hub import one_line

PACKAGE = "hf_selortho"
SPACE_EXTRA, EMBEDDED_EXTRA = "space", "demo"
_ANOTHER_WAY = "pass --wheel_url with the address of a wheel, or --from_index where an index of packages offers it"


@dataclass(frozen=True)
class OwnPackage:
    """Where a Space gets this package from: a wheel in the Space itself, a wheel elsewhere, or else an index."""

    wheel: Path | None = None
    url: str | None = None

    def requirement(self, space: str, extras: Collection[str]) -> str:
        """The line of requirements.txt for it.

        Where a Space is built, requirements.txt is alone: pip runs before the other files of the repository are there.
        A wheel of the repository has to be named by its address on the Hub, which pip opens without a token.
        """
        name = f"{PACKAGE}[{','.join(sorted(extras))}]"
        if self.wheel is not None:
            address = hf_hub_url(space, self.wheel.name, repo_type="space", revision="main")
            return f"{name} @ {address}#sha256={sha256_of(self.wheel)}"
        return f"{name} @ {self.url}" if self.url else f"{name}=={__version__}"

    def requires(self) -> list[str]:
        """What it needs, as its metadata says."""
        if self.wheel is None:
            return importlib.metadata.requires(PACKAGE) or []
        with zipfile.ZipFile(self.wheel) as archive:
            [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            return parse_email(archive.read(metadata))[0].get("requires_dist", [])


def check_wheel_url(url: str) -> None:
    """Raise a SelOrthoError unless it is the address of a wheel of this package, of this version."""
    parts = urlsplit(url)
    wheel = parts.path.split("/")[-1]
    if parts.scheme not in ("https", "http") or not parts.hostname or any(mark in url for mark in " \t\r\n"):
        raise SelOrthoError(
            f"--wheel_url {url!r:.200} is no address: expected https://.../{PACKAGE}-{__version__}-....whl"
        )
    if not (wheel.startswith(f"{PACKAGE}-{__version__}-") and wheel.endswith(".whl")):
        raise SelOrthoError(
            f"--wheel_url names {wheel!r:.200}, expected a wheel {PACKAGE}-{__version__}-....whl: the page is that of "
            f"version {__version__}"
        )
    if parts.username or parts.password:
        raise SelOrthoError("--wheel_url holds a password, which everybody who sees the Space could read: leave it out")


def build_wheel(root: Path, folder: Path) -> Path:
    """Build the wheel of this package from its source tree, without network.

    Args:
        root: the source tree: a checkout, or an unpacked sdist.
        folder: where the wheel is put.

    Raises:
        SelOrthoError: that is no source tree, the build backend is not installed, or it fails.
    """
    if not (root / "pyproject.toml").is_file() or not (root / PACKAGE / "__init__.py").is_file():
        raise SelOrthoError(
            f"{root} is no source tree of {PACKAGE}, so no wheel of it can be built: run the script of a checkout, or "
            f"{_ANOTHER_WAY}"
        )
    if importlib.util.find_spec("hatchling") is None:
        raise SelOrthoError(
            f"the wheel of {PACKAGE} is built with hatchling, which is not installed: pip install hatchling, or "
            f"{_ANOTHER_WAY}"
        )
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder.resolve())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SelOrthoError(
            f"the wheel of {PACKAGE} cannot be built in {root}: {said[-1] if said else 'no reason given'}"
        )
    return wheels[0]


def requirements_text(own: OwnPackage, space: str, extras: Collection[str]) -> str:
    """Content of requirements.txt.

    Args:
        own: where this package comes from. space: owner/name. extras: of this package that the Space needs.

    Raises:
        SelOrthoError: something that is needed is not installed here, or in a version that is not allowed.
    """
    return "\n".join([own.requirement(space, extras), *pins(own.requires(), extras)]) + "\n"


def pins(requires: Sequence[str], extras: Collection[str]) -> list[str]:
    """The requirements of a package as `name==version`, in order: the versions installed here.

    A local label of a version, such as that of a build for CPUs (2.13.0+cpu), is left out: where the Space is built it
    is not offered.

    Raises:
        SelOrthoError: something is not installed here, or in a version that is not allowed.
    """
    needed = sorted(_needed(requires, extras), key=lambda requirement: requirement.name.lower())
    return [f"{_with_extras(requirement)}=={_installed(requirement)}" for requirement in needed]


def installed_version(name: str) -> str:
    """Version of what is installed, without a local label.

    Raises:
        SelOrthoError: it is not installed.
    """
    try:
        return Version(importlib.metadata.version(name)).public
    except importlib.metadata.PackageNotFoundError as error:
        raise SelOrthoError(
            f"{name} is not installed here, so nobody knows which version of it the Space works with: install what the "
            f"Space needs, pip install '{PACKAGE}[{SPACE_EXTRA},{EMBEDDED_EXTRA}]'"
        ) from error
    except ValueError as error:
        raise SelOrthoError(f"the installed {name} has no version ({one_line(error)}): install it again") from error


def _needed(requires: Sequence[str], extras: Collection[str]) -> Iterator[Requirement]:
    for requirement in map(Requirement, requires):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def _installed(requirement: Requirement) -> str:
    version = installed_version(requirement.name)
    if not requirement.specifier.contains(version, prereleases=True):
        raise SelOrthoError(
            f"{requirement.name} {version} is installed here, expected {requirement.specifier}: a Space is pinned to "
            f"versions that work; pip install '{requirement.name}{requirement.specifier}'"
        )
    return version


def _with_extras(requirement: Requirement) -> str:
    return requirement.name + (f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else "")
