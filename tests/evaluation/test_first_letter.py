"""Absorption on tasks whose answer is planted, and the task itself on small random language models and the real one."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation.absorption import FirstLetterTask, absorption, main_features
from hf_selortho.evaluation.first_letter import first_letter_task, fit_probes, vocabulary_words
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.contexts import Context

LETTERS, EACH, TRAIN = 3, 40, 30  # words 0 to 29 of a letter are train words, 30 to 39 test words
WORDS = LETTERS * EACH
LETTER, WORD = 5.0, 2.0  # lengths of a word's two directions, its letter's and its own


def planted_task() -> FirstLetterTask:
    """Word w of letter l is 5 e_l + 2 e_(3+w)."""
    letters = torch.arange(LETTERS).repeat_interleave(EACH)
    eye = torch.eye(LETTERS + WORDS)
    probes, biases = torch.zeros(26, LETTERS + WORDS), torch.full((26,), -math.inf)
    probes[:LETTERS], biases[:LETTERS] = eye[:LETTERS], -LETTER / 2
    return FirstLetterTask(
        words=[f"word{number}" for number in range(WORDS)],
        letters=letters,
        activations=LETTER * eye[letters] + WORD * eye[LETTERS:],
        train=torch.arange(EACH).repeat(LETTERS) < TRAIN,
        probes=probes,
        biases=biases,
        probe_f1=[1.0] * LETTERS + [math.nan] * (26 - LETTERS),
        spelling_accuracy=1.0,
    )


def planted_sae(absorbed: list[int], share: float = 1.0, leak: float = 0.0, **settings) -> SelOrthoSAE:
    """A feature for each letter and each word; on the `absorbed` words (numbers within their letter), the letter's
    feature falls to `leak` of its value, and the word's own feature decodes `share` of the letter too."""
    width = LETTERS + WORDS
    sae = SelOrthoSAE(SelOrthoConfig(d_in=width, d_sae=width, **settings)).eval()
    W_enc, W_dec = torch.eye(width), torch.eye(width)
    for letter in range(LETTERS):
        for number in absorbed:
            word = LETTERS + letter * EACH + number
            W_enc[word, letter] = -(1 - leak) * LETTER / WORD
            W_dec[word, letter] = share * LETTER / WORD
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


