"""Activation functions of the encoder, `h = act(z)` with `z = x W_enc + b_enc`, in two exact forms.

Dense: pre-activations (B, n) in, feature activations (B, n) out, with autograd. Active entries: pre-activations are
computed and looked through a few tokens at a time, only what fires is kept, and `(B, n)` never exists.

- relu: `max(z, 0)`.
- topk: the k largest of each token (Gao et al. 2024).
- batchtopk: the `B k` largest of the batch (Bussmann et al. 2024); a fixed threshold at inference.
- jumprelu: `z` where `z > threshold_i`, thresholds learned through straight-through estimators (Rajamanoharan et al.
  2024): `dh/dthreshold = -(threshold / eps) K((z - threshold) / eps)`, `dL0/dthreshold = -(1 / eps) K(...)`, `K` the
  rectangle of width 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch_group import BatchGroup
from .sparse_ops import ActiveFeatures, row_offsets, sparse_encode

CHUNK_ROWS = 128  # tokens whose pre-activations are held at once: enough for matrix products at full speed
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}  # pre-activations held at once, if that is more tokens

# Densities below which the active entries are cheaper than dense arithmetic; the CPU's is measured (benchmark.py)
SPARSE_BELOW = {"cpu": 0.08, "cuda": 0.004}


@dataclass(frozen=True)
class Encoded:
    """Feature activations of a batch, and what the loss needs to know about how they came about."""

    h: Tensor | ActiveFeatures
    threshold: Tensor | None = None  # batchtopk: the smallest activation that was kept
    l0: Tensor | None = None  # jumprelu: mean L0 with a gradient to the thresholds


@dataclass(frozen=True)
class ActivationFunction:
    """One of the activation functions with its settings."""

    kind: str
    k: int | None = None
    bandwidth: float = 0.05  # eps of jumprelu

    def dense(
        self, z: Tensor, threshold: Tensor | None, *, batch: bool = False, group: BatchGroup | None = None
    ) -> Encoded:
        """Apply to pre-activations (..., n).

        `threshold` is the fixed one of batchtopk or the (n,) ones of jumprelu. `batch` makes batchtopk look at the
        batch instead.
        """
        if self.kind == "topk":
            assert self.k is not None
            values, indices = torch.relu(z).topk(self.k, dim=-1, sorted=False)
            return Encoded(torch.zeros_like(z).scatter(-1, indices, values))
        if self.kind == "batchtopk":
            if not batch:
                assert threshold is not None
                return Encoded(torch.where(z > threshold, z, 0))
            wanted = self.wanted(z.numel() // z.shape[-1], z.device, group)
            least = batch_threshold(z.detach().flatten(), wanted, group)
            return Encoded(torch.where((z >= least) & (z > 0), z, 0), threshold=least)
        if self.kind == "jumprelu":
            assert threshold is not None
            h, fired = _JumpReLU.apply(z, threshold, self.bandwidth)
            return Encoded(h, l0=fired / (z.numel() // z.shape[-1]))
        return Encoded(torch.relu_(z))  # (B, n) is large, and nobody else has z

    def active(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, group: BatchGroup | None = None
    ) -> Encoded | None:
        """The same for tokens `x` (B, d_in), as active entries with gradients to the encoder; None if too dense."""
        with torch.no_grad():
            found = self._find(x, W_enc, b_enc, threshold, group)
        if found is None:
            return None
        pattern, least = found
        if self.kind != "jumprelu":
            return Encoded(pattern.with_values(sparse_encode(x, W_enc, b_enc, pattern)), threshold=least)
        assert threshold is not None
        above = pattern.values > threshold.detach()[pattern.cols]
        gated = pattern.with_values(pattern.values * above)
        values = sparse_encode(x, W_enc, b_enc, gated, above)
        values, fired = _SparseJumpReLU.apply(values, threshold, pattern, above, self.bandwidth)
        return Encoded(pattern.with_values(values), l0=fired / len(x))

    def _find(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, group: BatchGroup | None
    ) -> tuple[ActiveFeatures, Tensor | None] | None:
        device, n = x.device.type, W_enc.shape[1]
        limit = SPARSE_BELOW.get(device, 0.0)
        if self.k is not None and self.k > limit * n:
            return None
        wanted = self.wanted(len(x), x.device, group) if self.kind == "batchtopk" else None
        kept = _Kept(self, n, wanted)
        lower = None if threshold is None else threshold.detach() - self.bandwidth / 2
        rows = max(CHUNK_ROWS, CHUNK_ELEMENTS.get(device, 1 << 28) // n)
        for start, z in _pre_activations(x, W_enc, b_enc, rows):
            kept.add(z, lower)
            if start == 0 and self.k is None and _density(kept.entries, z, group) > limit:
                return None
        least = None
        if wanted is not None:
            least = batch_threshold(torch.cat(kept.values), wanted, group)
        return kept.entries_of_batch(least), least

    def wanted(self, tokens: int, device: torch.device, group: BatchGroup | None) -> int:
        """Entries that batchtopk keeps, `B k`; B counts the tokens of all processes."""
        assert self.k is not None
        total = tokens if group is None else int(group.sum(torch.tensor([tokens], device=device)))
        return total * self.k


def batch_threshold(z: Tensor, wanted: int, group: BatchGroup | None) -> Tensor:
    """The `wanted`-th largest of the pre-activations (m,) of all processes, 0 if fewer are positive."""
    if group is None:
        return z.topk(min(wanted, len(z)), sorted=False).values.min().clamp_min(0)
    bits = z[z > 0].float().view(torch.int32).sort().values  # positive floats are ordered as their bits are
    low = torch.zeros(1, dtype=torch.int32, device=z.device)
    for bit in range(30, -1, -1):  # the largest threshold that `wanted` entries reach, bit by bit
        higher = low | (1 << bit)
        reached = len(bits) - torch.searchsorted(bits, higher)
        if int(group.sum(reached)) >= wanted:
            low = higher
    return low.view(torch.float32)[0]


class _Kept:
    """What fires in the chunks of pre-activations looked through so far."""

    def __init__(self, function: ActivationFunction, n: int, wanted: int | None) -> None:
        self.function, self.n, self.wanted = function, n, wanted
        self.counts: list[Tensor] = []  # per token
        self.cols: list[Tensor] = []
        self.values: list[Tensor] = []
        self.least = 0.0  # of batchtopk: no smaller entry can be kept

    @property
    def entries(self) -> int:
        return sum(map(len, self.cols))

    def add(self, z: Tensor, lower: Tensor | None) -> None:
        """Look through pre-activations (rows, n); entries above `lower` count for jumprelu."""
        if self.function.kind == "topk":
            assert self.function.k is not None
            values, cols = z.topk(self.function.k, dim=-1, sorted=False)
            self.counts.append(torch.full((len(z),), cols.shape[1], device=z.device))
            self.cols.append(cols.flatten())
            self.values.append(values.relu_().flatten())
            return
        if lower is not None:
            fires = z > lower
        else:
            fires = z >= self.least if self.least > 0 else z > 0
        flat = fires.view(-1).nonzero()[:, 0]
        rows = flat // self.n
        self.counts.append(torch.bincount(rows, minlength=len(z)))
        self.cols.append(flat - rows * self.n)
        self.values.append(z.view(-1)[flat])
        if self.wanted is not None and self.entries > 2 * self.wanted:
            self.prune()

    def prune(self) -> None:
        """Raise the bar to what the entries so far say: the threshold of the batch can only be higher."""
        assert self.wanted is not None
        values = torch.cat(self.values)
        self.least = float(values.topk(self.wanted, sorted=False).values.min())
        self._keep(values >= self.least)

    def _keep(self, which: Tensor) -> None:
        counts = torch.cat(self.counts)
        rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        self.counts = [torch.bincount(rows[which], minlength=len(counts))]
        self.cols = [torch.cat(self.cols)[which]]
        self.values = [torch.cat(self.values)[which]]

    def entries_of_batch(self, least: Tensor | None) -> ActiveFeatures:
        if least is not None:
            self._keep(torch.cat(self.values) >= least)
        return ActiveFeatures(row_offsets(torch.cat(self.counts)), torch.cat(self.cols), torch.cat(self.values), self.n)


def _pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, rows: int) -> Any:
    """First token and pre-activations (rows, n) of a few tokens at a time, always in the same memory."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else W_enc.dtype
    with torch.autocast(kind, enabled=False):
        x, W_enc, b_enc = x.to(dtype), W_enc.to(dtype), b_enc.to(dtype)
        memory = x.new_empty(min(rows, len(x)), W_enc.shape[1])
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            z = torch.addmm(b_enc, part, W_enc, out=memory[: len(part)])
            yield start, z if dtype == torch.float64 else z.float()


