"""Feature absorption of an SAE on the first-letter task (Chanin et al. 2024, arXiv 2409.14507; SAEBench).

An SAE that has a feature for "begins with S" may leave it silent on the word "snake", whose own feature has taken the
direction of the letter over: the letter is absorbed.

Everything is measured against the average word that begins with another letter. With `a` and `h` the activations and
feature activations of a word, `a'` and `h'` their means over the train words of other letters, and `p` the letter's
probe, the word has `p . (a - a')` of the letter, and feature i contributes `scale (h_i - h'_i) p . W_dec[i]` to it.
That origin is the same for every SAE, so that shares can be compared; the mean and the bias that an SAE adds cancel;
and so does what features contribute that fire on every word of the prompt. From the zero of the residual stream,
these would drown the letter: a probe's bias, not its direction, deals with what all words have in common. (At layer 8
of Gemma-3-270m, `p . a` is negative for 7% of the words that their probe is right on; `p . (a - a')` for none.)

SAEBench measures from zero and finds main features with a logistic regression, so its figures are not these. What is
kept of it are the definitions of full absorption and of the fraction, and their thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..modeling_selortho import SelOrthoSAE

MIN_SPELLING_ACCURACY = 0.5  # below either of these two, `words_of_caution` says so
MIN_PROBE_F1 = 0.5
MIN_F1_GAIN = 0.03  # of another main feature: tau of the paper
MAX_MAIN_FEATURES = 5
FULL_COSINE = 0.025  # of the absorbing feature with the probe, full absorption
PARTIAL_COSINE = 0.1  # the same, absorption fraction
MIN_SHARE = 0.4  # of the letter that absorbing features contribute
MAX_ABSORBING = 3  # features that make up for the main ones, absorption fraction
_CANDIDATES = 64  # features of the highest correlation with a letter, among which its main features are looked for
_BATCH_WORDS = 512


@dataclass(frozen=True)
class FirstLetterTask:
    """Words with a language model's activations on them and probes of their first letter.

    Letters are numbered 0 (A) to 25 (Z). A probe says "yes" where `activations @ probes[letter] + biases[letter]` is
    positive.
    """

    words: list[str]
    letters: Tensor  # (words,) int64, 0 to 25
    activations: Tensor  # (words, d_in) float32, the raw residual stream at the word's token
    train: Tensor  # (words,) bool; the others are test words
    probes: Tensor  # (26, d_in) float32, unit directions in the raw space; zeros for a letter that is left out
    biases: Tensor  # (26,) float32, in the units of the activations; -inf for a letter that is left out
    probe_f1: list[float]  # (26,), on the test words; NaN for a letter that is left out
    spelling_accuracy: float  # share of test words after whose few-shot prompt the next token is the right letter
    left_out: tuple[str, ...] = ()  # letters with too few words
    prompt: str = ""  # the few-shot prompt of the activations, which end at {word}

    @property
    def mean_probe_f1(self) -> float:
        """Mean of `probe_f1` over the letters that are not left out."""
        return float(np.nanmean(self.probe_f1))

    @property
    def words_of_caution(self) -> str | None:
        """One sentence where figures of this task mean little, as the language model cannot spell; else None."""
        if self.spelling_accuracy >= MIN_SPELLING_ACCURACY and self.mean_probe_f1 >= MIN_PROBE_F1:
            return None
        return (
            f"The language model names the first letter of {self.spelling_accuracy:.0%} of the words and its probes "
            f"have a mean F1 of {self.mean_probe_f1:.2f}, where {MIN_SPELLING_ACCURACY:.0%} and {MIN_PROBE_F1} are "
            "needed for first-letter absorption to mean much."
        )


@dataclass(frozen=True)
class MainFeatures:
    """The features that stand for a letter: a word is said to begin with it where one of them reaches its threshold."""

    features: Tensor  # (m,) int64, best first; m is 0 where no feature fires on the letter's words
    thresholds: Tensor  # (m,) float32, positive

    def predict(self, h: Tensor) -> Tensor:
        """Which words begin with the letter, by feature activations (words, d_sae): (words,) bool."""
        return (h[:, self.features] >= self.thresholds).any(1)


@dataclass(frozen=True)
class _Words:
    """Test words of one letter for which the probe is right."""

    h: Tensor  # (words, d_sae) feature activations
    letter: Tensor  # (words,) how much of the letter they have: p . (a - a'), in the units of the activations
    parts: Tensor  # (words, d_sae) what each feature contributes to it
    cosines: Tensor  # (d_sae,) of the decoder directions with the probe
    main: Tensor  # (m,) int64, main features


@torch.inference_mode()
def absorption(sae: SelOrthoSAE, task: FirstLetterTask) -> dict[str, float]:
    """How much of the first letter is absorbed by features of other things.

    An SAE without features of letters has nothing to absorb: read the figures next to `first_letter_f1`.

    Main features are found on the train words, see [`main_features`]; all else is measured on the test words. A word
    counts where the letter's probe is right on it, a letter where it has such words and a main feature.

    Returns:
        Means over letters, all in [0, 1] but the last:
        `absorption_rate`, the share of words that are fully absorbed: no main feature fires, and the one feature that
        contributes most has a cosine of at least 0.025 with the probe and contributes 40% of the letter at least;
        `absorption_fraction`, the mean over words of the part that up to three other features, with cosines of at
        least 0.1, make up of what main features and they contribute, where they contribute 40% at least;
        `first_letter_f1` of the main features on all test words; `split_features`, the number of main features.
        Besides, `absorption_letters` and `absorption_words`, how many entered. The first two are absent where none
        did.

    Raises:
        SelOrthoError: the SAE has another width than the activations of the task.
    """
    h = torch.cat([sae.encode(part.to(sae.device)).float().cpu() for part in task.activations.split(_BATCH_WORDS)])
    fires = (h > 0).any(0)
    h, directions = h[:, fires], decoder_directions(sae)[fires]  # (words, firing), (firing, d_in)
    h_train, h_test = h[task.train], h[~task.train]
    scores = (task.activations.double() @ task.probes.double().T + task.biases.double()).T  # (26, words)
    rates, fractions, f1s, splits, count = [], [], [], [], 0
    for letter in task.letters.unique().tolist():
        truth = task.letters == letter
        main = main_features(h_train, truth[task.train])
        f1s.append(f1_score(main.predict(h_test), truth[~task.train]))
        splits.append(len(main.features))
        rows = truth & ~task.train & (scores[letter] > 0)
        if not rows.any() or len(main.features) == 0:
            continue
        words = _words(task, h, directions, letter, rows, main.features)
        rates.append(float(_fully_absorbed(words).double().mean()))
        fractions.append(float(_absorbed_fraction(words).mean()))
        count += int(rows.sum())
    found = {"first_letter_f1": _mean(f1s), "split_features": _mean(splits)}
    if rates:
        found |= {"absorption_rate": _mean(rates), "absorption_fraction": _mean(fractions)}
    return found | {"absorption_letters": float(len(rates)), "absorption_words": float(count)}


def f1_score(predicted: Tensor, truth: Tensor) -> float:
    """F1 of yes-or-no predictions (n,) bool; 0 where nothing is right."""
    right = int((predicted & truth).sum())
    return 2 * right / max(int(predicted.sum() + truth.sum()), 1)


@torch.no_grad()
def decoder_directions(sae: SelOrthoSAE) -> Tensor:
    """What a feature activation of 1 adds to the reconstruction of a raw activation: (d_sae, d_in) float32, CPU.

    They are the rows of `W_dec` times one number, which `decode` itself tells.
    """
    W_dec = sae.W_dec.float().cpu()
    longest = int(W_dec.norm(dim=1).argmax())
    once = torch.zeros(1, len(W_dec), device=sae.device)
    once[0, longest] = 1e6  # so large that the mean which `decode` adds does not cost the difference its digits
    added = (sae.decode(once) - sae.decode(torch.zeros_like(once)))[0].double().cpu() / 1e6
    row = W_dec[longest].double()
    return W_dec * float(added @ row / (row @ row).clamp_min(torch.finfo(torch.float64).tiny))


def main_features(h: Tensor, truth: Tensor) -> MainFeatures:
    """The features whose firing tells a letter's words from others, greedily.

    The first is the feature that reaches the highest F1 at its best threshold. Another joins it, at most 5 in all, for
    words that none before has found, while the F1 of "one of them fires" rises by more than 0.03. (The paper fits a
    logistic regression to the features instead; this one has no settings and needs no scaling of the features.)

    Args:
        h: feature activations (words, d_sae). truth: (words,) bool, which words begin with the letter.
    """
    candidates = _most_correlated(h, truth)
    values, order = h[:, candidates].sort(dim=0, descending=True)  # (words, candidates)
    following = torch.cat([values[1:], torch.zeros_like(values[:1])]).clamp_min(0)
    cut = values > following  # a threshold cannot part equal values, and has to be positive
    covered = torch.zeros_like(truth)
    best = -MIN_F1_GAIN
    chosen: list[int] = []
    thresholds: list[float] = []
    while len(chosen) < min(MAX_MAIN_FEATURES, len(candidates)):
        fresh = ~covered[order]
        said = fresh.cumsum(0) + covered.sum()  # words that are predicted when the first r of the order are
        right = (fresh & truth[order]).cumsum(0) + (covered & truth).sum()
        f1 = torch.where(cut, 2 * right / (said + truth.sum()), 0)
        place = int(f1.argmax())
        rank, column = divmod(place, f1.shape[1])
        top = float(f1[rank, column])
        if top <= max(best + MIN_F1_GAIN, 0):
            break
        best = top
        chosen.append(int(candidates[column]))
        thresholds.append(float(values[rank, column] + following[rank, column]) / 2)
        covered |= h[:, chosen[-1]] >= thresholds[-1]
    return MainFeatures(torch.tensor(chosen, dtype=torch.int64), torch.tensor(thresholds))


def _most_correlated(h: Tensor, truth: Tensor) -> Tensor:
    """The features (at most 64,) that correlate most with the letter, of those that do so positively."""
    mean = h.mean(0)
    spread = (h - mean).norm(dim=0)
    correlation = torch.where(spread > 0, (h[truth].mean(0) - mean) / spread, 0)  # but for a factor
    top = correlation.topk(min(_CANDIDATES, len(correlation)))
    return top.indices[top.values > 0]


def _words(task: FirstLetterTask, h: Tensor, directions: Tensor, letter: int, rows: Tensor, main: Tensor) -> _Words:
    others = task.train & (task.letters != letter)
    probe = task.probes[letter]
    gains = directions @ probe  # (d_sae,)
    return _Words(
        h=h[rows],
        letter=((task.activations[rows] - task.activations[others].mean(0)).double() @ probe.double()).float(),
        parts=(h[rows] - h[others].mean(0)) * gains,
        cosines=gains / directions.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny),
        main=main,
    )


def _fully_absorbed(words: _Words) -> Tensor:
    """(words,) bool."""
    silent = (words.h[:, words.main] <= 0).all(1)
    top = words.parts.where(words.h > 0, -torch.inf).max(1)
    contributes = (words.letter > 0) & (top.values >= MIN_SHARE * words.letter)
    return silent & contributes & (words.cosines[top.indices] >= FULL_COSINE)


def _absorbed_fraction(words: _Words) -> Tensor:
    """(words,) float32 in [0, 1]."""
    by_main = words.parts[:, words.main].sum(1)
    absorbs = (words.h > 0) & (words.cosines >= PARTIAL_COSINE)
    absorbs[:, words.main] = False
    most = min(MAX_ABSORBING, words.h.shape[1])
    by_others = words.parts.where(absorbs, 0).clamp_min(0).topk(most, dim=1).values.sum(1)
    missing = (words.letter - by_main).clamp_min(0)
    made_up = torch.minimum(by_others, missing)
    fraction = made_up / (made_up + by_main.clamp_min(0)).clamp_min(torch.finfo(torch.float32).tiny)
    counts = (words.letter > 0) & (missing > 0) & (by_others >= MIN_SHARE * words.letter)
    return torch.where(counts, fraction, 0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
