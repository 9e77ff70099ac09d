"""What becomes of a step with NaN or infinity in it, and of a loss that jumps."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..errors import NonFiniteError
from ..language_models.capture import ORIGIN_NAMES, NonFiniteActivationsError, TokenOrigins
from ..process_group import ProcessGroup
from ..utils.files import reason, replace_file
from .run_folder import DEBUG

logger = logging.getLogger(__name__)

SPIKE_WINDOW = 101  # steps whose median loss a step is compared with
ADVICE = "look at these activations, or try a lower --learning_rate"
_FEWEST_STEPS = 20  # before that, the loss still falls


class NonFinitePolicy:
    """Keeps the batches that were not finite, and decides whether the run goes on without them.

    Args:
        folder: of the run; a batch is written to its `debug/step_N.safetensors`.
        policy: "stop", or "skip" for a run that goes on without the step.
        limit: steps that are skipped at most, those of several SAEs on one batch counted once.
    """

    def __init__(self, folder: Path | None, policy: str = "stop", limit: int = 10) -> None:
        self.folder, self.policy, self.limit = folder, policy, limit
        group = ProcessGroup.of_run()
        self._suffix = f"_rank_{group.rank}" if group.size > 1 else ""  # each process keeps its part of the batch
        self.step = 1  # that is on its way; whoever trains sets it
        self.skipped = 0
        self._batch: TokenOrigins | None = None  # of the latest batch that was kept
        self._kept: dict[tuple[Any, ...], str] = {}  # where it is, by layers

    def handle(
        self, fault: str, origins: TokenOrigins, activations: Mapping[Any, Tensor], advice: str = ADVICE
    ) -> None:
        """Keep a batch that was not finite; returns if the run goes on without it.

        Args:
            fault: where NaN or infinity first appeared.
            origins: of the tokens. activations: of these, by layer.
            advice: what to change.

        Raises:
            NonFiniteError: the run stops here.
        """
        self.skipped += origins is not self._batch
        words = f"{fault} at step {self.step}: the step was not taken. {self.keep(fault, origins, activations)}"
        if self.policy == "stop":
            raise NonFiniteError(f"{words}; {advice}, or pass --non_finite skip to leave such batches out")
        if self.skipped > self.limit:
            raise NonFiniteError(
                f"{words}. This is batch number {self.skipped} that is not finite, more than --max_skipped "
                f"{self.limit}: {advice}"
            )
        logger.warning("%s; going on without it (%d of at most %d)", words, self.skipped, self.limit)

    def handle_activations(self, error: NonFiniteActivationsError) -> None:
        """Handle what the language model has produced: the tokens that are not finite are left out."""
        self.handle(str(error), error.origins, error.by_layer, error.advice)

    def keep(self, fault: str, origins: TokenOrigins, activations: Mapping[Any, Tensor]) -> str:
        """Write a batch to `debug/`, once for each layer; says of which documents it is, and where."""
        if origins is not self._batch:
            self._batch, self._kept = origins, {}
        layers = tuple(activations)
        if self.folder is not None and layers not in self._kept:
            self._kept[layers] = f"; {self._write(self.folder / DEBUG, fault, origins, activations)}"
        return f"Documents of the batch: {_listed(origins)}{self._kept.get(layers, '')}"

    def _write(self, folder: Path, fault: str, origins: TokenOrigins, activations: Mapping[Any, Tensor]) -> str:
        tensors = {name: getattr(origins, name).cpu().contiguous() for name in ORIGIN_NAMES}
        for layer, rows in activations.items():  # and targets, named so
            name = "activations" if len(activations) == 1 else f"activations.{layer}"
            tensors[name] = rows.detach().cpu().contiguous()
        name = f"step_{self.step:06d}{self._suffix}"
        others = len(list(folder.glob(f"{name}*.safetensors")))
        path = folder / f"{name}{f'_{others + 1}' if others else ''}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, save(tensors, {"fault": fault, "step": str(self.step)}))
        except OSError as error:
            return f"it could not be written to {path}: {reason(error)}"
        return f"it is in {path}"


class LossSpikes:
    """Reports a loss beyond a multiple of the running median.

    Args:
        factor: that multiple; None reports nothing.
        name: of the SAE among several; "" if there is one.
    """

    def __init__(self, factor: float | None, name: str = "") -> None:
        self.factor, self.name = factor, name
        self.count = 0
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def add(self, step: int, loss: float, origins: TokenOrigins) -> None:
        """Compare the loss of a step with those before."""
        if self.factor is None:
            return
        median = statistics.median(self.losses) if len(self.losses) >= _FEWEST_STEPS else 0.0
        if median > 0 and loss > self.factor * median:
            self.count += 1
            logger.warning(
                "loss spike at step %d%s: %.4g, %.1f times the median of the %d steps before; documents of the "
                "batch: %s",
                *(step, f" of {self.name}" if self.name else "", loss, loss / median, len(self.losses)),
                _listed(origins),
            )
        self.losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"count": self.count, "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a [`state_dict`]."""
        self.count, self.losses = state["count"], deque(state["losses"], maxlen=SPIKE_WINDOW)


def first_not_finite(named: Mapping[str, Tensor | None]) -> str | None:
    """Name the first of some tensors that is not finite everywhere, and in how many numbers; None if all are."""
    for name, tensor in named.items():
        bad = 0 if tensor is None else int((~tensor.detach().isfinite()).sum())
        if tensor is not None and bad:
            return f"{name} ({bad:,} of {tensor.numel():,} numbers)"
    return None


def _listed(origins: TokenOrigins, limit: int = 16) -> str:
    documents = origins.document_ids.unique().tolist()
    return ", ".join(map(str, documents[:limit])) + (" ..." if len(documents) > limit else "")
