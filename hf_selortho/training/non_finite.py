"""What becomes of a batch that is not finite: the step is not taken, the batch is kept, and somebody is told."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import NonFiniteError
from ..language_models.capture import ORIGIN_NAMES, NonFiniteActivationsError, TokenOrigins
from ..utils.files import reason, replace_file
from .run_folder import DEBUG

logger = logging.getLogger(__name__)

SPIKE_WINDOW = 101  # steps whose median loss a step is compared with
_FEWEST_STEPS = 20  # before that, the loss still falls


class NonFiniteGuard:
    """Keeps the batches that were not finite, and decides whether the run goes on without them.

    Args:
        folder: of the run; a batch is written to its `debug/step_N.safetensors`.
        policy: "stop", or "skip" for a run that goes on without the step.
        limit: batches that are skipped at most.
        rank, processes: this process's number, and how many there are.
    """

    step = 1  # that is on its way; the loop sets it

    def __init__(
        self, folder: Path | None, policy: str = "stop", limit: int = 10, rank: int = 0, processes: int = 1
    ) -> None:
        self.folder, self.policy, self.limit = folder, policy, limit
        self._suffix = f"_rank_{rank}" if processes > 1 else ""
        self.skipped = 0
        self._counted_at = 0  # the latest step of which a batch was counted
        self._latest: TokenOrigins | None = None  # of the latest batch that was kept
        self._places: dict[tuple[int, ...], str] = {}  # where, by the layers of its activations

    def meet_in_step(
        self, fault: str, origins: TokenOrigins | None, activations: Mapping[int, Tensor], advice: str
    ) -> None:
        """[`meet`] for a batch of the step on its way, which each of several SAEs may meet: it counts once."""
        if self._counted_at == self.step:
            self.skipped -= 1
        self._counted_at = self.step
        self.meet(fault, origins, activations, advice)

    def meet(self, fault: str, origins: TokenOrigins | None, activations: Mapping[int, Tensor], advice: str) -> None:
        """Keep a batch that was not finite; returns if the run goes on without it.

        Args:
            fault: what was not finite, and where.
            origins: of the tokens; None in a process whose own batch was in order. activations: of these, by layer.
            advice: what to change.

        Raises:
            NonFiniteError: the run stops here.
        """
        self.skipped += 1
        kept, documents = "", ""
        if origins is not None:
            kept = self.keep(fault, origins, activations)
            documents = f". Documents of the batch: {_listed(origins.document_ids.unique().tolist())}"
        words = f"{fault} at step {self.step}: the step was not taken{documents}{kept}"
        if self.policy == "stop":
            raise NonFiniteError(f"{words}; {advice}, or pass --non_finite skip to leave such batches out")
        if self.skipped > self.limit:
            raise NonFiniteError(
                f"{words}. This is batch number {self.skipped} that is not finite, more than --max_skipped "
                f"{self.limit}: {advice}"
            )
        logger.warning("%s; going on without it (%d of at most %d)", words, self.skipped, self.limit)

    def meet_activations(self, error: NonFiniteActivationsError) -> None:
        """[`meet`] for what the language model has produced: the tokens that are not finite are left out."""
        self.meet(str(error), error.origins, error.by_layer, error.advice)

    def keep(self, fault: str, origins: TokenOrigins, activations: Mapping[int, Tensor]) -> str:
        """Write a batch down, once for each layer; says where, or why not."""
        if self.folder is None:
            return ""
        if self._latest is not origins:
            self._latest, self._places = origins, {}
        layers = tuple(activations)
        if layers not in self._places:
            self._places[layers] = self._write(self.folder / DEBUG, fault, origins, activations)
        return self._places[layers]

    def _write(self, folder: Path, fault: str, origins: TokenOrigins, activations: Mapping[int, Tensor]) -> str:
        step = self.step
        single = len(activations) == 1
        tensors = {name: getattr(origins, name).cpu().contiguous() for name in ORIGIN_NAMES}
        for layer, rows in activations.items():
            tensors["activations" if single else f"activations.{layer}"] = rows.detach().cpu().contiguous()
        number = 1
        path = folder / f"step_{step:06d}{self._suffix}.safetensors"
        while path.exists():
            number += 1
            path = folder / f"step_{step:06d}{self._suffix}_{number}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, save(tensors, {"fault": fault, "step": str(step)}))
        except OSError as error:
            return f"; it could not be written to {path}: {reason(error)}"
        return f"; it is in {path}"


class LossSpikes:
    """Notices a loss beyond a multiple of the running median.

    Args:
        factor: that multiple; None notices nothing.
        name: of the SAE among several; "" if there is one.
    """

    def __init__(self, factor: float | None, name: str = "") -> None:
        self.factor, self.name = factor, name
        self.count = 0
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def see(self, step: int, loss: float, origins: TokenOrigins) -> None:
        """Look at the loss of a step; says so where it stands out."""
        if self.factor is None:
            return
        if len(self._losses) >= _FEWEST_STEPS:
            median = statistics.median(self._losses)
            if median > 0 and loss > self.factor * median:
                self.count += 1
                logger.warning(
                    "loss spike at step %d%s: %.4g, %.1f times the median of the %d steps before; documents of the "
                    "batch: %s",
                    *(step, f" of {self.name}" if self.name else "", loss, loss / median, len(self._losses)),
                    _listed(origins.document_ids.unique().tolist()),
                )
        self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"count": self.count, "losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a [`state_dict`]."""
        self.count = int(state["count"])
        self._losses = deque(map(float, state["losses"]), maxlen=SPIKE_WINDOW)


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all numbers are finite, () bool; NaN and infinity survive a sum, which reads the tensor only once."""
    quick = tensor.detach().sum(dtype=torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None)
    if tensor.device.type == "cuda":  # looking at the sum would wait for the GPU
        return tensor.detach().isfinite().all()
    return quick.isfinite() if math.isfinite(float(quick)) else tensor.detach().isfinite().all()


def first_not_finite(named: Mapping[str, Tensor | None]) -> str | None:
    """The first of some tensors by name that is not finite everywhere, and in how many numbers; None if all are."""
    for name, tensor in named.items():
        if tensor is not None:
            bad = int((~tensor.detach().isfinite()).sum())
            if bad:
                return f"{name} ({bad:,} of {tensor.numel():,} numbers)" if tensor.numel() > 1 else name
    return None


def _listed(documents: list[int], limit: int = 16) -> str:
    return ", ".join(map(str, documents[:limit])) + (" ..." if len(documents) > limit else "")
