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

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE

MIN_SPELLING_ACCURACY = 0.5  # below either of these two, `facts` has a caution
MIN_PROBE_F1 = 0.5
MIN_F1_GAIN = 0.03  # of another main feature: tau of the paper
MAX_MAIN_FEATURES = 5
FULL_COSINE = 0.025  # of the absorbing feature with the probe, full absorption
PARTIAL_COSINE = 0.1  # the same, absorption fraction
MIN_SHARE = 0.4  # of the letter that absorbing features contribute
MAX_ABSORBING = 3  # features that make up for the main ones, absorption fraction
_CANDIDATES = 64  # features of the highest correlation with a letter, among which its main features are looked for
_BATCH_WORDS = 512
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class FirstLetterTask:
    """Words with a language model's activations on them and probes of their first letter.

    Letters are numbered 0 (A) to 25 (Z). A probe says "yes" where `activations @ probes[letter] + biases[letter]` is
    positive.
    """

    words: list[str]
    letters: Tensor  # (words,) int64, 0 to 25
    activations: Tensor  # (words, d_in) float32, raw, of the SAE's site at the word's token
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
    def facts(self) -> dict[str, Any]:
        """What the language model reaches, and one sentence where figures of this task mean little, else None."""
        caution = None
        if self.spelling_accuracy < MIN_SPELLING_ACCURACY or self.mean_probe_f1 < MIN_PROBE_F1:
            caution = (
                f"The language model names the first letter of {self.spelling_accuracy:.0%} of the words and its "
                f"probes have a mean F1 of {self.mean_probe_f1:.2f}, where {MIN_SPELLING_ACCURACY:.0%} and "
                f"{MIN_PROBE_F1} are needed for first-letter absorption to mean much."
            )
        return {
            "spelling_accuracy": self.spelling_accuracy,
            "first_letter_probe_f1": self.mean_probe_f1,
            "first_letter_words": len(self.words),
            "first_letter_caution": caution,
            "first_letter_left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class MainFeatures:
    """The features that stand for a letter: a word is said to begin with it where one of them reaches its threshold."""

    features: Tensor  # (m,) int64, best first; m is 0 where no feature fires on the letter's words
    thresholds: Tensor  # (m,) float32, positive

    def predict(self, h: Tensor) -> Tensor:
        """Which words begin with the letter, by feature activations (words, d_sae): (words,) bool."""
        return (h[:, self.features] >= self.thresholds).any(1)


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
        SelOrthoError: the SAE has another width than the activations of the task, or is a transcoder.
    """
    config = SelOrthoSAE.checked(sae).config
    if config.is_transcoder:
        raise SelOrthoError(f"target={config.target}: absorption is measured of SAEs that reconstruct what they read")
    h = torch.cat([sae.encode(part.to(sae.device)).float().cpu() for part in task.activations.split(_BATCH_WORDS)])
    fires = (h > 0).any(0)
    # what a feature activation of 1 adds to the reconstruction of a raw activation
    directions = sae.raw_directions().cpu()[fires]  # (firing, d_in)
    h = h[:, fires]  # (words, firing)
    scores = task.activations.double() @ task.probes.double().T + task.biases.double()  # (words, 26)
    rates, fractions, f1s, splits, count = [], [], [], [], 0
    for letter in task.letters.unique().tolist():
        truth = task.letters == letter
        main = main_features(h[task.train], truth[task.train])
        f1s.append(float(f1_score(truth[~task.train], main.predict(h[~task.train]), zero_division=0)))
        splits.append(len(main.features))
        known = truth & ~task.train & (scores[:, letter] > 0)
        if known.any() and splits[-1]:
            full, fraction = _absorbed(task, letter, h, directions, known, main.features)
            rates.append(full.double().mean().item())
            fractions.append(fraction.mean().item())
            count += len(full)
    figures = {"first_letter_f1": fmean(f1s), "split_features": fmean(splits)}
    if rates:
        figures |= {"absorption_rate": fmean(rates), "absorption_fraction": fmean(fractions)}
    return figures | {"absorption_letters": float(len(rates)), "absorption_words": float(count)}


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


def _absorbed(
    task: FirstLetterTask, letter: int, h: Tensor, directions: Tensor, rows: Tensor, main: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the words `rows` of a letter are fully absorbed, (words,) bool, and the part of each that is, (words,).

    Args:
        h: feature activations of all words (all, d_sae). directions: of the decoder (d_sae, d_in).
        rows: (all,) bool. main: main features of the letter (m,).
    """
    others = task.train & (task.letters != letter)
    probe = task.probes[letter]
    gains = directions @ probe  # (d_sae,)
    cosines = gains / directions.norm(dim=1).clamp_min(_TINY)
    # how much of the letter each word has, and what each feature contributes to it
    has = ((task.activations[rows] - task.activations[others].mean(0)).double() @ probe.double()).float()  # (words,)
    parts = (h[rows] - h[others].mean(0)) * gains  # (words, d_sae)
    fires = h[rows] > 0

    top = parts.where(fires, -torch.inf).max(1)
    enough = (has > 0) & (top.values >= MIN_SHARE * has)
    full = enough & ~fires[:, main].any(1) & (cosines[top.indices] >= FULL_COSINE)

    by_main = parts[:, main].sum(1)
    absorbs = fires & (cosines >= PARTIAL_COSINE)
    absorbs[:, main] = False
    by_others = parts.where(absorbs, 0).clamp_min(0).topk(min(MAX_ABSORBING, len(gains)), dim=1).values.sum(1)
    missing = (has - by_main).clamp_min(0)
    made_up = torch.minimum(by_others, missing)
    fraction = made_up / (made_up + by_main.clamp_min(0)).clamp_min(_TINY)
    counts = (has > 0) & (missing > 0) & (by_others >= MIN_SHARE * has)
    return full, torch.where(counts, fraction, 0)
