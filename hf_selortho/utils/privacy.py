"""Keep the names of this machine, of its user and of their folders out of what leaves it."""

from __future__ import annotations

import functools
import getpass
import json
import os
import platform
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .command_line import without_secrets

# What stands for the name of a folder or file of this machine, by the setting that it is the value of. The colon, which
# no id of the Hub holds, keeps anybody from looking there.
LOCAL_MODEL, LOCAL_TEXT = "local:model", "local:text"
_PLACEHOLDERS = {
    "lm_name": LOCAL_MODEL, "model": LOCAL_MODEL, "dataset": LOCAL_TEXT, "activations": "local:activations"
}  # fmt: skip
# Settings that name a language model or a text, each with the one of its revision.
_PAIRS = (
    ("lm_name", "lm_revision"), ("model", "model_revision"), ("dataset", "dataset_revision"), ("name", "revision"),
    ("dataset", "revision"),
)  # fmt: skip
# Names that many machines and accounts have, and parts of the paths of this package: they tell nobody from others.
_COMMON = set(
    "root user users admin administrator ubuntu debian fedora docker jovyan vscode codespace runner node home data app "
    "work workspace local localhost host server linux windows desktop laptop test tests dev src lib opt tmp var hub "
    "utils features browser training commands formats evaluation models model spaces datasets main nobody mnt".split()
)
_ABSOLUTE = r"(?:file:/*)?(?:~[\w.-]*/|/|[A-Za-z]:[/\\]|\\\\)(?=[\w.~-])"  # how an absolute path begins
_PATH = re.compile(rf"(?:(?<![^\s\"'`=(\[{{,;|])|(?<=\w:)(?!//)){_ABSOLUTE}[^\s\"'`,;:()\[\]{{}}<>|]*")
_FILE = re.compile(r"\.(csv|tsv|txt|jsonl?|parquet|arrow|gz|bz2|xz|zst|zip|safetensors)$", re.IGNORECASE)


def is_path(name: str) -> bool:
    """Return whether a name is that of a file or folder of a machine, by its form or because it is there."""
    formed = re.match(rf"{_ABSOLUTE}|~|\.|local:", name) or "\\" in name or name.count("/") > 1 or _FILE.search(name)
    return bool(formed) or os.path.exists(name)


def without_paths(
    value: Any, known: Mapping[str, str] | None = None, revisions: Mapping[str, str | None] | None = None, key: str = ""
) -> Any:
    """Replace the paths of this machine in settings: the result says nothing of its folders, its user or its name.

    Args:
        value: a string, or mappings and lists of them; anything else is returned as it is.
        known: by local name, what to call it. revisions: by local name, the revision to say beside it.
        key: of the value; a local model, text or cache is named after it, of any other path the last part is left.
    """
    known, revisions = known or {}, revisions or {}
    if isinstance(value, Mapping):
        public = {without_paths(k, known): without_paths(item, known, revisions, k) for k, item in value.items()}
        pairs = [(name, revision) for name, revision in _PAIRS if revision in value and name in value]
        return public | {revision: revisions[value[name]] for name, revision in pairs if value[name] in revisions}
    if isinstance(value, (list, tuple)):
        return [without_paths(item, known, revisions, key) for item in value]
    if not isinstance(value, str):
        return value
    if value in known and (key in _PLACEHOLDERS or key == "name" or re.search(r"[/\\]", value)):  # else just a word
        return known[value]
    if key in _PLACEHOLDERS and is_path(value) and not value.startswith("hub:"):
        return _PLACEHOLDERS[key]
    if key == "command":
        return _command_without_paths(value, known)
    if re.match(_ABSOLUTE, value):
        return _last_part(value)
    for home in sorted(_homes(), key=len, reverse=True):  # which may have blanks, at which a path in a text ends
        value = re.sub(re.escape(home) + r"(?=[/\\])", "~", value)
    text = _PATH.sub(lambda match: _last_part(match[0]), without_secrets(value)).encode("utf-8", "surrogatepass")
    for _, pattern in _host_patterns():
        text = pattern.sub(b"localhost", text)
    return text.decode("utf-8", "surrogatepass")


