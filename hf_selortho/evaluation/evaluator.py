"""Measures trained SAEs on held-out text: on the activations themselves and inside the language model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture, length_batches
from ..language_models.contexts import Context, pad_batch
from ..modeling_selortho import SelOrthoSAE
from ..utils.progress import Bar
from .metrics import (
    Correlations,
    Figures,
    LossRecovered,
    Reconstruction,
    Sparsity,
    correlation_histogram,
    cross_entropy,
    max_decoder_cosine,
)

logger = logging.getLogger(__name__)

# Batches are cut from a shuffled pool, since correlations within a batch depend on how many documents it draws from:
# this many come from several hundred contexts (training mixes 2048). In bfloat16 they take 150 MB for Gemma 2 2B.
_POOL_BATCHES = 8
# Logits of one forward pass, in the language model's dtype. More is not faster.
_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_saes` found. Figures that the data do not define (e.g. no eligible pair) are absent."""

    metrics: dict[str, Any]  # figures, and the probes where there are some
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # for the pictures, see `plots`


def evaluate_saes(
    saes: Sequence[SelOrthoSAE],
    capture: ActivationCapture | None,
    contexts: Sequence[Context],
    *,
    batches: Iterable[Mapping[int, Tensor]] | None = None,
    batch_size: int = 4096,
    ce_samples: int = 64,
    progress: bool = True,
    seed: int = 0,
) -> list[Evaluation]:
    """Evaluate SAEs, of one or several layers, in one pass over held-out text.

    Correlations are measured on batches of tokens with the pair settings of each SAE's config and averaged. The
    cross-entropies are measured with the activations untouched, with the SAE's reconstruction in their place, and with
    zeros. Only the positions that an SAE is trained on are replaced: BOS, padding and sinks keep their activations. The
    same contexts and seed give the same figures.

    Args:
        saes: each with its `layer` in its config, where `capture` reads several.
        capture: the language model at all of these layers; None: no cross-entropies, and `batches` are needed.
        contexts: held-out text.
        batches: activations by layer, (B, d_in) each, where they need not be computed again.
        batch_size: tokens of a batch.
        ce_samples: contexts that the cross-entropies are measured on; 0: not at all.
        progress: whether to show bars.
        seed: of the order of the contexts and of the tokens.

    Raises:
        SelOrthoError: no contexts, no tokens left to measure, or an SAE of another width than the language model.
    """
    if not contexts:
        raise SelOrthoError("no held-out contexts to evaluate on: use more text or a larger held-out fraction")
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [contexts[i] for i in order]
    with torch.inference_mode():
        if batches is None:
            assert capture is not None
            batches = _token_batches(capture, shuffled, batch_size, seed, progress)
        running = [_FeatureMetrics(sae, batch_size) for sae in saes]
        for batch in batches:
            for metrics in running:
                metrics.add(batch)
        evaluations = [metrics.result(len(contexts)) for metrics in running]
        if capture is not None:
            losses = _measure_cross_entropy(saes, capture, shuffled[:ce_samples], progress)
            for evaluation, loss in zip(evaluations, losses, strict=True):
                evaluation.metrics.update(loss)
    return [Evaluation(_defined(evaluation.metrics), evaluation.arrays) for evaluation in evaluations]


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


def _token_batches(
    capture: ActivationCapture, contexts: Sequence[Context], batch_size: int, seed: int, progress: bool
) -> Iterator[dict[int, Tensor]]:
    """Activations (batch_size, d_in) of the kept tokens by layer, mixed over pools of several batches; the last may be
    shorter."""
    generator = torch.Generator().manual_seed(seed)
    rest: list[dict[int, Tensor]] = []
    with Bar("evaluating", total=len(contexts), unit="context", disable=not progress) as bar:
        for group in _groups(contexts, _POOL_BATCHES * batch_size):
            parts = rest + [captured.by_layer for captured in capture.capture_batches(group)]
            bar.update(len(group))
            pool = {layer: torch.cat([part[layer] for part in parts]) for layer in capture.layers}
            tokens = len(pool[capture.layers[0]])
            mixed = torch.randperm(tokens, generator=generator)
            pool = {layer: held[mixed.to(held.device)] for layer, held in pool.items()}
            full = tokens // batch_size * batch_size
            rest = [{layer: held[full:] for layer, held in pool.items()}] if full < tokens else []
            for start in range(0, full, batch_size):
                yield {layer: held[start : start + batch_size] for layer, held in pool.items()}
    yield from rest


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


