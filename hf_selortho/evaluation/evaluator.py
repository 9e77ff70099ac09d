"""Measures a trained SAE on held-out text: on the activations themselves and inside the language model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..activations.capture import ActivationCapture, length_batches
from ..activations.tokens import Context, pad_batch
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from .functional import batch_correlation_summary, correlation_histogram, cross_entropy, max_decoder_cosine
from .metrics import CorrelationMetric, LossRecoveredMetric, ReconstructionMetric, SparsityMetric

logger = logging.getLogger(__name__)

# Batches are cut from a shuffled pool, since correlations within a batch depend on how many documents it draws from:
# this many come from several hundred contexts (training mixes 2048). In bfloat16 they take 150 MB for Gemma 2 2B.
_POOL_BATCHES = 8
# Logits of one forward pass, in the language model's dtype. More is not faster.
_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_sae` found. Figures that the data do not define (e.g. no eligible pair) are absent."""

    metrics: dict[str, float | int]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # for the pictures, see `plots`


def evaluate_sae(
    sae: SelOrthoSAE,
    capture: ActivationCapture,
    contexts: Sequence[Context],
    *,
    batch_size: int = 4096,
    ce_samples: int = 64,
    progress: bool = True,
    seed: int = 0,
) -> Evaluation:
    """Evaluate `sae` on the language model's activations for held-out `contexts`.

    Correlations are measured on batches of `batch_size` tokens with the pair settings of the SAE's config and
    averaged. The cross-entropies are measured on `ce_samples` of the contexts (0: not at all), next to the true
    tokens: with the activations untouched, with the SAE's reconstruction in their place, and with zeros. Only the
    positions that an SAE is trained on are replaced: BOS, padding and sinks keep their activations. The same contexts
    and seed give the same figures.

    Raises:
        SelOrthoError: no contexts, no tokens left to measure, or an SAE of another width than the language model.
    """
    _check_fit(sae, capture)
    if not contexts:
        raise SelOrthoError("no held-out contexts to evaluate on: use more text or a larger held-out fraction")
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [contexts[i] for i in order]
    with torch.inference_mode():
        metrics, arrays = _measure_features(
            sae, _token_batches(capture, shuffled, batch_size, seed, progress), batch_size
        )
        arrays["max_decoder_cosine"] = max_decoder_cosine(sae.W_dec).cpu().numpy()
        metrics["max_decoder_cosine"] = float(arrays["max_decoder_cosine"].mean())
        metrics |= _measure_cross_entropy(sae, capture, shuffled[:ce_samples], progress)
    return Evaluation({"samples": len(contexts)} | _defined(metrics), arrays)


