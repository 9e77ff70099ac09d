"""The words and the kinds of a text's tokens, in words that a label can be made of."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..language_models.token_text import TokenTexts
from ..utils.characters import visible
from .firings import NOTHING, FiringTokens

LONGEST_WORD = 40
_UNSPACED = re.compile("CJK|HIRAGANA|KATAKANA|THAI|LAO|KHMER|MYANMAR|TIBETAN")
# What a kind of token is called: the token itself, the place after such a one, the place before it.
KINDS = {
    "none": ("", "start of a text", "end of a text"),
    "line break": ("line breaks", "start of a line", "end of a line"),
    "space": ("spaces", "after spaces", "before spaces"),
    "sentence end": ("ends of sentences", "start of a sentence", "last word of a sentence"),
    "punctuation": ("punctuation", "after punctuation", "before punctuation"),
    "number": ("numbers", "after a number", "before a number"),
    "capitals": ("words in capitals", "after a word in capitals", "before a word in capitals"),
    "capitalised": ("capitalised words", "after a capitalised word", "before a capitalised word"),
    "piece": ("ends of words", "after the end of a long word", "before the end of a word"),
    "other script": ("words in other scripts", "after another script", "before another script"),
    "word": ("words in lower case", "after a word in lower case", "before a word in lower case"),
}
_KIND_NUMBERS = {name: number for number, name in enumerate(KINDS)}
_NAMES = {
    ".": "full stop", ",": "comma", ";": "semicolon", ":": "colon", "?": "question mark", "!": "exclamation mark",
    "'": "apostrophe", "’": "apostrophe", '"': "quotation mark", "“": "opening quotation mark",
    "”": "closing quotation mark", "(": "opening bracket", ")": "closing bracket", "[": "opening square bracket",
    "]": "closing square bracket", "{": "opening brace", "}": "closing brace", "<": "less-than sign",
    ">": "greater-than sign", "-": "hyphen", "–": "dash", "—": "dash", "--": "dash", "...": "ellipsis", "…": "ellipsis",
    "/": "slash", "\\": "backslash", "*": "asterisk", "=": "equals sign", "+": "plus sign", "_": "underscore",
    "|": "vertical bar", "#": "hash sign", "&": "ampersand", "@": "at sign", "%": "per cent sign", "$": "dollar sign",
    "~": "tilde", "^": "caret", "`": "backtick",
}  # fmt: skip
_OF_WORDS = {"Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl", "No", "Sc", "So"}  # Unicode categories: currency, emoji, too
_WORDLESS = {"line break", "tab", "space", "indentation", *_NAMES.values()} | {
    KINDS[kind][0] for kind in ("line break", "space", "sentence end", "punctuation")
}


@dataclass(frozen=True)
class Words:
    """Of every token of a text the word that it is and its kind, and the same of the tokens beside it."""

    names: list[str]  # of the words by their numbers: plain, "-ing" for the end of a word, "line break"
    quoted: list[bool]  # whether a name is a word of the text, and no description such as "line break"
    own: np.ndarray  # (tokens,) int32 numbers of words
    before: np.ndarray
    after: np.ndarray
    own_kind: np.ndarray  # (tokens,) int8 numbers of KINDS
    kind_before: np.ndarray
    kind_after: np.ndarray


def words_of(tokens: FiringTokens, texts: TokenTexts) -> Words:
    """Name the tokens of a text; words differ neither by case nor by the spaces around them."""
    every = (tokens.token_ids, tokens.before, tokens.after)
    ids, places = np.unique(np.concatenate(every), return_inverse=True)
    written = [" " if token_id == NOTHING else texts.token(int(token_id)) or " " for token_id in ids]
    own, before, after = np.split(places.astype(np.int32), 3)
    # "ing" is the end of a word where letters stand right before it; the word before is one by its own space
    letter_last, letter_first = (np.array([_in_words(text[place]) for text in written]) for place in (-1, 0))
    ends_word = letter_last[before] & letter_first[own]
    continued = letter_last[own] & letter_first[after]  # the word after is the rest of this one
    table = _table(written, np.bincount(own, minlength=len(ids)), bool((ids == NOTHING).any()))
    return Words(
        names=table.names,
        quoted=table.quoted,
        own=np.where(ends_word, table.pieces[own], table.words[own]),
        before=table.words[before],
        after=np.where(continued, table.pieces[after], table.words[after]),
        own_kind=np.where(ends_word, table.piece_kinds[own], table.kinds[own]),
        kind_before=table.kinds[before],
        kind_after=np.where(continued, table.piece_kinds[after], table.kinds[after]),
    )


def _in_words(character: str) -> bool:
    """Tell whether a character is a letter of a script that puts spaces between words."""
    return character.isalpha() and not _UNSPACED.match(unicodedata.name(character, ""))


@dataclass(frozen=True)
class _Table:
    names: list[str]
    quoted: list[bool]
    words: np.ndarray  # of each token, the number of its word
    pieces: np.ndarray  # the same where it continues a word
    kinds: np.ndarray
    piece_kinds: np.ndarray


def _table(written: Sequence[str], counts: np.ndarray, with_nothing: bool) -> _Table:
    """Number the words that tokens stand for; each is named as the most frequent token of it is written."""
    numbers: dict[tuple[str, bool, bool], int] = {}
    best: dict[int, tuple[int, str, bool]] = {}
    words, pieces = np.zeros((2, len(written)), dtype=np.int32)
    kinds, piece_kinds = np.zeros((2, len(written)), dtype=np.int8)
    for place, text in enumerate(written):
        kind = "none" if with_nothing and place == 0 else kind_of(text)
        lexical = kind not in ("none", "line break", "space", "sentence end", "punctuation")
        for piece, column in ((False, words), (True, pieces)):
            name = name_of(text, kind)
            number = numbers.setdefault((name.casefold(), lexical, piece and text[0].isalpha()), len(numbers))
            shown = f"-{name}" if piece and text[0].isalpha() else name
            best[number] = max(best.get(number, (-1, "", False)), (int(counts[place]), shown, lexical))
            column[place] = number
        kinds[place] = _KIND_NUMBERS[kind]
        piece_kinds[place] = _KIND_NUMBERS["piece"] if text[0].isalpha() else kinds[place]
    names, quoted = [best[n][1] for n in range(len(best))], [best[n][2] for n in range(len(best))]
    return _Table(names, quoted, words, pieces, kinds, piece_kinds)


def kind_of(text: str) -> str:
    """Return which of KINDS a token is by its text."""
    word = text.strip()
    if not word:
        return "line break" if "\n" in text or "\r" in text else "space"
    letters = [character for character in word if character.isalpha()]
    if not letters:
        if any(character.isnumeric() for character in word):
            return "number"
        return (
            "sentence end" if word in (".", "!", "?", "...", "…", "?!", "!!", '."', ".”", '?"', '!"') else "punctuation"
        )
    if not unicodedata.name(letters[0], "").startswith("LATIN"):
        return "other script"
    if len(letters) > 1 and word.isupper():
        return "capitals"
    return "capitalised" if letters[0].isupper() else "word"


def name_of(text: str, kind: str) -> str:
    """Write a token of a kind as a word that is never white space or punctuation alone."""
    word = visible(text.strip(), alone=True)
    if kind == "none":
        return ""
    if kind == "line break":
        return "line break"
    if kind == "space":
        return "tab" if "\t" in text else "space" if len(text) == 1 else "indentation"
    if kind in ("sentence end", "punctuation"):
        return _NAMES.get(text.strip()) or f"punctuation {word[:LONGEST_WORD]}"
    return word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…"


def is_wordless(name: str) -> bool:
    """Tell whether a name as of [`name_of`] or in KINDS, or the token itself, is white space or punctuation."""
    said = name in _WORDLESS or name.startswith("punctuation ")
    return said or not any(unicodedata.category(character) in _OF_WORDS for character in name)
