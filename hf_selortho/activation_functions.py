"""Activation functions of the encoder, `h = act(z)` with `z = x W_enc + b_enc`.

- relu: `max(z, 0)`.
- topk: the k largest of each token (Gao et al. 2024).
- batchtopk: the `B k` largest of a training batch (Bussmann et al. 2024); what exceeds a fixed threshold at inference.
- jumprelu: `z` where `z > threshold_i`, thresholds learned through straight-through estimators (Rajamanoharan et al.
  2024): `dh/dthreshold = -(threshold / eps) K((z - threshold) / eps)`, `dL0/dthreshold = -(1 / eps) K(...)`, `K` the
  rectangle of width 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def activate(
    kind: str, z: Tensor, k: int | None = None, threshold: Tensor | None = None, bandwidth: float = 0.05
) -> Tensor:
    """Apply an activation function to pre-activations `z` (..., n), as at inference.

    Args:
        kind: "relu", "topk", "batchtopk" or "jumprelu". z: may be overwritten.
        k: of topk. threshold: () of batchtopk, (n,) of jumprelu. bandwidth: `eps` of jumprelu.
    """
    if kind == "relu":
        return torch.relu_(z)  # (B, n) is large, and nobody else has z
    if kind == "topk":
        assert k is not None
        values, indices = torch.relu(z).topk(k, dim=-1, sorted=False)
        return torch.zeros_like(z).scatter(-1, indices, values)
    assert threshold is not None
    if kind == "jumprelu":
        return JumpReLU.apply(z, threshold, bandwidth)[0]
    return torch.where(z > threshold, z, 0)


class JumpReLU(torch.autograd.Function):
    """`z` where `z > threshold`, and how many of them, with the estimators of the module's docstring.

    `z` is (..., n) for thresholds (n,), or, with `cols` (m,), holds the entries (m,) of these features.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, cols: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, threshold, cols)
        ctx.bandwidth = bandwidth
        above = z > (threshold if cols is None else threshold[cols])
        return z * above, above.sum().to(threshold.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_fired: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold, cols = ctx.saved_tensors
        own = threshold if cols is None else threshold[cols]
        near = ((z - own).abs() < ctx.bandwidth / 2).to(own.dtype)
        per_entry = near * (own * grad + grad_fired)
        if cols is None:
            summed = per_entry.flatten(0, -2).sum(0)
        else:
            summed = per_entry.new_zeros(len(threshold)).index_add_(0, cols, per_entry)
        return grad * (z > own), -summed / ctx.bandwidth, None, None