def next_token_losses(capture: ActivationCapture, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Negative log-likelihood of every token (b, t) that follows another one: flat (tokens,) float32, in nats.

    The whole model is called, so that whatever an architecture does to its logits (the softcapping of Gemma 2, the
    scaling of Granite) is done; only the log-softmax is taken in chunks."""
    lm, device = capture.lm.model, capture.device
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    logits = lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (b, t, vocabulary)
    row, column = attention_mask[:, 1:].bool().nonzero(as_tuple=True)  # token column + 1 is predicted at column
    index = row * input_ids.shape[1] + column
    return cross_entropy(logits.flatten(0, 1), input_ids[row, column + 1], index)


def _check_fit(sae: SelOrthoSAE, capture: ActivationCapture) -> None:
    width, lm = sae.config.d_in, capture.lm
    if width != lm.d_model:
        trained_on = f", trained on {sae.config.lm_name}" if sae.config.lm_name else ""
        raise SelOrthoError(
            f"the SAE has d_in={width}{trained_on}, but the activations of {lm.name} are {lm.d_model} wide: "
            "evaluate it on the language model it was trained on"
        )


def _token_batches(
    capture: ActivationCapture, contexts: Sequence[Context], batch_size: int, seed: int, progress: bool
) -> Iterator[Tensor]:
    """Activations (batch_size, d_in) of the kept tokens, mixed over pools of several batches; the last may be
    shorter."""
    generator = torch.Generator().manual_seed(seed)
    rest: list[Tensor] = []
    with tqdm(total=len(contexts), desc="evaluating", unit="context", disable=not progress) as bar:
        for group in _groups(contexts, _POOL_BATCHES * batch_size):
            parts = rest
            for batch in length_batches(group, capture.batch_tokens):
                parts.append(capture.harvest(batch).activations)
                bar.update(len(batch))
            pool = torch.cat(parts)
            pool = pool[torch.randperm(len(pool), generator=generator).to(pool.device)]
            batches = pool.split(batch_size)
            full = [b for b in batches if len(b) == batch_size]
            rest = list(batches[len(full) :])
            yield from full
    yield from (r for r in rest if len(r))


def _groups(contexts: Sequence[Context], tokens: int) -> Iterator[list[Context]]:
    """Consecutive contexts that hold about `tokens` tokens together."""
    group: list[Context] = []
    held = 0
    for context in contexts:
        group.append(context)
        held += len(context.input_ids)
        if held >= tokens:
            yield group
            group, held = [], 0
    if group:
        yield group


def _measure_features(
    sae: SelOrthoSAE, batches: Iterator[Tensor], batch_size: int
) -> tuple[dict[str, float | int], dict[str, np.ndarray]]:
    pairs = {name: getattr(sae.config, name) for name in ("pair_fraction", "min_support", "correlation")}
    reconstruction, sparsity = ReconstructionMetric(), SparsityMetric()
    correlation = CorrelationMetric(batch_size=batch_size, **pairs)
    arrays: dict[str, np.ndarray] = {}
    for batch in batches:
        x = batch.to(sae.device).float()  # (B, d_in)
        h = sae.encode(x)  # (B, d_sae)
        reconstruction.add_batch(predictions=sae.decode(h), references=x)
        sparsity.add_batch(predictions=h)
        correlation.add_batch(predictions=h)
        if not arrays:
            arrays = _correlation_arrays(h, **pairs)
    if len(sparsity) == 0:
        raise SelOrthoError("no held-out token is left once special and sink tokens are dropped: use longer texts")
    arrays["feature_density"] = sparsity.density().cpu().numpy()
    tokens = len(sparsity)
    return {"tokens": tokens} | reconstruction.compute() | sparsity.compute() | correlation.compute(), arrays


def _correlation_arrays(h: Tensor, pair_fraction: float, min_support: int, correlation: str) -> dict[str, np.ndarray]:
    """What the correlation histogram shows, of one batch."""
    histogram = correlation_histogram(h, min_support=min_support, correlation=correlation)
    summary = batch_correlation_summary(h, pair_fraction, min_support, correlation)
    return {
        "correlation_counts": histogram.counts.numpy(),
        "correlation_edges": histogram.edges.numpy(),
        "correlation_threshold": np.array(summary.threshold),
        "correlation_features": np.array([histogram.features, histogram.eligible_features]),
    }


def _measure_cross_entropy(
    sae: SelOrthoSAE, capture: ActivationCapture, contexts: Sequence[Context], progress: bool
) -> dict[str, float | int]:
    contexts = [c for c in contexts if len(c.input_ids) > 1]
    if not contexts:
        return {}
    metric = LossRecoveredMetric()
    lm = capture.lm.model
    batch_tokens = _LOGITS_BYTES // (lm.config.get_text_config().vocab_size * lm.dtype.itemsize)
    pad_id = capture.lm.tokenizer.pad_token_id or 0
    with tqdm(total=len(contexts), desc="cross-entropy", unit="context", disable=not progress) as bar:
        for batch in length_batches(contexts, batch_tokens):
            tokens = pad_batch(batch, pad_id)
            metric.add_batch(
                references=next_token_losses(capture, *tokens),
                predictions=_spliced_losses(
                    capture, *tokens, lambda x: sae.decode(sae.encode(x.to(sae.device).float()))
                ),
                ablations=_spliced_losses(capture, *tokens, torch.zeros_like),
            )
            bar.update(len(batch))
    return {"ce_samples": len(contexts)} | metric.compute()


def _spliced_losses(
    capture: ActivationCapture, input_ids: Tensor, attention_mask: Tensor, replacement: Callable[[Tensor], Tensor]
) -> Tensor:
    def replace(hidden: Tensor) -> Tensor:
        keep = capture.keep_mask(input_ids, attention_mask, hidden)
        spliced = hidden.clone()
        spliced[keep] = replacement(hidden[keep]).to(hidden)
        return spliced

    with capture.splice(replace):
        return next_token_losses(capture, input_ids, attention_mask)


def _defined(metrics: dict[str, float | int]) -> dict[str, float | int]:
    """Without NaN and infinity, which JSON does not have."""
    undefined = [name for name, value in metrics.items() if not math.isfinite(value)]
    if undefined:
        logger.warning("left out of the metrics, as this data does not define them: %s", ", ".join(undefined))
    return {name: value for name, value in metrics.items() if name not in undefined}
