"""When the decorrelation penalty acts, on which pairs and how strongly: one plan a step."""

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
from .budget import FVUBudget, GradientShare, read_reference
from .state import Controller, TrainState


class PenaltySchedule:
    """Plans of the steps of one run, by the SAE's `selection_interval`, `penalty_schedule` and `carry_decay`."""

    def __init__(self, config: SelOrthoConfig, group: ProcessGroup) -> None:
        self.config, self.group = config, group
        self.acts = config.penalty != "none" and config.ortho_coefficient > 0

    def is_selection(self, step: int) -> bool:
        """Whether pairs are selected at a step, counted from 1."""
        return (step - 1) % self.config.selection_interval == 0

    def plan(self, state: TrainState) -> PenaltyPlan:
        """What the penalty does at the step that comes next."""
        cfg, step = self.config, state.step + 1
        coefficient = None if state.controller is None else state.controller.coefficient
        selects = self.is_selection(step)
        if cfg.penalty_schedule == "every_step" and cfg.penalty == "selective":
            pairs = None if selects else state.pairs
            return PenaltyPlan(True, pairs, 1.0, coefficient, step, self._select(state) if pairs is None else None)
        weight = float(cfg.selection_interval)
        return PenaltyPlan(selects, None, weight, coefficient, step, self._select(state) if selects else None)

    def _select(self, state: TrainState) -> Callable[[FeatureActivations], Pairs] | None:
        cfg = self.config
        if cfg.carry_decay == 0 or cfg.penalty != "selective":
            return None

        def select(h: FeatureActivations) -> Pairs:
            if state.carried is None:
                state.carried = CoactivationEMA.of_config(cfg)
            state.carried.update(h, self.group)
            return state.carried.select(cfg.pair_fraction, cfg.min_support, cfg.correlation_threshold)

        return select


def make_controller(arguments: RunArguments, penalty: str, ortho_coefficient: float) -> Controller | None:
    """What steers the coefficient from its initial value, by `--ortho_budget`; None: it stays as it is.

    Raises:
        SelOrthoError: the reference of an FVU budget is missing or unreadable.
    """
    if arguments.ortho_budget == "none" or penalty == "none" or ortho_coefficient == 0:
        return None
    if arguments.ortho_budget == "gradient":
        return GradientShare(ortho_coefficient, arguments.ortho_budget_value)
    if arguments.ortho_reference is None:
        raise SelOrthoError(
            "--ortho_budget fvu needs --ortho_reference, the folder of a run with --ortho_coefficient 0: what "
            "reconstruction alone reaches is known from such a twin only"
        )
    reference = read_reference(arguments.ortho_reference)
    return FVUBudget(ortho_coefficient, arguments.ortho_budget_value, reference)


def steer(
    state: TrainState,
    sae: SelOrthoSAE,
    activations: Tensor,
    output: SelOrthoOutput,
    plan: PenaltyPlan,
    group: ProcessGroup,
) -> None:
    """Let the controller look at a step before its gradients are computed."""
    controller = state.controller
    if controller is None:
        return
    assert output.losses is not None and output.reconstruction is not None
    if isinstance(controller, FVUBudget):
        x = activations
        sums = torch.stack([(output.reconstruction - x).square().sum(), (x - x.mean(0)).square().sum()]).detach()
        error, variance = group.sum(sums).tolist()
        controller.update(state.step + 1, error / variance)
        return
    if not plan.acts:
        return
    target = (
        output.features.values
        if sae.config.penalty_space == "activation" and sae.config.penalty != "ortsae"
        else sae.W_dec
    )
    norms = [_gradient_norm(output.losses[name], target, group) for name in ("ortho", "reconstruction")]
    controller.update(norms[0] / plan.weight, norms[1])  # the weight makes up for the steps on which it rests


def _gradient_norm(loss: Tensor, target: Tensor | None, group: ProcessGroup) -> float:
    if target is None or not loss.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(loss, target, retain_graph=True)
    square = gradient.float().square().sum()[None]
    return float(group.sum(square).sqrt())


def full_penalty_notice(config: SelOrthoConfig, batch: int, available: int | None) -> str | None:
    """What the full penalty is going to need, said before a run starts; None for other penalties.

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
