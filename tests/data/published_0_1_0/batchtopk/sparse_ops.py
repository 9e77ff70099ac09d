"""Exact encoder and decoder arithmetic on the non-zero feature activations of a batch.

`h = act(x W_enc + b_enc)`, `x_hat = h W_dec + b_dec` with `h` (B, n) mostly zeros. Only the encoder's product needs
every entry of `h`; decoding and all four gradients need the active ones alone:

    x_hat     = sum over active (t, i) of h_ti W_dec_i          CSR times dense
    dL/dh_ti  = <dL/dx_hat_t, W_dec_i>, at active (t, i)        sampled product
    dL/dW_dec = h^T dL/dx_hat                                   CSR times dense
    dL/dW_enc = x^T dL/dz, dL/dz zero where not active          CSR times dense

No intermediate is larger than `(B, d_in)`, `(n, d_in)` or one chunk of pre-activations.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

with warnings.catch_warnings():  # said once a process: CSR tensors may lack features; our tests cover those used here
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()


class FeatureOrder(NamedTuple):
    """The active entries sorted by feature, then by token (CSC)."""

    offsets: Tensor  # (n + 1,) entries of feature i are offsets[i] to offsets[i + 1]
    rows: Tensor  # (nnz,) token of each entry
    order: Tensor  # (nnz,) where the entry lies in the order by token
    cols: Tensor  # (nnz,) feature of each entry


@dataclass(frozen=True)
class ActiveFeatures:
    """Non-zero feature activations of a batch of B tokens, sorted by token (CSR).

    Entries may be zero: a pattern can be wider than what fired. The features of a token may stand in any order, but for
    [`sparse_decode`] with groups they rise. `values` may require a gradient.
    """

    crow: Tensor  # (B + 1,) int64, entries of token t are crow[t] to crow[t + 1]
    cols: Tensor  # (nnz,) int64, feature of each entry
    values: Tensor  # (nnz,) activations
    n: int  # number of features

    @property
    def tokens(self) -> int:
        """Number of tokens B."""
        return len(self.crow) - 1

    @property
    def density(self) -> float:
        """Share of the `B n` activations that are entries."""
        return len(self.cols) / max(1, self.tokens * self.n)

    @cached_property
    def rows(self) -> Tensor:
        """Token of each entry, (nnz,)."""
        counts = self.crow[1:] - self.crow[:-1]
        return torch.repeat_interleave(
            torch.arange(self.tokens, device=self.cols.device), counts, output_size=len(self.cols)
        )

    @cached_property
    def by_feature(self) -> FeatureOrder:
        """The same entries sorted by feature."""
        small = torch.int16 if self.n <= 1 << 15 else torch.int32  # a radix sort: half the bytes, half the time
        cols, order = self.cols.to(small).sort(stable=True)
        offsets = self.crow.new_zeros(self.n + 1)
        torch.cumsum(torch.bincount(self.cols, minlength=self.n), 0, out=offsets[1:])
        return FeatureOrder(offsets, self.rows[order], order, cols.long())

    @cached_property
    def values_by_feature(self) -> Tensor:
        """The values in the order of `by_feature`, (nnz,)."""
        return self.values[self.by_feature.order]

    def matrix(self) -> Tensor:
        """The activations as a CSR tensor, (B, n)."""
        return csr(self.crow, self.cols, self.values, (self.tokens, self.n))

    def transposed(self) -> Tensor:
        """The activations as a CSR tensor, (n, B)."""
        return self.feature_rows(0, self.n)

    def feature_rows(self, start: int, stop: int) -> Tensor:
        """Features start to stop as the rows of a CSR tensor, (stop - start, B)."""
        offsets, rows = self.by_feature.offsets, self.by_feature.rows
        first, last = int(offsets[start]), int(offsets[stop])
        values = self.values_by_feature[first:last]
        return csr(offsets[start : stop + 1] - first, rows[first:last], values, (stop - start, self.tokens))

    def feature_columns(self, start: int, stop: int) -> Tensor:
        """Features start to stop as the columns of an ordinary tensor, (B, stop - start)."""
        offsets, rows, _, cols = self.by_feature
        first, last = int(offsets[start]), int(offsets[stop])
        width = stop - start
        block = self.values.new_zeros(self.tokens * width)
        place = torch.add(cols[first:last] - start, rows[first:last], alpha=width)
        return block.scatter_(0, place, self.values_by_feature[first:last]).view(-1, width)

    def with_values(self, values: Tensor) -> ActiveFeatures:
        """Other values (nnz,) at the same entries."""
        other = replace(self, values=values)
        for name in ("rows", "by_feature"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def detach(self) -> ActiveFeatures:
        """The same entries without gradient."""
        return self.with_values(self.values.detach())

    def sum_by_feature(self, values: Tensor) -> Tensor:
        """Sum over tokens of `values` (nnz,), given at the entries: (n,)."""
        return values.new_zeros(self.n).index_add_(0, self.cols, values)

    def to_dense(self) -> Tensor:
        """The activations as an ordinary tensor, (B, n)."""
        dense = self.values.new_zeros(self.tokens, self.n)
        return dense.index_put_((self.rows, self.cols), self.values)


def active_features(h: Tensor) -> ActiveFeatures:
    """The non-zero entries of feature activations `h` (B, n)."""
    flat = (h != 0).flatten().nonzero()[:, 0]
    rows = flat // max(1, h.shape[1])
    return ActiveFeatures(
        crow=row_offsets(torch.bincount(rows, minlength=len(h))),
        cols=flat - rows * h.shape[1],
        values=h.flatten()[flat],
        n=h.shape[1],
    )


def row_offsets(counts: Tensor) -> Tensor:
    """CSR offsets (rows + 1,) from the number of entries of each row (rows,)."""
    offsets = counts.new_zeros(len(counts) + 1, dtype=torch.int64)
    offsets[1:] = counts.cumsum(0)
    return offsets


def csr(crow: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR tensor whose parts are known to fit."""
    return torch.sparse_csr_tensor(crow, cols, values, shape, check_invariants=False)


