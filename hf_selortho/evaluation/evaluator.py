"""Measures trained SAEs on held-out text: on the activations themselves and inside the language model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..language_models.contexts import Context
from ..modeling_selortho import SelOrthoSAE
from ..utils.progress import Bar
from .metrics import (
    Correlations,
    Reconstruction,
    Sparsity,
    correlation_histogram,
    max_decoder_cosine,
)
from .replacement import defined, layer_of, measure_cross_entropy

logger = logging.getLogger(__name__)

# Batches are cut from a shuffled pool, since correlations within a batch depend on how many documents it draws from:
# this many come from several hundred contexts (training mixes 2048). In bfloat16 they take 150 MB for Gemma 2 2B.
_POOL_BATCHES = 8


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
    batches: Iterable[Mapping[int, Tensor | tuple[Tensor, Tensor]]] | None = None,
    batch_size: int = 4096,
    ce_samples: int = 64,
    progress: bool = True,
    seed: int = 0,
) -> list[Evaluation]:
    """Evaluate SAEs, of one or several layers, in one pass over held-out text.

    Correlations are measured on batches of tokens with the pair settings of each SAE's config and averaged. The
    cross-entropies are measured with the activations untouched, with the SAE's reconstruction in their place (a
    transcoder's in the place of its target), and with zeros. Only the positions that an SAE is trained on are replaced:
    BOS, padding and sinks keep their activations. The same contexts and seed give the same figures.

    Args:
        saes: each with its `layer` in its config, where `capture` reads several.
        capture: the language model at all of these layers; None: no cross-entropies, and `batches` are needed.
        contexts: held-out text.
        batches: activations by layer, (B, d_in) each, where they need not be computed again; of transcoders, pairs of
            these and of what they are to become, (B, d_out).
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
            losses = measure_cross_entropy(saes, capture, shuffled[:ce_samples], progress)
            for evaluation, loss in zip(evaluations, losses, strict=True):
                evaluation.metrics.update(loss)
    return [Evaluation(defined(evaluation.metrics), evaluation.arrays) for evaluation in evaluations]


def _token_batches(
    capture: ActivationCapture, contexts: Sequence[Context], batch_size: int, seed: int, progress: bool
) -> Iterator[dict[int, Tensor | tuple[Tensor, Tensor]]]:
    """Activations (batch_size, d_in) of the kept tokens by layer, with a target pairs of these and of the target's,
    mixed over pools of several batches; the last may be shorter."""
    generator = torch.Generator().manual_seed(seed)
    rest: list[dict[tuple[int, str], Tensor]] = []

    def paired(batch: dict[tuple[int, str], Tensor]) -> dict[int, Tensor | tuple[Tensor, Tensor]]:
        layers, target = capture.layers, bool(capture.target_sites)
        return {n: (batch[n, "site"], batch[n, "target"]) if target else batch[n, "site"] for n in layers}

    with Bar("evaluating", total=len(contexts), unit="context", disable=not progress) as bar:
        for group in _groups(contexts, _POOL_BATCHES * batch_size):
            parts = list(rest)
            for captured in capture.capture_batches(group):
                kinds = {"site": captured.by_layer, "target": captured.targets}
                parts.append({(n, kind): rows for kind, held in kinds.items() for n, rows in held.items()})
            bar.update(len(group))
            pool = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            tokens = len(pool[capture.layers[0], "site"])
            mixed = torch.randperm(tokens, generator=generator)
            pool = {key: held[mixed.to(held.device)] for key, held in pool.items()}
            full = tokens // batch_size * batch_size
            rest = [{key: held[full:] for key, held in pool.items()}] if full < tokens else []
            for start in range(0, full, batch_size):
                yield paired({key: held[start : start + batch_size] for key, held in pool.items()})
    yield from map(paired, rest)


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

    def add(self, batch: Mapping[int, Tensor | tuple[Tensor, Tensor]]) -> None:
        read = batch[layer_of(self.sae, tuple(batch))]
        x, y = (tensor.to(self.sae.device).float() for tensor in (read if isinstance(read, tuple) else (read, read)))
        h = self.sae.encode(x)  # (B, d_sae)
        self.reconstruction += Reconstruction.of(self.sae.center(y), self.sae.center(self.sae.reconstruct(x, h)))
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
