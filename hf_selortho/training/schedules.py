"""What changes from step to step: the learning rate, and when the penalty acts, on which pairs, how strongly."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE
from ..pair_selection import CoactivationEMA, Pairs
from ..penalties import PenaltyPlan
from ..process_group import SINGLE_PROCESS, ProcessGroup
from ..sparse_ops import FeatureActivations
from .arguments import RunArguments
from .contradictions import penalised


def learning_rate_at(step: int, *, peak: float, steps: int, warmup: float = 0, decay: float = 0) -> float:
    """Return the learning rate of a step, counted from 1: linear warm-up, constant, linear decay up to step `steps`.

    `warmup` and `decay` are numbers of steps, or shares of `steps` if below 1.
    """
    warmup = warmup * steps if warmup < 1 else warmup
    decay = decay * steps if decay < 1 else decay
    rising = min(1.0, step / warmup) if warmup else 1.0
    falling = min(1.0, (steps - step + 1) / decay) if decay else 1.0
    return peak * rising * falling


@dataclass
class GradientShare:
    """Holds the penalty's gradient at a fixed share of the reconstruction's: `|g_penalty| = share |g_reconstruction|`.

    The coefficient moves in log space towards the one that would have met the share, by `rate` of the way.
    """

    coefficient: float
    share: float
    rate: float = 0.2
    low: float = 1e-6
    high: float = 1e3

    def update(self, penalty_norm: float, reconstruction_norm: float) -> None:
        """Move by gradient norms measured with the current coefficient; 0, NaN and infinity tell nothing."""
        if 0 < penalty_norm < math.inf and 0 < reconstruction_norm < math.inf:
            distance = math.log(self.share) + math.log(reconstruction_norm) - math.log(penalty_norm)
            self.coefficient = min(self.high, max(self.low, self.coefficient * math.exp(self.rate * distance)))


class PenaltySchedule:
    """When the penalty acts, by the SAE's `selection_interval`, `penalty_schedule` and `carry_decay`, and on what.

    Args:
        config: of the SAE.
        group: processes whose tokens together are the batch.
        arguments: `--ortho_budget gradient` steers the coefficient, which else stays that of `config`.

    Attributes:
        pairs: of the latest selection.
    """

    def __init__(
        self, config: SelOrthoConfig, group: ProcessGroup = SINGLE_PROCESS, arguments: RunArguments | None = None
    ) -> None:
        self.config, self.group = config, group
        self.acts = penalised(config)
        self.pairs: Pairs | None = None
        averages = config.carry_decay > 0 and config.penalty == "selective"
        self._average = CoactivationEMA.of_config(config) if averages else None
        self._budget: GradientShare | None = None
        if arguments is not None and arguments.ortho_budget == "gradient" and self.acts:
            self._budget = GradientShare(config.ortho_coefficient, arguments.ortho_budget_value)

    @property
    def coefficient(self) -> float:
        """The coefficient of the penalty at present."""
        return self.config.ortho_coefficient if self._budget is None else self._budget.coefficient

    def plan(self, step: int) -> PenaltyPlan:
        """Say what the penalty does at a step, counted from 1."""
        cfg = self.config
        acts, pairs, weight = (step - 1) % cfg.selection_interval == 0, None, float(cfg.selection_interval)
        if cfg.penalty_schedule == "every_step" and cfg.penalty == "selective":
            acts, pairs, weight = True, None if acts else self.pairs, 1.0
        select = None if self._average is None or not acts or pairs is not None else self._select
        return PenaltyPlan(acts, pairs, weight, self.coefficient, step, select)

    def steer(self, sae: SelOrthoSAE, output: SelOrthoOutput, plan: PenaltyPlan) -> None:
        """Compare the gradients of penalty and reconstruction, before that of both together is computed."""
        if self._budget is None or not plan.acts:
            return
        assert output.losses is not None
        on_activations = sae.config.penalty_space == "activation" and sae.config.penalty != "ortsae"
        target = output.features.values if on_activations else sae.W_dec
        norms = [_gradient_norm(output.losses[name], target, self.group) for name in ("ortho", "reconstruction")]
        self._budget.update(norms[0] / plan.weight, norms[1])

    def copy(self) -> PenaltySchedule:
        """Return the schedule as it stands: what happens to this one from now on does not change the copy."""
        twin = copy.copy(self)
        twin._average, twin._budget = copy.copy(self._average), copy.copy(self._budget)
        return twin

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps: tensors, and JSON-able rest."""
        tensors: dict[str, Tensor] = {}
        if self.pairs is not None:
            tensors |= {f"pairs.{name}": getattr(self.pairs, name) for name in ("i", "j", "correlation")}
        if self._average is not None:
            tensors |= {f"average.{name}": value for name, value in self._average.state_dict().items()}
        return tensors, {"coefficient": self.coefficient}

    def load_state_dict(self, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        """Go on from a [`state_dict`] of a run of the same settings."""
        if "pairs.i" in tensors:
            self.pairs = Pairs(tensors["pairs.i"], tensors["pairs.j"], tensors["pairs.correlation"])
        if self._average is not None:
            kept = {key.removeprefix("average."): value for key, value in tensors.items() if key.startswith("average.")}
            self._average.load_state_dict(kept)
        if self._budget is not None:
            self._budget.coefficient = content["coefficient"]

    def _select(self, features: FeatureActivations) -> Pairs:
        """Select on the running average of co-activations, which takes in this batch."""
        assert self._average is not None
        self._average.update(features, self.group)
        cfg = self.config
        return self._average.select(cfg.pair_fraction, cfg.min_support, cfg.correlation_threshold)


def _gradient_norm(loss: Tensor, target: Tensor, group: ProcessGroup) -> float:
    if not loss.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(loss, target, retain_graph=True)
    return float(group.sum(gradient.float().square().sum()[None]).sqrt())
