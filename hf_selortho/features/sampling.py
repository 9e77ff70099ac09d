"""How a language model's next token is chosen, from random numbers of one's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import finite_number, whole_number
from ..errors import SelOrthoError
from ..language_models.loading import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one at temperature 0, else drawn at random.

    Raises:
        SelOrthoError: a value that is not allowed.
    """

    max_new_tokens: int = 40
    temperature: float = 0.0
    top_p: float = 1.0  # draw from the likeliest tokens that have this probability together (Holtzman et al. 2020)
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number(self.max_new_tokens, "max_new_tokens", 1)
        if finite_number(self.temperature, "temperature") < 0:
            raise SelOrthoError(
                f"temperature {self.temperature}: expected 0 (the likeliest token) or a positive number"
            )
        if not 0 < finite_number(self.top_p, "top_p") <= 1:
            raise SelOrthoError(f"top_p {self.top_p}: expected more than 0 and at most 1, which draws from all tokens")
        whole_number(self.seed, "seed", end=2**63)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token from its logits (vocabulary,), on the CPU."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / sampling.temperature  # in this order, the coldest temperature overflows nothing
    probabilities, token_ids = scaled.softmax(0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities[1:] = probabilities[1:].where(before[1:] < sampling.top_p, 0)  # the likeliest one always stays
    return int(token_ids[torch.multinomial(probabilities, 1, generator=generator)])


def end_ids(lm: LanguageModel) -> set[int]:
    """Tokens after which nothing follows: those of the language model's `generate`, else the tokenizer's EOS."""
    own = getattr(lm.model.generation_config, "eos_token_id", None)
    if own is None:
        own = lm.tokenizer.eos_token_id
    if own is None:
        return set()
    return {own} if isinstance(own, int) else set(own)
