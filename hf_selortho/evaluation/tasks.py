"""Tasks that SAEs are measured on inside a language model, read once for a layer and used for many SAEs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.contexts import Cutter, held_out_contexts
from ..data.texts import TextSource, open_documents
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..modeling_selortho import SelOrthoSAE
from .absorption import absorption
from .evaluator import evaluate_saes
from .first_letter import FirstLetterTask, first_letter_task
from .labelled_text import labelled_documents
from .probe_scores import measure_probes
from .probing import LabelledTexts, dense_probing, read_labelled_texts, sparse_probing
from .stability import stability

logger = logging.getLogger(__name__)


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
    elif capture.target_sites:
        facts["no_first_letter"] = "absorption is measured of SAEs that reconstruct what they read, not of transcoders"
    else:
        try:
            first_letter = first_letter_task(capture, words=words)
            facts |= first_letter.facts
        except SelOrthoError as error:  # the tokenizer has no words for it
            facts["no_first_letter"] = str(error)
    return Tasks(probing, first_letter, facts)


def evaluate_on_text(
    sae: SelOrthoSAE,
    capture: ActivationCapture,
    source: TextSource,
    label_column: str | None,
    cutting: Mapping[str, Any],
    sizes: Mapping[str, Any],
    *,
    others: Mapping[str, Tensor],
    probes: str = "none",
    samples: int = 1000,
    ce_samples: int = 64,
    batch_size: int = 4096,
) -> dict[str, Any]:
    """Measure an SAE on held-out text, on the tasks, and beside other SAEs: what docs/metrics.md calls "evaluation".

    Args:
        sae, capture: the SAE and the language model at its layer.
        source: the text, of which the held-out documents are read.
        label_column, cutting, sizes: as in [`prepare_tasks`].
        others: decoder directions (n, d_in) of other SAEs, by name.
        probes: sets of sae-probes to probe on, "quick" or "all", or "none".
        samples, ce_samples: contexts, and those of them on which the cross-entropies are measured.
        batch_size: tokens of the batches that correlations are measured on.

    Raises:
        SelOrthoError: too little text or too few labels, or an SAE of another width.
    """
    contexts = list(held_out_contexts(open_documents(source), Cutter(capture.lm.tokenizer, **cutting), samples))
    (evaluation,) = evaluate_saes([sae], capture, contexts, batch_size=batch_size, ce_samples=ce_samples)
    figures: dict[str, Any] = dict(evaluation.metrics)
    tasks = prepare_tasks(
        capture, source, label_column, cutting, sizes or {"probing_texts": 0, "first_letter_words": 0}
    )
    figures |= {key: value for key, value in tasks.facts.items() if not key.startswith("no_")} | tasks.measure(sae)
    if sizes["first_letter_words"] and tasks.first_letter is None:
        logger.warning("no first-letter task: %s", tasks.facts["no_first_letter"])
    if probes != "none":
        (figures["probes"],) = measure_probes([sae], capture, probes, prepend_bos=cutting["prepend_bos"])
    if others:
        W_dec = sae.W_dec.detach().float().cpu()
        figures["compared_with"] = {name: stability(W_dec, other) for name, other in others.items()}
    return figures
