"""Tasks that SAEs are measured on inside a language model, read once for a layer and used for many SAEs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.texts import TextSource
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..modeling_selortho import SelOrthoSAE
from .absorption import absorption
from .first_letter import FirstLetterTask, first_letter_task
from .labelled_text import labelled_documents
from .probing import LabelledTexts, dense_probing, read_labelled_texts, sparse_probing


@dataclass(frozen=True)
class Tasks:
    """What SAEs of one layer are measured on; None for what cannot be measured, and `facts` says why."""

    probing: LabelledTexts | None
    first_letter: FirstLetterTask | None
    facts: dict[str, Any]  # of the tasks themselves: what the language model reaches on them

    def measure(self, sae: SelOrthoSAE) -> dict[str, Any]:
        """Figures of an SAE on the tasks that there are."""
        figures: dict[str, Any] = {}
        if self.probing is not None:
            figures |= sparse_probing(sae, self.probing)
        if self.first_letter is not None:
            figures |= absorption(sae, self.first_letter)
        return figures


def prepare_tasks(
    capture: ActivationCapture,
    source: TextSource,
    label_column: str | None,
    cutting: Mapping[str, Any],
    sizes: Mapping[str, Any],
) -> Tasks:
    """Read the labelled texts and the words with a language model at one layer.

    Args:
        capture: at a single layer.
        source, label_column: the labelled texts; None: there are none.
        cutting: context_length, prepend_bos and min_tokens of the training.
        sizes: `probing_texts`, `first_letter_words`; 0 leaves a task out.
    """
    facts: dict[str, Any] = {}
    probing = first_letter = None
    texts, words = sizes.get("probing_texts", 1000), sizes.get("first_letter_words", 2000)
    if label_column is None or not texts:
        facts["no_probing"] = "the texts have no labels" if label_column is None else "left out by the plan"
    else:
        probing = read_labelled_texts(capture, *labelled_documents(source, label_column, texts), **cutting)
        facts |= dense_probing(probing) | {"probing_texts": len(probing), "probing_classes": len(probing.classes)}
    if not words:
        facts["no_first_letter"] = "left out by the plan"
    else:
        try:
            first_letter = first_letter_task(capture, words=words)
            facts |= first_letter.facts
        except SelOrthoError as error:  # the tokenizer has no words for it
            facts["no_first_letter"] = str(error)
    return Tasks(probing, first_letter, facts)
