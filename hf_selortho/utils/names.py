"""Read names as people type them: paths of this machine, and places in repositories of the Hub."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import SelOrthoError

Kind: TypeAlias = Literal["model", "dataset", "SAE", "Space"]  # an SAE is in a repository of models
_FOLDERS = {"model": "models", "SAE": "models", "dataset": "datasets", "Space": "spaces"}  # in addresses of the Hub
_LOCAL = {"dataset": "a file, a folder or "}
_PLACE = re.compile(  # a name without an owner has no sub-folder behind it: org/name:main is no folder of org
    r"(?P<repo>[\w.-]+/[\w.-]+(?=[@/]|$)|[\w.-]+(?=@|$))(?:@(?P<revision>refs/\w+/[^/@\s:]+|[^/@\s:]+))?(?:/(?P<sub>[^@]+))?",
    re.ASCII,
)
_ADDRESS = re.compile(r"(?:https?|hf)://|(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_SHOWN = re.compile(r"/(?:tree|blob|resolve|raw|commits?)/(refs/\w+/[^/]+|[^/]+)")  # in addresses of pages
_PAGE = re.compile(r"/(?:viewer|discussions|settings|edit|upload|new)(?:/.*)?$")  # others, of the whole repository
_UNREADABLE = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # of which no name of a file can be made
_OF_SEVERAL = re.compile(r"\.pth?$|/layer_\d+\.safetensors$")  # files that are an SAE each, with others beside it
_AROUND = " \t\r\n\v\f\xa0\u200b\ufeff\"'`“”‘’"  # that comes along with what is copied
_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def local_path(text: str | os.PathLike[str], argument: str = "path") -> str:
    r"""Return a path of this machine without what typing has added to it; it need not exist.

    Blanks and quotes around it, doubled and trailing slashes, `.` and `..` go; `~`, `$HOME` and `file://` are
    followed; `\` is read as `/`. A file whose name really has blanks or `\` is itself.

    Args:
        text: the path. argument: what to call it in errors, such as "--output_dir".

    Raises:
        SelOrthoError: it is empty, an address of the Hub, a path of Windows on another system, or of a user who is not.
    """
    path = _stripped(os.fspath(text), argument)
    if match := re.match("file:(?://(?:localhost)?(?=/)|(?!//))", path, re.IGNORECASE):
        path = url2pathname(path[match.end() :])
    if not os.path.lexists(path):
        path = os.path.expandvars(path)
        path = os.path.expanduser(path.replace("\\", "/")) if path.startswith("~") else path
    if not os.path.lexists(path):
        if re.match(r"\w+://|file:|~", path) or _ADDRESS.match(path) or (os.name != "nt" and _OF_WINDOWS.match(path)):
            said = "expected a path of this machine, not an address, a path of Windows or that of an unknown user"
            raise SelOrthoError(f"{argument} {path:.200}: {said}")
        path = path.replace("\\", "/")
    tidy = re.sub("^//+", "/", os.path.normpath(path))
    return tidy if os.path.realpath(tidy) == os.path.realpath(path) else path  # `..` behind a link leads elsewhere


def trimmed(text: str, argument: str = "revision") -> str:
    """Return a branch or other name without blanks around it; raises a SelOrthoError if it is empty."""
    return _stripped(text, argument)


def endpoint(text: str, argument: str = "endpoint") -> str:
    """Return the base address of an OpenAI-compatible endpoint without a slash, or the path of a request, at its end.

    Raises:
        SelOrthoError: it is no http or https address, or holds a user name, a password or a query.
    """
    address = _stripped(text, argument)
    try:
        parts = urlsplit(address)
        fits = (
            parts.scheme.lower() in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        parts, fits = urlsplit(""), False
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SelOrthoError(
            f"{argument} holds a user name, a password or a query: leave them out; the key is that of EXPLAIN_API_KEY"
        )
    if not fits or re.search(r"[\s\0-\x1f]", address) or not address.isascii():
        expected = "expected an address such as http://127.0.0.1:8000/v1"
        raise SelOrthoError(f"{argument} {address:.200}: {expected}")
    return address.rstrip("/").removesuffix("/chat/completions").rstrip("/")


def subfolder_of(text: str, argument: str = "subfolder") -> str | None:
    r"""Return a folder within a repository without `./`, `\`, doubled and trailing slashes; None for the top.

    Raises:
        SelOrthoError: it is empty, or leads out of the repository.
    """
    path = posixpath.normpath(_stripped(text, argument).replace("\\", "/").strip("/") or ".")
    if path.split("/")[0] == "..":
        raise SelOrthoError(f"{argument} {text!r:.200} leads out of the repository: expected a folder in it")
    return None if path == "." else path


@dataclass(frozen=True)
class RepoRef:
    """A folder, or a place in a repository of the Hub."""

    name: str  # the folder, or owner/name
    revision: str | None = None
    subfolder: str | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike[str], local: bool = True, kind: Kind = "SAE", argument: str = "") -> RepoRef:
        """Read `runs/demo` or `org/name[@revision][/subfolder]`, however it is typed; only an SAE has a sub-folder.

        Addresses of the Hub's pages and of its file system (`hf://`) are read as well, paths as [`local_path`] does.

        Args:
            text: the name.
            local: whether it may be a folder, or file of texts, of this machine, which go before the Hub.
            kind: what is named. argument: what to call it in errors, such as "--sae".

        Raises:
            SelOrthoError: it is none of these.
        """
        typed = _stripped(os.fspath(text), argument or kind)
        path = local_path(typed, argument or kind) if local and not _ADDRESS.match(typed) else ""
        if os.path.isdir(path) or (path and kind == "dataset" and os.path.exists(path)):
            return cls(path)
        if path and kind == "SAE" and os.path.isfile(path):
            folder, file = os.path.split(path)
            return cls(folder or ".", subfolder=None if file.endswith(".json") else file)  # a config is of its folder
        match = None if re.match(r"[./~]|file:", typed) else _PLACE.fullmatch(_without_host(typed, kind, argument))
        repo, revision, sub = match.group("repo", "revision", "sub") if match else ("..", None, None)
        revision, is_address = unquote(revision or ""), _ADDRESS.match(typed)
        sub = unquote(sub) if sub and is_address else sub
        if revision and sub and kind != "SAE" and not is_address:
            revision, sub = f"{revision}/{sub}", None
        if ".." in repo + revision or (sub and kind != "SAE") or not (local or "/" in repo):
            form = "owner/name[@revision]" + ("[/subfolder]" if kind == "SAE" else ", a whole repository,")
            form = f"{_LOCAL.get(kind, 'a folder or ') if local else ''}{form} of the Hub"
            said = f'unknown {kind} "{path or typed:.200}": neither on the Hub nor a local path'
            raise SelOrthoError(f"{argument}{': ' * bool(argument)}{said}; check the spelling, expected {form}")
        if not local and kind == "SAE" and os.path.exists(repo):
            raise SelOrthoError(f"{typed!r:.200} is a path of this machine: expected owner/name of the Hub")
        return cls(repo, revision or None, subfolder_of(sub) if sub else None)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return os.path.isdir(self.name)

    @property
    def lookup(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that go with the name."""
        parts = {"revision": self.revision, "subfolder": self.subfolder}
        return {key: value for key, value in parts.items() if value}

    def __str__(self) -> str:
        revision = self.revision or ""
        parts = [self.name, quote(revision, safe="/" if revision.startswith("refs/") else "")]
        return "@".join(filter(None, parts)) + (f"/{self.subfolder}" if self.subfolder else "")


