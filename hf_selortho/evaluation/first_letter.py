"""The first-letter task of Chanin et al. 2024 ("A is for Absorption", arXiv 2409.14507): words, activations, probes.

All that needs the language model is here and is computed once for a layer; `absorption` then measures any number of
SAEs against it.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..language_models.contexts import Context
from ..language_models.token_text import TokenTexts
from .absorption import FirstLetterTask
from .probing import split_by_class

logger = logging.getLogger(__name__)

LETTERS = ascii_uppercase
QUESTION = " {word} has the first letter:"  # as in the paper; an answer is " D" and ends its line
TRAIN_SHARE = 0.7  # of each letter's words; the others are test words
SPELLED_WORDS = 100  # test words that the spelling accuracy is measured on: a standard error of at most 5 points
_COMMON = 4  # words are drawn from this many times as many, the commonest of their letter
_PROBE_C = 0.1  # inverse strength of the L2 penalty, for activations whose typical dimension has a spread of 1
_WORD = re.compile("[▁Ġ ]([A-Za-z][a-z]{2,})")  # SentencePiece and byte-level BPE write the leading space as ▁ and Ġ


class _Word(NamedTuple):
    text: str  # without its leading space
    token_id: int

    @property
    def letter(self) -> int:
        return LETTERS.index(self.text[0].upper())


def first_letter_task(
    capture: ActivationCapture,
    *,
    words: int = 2000,
    seed: int = 0,
    icl_examples: int = 10,
    activation_examples: int = 2,
    min_words: int = 20,
) -> FirstLetterTask:
    """Read words with the language model at the layer of `capture` and fit a probe for each first letter.

    The words are single tokens, of three ASCII letters or more behind a space, lower-cased or capitalised, each in its
    commoner spelling. Tokenizers number their merges from the commonest on; words are drawn among each letter's common
    ones. All stand at the same place of one prompt: by default 18 tokens are read for each word up to the layer, and 87
    by the whole language model for each of the 200 words that it spells.

    Args:
        capture: at a single layer. A word whose token it drops as a sink is left out.
        words: at most this many, as evenly over the letters as their words allow.
        seed: of the draws.
        icl_examples: solved lines before the question when the spelling accuracy is measured.
        activation_examples: solved lines before the word when its activation is read; more take longer.
        min_words: letters with fewer words are left out.

    Raises:
        SelOrthoError: several layers, more examples than letters, or fewer than two letters with enough words.
    """
    rng = random.Random(seed)
    vocabulary = vocabulary_words(capture.lm.tokenizer)
    examples = _draw_examples(vocabulary, max(icl_examples, activation_examples), rng)
    prompt = _solved(examples[:activation_examples])
    found, activations, left_out = _enough(*_read(capture, prompt, _draw_words(vocabulary, words, rng)), min_words)
    letters = torch.tensor([word.letter for word in found])
    train = split_by_class(letters, lambda size: min(round(TRAIN_SHARE * size), size - 1), seed)  # one is left to test
    probes, biases = fit_probes(activations[train], letters[train])
    tested = [word for word, trained in zip(found, train.tolist(), strict=True) if not trained]
    asked = rng.sample(tested, min(SPELLED_WORDS, len(tested)))
    return FirstLetterTask(
        words=[word.text for word in found],
        letters=letters,
        activations=activations,
        train=train,
        probes=probes,
        biases=biases,
        probe_f1=_probe_f1(activations[~train], letters[~train], probes, biases),
        spelling_accuracy=_spelling_accuracy(capture, _solved(examples[:icl_examples]), asked),
        left_out=left_out,
        prompt=prompt + QUESTION,
    )


def vocabulary_words(tokenizer: PreTrainedTokenizerBase) -> list[list[_Word]]:
    """For each of the 26 letters, the words that are single tokens, the commonest first, each in one spelling."""
    by_letter: list[list[_Word]] = [[] for _ in LETTERS]
    seen = set()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        match = _WORD.fullmatch(token)
        if match and match[1].lower() not in seen:
            word = _Word(match[1], token_id)
            seen.add(word.text.lower())
            by_letter[word.letter].append(word)
    return by_letter


def fit_probes(activations: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regression of each letter that occurs against all others, both sides weighing the same.

    The fit is to centred activations in one unit for all dimensions, the median of their spreads: a probe has to lie in
    the space of the decoder's directions, which a unit for each dimension would distort, and the few dimensions of the
    residual stream that are hundreds of times as large as the others must not decide what the penalty allows.

    Args:
        activations: (words, d_in), raw. letters: (words,) int64.

    Returns:
        Unit directions (26, d_in) and biases (26,) in the raw space, as in [`FirstLetterTask`].
    """
    x = activations.double().numpy()
    mean, spreads = x.mean(0), x.std(0)
    unit = float(np.median(spreads[spreads > 0])) if spreads.any() else 1.0
    probes = torch.zeros(26, x.shape[1])
    biases = torch.full((26,), -math.inf)
    for letter in letters.unique().tolist():
        fit = LogisticRegression(C=_PROBE_C, class_weight="balanced", max_iter=1000)
        fit.fit((x - mean) / unit, (letters == letter).numpy())
        weights = fit.coef_[0] / unit
        norm = np.linalg.norm(weights)
        probes[letter] = torch.from_numpy(weights / norm)
        biases[letter] = float((fit.intercept_[0] - weights @ mean) / norm)
    return probes, biases


