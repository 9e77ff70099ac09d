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

try:  # this file also lives on the Hub, without the package
    from hf_selortho.errors import NonFiniteError, SelOrthoError
except ImportError:
    NonFiniteError = SelOrthoError = ValueError  # type: ignore[assignment, misc]


def floats_of(
    value: Any, what: str, axes: int | None = None, like: Tensor | None = None, finite: bool = False
) -> Tensor:
    """Take floating-point numbers as a tensor; lists and NumPy arrays become one. Only `finite` looks at the numbers.

    Args:
        value: what was given. what: its name in an error.
        axes: how many it must have; default: any but none.
        like: a tensor on whose device it must be; what is no tensor is put there.
        finite: refuse NaN and infinity.

    Raises:
        NonFiniteError: the numbers are to be finite and are not.
        SelOrthoError: it is something else, holds integers, or is on another device.
    """
    tensor = value
    if not isinstance(value, Tensor):
        try:
            if isinstance(value, list | tuple) and value and hasattr(value[0], "__array__"):
                value = [torch.as_tensor(row) for row in value]
                tensor = torch.stack(value)
            elif isinstance(value, list | tuple) or hasattr(value, "__array__"):
                tensor = torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            tensor = value
        if not isinstance(tensor, Tensor):
            raise SelOrthoError(f"{what}: got {named(value)}, expected a tensor, a NumPy array or lists of numbers")
        tensor = tensor if like is None else tensor.to(like.device)
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        remedy = "token ids are no activations" if not tensor.is_complex() else "take its real part"
        raise SelOrthoError(f"{what}: got {kind}, expected dense floating-point numbers, as of x.float(); {remedy}")
    if tensor.ndim == 0 or tensor.ndim != (axes or tensor.ndim):
        expected = {None: "(..., width)", 1: "(n,)", 2: "two axes, such as (tokens, features)"}[axes]
        raise SelOrthoError(f"{what} has shape {tuple(tensor.shape)}: expected {expected}")
    if like is not None and tensor.device != like.device:
        raise SelOrthoError(f"{what} on {tensor.device}: expected {like.device}, as of x.to({str(like.device)!r})")
    if finite and not torch.compiler.is_compiling() and not tensor.isfinite().all():
        rows = (~tensor.reshape(-1, tensor.shape[-1]).isfinite().all(1)).nonzero()[:, 0]
        raise NonFiniteError(
            f"{what} hold NaN or infinity in {len(rows)} of {tensor.shape[:-1].numel()} rows, the first is number "
            f"{int(rows[0])}: expected finite numbers; look for the batch or the weight they came from"
        )
    return tensor


def named(value: Any) -> str:
    """Write a value with its type for an error, short."""
    if value is None or type(value) in (int, float):
        return str(value)
    plain = isinstance(value, str | bytes | bool | complex)
    return f"{value!r:.60} ({type(value).__name__})" if plain else f"an object of type {type(value).__name__}"


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