def located(name: str | os.PathLike[str], lookup: Mapping[str, Any], kind: Kind = "SAE") -> tuple[str, dict[str, Any]]:
    """Return a name as [`RepoRef.parse`] reads it, and `lookup` with the revision and sub-folder that it holds.

    The folder of a run that has trained one SAE beside its twin stands for that SAE.

    Raises:
        SelOrthoError: the name is none, or says another revision or sub-folder than `lookup`.
    """
    ref = RepoRef.parse(name, kind=kind)
    readers: dict[str, Callable[[str], str | None]] = {"revision": trimmed, "subfolder": subfolder_of}
    given = {key: read(lookup[key]) for key, read in readers.items() if lookup.get(key)}
    for key, value in ref.lookup.items():
        if given.get(key) not in (None, value):
            raise SelOrthoError(f'{kind} "{ref}" has the {key} {value!r}, {key} says {given[key]!r}: leave one out')
    name = _sae_of_run(ref.name) if kind == "SAE" and ref.is_local and not given.get("subfolder") else ref.name
    return name, {**lookup, **given, **ref.lookup}


def _sae_of_run(folder: str) -> str:
    """Return the folder of the only SAE of a run, its twin aside; of what is no such run, the folder itself."""
    names = {path.parent.name for path in Path(folder).glob("layer_*/config.json")}
    own = [name for name in names if not name.endswith("_twin")]
    is_run = len(own) == 1 and names <= {own[0], f"{own[0]}_twin"} and not Path(folder, "config.json").exists()
    return os.path.join(folder, own[0]) if is_run else folder