def times_dense(left: Tensor, right: Tensor) -> Tensor:
    """A CSR tensor (a, b) times an ordinary one (b, c).

    `left @ right` would fill its result with zeros and copy it once more, which takes as long as the product.
    """
    result = right.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(result, left, right, beta=0, out=result)


def sparse_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, active: ActiveFeatures, gain: Tensor | None = None
) -> Tensor:
    """Give the activations of `active` the gradient of `h_ti = <x_t, W_enc_:i> + b_enc_i`; values (nnz,).

    Args:
        x: (B, d_in), without gradient. W_enc: (d_in, n). b_enc: (n,).
        active: what [`sparse_ops.active_features`] or an activation function chose, computed from the same tensors.
        gain: derivative of the activation at each entry (nnz,); None: 1 where the value is positive, else 0.
    """
    return _Encode.apply(x, W_enc, b_enc, active, gain)


def sparse_decode(active: ActiveFeatures, W_dec: Tensor, groups: Tensor | None = None) -> Tensor:
    """`h W_dec` from the active entries: (B, d_in), with gradients to `active.values` and `W_dec` (n, d_in).

    With `groups`, the rising ends of ranges of features (G,), the last of them n, the parts of the sum that belong to
    each range stand apart: (B, G, d_in).
    """
    return _Decode.apply(active.values, W_dec, active, groups)


class _Encode(torch.autograd.Function):
    """Identity on the values; the gradient reaches the encoder from the active entries alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: ActiveFeatures, gain: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.active, ctx.gain = active, gain
        return active.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        active = ctx.active
        gain = (active.values > 0) if ctx.gain is None else ctx.gain
        dz = active.with_values(grad * gain)
        # the gradient comes out as (n, d_in); a parameter that is stored in this order takes it without a copy
        dW = times_dense(dz.transposed(), x.to(grad.dtype)) if ctx.needs_input_grad[1] else None
        db = dz.sum_by_feature(dz.values)
        return None, None if dW is None else dW.T.to(W_enc.dtype), db.to(W_enc.dtype), None, None


class _Decode(torch.autograd.Function):
    """CSR times dense; its gradients are a sampled product and CSR times dense."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, active: ActiveFeatures, groups: Tensor | None) -> Tensor:
        ctx.save_for_backward(W_dec)
        active = active.with_values(values.detach())
        ctx.active, ctx.shape = active, (active.tokens, -1)
        if groups is not None:
            ctx.active, ctx.shape = _split_tokens(active, groups), (active.tokens, len(groups), -1)
        return times_dense(ctx.active.matrix(), W_dec.to(values.dtype)).view(*ctx.shape[:-1], W_dec.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (W_dec,) = ctx.saved_tensors
        active: ActiveFeatures = ctx.active
        flat = grad.reshape(active.tokens, -1).to(active.values.dtype)
        dvalues = dW = None
        if ctx.needs_input_grad[0]:
            dvalues = sampled_product(active, flat, W_dec.to(flat.dtype))
        if ctx.needs_input_grad[1]:
            dW = times_dense(active.transposed(), flat).to(W_dec.dtype)
        return dvalues, dW, None, None


def sampled_product(active: ActiveFeatures, left: Tensor, right: Tensor) -> Tensor:
    """`<left_t, right_i>` at every entry (t, i): left (B, d), right (n, d) -> (nnz,)."""
    pattern = csr(active.crow, active.cols, active.values, (active.tokens, active.n))
    return torch.sparse.sampled_addmm(pattern, left.contiguous(), right.T, beta=0.0).values()


def _split_tokens(active: ActiveFeatures, groups: Tensor) -> ActiveFeatures:
    """Each token as G rows, one for each range of features."""
    row = active.rows * len(groups) + torch.searchsorted(groups, active.cols, right=True)
    crow = row_offsets(torch.bincount(row, minlength=active.tokens * len(groups)))
    return ActiveFeatures(crow, active.cols, active.values, active.n)


def as_float(h: Tensor) -> Tensor:
    """Activations in float32, or float64 if they are."""
    return h if h.dtype == torch.float64 else h.float()
