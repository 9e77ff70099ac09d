"""The processes whose tokens together form one batch, and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .sparse_ops import ActiveFeatures, row_offsets


@dataclass(frozen=True)
class BatchGroup:
    """The processes whose tokens together form one batch (data parallel training)."""

    process_group: Any = None  # None: the default group

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.process_group)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank(self.process_group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over the processes, the same on each of them."""
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def minimum(self, tensor: Tensor) -> Tensor:
        """Smallest value of each entry over the processes."""
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.process_group)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors (m_r, ...) of all processes in the order of their ranks; the first axis may differ."""
        lengths = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = len(tensor)
        longest = self.sum(lengths).tolist()
        padded = tensor.new_zeros(max(longest), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in longest]
        dist.all_gather(parts, padded, group=self.process_group)
        return [part[:length] for part, length in zip(parts, longest, strict=True)]

    def gather_active(self, active: ActiveFeatures) -> ActiveFeatures:
        """The global batch: the active entries of all processes, 8 bytes each on the way, never `(B, n)`."""
        counts = torch.cat(self.gather((active.crow[1:] - active.crow[:-1]).int()))
        cols = torch.cat(self.gather(active.cols.int()))
        values = torch.cat(self.gather(active.values))
        return ActiveFeatures(row_offsets(counts), cols.long(), values, active.n)