def repo_id(text: str, kind: Kind = "model", argument: str = "repository") -> str:
    """Return the id owner/name of a repository to write to; raises a SelOrthoError if there is none in the text."""
    name = _without_host(_stripped(text, argument), kind, argument)
    try:
        validate_repo_id(name if "/" in name else "")
    except HFValidationError as error:
        expected = "expected owner/name, as in org/gemma2b-l12, of letters, digits, '-', '_' and '.'"
        raise SelOrthoError(f"{argument} {name!r:.200}: {expected}") from error
    return name


def activations_of(text: str | os.PathLike[str], argument: str = "activations") -> str:
    """Return where cached activations are: the path of a folder, or hub:owner/name[@revision]."""
    typed = _stripped(os.fspath(text), argument)
    is_remote = typed[:4].lower() == "hub:"
    if not is_remote and not _ADDRESS.match(typed):
        return local_path(typed, argument)
    ref = RepoRef.parse(typed[4:] if is_remote else typed, local=False, kind="dataset", argument=argument)
    return f"hub:{ref}"


def _stripped(text: str, argument: str) -> str:
    """Return a text without blanks and quotes around it, unless it is the name of a file that has them."""
    if _UNREADABLE.search(text):
        raise SelOrthoError(f"{argument} {text!r:.200} holds a NUL byte or half a character: type it again")
    name = text if os.path.lexists(text) else text.strip(_AROUND)
    if not name.strip():
        raise SelOrthoError(f"{argument} is empty: give it a value, or leave it out")
    return name


def _without_host(typed: str, kind: Kind, argument: str = "") -> str:
    """Turn an address of the Hub into owner/name@revision/subfolder; anything else only loses doubled slashes."""
    path = typed.replace("\\", "/")
    address = re.match(r"(?:(\w+)://)?([^/?#]*)([^?#]*)", path) if _ADDRESS.match(path) else None
    if address:
        scheme, host, path = address.groups()
        if scheme and scheme.lower() == "hf":
            path = host + path
        elif host.lower() not in (*_HOSTS, urlsplit(constants.ENDPOINT).netloc):
            raise SelOrthoError(f"{argument or kind} {typed!r:.200} is no address of {constants.ENDPOINT}, the Hub")
        elif re.search("/(blob|resolve|raw)/", path) and not _OF_SEVERAL.search(path):  # of a file
            path = posixpath.dirname(path)
        path = _SHOWN.sub(lambda shown: f"@{quote(unquote(shown[1]), safe='')}", _PAGE.sub("", path), count=1)
    path = re.sub("/+", "/", path).strip("/").removesuffix(".git")
    folder, _, rest = path.partition("/")
    if rest and (folder in ("datasets", "spaces") or (address and folder == "models")):
        if folder != _FOLDERS[kind]:
            said = f"is among the Hub's {folder}: expected one of its {_FOLDERS[kind]}"
            raise SelOrthoError(f"{argument or kind} {typed:.200} {said}")
        path = rest
    return path
