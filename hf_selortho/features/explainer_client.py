"""Ask a language model behind an OpenAI-compatible endpoint: patiently, within a budget, and nobody but that host."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from ..errors import SelOrthoError
from ..utils.command_line import without_secrets
from .explain import ROOM, UnreadableAnswerError, plain_line, without_thoughts

KEY, OPENAI_KEY = "EXPLAIN_API_KEY", "OPENAI_API_KEY"
_OPENAI = "api.openai.com"  # the only host that OPENAI_API_KEY is sent to
_ATTEMPTS = 4
_LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the endpoint asks for
_ROOM_TO_THINK = 4096  # tokens of an answer, once a model has been seen to think aloud
_LARGEST_ANSWER = 1 << 20  # bytes
_BYTES_PER_TOKEN = 3  # few, so that estimates are high: English text has 4
_PASSING = {408, 409, 425, 429}  # HTTP statuses after which it is worth asking again, beside all from 500 on
_REMEDIES = {
    401: f"check the key in {KEY} ({OPENAI_KEY} for {_OPENAI})",
    403: f"check the key in {KEY} ({OPENAI_KEY} for {_OPENAI}), and what it may use",
    404: "check --explain_url, which often ends in /v1, and --explain_model",
    405: "check --explain_url, which often ends in /v1",
}


class EndpointError(Exception):
    """An endpoint gives no answer of use."""


class BudgetSpentError(Exception):
    """The next request could take more tokens than are left."""


class _PassingError(EndpointError):
    """A failure that may pass.

    Args:
        words: what has failed.
        wait: seconds that the endpoint asks for.
        working: whether it may have worked on the answer, which then took tokens.
    """

    def __init__(self, words: str, wait: float = 0.0, working: bool = False) -> None:
        super().__init__(words)
        self.wait, self.working = wait, working


class _OtherSettingsError(Exception):
    """The model wants a setting of the request in another form, which the client has changed."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: text and key are for one host."""


