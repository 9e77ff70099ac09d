"""Feature activations of a batch, dense or as their non-zero entries, and exact arithmetic on the latter.

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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import floats_of

with warnings.catch_warnings():  # said once a process: CSR tensors may lack features; our tests cover those used here
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()

WIDENED_ELEMENTS = 1 << 22  # of a dense matrix that are converted to float32 at once
CHUNK_ELEMENTS = 1 << 21  # of the dense copy of some features on some tokens, in the cache if it can be
CHUNK_TOKENS = 512  # but no fewer tokens: for each chunk, all pairs are gone through


class _Features:
    values: Tensor

    def with_values(self: Any, values: Tensor) -> Any:
        """Replace the numbers, of the same shape."""
        return replace(self, values=values)

    def detach(self) -> Any:
        """Return the same activations without gradient."""
        return self.with_values(self.values.detach())

    def pattern(self) -> Any:
        """Return 1 where a feature fired, else 0."""
        return self.with_values((self.values != 0).to(self.values.dtype))

    def l0(self: Any) -> float:
        """Return the mean number of active features of a token."""
        return float((self.values > 0).sum()) / self.tokens


@dataclass(frozen=True)
class DenseFeatures(_Features):
    """Feature activations as an ordinary tensor; [`ActiveFeatures`] has the same methods."""

    values: Tensor  # (B, n)

    @property
    def n(self) -> int:
        """Number of features."""
        return self.values.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens B."""
        return len(self.values)

    def to_dense(self) -> Tensor:
        """Return an ordinary tensor (B, n)."""
        return self.values

    def to_active(self) -> ActiveFeatures:
        """Return the non-zero entries."""
        return active_features(self.values)

    def moments(self) -> Tensor:
        """Sum over tokens, for each feature: support, squares and values, (3, n), in float32 or wider."""
        h = self.values
        sums = torch.zeros(3, self.n, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        for chunk in h.split(max(1, WIDENED_ELEMENTS // max(1, self.n))):
            values = chunk.to(sums.dtype)
            sums[0] += values.sign().abs_().sum(0)
            sums[1] += torch.linalg.vecdot(values, values, dim=0)
            sums[2] += values.sum(0)
        return sums

    def squares_about(self, mean: Tensor) -> Tensor:
        """Sum `(h_ti - mean_i)^2` over tokens, (n,)."""
        squares = torch.zeros_like(mean)
        for chunk in self.values.split(max(1, WIDENED_ELEMENTS // max(1, self.n))):
            squares += (chunk.to(mean.dtype) - mean).square().sum(0)
        return squares

    def decode(self, W_dec: Tensor, ends: list[int] | None = None) -> Tensor:
        """Compute `h W_dec` (B, d_in), with gradients to `values` and `W_dec` (n, d_in).

        With the rising ends of ranges of features (G,), the last of them n, the parts of the sum that belong to each
        range stand apart: (B, G, d_in).
        """
        if ends is None:
            return self.values @ W_dec
        bounds = zip([0, *ends], ends, strict=False)
        return torch.stack([self.values[:, a:b] @ W_dec[a:b] for a, b in bounds], dim=1)

    def fired(self) -> Tensor:
        """Tell which features fired on any token, (n,) bool."""
        return (self.values > 0).any(0)

    def chunks(self, features: Tensor) -> Iterator[tuple[Tensor, Any]]:
        """Yield dense copies (U, tokens) of some features (U,), a few tokens at a time, and their place for `put`."""
        step = max(CHUNK_TOKENS, CHUNK_ELEMENTS // max(1, len(features)))
        for start in range(0, self.tokens, step):
            rows = slice(start, start + step)
            yield as_float(self.values[rows, features]).T.contiguous(), (rows, features)

    def put(self, target: Tensor, place: Any, block: Tensor) -> None:
        """Write numbers in the shape of a chunk to its place in `target`, which has the shape of `values`."""
        rows, features = place
        target[rows].index_copy_(1, features, block.T)


class FeatureOrder(NamedTuple):
    """The active entries sorted by feature, then by token (CSC)."""

    offsets: Tensor  # (n + 1,) entries of feature i are offsets[i] to offsets[i + 1]
    rows: Tensor  # (nnz,) token of each entry
    order: Tensor  # (nnz,) where the entry lies in the order by token
    cols: Tensor  # (nnz,) feature of each entry


@dataclass(frozen=True)
class ActiveFeatures(_Features):
    """Non-zero feature activations of a batch, sorted by token (CSR), with the methods of [`DenseFeatures`].

    Entries may be zero: a pattern can be wider than what fired. The features of a token may stand in any order, but to
    be decoded by ranges they rise.
    """

    crow: Tensor  # (B + 1,) int64, entries of token t are crow[t] to crow[t + 1]
    cols: Tensor  # (nnz,) int64, feature of each entry
    values: Tensor  # (nnz,) activations
    n: int  # number of features

    @staticmethod
    def at(flat: Tensor, values: Tensor, tokens: int, n: int) -> ActiveFeatures:
        """Make them from the places `token * n + feature` (nnz,) of the entries, rising by token."""
        rows = flat // max(1, n)
        cols = torch.sub(flat, rows, alpha=n)
        return ActiveFeatures(row_offsets(torch.bincount(rows, minlength=tokens)), cols, values, n)

    @property
    def tokens(self) -> int:
        return len(self.crow) - 1

    @cached_property
    def rows(self) -> Tensor:
        """Token of each entry, (nnz,)."""
        tokens = torch.arange(self.tokens, device=self.cols.device)
        return torch.repeat_interleave(tokens, self.crow.diff(), output_size=len(self.cols))

    @cached_property
    def by_feature(self) -> FeatureOrder:
        """The same entries sorted by feature."""
        small = torch.int16 if self.n <= 1 << 15 else torch.int32  # a radix sort: half the bytes, half the time
        cols, order = self.cols.to(small).sort(stable=True)
        offsets = row_offsets(torch.bincount(self.cols, minlength=self.n))
        return FeatureOrder(offsets, self.rows[order], order, cols.long())

    @cached_property
    def values_by_feature(self) -> Tensor:
        """The values in the order of `by_feature`, (nnz,)."""
        return self.values[self.by_feature.order]

    def matrix(self) -> Tensor:
        """Return the activations as a CSR tensor, (B, n)."""
        return csr(self.crow, self.cols, self.values, (self.tokens, self.n))

    def transposed(self) -> Tensor:
        """Return the activations as a CSR tensor, (n, B)."""
        return self.feature_rows(0, self.n)

    def feature_rows(self, start: int, stop: int) -> Tensor:
        """Return features start to stop as the rows of a CSR tensor, (stop - start, B)."""
        offsets, rows = self.by_feature.offsets, self.by_feature.rows
        first, last = int(offsets[start]), int(offsets[stop])
        values = self.values_by_feature[first:last]
        return csr(offsets[start : stop + 1] - first, rows[first:last], values, (stop - start, self.tokens))

    def feature_columns(self, start: int, stop: int) -> Tensor:
        """Return features start to stop as the columns of an ordinary tensor, (B, stop - start)."""
        offsets, rows, _, cols = self.by_feature
        first, last = int(offsets[start]), int(offsets[stop])
        width = stop - start
        block = self.values.new_zeros(self.tokens * width)
        place = torch.add(cols[first:last] - start, rows[first:last], alpha=width)
        return block.scatter_(0, place, self.values_by_feature[first:last]).view(-1, width)

    def with_values(self, values: Tensor) -> ActiveFeatures:
        other = replace(self, values=values)
        for name in ("rows", "by_feature"):  # what has been sorted once
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def sum_by_feature(self, values: Tensor) -> Tensor:
        """Sum `values` (nnz,), given at the entries, over tokens: (n,)."""
        return values.new_zeros(self.n).index_add_(0, self.cols, values)

    def to_dense(self) -> Tensor:
        dense = self.values.new_zeros(self.tokens, self.n)
        return dense.index_put_((self.rows, self.cols), self.values)

    def to_active(self) -> ActiveFeatures:
        return self

    def moments(self) -> Tensor:
        values = as_float(self.values)
        parts = ((values != 0).to(values.dtype), values.square(), values)
        return torch.stack([self.sum_by_feature(part) for part in parts])

    def squares_about(self, mean: Tensor) -> Tensor:
        values = as_float(self.values)
        entries = self.sum_by_feature(torch.ones_like(values))
        return self.sum_by_feature((values - mean[self.cols]).square()) + (self.tokens - entries) * mean.square()

    def decode(self, W_dec: Tensor, ends: list[int] | None = None) -> Tensor:
        return SparseDecode.apply(
            self.values, W_dec, self, None if ends is None else torch.tensor(ends).to(W_dec.device)
        )

    def fired(self) -> Tensor:
        fired = torch.zeros(self.n, dtype=torch.bool, device=self.cols.device)
        fired[self.cols[self.values > 0]] = True
        return fired

    def chunks(self, features: Tensor) -> Iterator[tuple[Tensor, Any]]:
        step = max(CHUNK_TOKENS, CHUNK_ELEMENTS // max(1, len(features)))
        number = features.new_full((self.n,), -1)
        number[features] = torch.arange(len(features), device=features.device)
        for start in range(0, self.tokens, step):
            width = min(step, self.tokens - start)
            first, last = int(self.crow[start]), int(self.crow[start + width])
            rank = number[self.cols[first:last]]
            kept = (rank >= 0).nonzero()[:, 0]
            places = torch.add(self.rows[first:last][kept] - start, rank[kept], alpha=width)
            entries = kept + first
            block = self.values.new_zeros(len(features) * width).scatter_(0, places, self.values[entries])
            yield block.view(-1, width), (entries, places)

    def put(self, target: Tensor, place: Any, block: Tensor) -> None:
        entries, places = place
        target[entries] = block.view(-1)[places]


FeatureActivations = DenseFeatures | ActiveFeatures


def feature_activations(h: Tensor | FeatureActivations) -> FeatureActivations:
    """Return `h` itself, or a tensor (B, n), a NumPy array or lists as [`DenseFeatures`].

    Raises:
        SelOrthoError: it is something else, or has not two axes.
    """
    if isinstance(h, DenseFeatures | ActiveFeatures):
        return h
    return DenseFeatures(floats_of(h, "feature activations h", axes=2))


def active_features(h: Tensor) -> ActiveFeatures:
    """Return the non-zero entries of feature activations `h` (B, n)."""
    flat = (h != 0).flatten().nonzero()[:, 0]
    return ActiveFeatures.at(flat, h.flatten()[flat], *h.shape)


def row_offsets(counts: Tensor) -> Tensor:
    """Return CSR offsets (rows + 1,) from the number of entries of each row (rows,)."""
    offsets = counts.new_zeros(len(counts) + 1, dtype=torch.int64)
    offsets[1:] = counts.cumsum(0)
    return offsets


def csr(crow: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Build a CSR tensor whose parts are known to fit."""
    return torch.sparse_csr_tensor(crow, cols, values, shape, check_invariants=False)


def times_dense(left: Tensor, right: Tensor) -> Tensor:
    """Multiply a tensor (a, b), CSR or dense, by a dense one (b, c).

    `left @ right` would fill its result with zeros and copy it once more, which takes as long as the product.
    """
    result = right.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(result, left, right, beta=0, out=result)


def as_float(h: Tensor) -> Tensor:
    """Return activations in float32, or float64 if they are."""
    return h if h.dtype == torch.float64 else h.float()


class SparseEncode(torch.autograd.Function):
    """Pre-activations `z_ti = <x_t, W_enc_:i> + b_enc_i` (nnz,) at the entries of `active`, which holds their values.

    The gradient reaches the encoder `W_enc` (d_in, n), `b_enc` (n,) from these entries alone, `x` (B, d_in) has none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: ActiveFeatures) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.active = active
        return active.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        dz = ctx.active.with_values(grad)
        # the gradient comes out as (n, d_in); a parameter that is stored in this order takes it without a copy
        dW = times_dense(dz.transposed(), x.to(grad.dtype)).T.to(W_enc.dtype) if ctx.needs_input_grad[1] else None
        return None, dW, dz.sum_by_feature(grad).to(W_enc.dtype), None


class SparseDecode(torch.autograd.Function):
    """CSR times dense; its gradients are a sampled product and CSR times dense."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, active: ActiveFeatures, ends: Tensor | None) -> Tensor:
        ctx.save_for_backward(W_dec)
        ctx.active = active.with_values(values.detach())
        if ends is not None:  # each token becomes G rows, one for each range of features
            row = active.rows * len(ends) + torch.searchsorted(ends, active.cols, right=True)
            ctx.active = replace(ctx.active, crow=row_offsets(torch.bincount(row, minlength=active.tokens * len(ends))))
        x_hat = times_dense(ctx.active.matrix(), W_dec.to(values.dtype))
        return x_hat if ends is None else x_hat.view(active.tokens, len(ends), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (W_dec,) = ctx.saved_tensors
        active: ActiveFeatures = ctx.active
        flat = grad.reshape(active.tokens, -1).to(active.values.dtype)
        dvalues = dW = None
        if ctx.needs_input_grad[0]:
            dvalues = torch.sparse.sampled_addmm(
                active.matrix(), flat.contiguous(), W_dec.to(flat.dtype).T, beta=0.0
            ).values()
        if ctx.needs_input_grad[1]:
            dW = times_dense(active.transposed(), flat).to(W_dec.dtype)
        return dvalues, dW, None, None
