"""The gradient of a sum of squared correlations, in closed form: at every activation, or at the active ones alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .pair_scores import FeatureNorms
from .pair_sums import occurring_features, token_chunks
from .sparse_ops import ActiveFeatures, as_float, csr, row_offsets, times_dense


class Operator:
    """The symmetric matrix `S` (n, n) with which the gradient of `sum_T w_ij c_ij^2` is `2 h S`.

    With `u_i = h_i / |h_i|` the gradient is `2 (sum_j w_ij c_ij u_j - u_i sum_j w_ij c_ij^2) / |h_i|`, that is
    `S_ij = w_ij c_ij / (|h_i| |h_j|)`, `S_ii = -sum_j w_ij c_ij^2 / |h_i|^2`. It holds for centred activations too:
    the gradient then sums to zero over the batch.
    """

    def __init__(self, matrix: Tensor, norms: FeatureNorms, features: Tensor | None = None) -> None:
        self.matrix = matrix  # (n, n), or (U, U) of the features that occur in pairs
        self.features = features  # (U,) rising, None: all
        self.mean = norms.mean

    @classmethod
    def of_pairs(cls, i: Tensor, j: Tensor, c: Tensor, weighted: Tensor, norms: FeatureNorms) -> Operator:
        features, number = occurring_features(i, j, len(norms.squares))
        inverse = norms.inverse[features]
        a, b = number[i], number[j]
        scaled = weighted * inverse[a] * inverse[b]
        diagonal = torch.zeros_like(inverse).index_add_(0, a, weighted * c).index_add_(0, b, weighted * c)
        own = torch.arange(len(features), device=i.device)
        rows, order = torch.cat([a, b, own]).int().sort(stable=True)  # a radix sort; within a row any order will do
        cols = torch.cat([b, a, own])[order]
        entries = torch.cat([scaled, scaled, -diagonal * inverse.square()])[order]
        crow = row_offsets(torch.bincount(rows, minlength=len(features)))
        return cls(csr(crow, cols, entries, (len(features), len(features))), norms, features)

    def of(self, h: Tensor) -> Tensor:
        """`h S` of a dense matrix (B, n), centred for Pearson."""
        features = self.features
        part = as_float(h if features is None else h[:, features])
        if self.mean is not None:
            part = part - (self.mean if features is None else self.mean[features])
        product = (self.matrix @ part.T.contiguous()).T  # (B, U); the operator is symmetric
        if features is None:
            return product
        return torch.zeros(h.shape, dtype=product.dtype, device=h.device).index_copy_(1, features, product)

    def at_active(self, h: ActiveFeatures) -> Tensor:
        """`h S` at the active entries of `h` alone, (nnz,)."""
        gradient = torch.zeros_like(h.values)
        assert self.features is not None  # the full penalty works on dense activations
        shift = None if self.mean is None else self.matrix @ self.mean[self.features][:, None]  # (U, 1)
        for block, entries, places in token_chunks(h, self.features):
            product = times_dense(self.matrix, block)  # (U, tokens)
            if shift is not None:
                product -= shift
            gradient[entries] = product.view(-1)[places]
        return gradient


class DensePenalty(torch.autograd.Function):
    """A penalty whose value is known, and whose gradient to `h` (B, n) is `scale * h S`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, value: Tensor, operator: Operator, scale: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.operator, ctx.scale = operator, scale
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            gradient = ctx.operator.of(h)
        return gradient.mul_(ctx.scale * grad).to(h.dtype), None, None, None


class SparsePenalty(torch.autograd.Function):
    """The same for the values of the active entries."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, h: ActiveFeatures, value: Tensor, operator: Operator, scale: float) -> Tensor:
        ctx.h, ctx.operator, ctx.scale = h, operator, scale
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.operator.at_active(ctx.h).mul_(ctx.scale * grad), None, None, None, None
