"""Tokens written as text for people, whatever alphabet their tokenizer's vocabulary is in."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# Bytes that are not all of a character, as SentencePiece names them; no text comes as such a token.
BYTES = re.compile(r"((?:<0x[0-9A-F]{2}>)+)")
_OWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level vocabularies write as themselves
_OTHERS = [byte for byte in range(256) if byte not in _OWN]  # these as U+0100 and following, so 0x20 as "Ġ"
_BYTE_LEVEL = {chr(byte): byte for byte in _OWN} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of a tokenizer's special tokens, those that were added to its vocabulary included."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *added}


class TokenTexts:
    """Writes the tokens of a tokenizer as the text that they stand for, spaces included.

    A character that several tokens make up stands once, on the token that completes it; bytes that do not complete a
    character are written as <0xE6>. Without these, the texts of consecutive tokens join to what they were made of.
    Special tokens have their names.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        # some decoders drop a space from the first token of a text: each token is decoded after this one
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._suffixed = str(tokenizer.convert_ids_to_tokens(self._anchor)).endswith("</w>']")
        self._part = functools.cache(self._uncached_part)

    def of(self, token_ids: Iterable[int], text: str | None = None) -> list[str]:
        """Write consecutive tokens, one text each.

        Args:
            token_ids: of the tokens.
            text: what they were made of, where they begin it: a space that the tokenizer puts before it is left out.
        """
        ids = list(token_ids)
        parts = [self._part(token_id) for token_id in ids if token_id not in self._special]
        texts: list[str] = []
        for _, run in itertools.groupby(parts, key=lambda part: isinstance(part, bytes)):
            texts += _characters(list(run))
        if text is not None and texts and texts[0][:1] == " " != text[:1] and len(texts[0]) > 1:
            texts[0] = texts[0][1:]
        rest = iter(texts)  # a BOS between two contexts of a text may stand within a character
        return [str(self._part(token_id)) if token_id in self._special else next(rest) for token_id in ids]

    def token(self, token_id: int) -> str:
        """Write a token by itself."""
        return self.of([token_id])[0]

    def _uncached_part(self, token_id: int) -> str | bytes:
        """Return the text of a token, or its bytes where they are not whole characters."""
        name: Any = self._tokenizer.convert_ids_to_tokens(token_id)  # bytes with some tokenizers
        if name is None:
            return f"<{token_id}>"  # a row of the embedding without a token
        if token_id in self._special:
            return str(name)
        if self._suffixed:
            return str(name).replace("</w>", " ")
        text = self._decoded(token_id)
        raw = _bytes_of(name) if "\ufffd" in text else None
        if raw is None:
            return text or str(name)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    def _decoded(self, token_id: int) -> str:
        decode = functools.partial(self._tokenizer.decode, clean_up_tokenization_spaces=False)
        start, text = str(decode(self._anchor)), str(decode([*self._anchor, token_id]))
        return text[len(start) :] if text.startswith(start) else str(decode([token_id]))


def _bytes_of(name: str | bytes) -> bytes | None:
    """Return the bytes that a name in a vocabulary stands for, None for one that stands for characters."""
    if isinstance(name, bytes):
        return name
    if BYTES.fullmatch(name):
        return bytes.fromhex(name[3:5])
    return bytes(_BYTE_LEVEL[c] for c in name) if all(c in _BYTE_LEVEL for c in name) else None


def _characters(parts: Sequence[str | bytes]) -> list[str]:
    """Write consecutive tokens' parts: texts as they are, of bytes each character on the part with its last byte."""
    pieces = [part for part in parts if isinstance(part, bytes)]
    if not pieces:
        return [str(part) for part in parts]
    stream = b"".join(pieces)
    owners = [number for number, piece in enumerate(pieces) for _ in piece]
    texts, start = [""] * len(pieces), 0
    for character in stream.decode("utf-8", "surrogateescape"):  # a byte of no character becomes a surrogate
        end = start + len(character.encode("utf-8", "surrogateescape"))
        last = owners[end - 1]
        whole = not "\udc80" <= character <= "\udcff"
        for place in range(start, end):
            if owners[place] != last or not whole:
                texts[owners[place]] += f"<0x{stream[place]:02X}>"
        texts[last] += character if whole else ""
        start = end
    return texts
