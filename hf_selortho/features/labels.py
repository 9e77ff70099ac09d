"""Names of features: the best of what was measured, or from a file of a person."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import SelOrthoError
from ..utils.characters import without_invisible
from ..utils.library_errors import one_line
from .records import Label
from .words import kind_of, name_of

LONGEST_LABEL = 200
THRESHOLD = 0.59  # of the score of a label; below it is "unclear"
# Of labels that are scored on few texts, where a score above one half is often chance.
THRESHOLDS = {"token": THRESHOLD, "context": THRESHOLD, "concept": 0.9, "model": 0.7}
_TOKENS, _LONGEST_OF_TOKENS = 3, 40


def choose_label(labels: Sequence[Label], description: str = "") -> tuple[str, str, float | None]:
    """Return the label to show, its source and its score, of a feature that fires: the best one that is good enough.

    Args:
        labels: its candidates, the best first.
        description: that stands for a label where there is no candidate.
    """
    if not labels:
        return description, "unclear", None
    good = [label for label in labels if label.score >= THRESHOLDS[label.source]]
    # A concept is told by the last tokens of texts alone: it names a feature where no word does.
    best = max(good, key=lambda label: (label.source != "concept", label.score), default=labels[0])
    return best.text, best.source if good else "unclear", best.score


def label_of_tokens(tokens: Sequence[str], activations: Sequence[float]) -> str:
    """Up to three tokens on which a feature fires most, by the sum of its activations on them: "import, from, as".

    Args:
        tokens: at the peaks of its strongest contexts. activations: of the feature on each.
    """
    weights: dict[str, float] = {}
    for token, activation in zip(tokens, activations, strict=True):
        if word := name_of(token, kind_of(token)):
            weights[word] = weights.get(word, 0.0) + activation
    label = ""
    for word in sorted(weights, key=lambda w: -weights[w])[:_TOKENS]:
        longer = f"{label}, {word}" if label else word
        if len(longer) > _LONGEST_OF_TOKENS:
            return label or word[: _LONGEST_OF_TOKENS - 1] + "…"
        label = longer
    return label


def read_labels(path: Path, d_sae: int) -> dict[int, str]:
    """Labels of a JSON file such as {"12": "import statements"}, control characters and outer spaces removed.

    Raises:
        SelOrthoError: it cannot be read, or holds something else.
    """
    expected = 'expected an object of labels by feature number, such as {"12": "import statements"}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SelOrthoError(f"--labels {path} cannot be read ({one_line(error)}): {expected}") from error
    if not isinstance(content, dict):
        raise SelOrthoError(f"--labels {path} holds {type(content).__name__}: {expected}")
    labels: dict[int, str] = {}
    for key, value in content.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < d_sae):
            raise SelOrthoError(f"--labels {path}: {key!r:.50} is no feature of this SAE: expected 0 to {d_sae - 1}")
        if not isinstance(value, str):
            raise SelOrthoError(f"--labels {path}: the label of feature {key} is {value!r:.50}: expected a text")
        label = _plain(value)
        if len(label) > LONGEST_LABEL:
            raise SelOrthoError(
                f"--labels {path}: the label of feature {key} has {len(label)} characters: expected at most "
                f"{LONGEST_LABEL}"
            )
        labels[int(key)] = label
    return labels


def _plain(text: str) -> str:
    """Without control and direction characters, line ends and runs of spaces."""
    spaced = "".join(" " if character.isspace() else character for character in text)
    return " ".join(without_invisible(spaced).split())
