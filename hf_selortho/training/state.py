"""What a training run counts, and what it reports of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE
from ..pair_selection import CoactivationEMA, Pairs, select_pairs
from ..process_group import SINGLE_PROCESS, ProcessGroup
from ..sparse_ops import FeatureActivations
from .budget import FVUBudget, GradientShare

Controller = GradientShare | FVUBudget


@dataclass
class TrainState:
    """Counters of a run; everything here goes into a checkpoint."""

    tokens_since_fired: Tensor  # (d_sae,) int64, as seen by this process
    step: int = 0
    tokens: int = 0  # drawn from the buffers of all processes
    pairs: Pairs | None = field(default=None, repr=False)  # of the latest selection
    carried: CoactivationEMA | None = field(default=None, repr=False)  # co-activations of earlier batches
    controller: Controller | None = None  # steers the penalty's coefficient
    skipped: int = 0  # steps that were not taken, as something was not finite

    def count(self, features: FeatureActivations, tokens: int) -> None:
        """Count a batch: feature activations (B, d_sae) of this process, `tokens` over all processes."""
        self.tokens += tokens
        self.tokens_since_fired += tokens
        self.tokens_since_fired[features.fired()] = 0

    def dead(self, after_tokens: int, group: ProcessGroup) -> Tensor:
        """Features that fired in no process for `after_tokens` tokens, (d_sae,) bool."""
        since = self.tokens_since_fired
        return group.minimum(since) >= after_tokens


def learning_rate_at(step: int, *, peak: float, steps: int, warmup: float = 0, decay: float = 0) -> float:
    """Learning rate of step `step` (counted from 1): linear warm-up, constant, linear decay that ends at step `steps`.

    `warmup` and `decay` are numbers of steps, or shares of `steps` if below 1.
    """
    warmup = warmup * steps if warmup < 1 else warmup
    decay = decay * steps if decay < 1 else decay
    rising = min(1.0, step / warmup) if warmup else 1.0
    falling = min(1.0, (steps - step + 1) / decay) if decay else 1.0
    return peak * rising * falling


@torch.no_grad()
def step_report(
    sae: SelOrthoSAE,
    activations: Tensor,
    output: SelOrthoOutput,
    pairs: Pairs | None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float | None]:
    """Figures of one batch (B, d_in); correlations are those of the latest selection, or of one made for the report."""
    assert output.losses is not None and output.loss is not None and output.reconstruction is not None
    h = output.features.detach()
    variance = (activations - activations.mean(0)).square().sum(1).mean()
    error = (output.reconstruction - activations).square().sum(1).mean()
    config = sae.config
    if pairs is None:
        pairs = select_pairs(h, config.pair_fraction, config.min_support, config.correlation, group=group)
    strength = pairs.correlation.abs()
    return {
        "loss": output.loss.item(),
        **{name: term.item() for name, term in output.losses.items()},
        "fvu": (error / variance).item(),
        "l0": h.l0(),
        "peak_correlation": float(strength.max()) if len(pairs) else None,
        "top_correlation": float(strength.mean()) if len(pairs) else None,
        "selected_pairs": len(pairs),
        "unique_features": len(torch.cat([pairs.i, pairs.j]).unique()),
    }


def pair_churn(pairs: Pairs | None, previous: Pairs | None, d_sae: int) -> float | None:
    """Share of the selected pairs that the selection before did not hold; None where there is nothing to compare."""
    if pairs is None or previous is None or len(pairs) == 0:
        return None
    return 1 - float(torch.isin(pairs.keys(d_sae), previous.keys(d_sae)).float().mean())
