"""What the Hub answers, in one line a person can act on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub

from .errors import SelOrthoError

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["model", "dataset", "SAE"]  # what is looked for; an SAE is in a repository of models
T = TypeVar("T")
ATTEMPTS = 4  # at what a busy server answers
_PAUSE = 1.0  # seconds before the second of them; each further one waits twice as long
_LONGEST_PAUSE = 60.0
_SHOWN = 10  # branches or tags in a message

# What looking something up on the Hub may raise. Connection errors are no OSErrors, but share a parent with
# HfHubHTTPError: the error of the HTTP library below, which differs between the versions of huggingface_hub.
# ValueError: an ill-formed id.
LOOKUP_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, hub.HfHubHTTPError.__mro__[1])
_BROKEN_OFF = {
    "RemoteProtocolError",
    "ReadError",
    "WriteError",
    "CloseError",
}  # of that library: a connection was there


def one_line(error: BaseException) -> str:
    """The message of an exception on one line of at most 300 characters, with its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def patiently(request: Callable[[], T]) -> T:
    """The answer to a request that is made again, a few times, while the Hub is busy or the connection breaks off.

    The client does so for some of its requests only.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return request()
        except LOOKUP_ERRORS as error:
            seconds = pause(attempt) if type(error).__name__ in _BROKEN_OFF else pause_of_busy(error, attempt)
            if seconds is None:
                raise
            logger.info("the Hub does not answer; again in %.0f s", seconds)
            time.sleep(seconds)
    return request()


def pause_of_busy(error: Exception, attempt: int) -> float | None:
    """Seconds to wait for a Hub that is busy (HTTP status 429 or above 499): what it asks for, or ever more.

    None if it has said something else.
    """
    if not isinstance(error, hub.HfHubHTTPError):
        return None
    status, asked = error.response.status_code, error.response.headers.get("Retry-After", "")
    if status != 429 and status < 500:
        return None
    return min(float(asked) if asked.isdecimal() else pause(attempt), _LONGEST_PAUSE)


def pause(attempt: int) -> float:
    """Seconds to wait after the attempt of this number, from 0."""
    return min(_PAUSE * 2**attempt, _LONGEST_PAUSE)


def resolve_commit(kind: Kind, name: str, revision: str | None, token: str | None = None) -> str | None:
    """The commit that a branch or tag stands for, or None where the Hub cannot be reached.

    It is asked here, once: where nobody answers, each download would go on trying for half a minute.

    Raises:
        SelOrthoError: the Hub answers that there is no such repository or revision, or gives no access to it.
    """
    api = HfApi(token=token)
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        info = patiently(lambda: ask(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT))
        if kind == "dataset" and info.gated:  # everybody sees its page; `datasets` loses why it got no further
            api.auth_check(name, repo_type=kind)
        return info.sha
    except LOOKUP_ERRORS as error:
        refused = isinstance(error, hub.HfHubHTTPError) and error.response.status_code < 500
        if refused or isinstance(error, hub.HFValidationError):
            raise hub_error(error, kind, name, revision, token) from error
        logger.info('the Hub does not answer (%s), looking for "%s" in the local cache', one_line(error), name)
        return None


def hub_error(
    error: Exception,
    kind: Kind,
    name: str,
    revision: str | None = None,
    token: str | None = None,
) -> SelOrthoError:
    """Explain what the Hub client raised while it looked for `name`.

    Args:
        error: the exception of huggingface_hub, or an `OSError` of the network below it.
        kind: what was looked for.
        name: its id, as the user gave it.
        revision: the branch, tag or commit that was asked for.
        token: the access token that was given, if any; a stored one is found by itself.
    """
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    if isinstance(error, hub.GatedRepoError):
        if token or (token is None and huggingface_hub.get_token()):
            return SelOrthoError(
                f'{kind} "{name}" is gated and your token has no access to it: accept its terms at {page} with the '
                "account that the token belongs to"
            )
        return SelOrthoError(
            f'{kind} "{name}" is gated: accept its terms at {page}, then run `hf auth login` or set HF_TOKEN'
        )
    if isinstance(error, hub.RevisionNotFoundError):
        offered = _revisions(kind, name, token) or f"choose a branch, tag or commit of {page}"
        return SelOrthoError(f'{kind} "{name}" has no revision "{revision}": {offered}')
    if isinstance(error, hub.RepositoryNotFoundError):
        return SelOrthoError(
            f'unknown {kind} "{name}": neither on the Hub nor a local path; check the spelling, or, if it is private, '
            "run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, hub.HFValidationError):
        return SelOrthoError(f'unknown {kind} "{name}": no such local path, and not an id of the Hub ("owner/name")')
    if isinstance(error, hub.RemoteEntryNotFoundError):
        return SelOrthoError(f'"{name}" on the Hub holds no {kind} that can be read: {one_line(error)}')
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        remedy = "check your token (`hf auth login`, HF_TOKEN)" if status in (401, 403) else "try again later"
        return SelOrthoError(f'the Hub refused {kind} "{name}" with HTTP status {status}: {remedy}')
    return unreachable(kind, name)


def unreachable(kind: Kind, name: str, local_only: bool = False) -> SelOrthoError:
    """The error for "no network, and not in the local cache"; `local_only`: the caller wanted no network."""
    offline = constants.HF_HUB_OFFLINE
    why = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the Hub cannot be reached"
    if local_only and not offline:
        return SelOrthoError(
            f'{kind} "{name}" is not in the local cache, where alone it was looked for: load it once without '
            "local_files_only=True"
        )
    other = "" if kind == "SAE" else ", or use `--preset demo`, which needs no Hub"
    return SelOrthoError(
        f'{kind} "{name}" is not in the local cache and {why}: check the connection and the spelling{other}'
    )


def _revisions(kind: Kind, name: str, token: str | None) -> str | None:
    """The branches and tags of a repository, in words; None where the Hub does not tell."""
    try:
        refs = HfApi(token=token).list_repo_refs(name, repo_type="dataset" if kind == "dataset" else "model")
    except (KeyError, TypeError):  # a mirror that answers something else
        return None
    except LOOKUP_ERRORS:
        return None
    branches, tags = ([ref.name for ref in group][:_SHOWN] for group in (refs.branches, refs.tags))
    of_tags = f"; tags: {', '.join(tags)}" if tags else ""
    return f"choose a commit or one of its branches: {', '.join(branches)}{of_tags}"