@pytest.mark.parametrize("number", [0, 1, 4])
def test_planted_absorption_is_found(number):
    absorbed = [*range(3), *range(TRAIN, TRAIN + number)] if number else []
    recall = 1 - number / 10
    assert absorption(planted_sae(absorbed), planted_task()) == pytest.approx(
        {
            "absorption_rate": number / 10, "absorption_fraction": number / 10, "absorption_letters": 3,
            "absorption_words": 30, "first_letter_f1": 2 * recall / (1 + recall),
            "split_features": 1,  # a single word of 30 raises the F1 by less than 0.03
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("share", "leak", "rate", "fraction"),
    [
        (0.35, 0.0, 0, 0),  # contributes less than 40%
        (0.45, 0.0, 1, 1),
        (0.45, 0.25, 0, 0.45 / 0.70),  # the main feature still fires: no full absorption
        (0.95, 0.25, 0, 0.75),  # no more is made up than was missing
        (0.6, 1.0, 0, 0),  # nothing is missing
    ],
)
def test_partial_absorption(share, leak, rate, fraction):
    found = absorption(planted_sae(list(range(TRAIN, EACH)), share, leak), planted_task())
    assert (found["absorption_rate"], found["absorption_fraction"]) == pytest.approx((rate, fraction), abs=1e-5)


def test_only_words_that_the_probe_knows_count():
    task, sae = planted_task(), planted_sae([TRAIN, TRAIN + 1])
    unknown = torch.zeros(WORDS, dtype=torch.bool).view(LETTERS, EACH)
    unknown[0, TRAIN + 1 :] = True  # leaves an absorbed word of the first letter
    unknown[1, TRAIN:] = True
    activations = task.activations - (LETTER * unknown.flatten())[:, None] * task.probes[task.letters]
    found = absorption(sae, dataclasses.replace(task, activations=activations))
    assert found["absorption_letters"] == 2 and found["absorption_words"] == 11
    assert found["absorption_rate"] == pytest.approx((1 + 0.2) / 2)
    nothing = absorption(sae, dataclasses.replace(task, biases=torch.full((26,), -1e6)))
    assert nothing["absorption_letters"] == nothing["absorption_words"] == 0 and "absorption_rate" not in nothing


def test_units_and_origin_do_not_matter():
    """An SAE that normalises its input, features in other units, and a direction that all words share."""
    task, sae = planted_task(), planted_sae([TRAIN, TRAIN + 1], share=0.6)
    expected = absorption(sae, task)
    assert expected["absorption_rate"] == pytest.approx(0.2)
    assert absorption(copy.deepcopy(sae).to(torch.bfloat16), task) == pytest.approx(expected, abs=0.01)
    mean, scale = 100 * torch.randn(LETTERS + WORDS), 7.0
    biases = scale * task.biases - task.probes @ mean
    moved = dataclasses.replace(task, activations=scale * task.activations + mean, biases=biases)
    sae.set_input_statistics(mean, scale)
    assert absorption(sae, moved) == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        units = torch.logspace(-1, 1, LETTERS + WORDS)
        sae.W_enc.mul_(units)
        sae.W_dec.div_(units[:, None])
        constant = torch.ones(1, LETTERS + WORDS)  # half of b_dec becomes a feature that always fires
        sae.b_dec.sub_(constant[0])
        wider = SelOrthoSAE(SelOrthoConfig(d_in=LETTERS + WORDS, d_sae=LETTERS + WORDS + 1)).eval()
        wider.set_input_statistics(mean, scale)
        wider.W_enc.copy_(torch.cat([sae.W_enc, torch.zeros(LETTERS + WORDS, 1)], 1))
        wider.W_dec.copy_(torch.cat([sae.W_dec, constant]))
        wider.b_enc.copy_(torch.cat([sae.b_enc, torch.ones(1)]))
        wider.b_dec.copy_(sae.b_dec)
    assert absorption(wider, moved) == pytest.approx(expected, abs=1e-5)


def test_dead_features_and_another_width():
    sae = planted_sae([])
    sae.b_enc.data -= 1e6
    assert absorption(sae, planted_task()) == {
        "first_letter_f1": 0, "split_features": 0, "absorption_letters": 0, "absorption_words": 0,
    }  # fmt: skip
    other = SelOrthoSAE(SelOrthoConfig(d_in=5, d_sae=8))
    with pytest.raises(SelOrthoError, match="d_in=5"):
        absorption(other, planted_task())


def test_main_features():
    """A letter that two features share, one that joins neither, and one that fires everywhere, but less elsewhere."""
    truth = torch.arange(100) < 50
    h = torch.zeros(100, 5)
    h[:30, 1] = 1
    h[30:50, 2] = 1
    h[0, 3] = 9
    h[:, 4] = 1 + 3 * (torch.arange(100) < 20)
    main = main_features(h, truth)
    assert main.features.tolist() == [1, 2] and main.thresholds.tolist() == [0.5, 0.5]
    assert torch.equal(main.predict(h), truth)
    alone = main_features(h[:, 4:], truth)
    assert alone.features.tolist() == [0] and alone.thresholds.tolist() == [0.5]  # F1 2/3 beats the 4/7 of above 2.5
    alone = main_features(h[:, 4:], torch.arange(100) < 20)
    assert alone.thresholds.tolist() == [2.5]
    assert len(main_features(torch.zeros(100, 5), truth).features) == 0


def test_probes_are_fitted_in_the_raw_space():
    """Two letters on one axis of six, beside one of a large mean and spread."""
    letters = torch.tensor([0, 4]).repeat(100)
    x = 20 * torch.randn(200, 6) * torch.tensor([0.5, 1, 1, 1, 1, 300]) + torch.tensor([0, 0, 0, 0, 0, 4000.0])
    x[:, 0] += 20 * letters
    probes, biases = fit_probes(x, letters)
    said = x @ probes.T + biases > 0
    assert all((said[:, letter] == (letters == letter)).float().mean() > 0.98 for letter in (0, 4))
    assert probes[0].norm() == pytest.approx(1) and torch.allclose(probes[0], -probes[4], atol=1e-3)
    assert probes[4, 0] > 0.9 and probes[1].norm() == 0 and biases[1] == -math.inf and not said[:, 1].any()


def test_where_the_model_cannot_spell_a_caution_says_so():
    task = planted_task()
    assert task.facts == {
        "spelling_accuracy": 1, "first_letter_probe_f1": 1, "first_letter_words": WORDS, "first_letter_caution": None,
        "first_letter_left_out": [],
    }  # fmt: skip
    caution = dataclasses.replace(task, spelling_accuracy=0.123).facts["first_letter_caution"]
    assert "12%" in caution and "mean F1 of 1.00" in caution
    assert "0.25" in dataclasses.replace(task, probe_f1=[0.25] * 26).facts["first_letter_caution"]


def fresh_task(capture: ActivationCapture, **settings) -> FirstLetterTask:
    return first_letter_task(capture, **{"icl_examples": 4, "min_words": 2} | settings)


@pytest.mark.parametrize("arch", ["gemma3", "gpt2"])
def test_the_task_of_a_small_model(arch, tiny_lm, tiny_tokenizer):
    capture = ActivationCapture(tiny_lm(arch), 1)
    task = fresh_task(capture)
    assert len(task.words) == len(set(task.words)) == len(task.letters) == len(task.train) > 10
    assert [word[0].upper() for word in task.words] == ["ABCDEFGHIJKLMNOPQRSTUVWXYZ"[letter] for letter in task.letters]
    assert all(word.isalpha() and len(word) >= 3 for word in task.words)
    assert task.activations.shape == (len(task.words), 32) and task.activations.dtype == torch.float32
    for letter in task.letters.unique():
        trained = task.train[task.letters == letter]
        assert trained.any() and not trained.all()
    present = {word[0].upper() for word in task.words}
    assert present.isdisjoint(task.left_out) and len(present) + len(task.left_out) == 26
    assert task.prompt.count("\n") == 2 and task.prompt.endswith("\n {word} has the first letter:")

    whole = tiny_tokenizer(task.prompt.format(word=task.words[0])).input_ids
    place = len(tiny_tokenizer(task.prompt.split(" {word}")[0]).input_ids)
    assert tiny_tokenizer.decode(whole[place]).strip() == task.words[0]
    captured = capture.capture_all([Context(0, whole)])
    at_word = captured[captured.origins.positions == place]
    assert torch.allclose(at_word.by_layer[capture.layer][0], task.activations[0], atol=1e-4)

    again = fresh_task(capture)
    assert again.words == task.words and torch.equal(again.activations, task.activations)
    assert 0 <= again.spelling_accuracy == task.spelling_accuracy <= 1
    sae = SelOrthoSAE(SelOrthoConfig(d_in=32, d_sae=64)).eval()
    assert set(absorption(sae, task)) >= {"first_letter_f1", "absorption_letters"}


def test_fewer_words_sinks_and_letters(tiny_lm, caplog):
    lm = tiny_lm("gemma3")
    task = fresh_task(ActivationCapture(lm, 1))
    assert len(fresh_task(ActivationCapture(lm, 1), words=40).words) <= 40
    median = task.activations.norm(dim=1).median().item()
    strict = fresh_task(ActivationCapture(lm, 1, max_norm=median))
    assert 0 < len(strict.words) < len(task.words) and strict.activations.norm(dim=1).max() <= median + 1e-4
    few = fresh_task(ActivationCapture(lm, 1), min_words=5)
    assert f"without {', '.join(few.left_out)}: fewer than 5 words" in caplog.text
    assert min(few.letters.bincount()[few.letters.unique()]) >= 5


def test_words_of_the_vocabulary():
    class Tokenizer:
        def get_vocab(self):
            return {"▁dog": 9, "▁Dog": 4, "Ġday": 5, "▁do": 1, "cat": 2, "▁caT": 3, "▁cafés": 6, " Cat": 7, "▁<eos>": 8}

    words = vocabulary_words(Tokenizer())
    assert [(word.text, word.token_id) for word in words[3]] == [("Dog", 4), ("day", 5)]
    assert [word.text for word in words[2]] == ["Cat"] and sum(map(len, words)) == 3


def test_errors(tiny_lm):
    lm = tiny_lm("gemma3")
    with pytest.raises(SelOrthoError, match=r"layers \[1, 2\]: expected a single one; use capture.at"):
        first_letter_task(ActivationCapture(lm, [1, 2]))
    with pytest.raises(SelOrthoError, match=r"27 examples: .* use fewer examples"):
        first_letter_task(ActivationCapture(lm, 1), icl_examples=27)
    with pytest.raises(SelOrthoError, match="0 letters have 500 of the words, .* use more words, a lower min_words"):
        fresh_task(ActivationCapture(lm, 1), min_words=500)


@pytest.mark.slow
def test_probes_of_the_real_gemma(embedded_lm):
    """A guess at random has an F1 of at most 2 / 27; a quarter of the words is enough to tell."""
    task = first_letter_task(ActivationCapture(embedded_lm, 8), words=520, activation_examples=1, icl_examples=2)
    assert len(task.words) > 400 and len(task.left_out) < 8
    assert task.mean_probe_f1 > 0.3
