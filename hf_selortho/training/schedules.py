"""What changes from step to step: learning rate, when the penalty acts and on which pairs, its steered coefficient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoOutput, SelOrthoSAE
from ..pair_selection import CoactivationEMA, Pairs
from ..penalties import PenaltyPlan, full_penalty_bytes
from ..process_group import ProcessGroup
from ..sparse_ops import FeatureActivations
from .arguments import RunArguments
from .state import GradientShare, TrainState


def learning_rate_at(step: int, *, peak: float, steps: int, warmup: float = 0, decay: float = 0) -> float:
    """Return the learning rate of a step, counted from 1: linear warm-up, constant, linear decay up to step `steps`.

    `warmup` and `decay` are numbers of steps, or shares of `steps` if below 1.
    """
    warmup = warmup * steps if warmup < 1 else warmup
    decay = decay * steps if decay < 1 else decay
    rising = min(1.0, step / warmup) if warmup else 1.0
    falling = min(1.0, (steps - step + 1) / decay) if decay else 1.0
    return peak * rising * falling


class PenaltySchedule:
    """When the penalty acts, by the SAE's `selection_interval`, `penalty_schedule` and `carry_decay`: a plan a step."""

    def __init__(self, config: SelOrthoConfig, group: ProcessGroup) -> None:
        self.config, self.group = config, group
        self.acts = config.penalty != "none" and config.ortho_coefficient > 0

    def plan(self, state: TrainState) -> PenaltyPlan:
        """Say what the penalty does at the step that comes next."""
        cfg, step = self.config, state.step + 1
        coefficient = None if state.controller is None else state.controller.coefficient
        selects = (step - 1) % cfg.selection_interval == 0
        if cfg.penalty_schedule == "every_step" and cfg.penalty == "selective":
            pairs = None if selects else state.pairs
            return PenaltyPlan(True, pairs, 1.0, coefficient, step, self._select(state) if pairs is None else None)
        weight = float(cfg.selection_interval)  # one step stands for all of the interval
        return PenaltyPlan(selects, None, weight, coefficient, step, self._select(state) if selects else None)

    def _select(self, state: TrainState) -> Callable[[FeatureActivations], Pairs] | None:
        """Select on the running average of co-activations; None: on the batch alone."""
        cfg = self.config
        if cfg.carry_decay == 0 or cfg.penalty != "selective":
            return None

        def select(h: FeatureActivations) -> Pairs:
            if state.carried is None:
                state.carried = CoactivationEMA.of_config(cfg)
            state.carried.update(h, self.group)
            return state.carried.select(cfg.pair_fraction, cfg.min_support, cfg.correlation_threshold)

        return select


def make_controller(arguments: RunArguments, penalty: str, ortho_coefficient: float) -> GradientShare | None:
    """Return what steers the coefficient from its initial value (`--ortho_budget gradient`); None: it stays."""
    if arguments.ortho_budget == "none" or penalty == "none" or ortho_coefficient == 0:
        return None
    return GradientShare(ortho_coefficient, arguments.ortho_budget_value)


def steer(
    controller: GradientShare, sae: SelOrthoSAE, output: SelOrthoOutput, plan: PenaltyPlan, group: ProcessGroup
) -> None:
    """Let the controller compare the gradients of penalty and reconstruction, before the gradient of both together."""
    if not plan.acts:
        return
    assert output.losses is not None
    on_activations = sae.config.penalty_space == "activation" and sae.config.penalty != "ortsae"
    target = output.features.values if on_activations else sae.W_dec
    norms = [_gradient_norm(output.losses[name], target, group) for name in ("ortho", "reconstruction")]
    controller.update(norms[0] / plan.weight, norms[1])


def _gradient_norm(loss: Tensor, target: Tensor, group: ProcessGroup) -> float:
    if not loss.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(loss, target, retain_graph=True)
    return float(group.sum(gradient.float().square().sum()[None]).sqrt())


def full_penalty_notice(config: SelOrthoConfig, batch: int, available: int | None) -> str | None:
    """Say before a run starts what memory the full penalty needs; None for other penalties.

    Raises:
        SelOrthoError: it does not fit in the memory that is available (bytes).
    """
    if config.penalty != "full":
        return None
    assert config.d_sae is not None
    needed = full_penalty_bytes(config.d_sae, batch)
    words = f"--penalty full on {config.d_sae} features needs {needed:,} bytes ({needed / 2**30:.1f} GiB) a step"
    if available is not None and needed > available:
        raise SelOrthoError(
            f"{words} for its {config.d_sae} x {config.d_sae} matrices, but {available:,} are available; use "
            "--penalty selective, which never forms them, or fewer features"
        )
    return words
