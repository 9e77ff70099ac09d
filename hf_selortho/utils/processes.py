"""What the processes of a run tell each other about activations; a single process talks to nobody."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place; each of them has to call this."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_processes(value: float | None, device: torch.device | str = "cpu") -> float | None:
    """The mean of a number over the processes that have one (not None); None if none has."""
    pair = torch.tensor([0.0, 0.0] if value is None else [value, 1.0], dtype=torch.float64, device=device)
    total, count = sum_over_processes(pair).tolist()
    return total / count if count else None
