"""How fast activations are harvested to disk, against the language model alone, in rounds over the same texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from ..data.cache_forecast import throwaway_harvest
from ..data.cache_writer import HarvestSettings
from ..data.contexts import Context, ContextStream, count_tokens, pad_batch
from ..data.texts import Documents, TextSource, open_documents
from ..language_models.capture import ActivationCapture, length_batches
from ..language_models.loading import LanguageModel, load_language_model
from .pipeline import wait_for
from .report import table

CONTEXT_LENGTH = 128
SHARDS, SHARD_TOKENS = 4, 4096  # of a round
PADDED_CONTEXTS, PADDED_BATCH = 32, 8  # of a round, for the slow case

PLAIN = "whole model in float32, contexts padded to 128"
BARE = "bare forward up to the layer in {}, batches of the harvest"
HARVEST = "harvest to shards in {}"


def measure_harvest(model: str, layer: int, dataset: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Real tokens a second (BOS included, padding not) of each case by round.

    Args:
        model: language model. layer: decoder layer, counted from 0. dataset: what is read.
        rounds: in each of them every case reads the same texts, in another order of the cases.
        device: where the language model computes.
    """
    documents = open_documents(TextSource(dataset))
    own = load_language_model(model, device=device)  # in the dtype that a harvest takes here
    own_name = str(own.model.dtype).removeprefix("torch.")
    named = {
        name: own if name == own_name else load_language_model(model, dtype=name, device=device)
        for name in ("bfloat16", "float32")
    }
    cases: dict[str, Callable[[int], float]] = {PLAIN: partial(_padded, named["float32"], documents)}
    for name, lm in named.items():
        cases[BARE.format(name)] = partial(_bare, ActivationCapture(lm, layer), documents)
    cases[HARVEST.format(own_name)] = partial(_harvest, ActivationCapture(own, layer), documents)
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for name in names:  # the first forward of a kind is slow
        cases[name](0)
    for number in tqdm(range(rounds), desc="harvest", unit="round"):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            speeds[name].append(cases[name](number))
    return [{"case": name, "tokens_per_second": speeds[name]} for name in names]


def harvest_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Median speed of every case, and the median over the rounds of its ratios to the others."""
    speeds = {row["case"]: row["tokens_per_second"] for row in rows}
    yardsticks = [name for name in speeds if not name.startswith(HARVEST.format(""))]
    header = ["case", "tokens/s", "x plain", "x bare bfloat16", "x bare float32"]
    body = [
        [name, f"{median(found):,.0f}"]
        + [f"{median(a / b for a, b in zip(found, speeds[other], strict=True)):.2f}" for other in yardsticks]
        for name, found in speeds.items()
    ]
    return table(header, body, left=(0,))


def _stream(lm: LanguageModel, documents: Documents, seed: int) -> ContextStream:
    return ContextStream(documents, lm.tokenizer, context_length=CONTEXT_LENGTH, seed=seed)


def _padded(lm: LanguageModel, documents: Documents, seed: int) -> float:
    """As activations are often collected: each context padded to the full length, all layers computed."""
    contexts = _stream(lm, documents, seed).take(PADDED_CONTEXTS)
    batches = [_to_full_length(contexts[n : n + PADDED_BATCH]) for n in range(0, len(contexts), PADDED_BATCH)]
    started = time.perf_counter()
    with torch.inference_mode():
        for input_ids, mask in batches:
            device = lm.model.device
            lm.model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return count_tokens(contexts) / _elapsed(started, lm)


def _bare(capture: ActivationCapture, documents: Documents, seed: int) -> float:
    stream = _stream(capture.lm, documents, seed)
    shards = [stream.take_tokens(SHARD_TOKENS) for _ in range(SHARDS)]
    batches = [
        pad_batch([contexts[number] for number in numbers], 0)
        for contexts in shards
        for numbers in length_batches(contexts, capture.batch_tokens)
    ]
    started = time.perf_counter()
    for input_ids, mask in batches:
        capture.hidden_states(input_ids, mask)
    return sum(map(count_tokens, shards)) / _elapsed(started, capture.lm)


def _harvest(capture: ActivationCapture, documents: Documents, seed: int) -> float:
    """From text to files: tokenising, the language model, norms, sinks, statistics, hashes, flushed to the disk."""
    settings = HarvestSettings(CONTEXT_LENGTH, shard_tokens=SHARD_TOKENS, max_tokens=SHARDS * SHARD_TOKENS)
    return throwaway_harvest(capture, _stream(capture.lm, documents, seed), settings, Path())


def _to_full_length(contexts: Sequence[Context]) -> tuple[Tensor, Tensor]:
    input_ids, mask = pad_batch(contexts, 0)
    missing = (0, CONTEXT_LENGTH - input_ids.shape[1])
    return pad(input_ids, missing), pad(mask, missing)


def _elapsed(started: float, lm: LanguageModel) -> float:
    wait_for(lm.model.device)
    return time.perf_counter() - started
