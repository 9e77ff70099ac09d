"""Chats: lists of messages, written as a tokenizer's chat template says, and which of their tokens are trained on."""

from __future__ import annotations

import re
import reprlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import SelOrthoError
from ..language_models.token_text import special_ids
from ..utils.library_errors import one_line

_SHAREGPT = {"human": "user", "gpt": "assistant"}
# Characters of private use that go through a template in place of what is to be found again behind it.
_OPEN, _CLOSE, _FIRST = "\U000f8000", "\U000f8001", 0xF8002  # a message's begin and end, the first special token
_EDGE, _SPELT = re.compile(f"[{_OPEN}{_CLOSE}]"), re.compile(f"([{chr(_FIRST)}-\U000ffffd])")
_DATE = "26 Jul 2024"  # for templates that would write today's, so that a chat has the same tokens on every day


def _now(form: str) -> str:
    return datetime.strptime(_DATE, "%d %b %Y").strftime(form)


_DATES: dict[str, Any] = {"date_string": _DATE, "strftime_now": _now}


class Chat(NamedTuple):
    """A conversation, and the roles whose messages are trained on."""

    messages: tuple[tuple[str, str], ...]  # role and content of each
    roles: tuple[str, ...] | None = None  # None: all, and what the template writes around their messages

    def __str__(self) -> str:
        return "\n".join(f"{role}: {content}" for role, content in self.messages)


Text = str | Chat  # of a document


def read_chat(value: Any, roles: Sequence[str] | None, place: str) -> Chat:
    """Make a chat of a list of {"role", "content"}, or of {"from", "value"} as ShareGPT has it; of None, an empty one.

    Raises:
        SelOrthoError: it is something else; the message says what, at the `place`.
    """
    messages = []
    for message in value if isinstance(value, list) else [] if value is None else [value]:
        part = message if isinstance(message, dict) else {}
        role = part.get("role") or _SHAREGPT.get(str(part.get("from")), part.get("from"))
        content = part.get("value") if part.get("content") is None else part["content"]
        if not isinstance(role, str) or not isinstance(content, str):
            raise SelOrthoError(
                f'{place} holds {reprlib.repr(message)}: expected messages such as {{"role": "user", "content": '
                '"Hello"}; mend or remove it, or choose another --chat_column'
            )
        messages.append((role, content))
    return Chat(tuple(messages), None if roles is None else tuple(roles))


class ChatTokenizer:
    """Tokenises chats as a language model was trained on them, with the special tokens that the template writes.

    A message that spells a special token stays text. Special tokens are never trained on, nor, where roles are chosen,
    tokens without a character of their messages.

    Args:
        tokenizer: of the language model.

    Raises:
        SelOrthoError: it has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise SelOrthoError(
                f"the tokenizer {type(tokenizer).__name__} has no chat template: choose a --model that was tuned on "
                "chats, such as google/gemma-3-270m-it, or read --text_column messages.content without one"
            )
        self._tokenizer, self._special = tokenizer, special_ids(tokenizer)
        names = sorted(map(str, tokenizer.convert_ids_to_tokens(sorted(self._special))), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._marks = {name: chr(_FIRST + number) for number, name in enumerate(names)}
        self._unmarked = str.maketrans({_OPEN: None, _CLOSE: None, **{mark: n for n, mark in self._marks.items()}})

    def encode(self, document_id: int, chat: Chat) -> tuple[list[int], list[bool]]:
        """Return the tokens of a document, without a BOS in front, and which of them are trained on.

        Raises:
            SelOrthoError: the template refuses the chat, or roles are to be told apart and cannot be.
        """
        ids, within, inside = list[int](), list[bool](), not chat.roles
        for number, part in enumerate(_SPELT.split(self._render(document_id, chat))):
            edges = [mark.start() - n for n, mark in enumerate(_EDGE.finditer(part))]
            encoded = self._tokenizer(
                part.translate(self._unmarked),
                add_special_tokens=False,
                split_special_tokens=number % 2 == 1,  # a special token that a message spells
                return_offsets_mapping=bool(chat.roles),
                verbose=False,
            )
            ids += encoded["input_ids"]
            places = encoded["offset_mapping"] if chat.roles else [(0, 0)] * len(encoded["input_ids"])
            within += _within(edges, places, inside)
            inside ^= len(edges) % 2 == 1
        start = int(ids[:1] == [self._tokenizer.bos_token_id])
        return ids[start:], [w and i not in self._special for i, w in zip(ids[start:], within[start:], strict=True)]

    def _render(self, number: int, chat: Chat) -> str:
        """Write a chat with marks around the messages of its roles, and for special tokens that messages spell."""
        messages = [(role, self._mark(content, role in (chat.roles or ()))) for role, content in chat.messages]
        whole = self._template(number, chat, chat.messages)
        text = whole if messages == list(chat.messages) else self._template(number, chat, messages)
        found = "".join(_EDGE.findall(text))
        if text.translate(self._unmarked) != whole or found != (_OPEN + _CLOSE) * sum(_OPEN in m for _, m in messages):
            raise self._fault(
                number, chat, "is rewritten by the chat template, so that what its messages say cannot be told from it"
            )
        return text

    def _mark(self, content: str, chosen: bool) -> str:
        content = self._names.sub(lambda name: self._marks[name[0]], content)
        core = content.strip()  # templates leave out the blanks around it
        return content.replace(core, f"{_OPEN}{core}{_CLOSE}", 1) if chosen and core else content

    def _template(self, number: int, chat: Chat, messages: Sequence[tuple[str, str]]) -> str:
        listed = [{"role": role, "content": content} for role, content in messages]
        try:
            return str(self._tokenizer.apply_chat_template(listed, tokenize=False, **_DATES))
        except Exception as error:  # whatever the code of a template raises
            said = f"is refused by the chat template ({one_line(error)}); many take no system message, or user and "
            raise self._fault(number, chat, f"{said}assistant in turn alone") from error

    def _fault(self, number: int, chat: Chat, said: str) -> SelOrthoError:
        remedy = "remove it, leave --chat_roles out, or" if chat.roles else "mend or remove it, or"
        return SelOrthoError(f"chat {number} ({str(chat)[:50]!r}) {said}: {remedy} choose another --model")


def _within(edges: Sequence[int], places: Sequence[tuple[int, int]], inside: bool) -> list[bool]:
    """Tell which places (start, end) of a text overlap a span; `edges` begin and end spans, one is open if `inside`."""
    before = [(bisect_right(edges, start), bisect_left(edges, end)) for start, end in places]
    return [(number + inside) % 2 == 1 or number < last for number, last in before]
