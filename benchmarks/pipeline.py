"""How fast activations arrive: the language model that computes them, and the buffer that shuffles them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_selortho.data.buffer import ActivationBuffer
from hf_selortho.data.contexts import ContextStream, Cutter
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.language_models.capture import ActivationCapture, only
from hf_selortho.language_models.loading import LanguageModel, check_context_length

BATCHES = 6  # that the buffer holds
CONTEXT_LENGTH = 128


@dataclass(frozen=True)
class Supply:
    """Speeds of what comes before the SAE, and activations to go on with."""

    lm_tokens_per_second: float  # activations kept, special tokens and padding computed on top
    buffer_tokens_per_second: float  # without the harvest
    activations: Tensor  # (tokens, d_in)


def measure_supply(lm: LanguageModel, layer: int, dataset: str, batch: int) -> Supply:
    """Time the harvest after decoder layer `layer` on the texts of `dataset`, and the buffer's batches."""
    capture = ActivationCapture(lm, layer)
    check_context_length(lm, CONTEXT_LENGTH)
    stream = ContextStream(open_documents(TextSource(dataset)), Cutter(lm.tokenizer, context_length=CONTEXT_LENGTH))
    contexts = math.ceil(BATCHES * batch / CONTEXT_LENGTH)
    buffer = ActivationBuffer(
        capture, stream, contexts=contexts, context_length=CONTEXT_LENGTH, batch_size=batch, refresh_every=BATCHES
    )
    buffer.fill(progress=True)  # warms the language model up
    served = []
    started = time.perf_counter()
    for _ in range(BATCHES):  # all that it serves without a refresh
        served.append(only(buffer.next_batch().by_layer))
    wait_for(capture.device)
    buffer_seconds = time.perf_counter() - started
    fresh = stream.take(contexts)
    started = time.perf_counter()
    captured = capture.capture_all(fresh)
    wait_for(capture.device)
    lm_seconds = time.perf_counter() - started
    return Supply(len(captured) / lm_seconds, BATCHES * batch / buffer_seconds, torch.cat(served))


def wait_for(device: torch.device) -> None:
    """Return once a GPU has done what it was given; others have by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