@dataclass
class ChatClient:
    """A language model behind an OpenAI-compatible endpoint, asked one question at a time.

    The key is that of the environment variable EXPLAIN_API_KEY, for api.openai.com also OPENAI_API_KEY; it is shown
    nowhere. No redirect is followed.

    Args:
        url: of the endpoint, such as http://127.0.0.1:8000/v1.
        model: its name there.
        budget: tokens that all requests may take together, as the endpoint counts them where it says so.
        timeout: seconds that an answer may take.
        pause: seconds before the second attempt; each further one waits twice as long.

    Raises:
        SelOrthoError: the key holds characters that no key has.
    """

    url: str
    model: str
    budget: float = math.inf
    timeout: float = 120.0
    pause: float = 1.0
    spent: int = field(default=0, init=False)  # tokens

    def __post_init__(self) -> None:
        host = urlsplit(self.url).hostname or ""
        self._key = _key_for(host)
        direct = [urllib.request.ProxyHandler({})] if _is_loopback(host) else []
        self._opener = urllib.request.build_opener(_NoRedirect, *direct)
        self._room, self._room_name, self._settings = ROOM, "max_tokens", {"temperature": 0}

    def ask(self, prompt: str) -> str:
        """Return the answer to a prompt.

        Raises:
            BudgetSpentError: the request could take more tokens than are left; it is not sent.
            EndpointError: the endpoint gives no answer, however often it is asked.
            UnreadableAnswerError: the model refuses.
            SelOrthoError: the endpoint takes no such request: a wrong address, key or model.
        """
        text, cut = self._ask_patiently(prompt)
        if cut and not without_thoughts(text) and self._room < _ROOM_TO_THINK:
            self._room = _ROOM_TO_THINK
            text, _ = self._ask_patiently(prompt)
        return text

    def _ask_patiently(self, prompt: str) -> tuple[str, bool]:
        attempt = 1
        while True:
            most = tokens_of(prompt) + self._room
            if self.spent + most > self.budget:
                raise BudgetSpentError
            try:
                content = self._post(prompt)
                self.spent += _used(content, most)
                return _text_of(content)
            except _OtherSettingsError:
                continue
            except _PassingError as error:
                self.spent += most if error.working else 0
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(min(max(self.pause * 2 ** (attempt - 1), error.wait), _LONGEST_WAIT))
                attempt += 1

    def _post(self, prompt: str) -> dict[str, Any]:
        """Send a request and return the object that is answered."""
        content = {"model": self.model, "messages": [{"role": "user", "content": prompt}], self._room_name: self._room}
        headers = {"Content-Type": "application/json", "User-Agent": f"hf_selortho/{__version__}"}
        body = json.dumps({**content, **self._settings}).encode()
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return _json_object(_read(response, time.monotonic() + self.timeout))
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last of a host that can be none
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise _PassingError(f"no answer in {self.timeout:g} seconds", working=True) from None
            never = isinstance(error, (urllib.error.URLError, ValueError))  # there was no connection
            said = getattr(cause, "strerror", None) or type(cause).__name__
            raise _PassingError(
                f"no connection: {said}" if never else "the answer breaks off", working=not never
            ) from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Make the error of an HTTP status that is none of success."""
        status, message = error.code, ""
        with error, suppress(OSError, http.client.HTTPException, EndpointError):
            message = _message(_json_object(_read(error, time.monotonic() + self.timeout)))
        said = plain_line(without_secrets(message))
        words = f"HTTP status {status}{f' ({said})' if said else ''}"
        if status in _PASSING or status >= 500:
            return _PassingError(words, _seconds(error.headers.get("Retry-After")))
        if 300 <= status < 400:
            place = plain_line(urlsplit(error.headers.get("Location") or "").netloc) or "another address"
            return SelOrthoError(
                f"--explain_url {self.url} redirects to {place}, to which nothing is sent: name the address itself"
            )
        if status in _REMEDIES:
            return SelOrthoError(f"--explain_url {self.url} answers with {words}: {_REMEDIES[status]}")
        return _OtherSettingsError() if self._adapts(message) else EndpointError(words)

    def _adapts(self, message: str) -> bool:
        """Ask from now on as newer models of OpenAI want it, if a message says so; tell whether that is new."""
        if "max_completion_tokens" in message and self._room_name == "max_tokens":
            self._room_name = "max_completion_tokens"
        elif "temperature" in message and self._settings:
            self._settings = {}
        else:
            return False
        return True


def tokens_of(text: str) -> int:
    """Estimate the tokens of a text, rather too many than too few."""
    return len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN + 1


def _key_for(host: str) -> str:
    """Return the key for a host, "" where there is none."""
    for name in (KEY, OPENAI_KEY) if host == _OPENAI else (KEY,):
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable() and " " not in key):
                raise SelOrthoError(f"{name} holds characters that no key has: expected the key alone")
            return key
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _read(response: Any, end: float) -> bytes:
    """Read an answer that is over in time and not too large."""
    parts, size = list[bytes](), 0
    while part := response.read1(1 << 16):
        size += len(part)
        if size > _LARGEST_ANSWER:
            raise EndpointError(f"an answer of more than {_LARGEST_ANSWER:,} bytes")
        if time.monotonic() > end:
            raise TimeoutError
        parts.append(part)
    return b"".join(parts)


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _PassingError("an answer that is no JSON object", working=True)
    return content


def _text_of(content: dict[str, Any]) -> tuple[str, bool]:
    """Return the text of an answer, and whether it was cut at the limit of tokens."""
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        said = plain_line(without_secrets(_message(content)))
        raise _PassingError(f"an answer without a message{f' ({said})' if said else ''}") from None
    if isinstance(text, list):  # of parts
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if refusal and not text:
        raise UnreadableAnswerError("a refusal")
    return text if isinstance(text, str) else "", choice.get("finish_reason") == "length"


def _used(content: dict[str, Any], most: int) -> int:
    """Return the tokens that an answer took: as it says itself, else at most as many as were allowed."""
    usage = content.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if type(total) is int and total > 0 else most


def _message(content: dict[str, Any]) -> str:
    """Return what an answer says of an error, "" where it says nothing."""
    error = content.get("error", content)
    return str(error.get("message", "") if isinstance(error, dict) else error)


def _seconds(text: str | None) -> float:
    """Read a Retry-After header: seconds or a date; 0 for anything else."""
    try:
        wait = float(text or 0)
    except ValueError:
        try:
            wait = (parsedate_to_datetime(str(text)) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a time zone
            wait = 0.0
    return wait if 0 < wait < math.inf else 0.0
