"""Penalties that others have proposed, for comparisons in the same training loop."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # features compared with a chunk at once


def ortsae_penalty(W_dec: Tensor, coefficient: float = 0.25, chunk: int = 8192, seed: int = 0) -> Tensor:
    """OrtSAE (arXiv 2509.22033): mean over features of the squared largest decoder cosine within a random chunk.

    Args:
        W_dec: decoder rows (n, d_in), of any norm.
        chunk: features compared with one another; the chunks are drawn anew for every `seed`.

    Returns:
        `coefficient * mean_i (max_j cos(W_i, W_j))^2`, with the gradient through the largest cosine of each feature.
    """
    order = torch.randperm(len(W_dec), generator=torch.Generator().manual_seed(seed)).to(W_dec.device)
    with torch.autocast(W_dec.device.type, enabled=False):
        unit = torch.nn.functional.normalize(W_dec.float() if W_dec.dtype != torch.float64 else W_dec, dim=1)
        nearest = torch.cat([part[_nearest(unit.detach()[part])] for part in order.split(chunk) if len(part) > 1])
        compared = order[: len(nearest)]  # a last chunk of a single feature has no neighbour
        cosine = (unit[compared] * unit[nearest]).sum(1)
        return coefficient * cosine.square().sum() / len(W_dec)


def _nearest(unit: Tensor) -> Tensor:
    """Of each row (m, d_in), the other row of largest cosine, (m,)."""
    found = []
    for start in range(0, len(unit), ROWS):
        cosine = unit[start : start + ROWS] @ unit.T  # (rows, m)
        own = torch.arange(len(cosine), device=unit.device)
        cosine[own, start + own] = -torch.inf
        found.append(cosine.argmax(1))
    return torch.cat(found)
