"""The figures of a training step, which go into metrics.jsonl."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE
from ..pair_selection import Pairs, select_pairs
from ..process_group import ProcessGroup


@torch.no_grad()
def step_report(
    sae: SelOrthoSAE, target: Tensor, output: SelOrthoOutput, pairs: Pairs | None, group: ProcessGroup
) -> dict[str, float | None]:
    """Return figures of a batch whose reconstruction is that of `target` (B, d_out), averaged over the processes.

    Correlations are those of `pairs`, the latest selection, or of one made for the report.
    """
    assert output.losses is not None and output.loss is not None and output.reconstruction is not None
    h = output.features.detach()
    variance = (target - target.mean(0)).square().sum(1).mean()
    error = (output.reconstruction - target).square().sum(1).mean()
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
    means = group.sum(torch.tensor(list(known.values()), device=target.device)) / group.size
    return {**figures, **dict(zip(known, means.tolist(), strict=True))}


def pair_churn(pairs: Pairs | None, previous: Pairs | None, d_sae: int) -> float | None:
    """Return the share of selected pairs that the selection before did not hold; None if there is none to compare."""
    if pairs is None or previous is None or len(pairs) == 0:
        return None
    return 1 - float(torch.isin(pairs.keys(d_sae), previous.keys(d_sae)).float().mean())
