"""Chats: lists of messages, written as a tokenizer's chat template says, and which of their tokens are trained on."""

from __future__ import annotations

import functools
import itertools
import re
import reprlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import SelOrthoError
from ..language_models.token_text import special_ids
from ..utils.library_errors import one_line

_SHAREGPT = {"human": "user", "gpt": "assistant"}
# Characters of private use that go through a template in place of what is to be found again behind it.
_OPEN, _CLOSE, _FIRST, _LAST = "\U000f0000", "\U000f0001", 0xF0002, 0xFFFFD
_DATE = "26 Jul 2024"  # for templates that would write today's, so that a chat has the same tokens on every day


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
        self._of_name = functools.cache(functools.partial(self._ids, split_special_tokens=True))

    def encode(self, documents: Sequence[tuple[int, Chat]]) -> Iterator[tuple[list[int], list[bool]]]:
        """Yield the tokens of each document, without a BOS in front, and which of them are trained on.

        Raises:
            SelOrthoError: the template refuses a chat, or roles are to be told apart and cannot be.
        """
        # a piece of text, or a single mark of a special token that a message spells
        marked = [re.split(f"([{chr(_FIRST)}-{chr(_LAST)}])", self._render(number, chat)) for number, chat in documents]
        pieces = [piece.translate({ord(_OPEN): None, ord(_CLOSE): None}) for parts in marked for piece in parts[::2]]
        by_roles = any(chat.roles for _, chat in documents)
        if by_roles and not self._tokenizer.is_fast:
            kind = type(self._tokenizer).__name__
            raise SelOrthoError(f"the tokenizer {kind} does not say where its tokens stand: leave --chat_roles out")
        encoded = self._ids(pieces, return_offsets_mapping=by_roles)
        offsets = encoded["offset_mapping"] if by_roles else itertools.repeat(())
        rest = zip(encoded["input_ids"], offsets, strict=False)
        bos = self._tokenizer.bos_token_id
        for (_, chat), parts in zip(documents, marked, strict=True):
            ids, within, inside = list[int](), list[bool](), chat.roles is None
            for number, part in enumerate(parts):
                if number % 2:
                    name_ids = self._of_name(part.translate(self._unmarked))["input_ids"]
                    ids, within = ids + name_ids, within + [inside] * len(name_ids)
                    continue
                piece_ids, places = next(rest)
                edges = [m.start() - n for n, m in enumerate(re.finditer(f"[{_OPEN}{_CLOSE}]", part))]
                ids += piece_ids
                within += _within(edges, places, inside) if chat.roles else [True] * len(piece_ids)
                inside ^= len(edges) % 2 == 1
            start = int(bos is not None and ids[:1] == [bos])
            yield ids[start:], [w and i not in self._special for i, w in zip(ids[start:], within[start:], strict=True)]

    def _ids(self, text: str | list[str], **options: Any) -> Any:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False, **options}
        return self._tokenizer(text, **options)

    def _render(self, number: int, chat: Chat) -> str:
        """Write a chat with marks around the messages of its roles, and for special tokens that messages spell."""
        messages = [(role, self._mark(content, role in (chat.roles or ()))) for role, content in chat.messages]
        whole = self._template(number, chat, chat.messages)
        if messages == list(chat.messages):
            return whole
        text = self._template(number, chat, messages)
        found = "".join(re.findall(f"[{_OPEN}{_CLOSE}]", text))
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
            return str(self._tokenizer.apply_chat_template(listed, tokenize=False, date_string=_DATE))
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