def _probe_f1(activations: Tensor, letters: Tensor, probes: Tensor, biases: Tensor) -> list[float]:
    said = activations.double() @ probes.double().T + biases.double() > 0  # (words, 26)
    return [
        float(f1_score(letters == letter, said[:, letter], zero_division=0)) if bias > -math.inf else math.nan
        for letter, bias in enumerate(biases.tolist())
    ]


def _draw_examples(vocabulary: list[list[_Word]], count: int, rng: random.Random) -> list[_Word]:
    """Common words of different letters, taken out of the vocabulary."""
    letters = [letter for letter, words in enumerate(vocabulary) if words]
    if count > len(letters):
        raise SelOrthoError(
            f"{count} examples: the language model has single-token words of {len(letters)} letters, and every "
            "example takes another letter; use fewer examples"
        )
    drawn = rng.sample(letters, count)
    return [vocabulary[letter].pop(rng.randrange(min(50, len(vocabulary[letter])))) for letter in drawn]


def _draw_words(vocabulary: list[list[_Word]], count: int, rng: random.Random) -> list[_Word]:
    """At most so many words; what a letter with few words cannot give, the others do."""
    drawn: list[_Word] = []
    smallest_first = sorted(vocabulary, key=len)
    for place, words in enumerate(smallest_first):
        share = (count - len(drawn)) // (len(smallest_first) - place)
        common = words[: _COMMON * share]
        drawn += rng.sample(common, min(share, len(common)))
    return drawn


def _solved(examples: Sequence[_Word]) -> str:
    return "".join(f"{QUESTION.format(word=word.text)} {LETTERS[word.letter]}\n" for word in examples)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    return bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def _read(capture: ActivationCapture, prompt: str, words: Sequence[_Word]) -> tuple[list[_Word], Tensor]:
    """The words that are single tokens after the prompt and no sinks, and their activations (words, d_in) float32."""
    tokenizer = capture.lm.tokenizer
    start = _prompt_ids(tokenizer, prompt)
    contexts = [  # what follows a word cannot change its activation, so the contexts end there
        Context(number, [*start, word.token_id])
        for number, word in enumerate(words)
        if _prompt_ids(tokenizer, f"{prompt} {word.text}") == [*start, word.token_id]
    ]
    activations, found = [torch.zeros(0, capture.widths[capture.layer])], []
    for captured in capture.capture_batches(contexts):
        at_word = captured[captured.origins.positions == len(start)]
        activations.append(at_word.by_layer[capture.layer].float().cpu())
        found += [words[number] for number in at_word.origins.document_ids.tolist()]
    return found, torch.cat(activations)


def _enough(words: list[_Word], activations: Tensor, min_words: int) -> tuple[list[_Word], Tensor, tuple[str, ...]]:
    """The words of letters that have enough of them, their activations, and the letters that are left out."""
    counts = Counter(word.letter for word in words)
    left_out = tuple(name for letter, name in enumerate(LETTERS) if counts[letter] < min_words)
    if len(left_out) > 24:
        raise SelOrthoError(
            f"{26 - len(left_out)} letters have {min_words} of the words, single tokens of the language model: "
            "expected two at least; use more words, a lower min_words, or a language model of a larger vocabulary"
        )
    if left_out:
        logger.warning("first-letter task without %s: fewer than %d words each", ", ".join(left_out), min_words)
    kept = [row for row, word in enumerate(words) if LETTERS[word.letter] not in left_out]
    return [words[row] for row in kept], activations[kept], left_out


@torch.inference_mode()
def _spelling_accuracy(capture: ActivationCapture, prompt: str, words: Sequence[_Word]) -> float:
    """Share of the words after whose question the language model's likeliest next token is their first letter."""
    tokenizer, model, texts = capture.lm.tokenizer, capture.lm.model, TokenTexts(capture.lm.tokenizer)
    asked = [(word, _prompt_ids(tokenizer, prompt + QUESTION.format(word=word.text))) for word in words]
    right = 0
    # all questions have one length, unless the tokenizer is an odd one
    for length, same in itertools.groupby(sorted(asked, key=lambda row: len(row[1])), key=lambda row: len(row[1])):
        alike, size = list(same), max(capture.batch_tokens // length, 1)
        for batch in (alike[start : start + size] for start in range(0, len(alike), size)):
            input_ids = torch.tensor([ids for _, ids in batch], device=capture.device)
            logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[:, -1]  # (words, vocabulary)
            said = [texts.token(token_id).strip().upper() for token_id in logits.argmax(-1).tolist()]
            right += sum(answer == LETTERS[word.letter] for answer, (word, _) in zip(said, batch, strict=True))
    return right / max(len(words), 1)
