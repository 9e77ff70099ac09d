"""What a feature index is built from, and how much of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..data.contexts import Context, Cutter, held_out_contexts
from ..data.pair_history import PairSnapshot
from ..data.texts import Documents
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..modeling_selortho import SelOrthoSAE


@dataclass(frozen=True)
class IndexSettings:
    """How much of what an index holds."""

    tokens: int = 1_000_000  # of the text, beside BOS; fewer where there are not so many
    max_pairs: int = 5000
    top_contexts: int = 10  # of each feature
    seed: int = 0  # of the contexts drawn at random

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("max_pairs", 0), ("top_contexts", 1)):
            if getattr(self, name) < least:
                raise SelOrthoError(f"{name} {getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class Sources:
    """What an index is built from.

    `history` is that of the SAE's training (`pair_history.read_pair_history`), empty where there is none. `labels`
    stand in place of those made of tokens.
    """

    sae: SelOrthoSAE
    capture: ActivationCapture  # the language model at the SAE's layer
    documents: Documents
    name: str  # of the SAE
    weights_sha256: str
    twin: SelOrthoSAE | None = None  # the same trained without the penalty
    twin_name: str = ""
    twin_weights_sha256: str = ""
    history: Sequence[PairSnapshot] = ()
    labels: Mapping[int, str] | None = None
    min_tokens: int = 8  # of a context
    dataset_config: str | None = None  # as the text was opened with

    def contexts(self) -> Iterator[Context]:
        """Held-out contexts, from the start."""
        config = self.sae.config
        cutter = Cutter(self.capture.lm.tokenizer, config.context_length, config.prepend_bos, self.min_tokens)
        return held_out_contexts(self.documents, cutter)