def _density(entries: int, z: Tensor, group: BatchGroup | None) -> float:
    """Share of entries; under data parallelism all processes have to take the same way, as they talk along it."""
    share = entries / max(1, z.numel())
    return share if group is None else float(group.sum(torch.tensor([share], device=z.device))) / group.size


def _near(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (z - threshold).abs() < bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    """`z` where `z > threshold` (n,), and how many of them, with the estimators of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        above = z > threshold
        return z * above, above.sum().to(threshold.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_fired: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        near = _near(z, threshold, ctx.bandwidth).to(threshold.dtype)
        per_entry = near * (threshold * grad + grad_fired)
        return grad * (z > threshold), -per_entry.flatten(0, -2).sum(0) / ctx.bandwidth, None


class _SparseJumpReLU(torch.autograd.Function):
    """The same for active entries: identity on their values, which are gated already."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, threshold: Tensor, pattern: ActiveFeatures, above: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(threshold)
        ctx.pattern, ctx.bandwidth = pattern, bandwidth
        return values.clone(), above.sum().to(threshold.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_fired: Tensor) -> tuple[Tensor | None, ...]:
        (threshold,) = ctx.saved_tensors
        pattern: ActiveFeatures = ctx.pattern
        own = threshold[pattern.cols]
        per_entry = _near(pattern.values, own, ctx.bandwidth) * (own * grad + grad_fired)
        return grad, -pattern.sum_by_feature(per_entry) / ctx.bandwidth, None, None, None