def private_names(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield what of this machine stands in some bytes: what it is, such as "the home folder", and the words."""
    lower = data.lower()
    for what, patterns in (
        ("the home folder of this machine", _home_patterns()),
        ("the user name of this machine in a path", _user_patterns()),
        ("the name of this machine", _host_patterns()),
    ):
        matches = (pattern.search(data) for name, pattern in patterns if name.lower() in lower)
        if match := next(filter(None, matches), None):
            yield what, match[0].decode("utf-8", "replace")
    text = data.decode("utf-8", "ignore")
    if without_secrets(text) != text:
        yield "an access token", "***"


def _command_without_paths(command: str, known: Mapping[str, str] | None) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        return without_paths(command, known)
    public, option = [], ""
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if name:
            option = name[2:].replace("-", "_")
            public.append(f"{name}={without_paths(value, known, key=option)}" if equals else word)
        else:
            public.append(without_paths(value, known, key=option))
    return command if public == words else shlex.join(public)


def _last_part(path: str) -> str:
    """Return the last part of a path, unless that is a private name itself."""
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    private = {user.lower() for user in _users()} | {host.lower() for host in _hosts()}
    return "local" if name.lstrip("~").lower() in private | {""} else name


def _homes() -> set[str]:
    homes = {os.environ.get("HOME"), os.environ.get("USERPROFILE"), os.path.expanduser("~")}
    homes |= {os.path.realpath(home) for home in homes if home}
    return {home.rstrip("/\\") for home in homes if home and re.search(r"[^/\\.:~]", home)}


def _users() -> set[str]:
    """Return what the user is called, unless it is what many are."""
    names = {os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")}
    with suppress(OSError, KeyError, ImportError):  # there may be no account of this number
        names.add(getpass.getuser())
    names |= {re.split(r"[/\\]", home)[-1] for home in _homes()}
    return {name for name in names if name and len(name) > 2 and name.lower() not in _COMMON}


def _hosts() -> set[str]:
    names = {socket.gethostname(), platform.node(), os.environ.get("HOSTNAME"), os.environ.get("COMPUTERNAME")}
    names |= {name.split(".")[0] for name in names if name}
    return {name for name in names if name and len(name) > 2 and name.lower() not in _COMMON}


def _home_patterns() -> list[tuple[bytes, re.Pattern[bytes]]]:
    """Match the last two parts of the home folder, which are told from other words without the first slash."""
    homes = [re.search(r"(?:[^/\\]+|^)[/\\][^/\\]+$", home) for home in _homes()]
    return [pair for home in homes if home for pair in _patterns(rb"(?<![\w.-])", home[0])]


def _user_patterns() -> list[tuple[bytes, re.Pattern[bytes]]]:
    """Match a user name as a part of an absolute path, or of one that begins with ./ or ../, but not of an address."""
    start = rb"(?:(?<![\w.~\\/:+@%&?#}\])*$-])|(?<=\w:)(?!//))(?:file:/*)?(?:~|\.{1,2}|[A-Za-z]:)?(?:/|\\{1,2})"
    parts = rb"(?:[^\s\"'`<>|:/\\]+(?:/|\\{1,2}))*"
    return [pair for user in _users() for pair in _patterns(rb"(?:%s%s|~)" % (start, parts), user)]


def _host_patterns() -> list[tuple[bytes, re.Pattern[bytes]]]:
    """Match a host name as a word; one that may be a word or a number of a text, only as the host of an address."""
    pairs = []
    for host in _hosts():
        is_word = len(host) < 6 or host.isdigit() or host.lower() in _words_of_ours()
        pairs += _patterns(rb"(?:[\w.-]{1,64}@|(?<=//))" if is_word else rb"(?:[\w.-]{1,64}@|(?<![\w-]))", host)
    return pairs


@functools.cache
def _words_of_ours() -> str:
    """Read the text of the settings, whose words are those of many others."""
    return Path(__file__).parents[1].joinpath("configuration_selortho.py").read_text(encoding="utf-8").lower()


@functools.cache  # asked for at every string of the settings and every file that is pushed
def _patterns(before: bytes, name: str) -> list[tuple[bytes, re.Pattern[bytes]]]:
    """Return each spelling of a name with its pattern behind `before`: a search for words alone is quicker."""
    pattern = rb"%s%s(?![\w-])"
    return [(word, re.compile(pattern % (before, re.escape(word)), re.IGNORECASE)) for word in _spellings(name)]


def _spellings(name: str) -> set[bytes]:
    """Return a name as it stands in text, JSON, YAML, Python and addresses, with either kind of slash."""
    names = {name, name.replace("\\", "/")}
    written = {form for n in names for form in (n, json.dumps(n)[1:-1], ascii(n)[1:-1], quote(n))}
    return {form.encode("utf-8", "surrogateescape") for form in written}