class _FeatureMetrics:
    """Running metrics of one SAE, and the correlation histogram of the first batch."""

    def __init__(self, sae: SelOrthoSAE, batch_size: int) -> None:
        self.sae = sae
        self.reconstruction, self.sparsity = Reconstruction(), Sparsity()
        config = sae.config
        self.correlations = Correlations(batch_size, config.pair_fraction, config.min_support, config.correlation)
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, batch: Mapping[int, Tensor]) -> None:
        x = self.sae.center(batch[layer_of(self.sae, tuple(batch))].to(self.sae.device).float())  # (B, d_in)
        h = self.sae.encode(x)  # (B, d_sae)
        self.reconstruction += Reconstruction.of(x, self.sae.decode(h))
        self.sparsity += Sparsity.of(h)
        self.correlations += h
        if not self.arrays and len(h):
            config = self.sae.config
            histogram = correlation_histogram(h, min_support=config.min_support, correlation=config.correlation)
            self.arrays["correlation_counts"] = histogram.counts.numpy()
            self.arrays["correlation_edges"] = histogram.edges.numpy()
            self.arrays["correlation_features"] = np.array([histogram.features, histogram.eligible_features])

    def result(self, samples: int) -> Evaluation:
        """The figures of everything added, of so many contexts."""
        tokens = self.sparsity.tokens
        if tokens == 0:
            raise SelOrthoError("no held-out token is left once special and sink tokens are dropped: use longer texts")
        metrics = {"samples": samples, "tokens": tokens} | self.reconstruction.figures() | self.sparsity.figures()
        metrics |= self.correlations.figures()
        cosines = max_decoder_cosine(self.sae.W_dec).cpu().numpy()
        metrics["max_decoder_cosine"] = float(cosines.mean())
        arrays = self.arrays | {
            "correlation_threshold": np.array(self.correlations.summaries[0].threshold),
            "feature_density": self.sparsity.density.cpu().numpy(),
            "max_decoder_cosine": cosines,
        }
        return Evaluation(metrics, arrays)


def layer_of(sae: SelOrthoSAE, layers: Sequence[int]) -> int:
    """Which of the layers the SAE reads; the only one where its config says none of them."""
    wanted = sae.config.layer
    if wanted is not None and wanted in layers:
        return wanted
    (layer,) = layers
    return layer


def _measure_cross_entropy(
    saes: Sequence[SelOrthoSAE], capture: ActivationCapture, contexts: Sequence[Context], progress: bool
) -> list[Figures]:
    contexts = [c for c in contexts if len(c.input_ids) > 1]
    if not contexts:
        return [{} for _ in saes]
    totals = [LossRecovered() for _ in saes]
    sites = [capture.at(layer_of(sae, capture.layers)) for sae in saes]
    lm = capture.lm.model
    batch_tokens = _LOGITS_BYTES // (capture.lm.vocabulary * lm.dtype.itemsize)
    pad_id = capture.lm.pad_id
    with Bar("cross-entropy", total=len(contexts), unit="context", disable=not progress) as bar:
        for numbers in length_batches(contexts, batch_tokens):
            tokens = pad_batch([contexts[number] for number in numbers], pad_id)
            clean = next_token_losses(capture, *tokens)
            ablated: dict[int, Tensor] = {}  # the same for all SAEs of a layer
            for number, (sae, site) in enumerate(zip(saes, sites, strict=True)):
                if site.layer not in ablated:
                    ablated[site.layer] = _spliced_losses(site, *tokens, torch.zeros_like)
                spliced = _spliced_losses(site, *tokens, _reconstruction_of(sae))
                totals[number] += LossRecovered.of(clean, spliced, ablated[site.layer])
            bar.update(len(numbers))
    return [{"ce_samples": len(contexts)} | total.figures() for total in totals]


def _reconstruction_of(sae: SelOrthoSAE) -> Callable[[Tensor], Tensor]:
    return lambda x: sae.decode(sae.encode(x.to(sae.device).float()))


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


def _defined(metrics: Figures) -> Figures:
    """Without NaN and infinity, which JSON does not have."""
    undefined = [name for name, value in metrics.items() if not math.isfinite(value)]
    if undefined:
        logger.warning("left out of the metrics, as this data does not define them: %s", ", ".join(undefined))
    return {name: value for name, value in metrics.items() if name not in undefined}
