"""Tokens as people read them, whatever alphabet the vocabulary is in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_selortho.browser.rendering import _environment
from hf_selortho.language_models.token_text import BYTES, TokenTexts

TEXTS = [
    "the cat sat on the mat",
    "日本語",
    "😀 👩‍👩‍👧 👍🏽 ❤️ 🇯🇵",
    "مرحبا بالعالم",
    "नमस्ते",
    "e\u0301 nai\u0308f",
    "real \ufffd, zero\u200bwidth \u202eturned\n\tand <0xE6> & <b>",
]


def byte_level(size: int) -> PreTrainedTokenizerFast:
    """As of GPT-2, Llama 3 and Qwen; the larger the vocabulary, the more whole and broken characters are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2: ▁ for spaces, one of which is put before each text, and <0xE6> for bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecaon日�", "▁t", "▁th", "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    vocabulary = {piece: n for n, piece in enumerate(["[UNK]", "[CLS]", "a", "the", "cat", "##s", "sat", "."])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[CLS]", unk_token="[UNK]")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [lambda: byte_level(257), lambda: byte_level(330), byte_fallback])
def test_tokens_read_as_their_text_and_bytes_of_a_character_are_apart(
    make: Callable[[], PreTrainedTokenizerFast], text: str
) -> None:
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tokens = TokenTexts(tokenizer).of([tokenizer.bos_token_id, *ids], text)
    assert len(tokens) == len(ids) + 1 and tokens[0] == "<s>" and "" not in tokens
    joined = "".join(BYTES.sub("", token) for token in tokens[1:])
    assert joined.removeprefix("" if text.startswith(" ") or tokens[1] != " " else " ") == text
    assert tokenizer.decode(ids) == text
    cut = TokenTexts(tokenizer).of(ids[-1:])[0]  # a window that begins within a character
    assert "�" not in cut.replace(text[-1:], "") and "�" not in "".join(BYTES.findall(cut))


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (lambda: byte_level(257), "語 é", ["<0xE8>", "<0xAA>", "語", " ", "<0xC3>", "é"]),
        (byte_fallback, "the the語日�", ["the", " the", "<0xE8>", "<0xAA>", "語", "日", "�"]),
        (word_piece, "the cats sat.", ["the", " cat", "s", " sat", "."]),
    ],
)
def test_a_character_stands_on_the_token_that_completes_it_and_spaces_are_kept(make, text, expected) -> None:
    tokenizer = make()
    texts = TokenTexts(tokenizer)
    assert texts.of(tokenizer(text, add_special_tokens=False)["input_ids"], text) == expected
    assert texts.token(len(tokenizer) + 5) == f"<{len(tokenizer) + 5}>"  # a padded embedding has no token there


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("<0xE8><0xAA>", "&lt;0xE8&gt;&lt;0xAA&gt;"),
        ("\u0301", "◌\u0301"),  # a mark has something to stand on
        ("مر", 'dir="auto">مر<'),
        ("👩\u200d🔧", "👩\u200d🔧"),  # one picture
        ("\u200d", "‹200D›"),
        ("\u202e", "‹202E›"),
        ("\ufe0f", "‹FE0F›"),
        ("\ud83d", "‹D83D›"),
        (" ", "␣"),  # else it would look like none
    ],
)
def test_a_token_of_a_list_is_visible_and_turns_round_nothing(token: str, shown: str) -> None:
    components = _environment().get_template("components.html").module
    assert shown in components.token_code(token)
