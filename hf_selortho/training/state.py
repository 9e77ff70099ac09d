"""What a training run counts, and what it reports of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE
from ..pair_selection import CoactivationEMA, Pairs, select_pairs
from ..process_group import ProcessGroup
from ..sparse_ops import FeatureActivations


@dataclass
class GradientShare:
    """Holds the penalty's gradient at a fixed share of the reconstruction's: `|g_penalty| = share |g_reconstruction|`.

    The coefficient moves in log space towards the one that would have met the share, by `rate` of the way.
    """

    coefficient: float
    share: float
    rate: float = 0.2
    low: float = 1e-6
    high: float = 1e3

    def update(self, penalty_norm: float, reconstruction_norm: float) -> None:
        """Move by gradient norms measured with the current coefficient; 0, NaN and infinity tell nothing."""
        if 0 < penalty_norm < math.inf and 0 < reconstruction_norm < math.inf:
            distance = math.log(self.share) + math.log(reconstruction_norm) - math.log(penalty_norm)
            self.coefficient = min(self.high, max(self.low, self.coefficient * math.exp(self.rate * distance)))


@dataclass
class TrainState:
    """Counters of a run; everything here goes into a checkpoint."""

    tokens_since_fired: Tensor  # (d_sae,) int64, as seen by this process
    step: int = 0
    tokens: int = 0  # drawn from the buffers of all processes
    pairs: Pairs | None = field(default=None, repr=False)  # of the latest selection
    carried: CoactivationEMA | None = field(default=None, repr=False)  # co-activations of earlier batches
    controller: GradientShare | None = None  # steers the penalty's coefficient
    skipped: int = 0  # steps that were not taken, as something was not finite

    def count(self, features: FeatureActivations, tokens: int) -> None:
        """Count a batch: feature activations (B, d_sae) of this process, `tokens` over all processes."""
        self.tokens += tokens
        self.tokens_since_fired += tokens
        self.tokens_since_fired[features.fired()] = 0

    def dead(self, after_tokens: int, group: ProcessGroup) -> Tensor:
        """Return the features that fired in no process for `after_tokens` tokens, (d_sae,) bool."""
        return group.minimum(self.tokens_since_fired) >= after_tokens

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps of this process: tensors, and JSON-able counters."""
        tensors = {"tokens_since_fired": self.tokens_since_fired}
        if self.pairs is not None:
            tensors |= {f"pairs.{name}": getattr(self.pairs, name) for name in ("i", "j", "correlation")}
        if self.carried is not None:
            tensors |= {f"carried.{name}": value for name, value in self.carried.state_dict().items()}
        coefficient = None if self.controller is None else self.controller.coefficient
        return tensors, {
            "step": self.step, "tokens": self.tokens, "skipped": self.skipped, "coefficient": coefficient,
        }  # fmt: skip

    def load_state_dict(self, tensors: dict[str, Tensor], counters: dict[str, Any], config: SelOrthoConfig) -> None:
        """Go on from a [`state_dict`] of a run of the same settings."""
        moved = {name: value.to(self.tokens_since_fired.device) for name, value in tensors.items()}
        self.tokens_since_fired = moved["tokens_since_fired"]
        if "pairs.i" in moved:
            self.pairs = Pairs(moved["pairs.i"], moved["pairs.j"], moved["pairs.correlation"])
        if carried := {name.removeprefix("carried."): moved[name] for name in moved if name.startswith("carried.")}:
            self.carried = CoactivationEMA.of_config(config)
            self.carried.load_state_dict(carried)
        self.step, self.tokens, self.skipped = counters["step"], counters["tokens"], counters["skipped"]
        if self.controller is not None:
            self.controller.coefficient = counters["coefficient"]


@torch.no_grad()
def step_report(
    sae: SelOrthoSAE, activations: Tensor, output: SelOrthoOutput, pairs: Pairs | None, group: ProcessGroup
) -> dict[str, float | None]:
    """Return figures of a batch (B, d_in), averaged over the processes.

    Correlations are those of `pairs`, the latest selection, or of one made for the report.
    """
    assert output.losses is not None and output.loss is not None and output.reconstruction is not None
    h = output.features.detach()
    variance = (activations - activations.mean(0)).square().sum(1).mean()
    error = (output.reconstruction - activations).square().sum(1).mean()
    config = sae.config
    if pairs is None:
        pairs = select_pairs(h, config.pair_fraction, config.min_support, config.correlation, group=group)
    strength = pairs.correlation.abs()
    figures = {
        "loss": output.loss.item(),
        **{name: term.item() for name, term in output.losses.items()},
        "fvu": (error / variance).item(),
        "l0": h.l0(),
        "peak_correlation": float(strength.max()) if len(pairs) else None,
        "top_correlation": float(strength.mean()) if len(pairs) else None,
        "selected_pairs": len(pairs),
        "unique_features": len(torch.cat([pairs.i, pairs.j]).unique()),
    }
    if group.size == 1:  # whole numbers stay whole
        return figures
    known = {name: value for name, value in figures.items() if value is not None}
    means = group.sum(torch.tensor(list(known.values()), device=activations.device)) / group.size
    return {**figures, **dict(zip(known, means.tolist(), strict=True))}


def pair_churn(pairs: Pairs | None, previous: Pairs | None, d_sae: int) -> float | None:
    """Return the share of selected pairs that the selection before did not hold; None if there is none to compare."""
    if pairs is None or previous is None or len(pairs) == 0:
        return None
    return 1 - float(torch.isin(pairs.keys(d_sae), previous.keys(d_sae)).float().mean())
