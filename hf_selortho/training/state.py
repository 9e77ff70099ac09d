"""What a training run counts, and what it reports of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..decorrelation import BatchGroup, Pairs, select_pairs
from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE


@dataclass
class TrainState:
    """Counters of a run; everything here goes into a checkpoint."""

    tokens_since_fired: Tensor  # (d_sae,) int64, as seen by this process
    step: int = 0
    tokens: int = 0  # drawn from the buffers of all processes
    pairs: Pairs | None = field(default=None, repr=False)  # selected at the last step

    def count(self, feature_acts: Tensor, tokens: int) -> None:
        """Count a batch: feature activations (B, d_sae) of this process, `tokens` over all processes."""
        self.tokens += tokens
        self.tokens_since_fired += tokens
        self.tokens_since_fired[(feature_acts > 0).any(0)] = 0


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
    group: BatchGroup | None = None,
) -> dict[str, float | None]:
    """Figures of one batch (B, d_in); correlations are those of the selected pairs, whether penalised or not."""
    assert output.losses is not None and output.feature_acts is not None and output.loss is not None
    h = output.feature_acts
    x = sae.normalize_input(activations)
    variance = (x - x.mean(0)).square().sum(1).mean()
    config = sae.config
    pairs = output.pairs
    if pairs is None:
        pairs = select_pairs(h, config.pair_fraction, config.min_support, config.correlation, group=group)
    strength = pairs.correlation.abs()
    return {
        "loss": output.loss.item(),
        **{name: term.item() for name, term in output.losses.items()},
        "fvu": (output.losses["reconstruction"] / variance).item(),
        "l0": float((h > 0).sum(1).float().mean()),
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
