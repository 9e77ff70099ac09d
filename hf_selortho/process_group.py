"""The processes of a run, whose tokens together form one batch; a single process is a group of size one."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .sparse_ops import ActiveFeatures, row_offsets


@dataclass(frozen=True)
class ProcessGroup:
    """The processes whose tokens together form one batch. With one process, every method returns what it is given.

    Each process has to call the methods in the same order.
    """

    size: int = 1
    rank: int = 0

    @staticmethod
    def of_run() -> ProcessGroup:
        """Return the group of all processes of torch.distributed; where it is not in use, of one."""
        in_use = dist.is_available() and dist.is_initialized()
        return ProcessGroup(dist.get_world_size(), dist.get_rank()) if in_use else SINGLE_PROCESS

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes; the result is the same on each of them."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def minimum(self, tensor: Tensor) -> Tensor:
        """Take the smallest value of each entry over the processes."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def mean(self, value: float | None, device: torch.device | str = "cpu") -> float | None:
        """Average a number over the processes that have one (not None); None if none has."""
        pair = torch.tensor([0.0, 0.0] if value is None else [value, 1.0], dtype=torch.float64, device=device)
        total, count = self.sum(pair).tolist()
        return total / count if count else None

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors (m_r, ...) of all processes by rising rank; their lengths may differ."""
        if self.size == 1:
            return tensor
        lengths = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = len(tensor)
        longest = self.sum(lengths).tolist()
        padded = tensor.new_zeros(max(longest), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in longest]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, longest, strict=True)])

    def gather_active(self, active: ActiveFeatures) -> ActiveFeatures:
        """Put the active entries of all processes together: 8 bytes each on the way, never `(B, n)`."""
        if self.size == 1:
            return active
        counts = self.gather(active.crow.diff().int())
        cols, values = self.gather(active.cols.int()), self.gather(active.values)
        return ActiveFeatures(row_offsets(counts), cols.long(), values, active.n)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, operation)
        return tensor


SINGLE_PROCESS = ProcessGroup()


def leave_process_group(accelerator: Any) -> None:
    """End what an `Accelerator` has started and destroy the process group, whose threads are gone when this returns.

    They must be: gloo's threads drop the tensors of a collective a moment after it is over, and need Python's lock for
    that (torch 2.13); where the interpreter ends before they have, the process aborts. A `DistributedDataParallel` that
    outlives the group hangs instead, so its holder lets go of it first (`Trainer.release`).
    """
    accelerator.free_memory()  # its own references to the models
    gc.collect()  # which the line above does before it lets go of them
    accelerator.end_training()
