"""Resampling of the dead features of a ReLU SAE (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling_selortho import SelOrthoSAE
from ..process_group import SINGLE_PROCESS, ProcessGroup

ENCODER_NORM = 0.2  # of a resampled feature, as a share of the mean encoder norm of those alive


@torch.no_grad()
def resample_dead(
    sae: SelOrthoSAE,
    moments: dict[str, dict[str, Tensor]],
    dead: Tensor,
    activations: Tensor,
    errors: Tensor,
    generator: torch.Generator,
    group: ProcessGroup = SINGLE_PROCESS,
) -> int:
    """Point dead features at tokens that are reconstructed badly; returns how many there were.

    Tokens are drawn with a probability proportional to the square of their error. A feature's decoder row becomes the
    token's direction about `b_dec`, its encoder column the same at a fifth of the usual norm, its bias 0, and Adam
    forgets what it knew of them.

    Args:
        moments: Adam's state by parameter, in the parameters' shapes ([`SAEOptimizer.moments`]).
        dead: (n,) bool. activations: (B, d_in), raw. errors: (B,) squared errors of these tokens.
        generator: on the CPU, in the same state on all processes.
        group: processes whose tokens are candidates together.
    """
    features = dead.nonzero()[:, 0]
    if len(features) == 0:
        return 0
    activations, errors = group.gather(activations), group.gather(errors)
    chance = errors.double().cpu().square()
    chance = chance / chance.max().clamp_min(torch.finfo(torch.float64).tiny) + 1e-12  # enough tokens of some chance
    drawn = torch.multinomial(chance, len(features), replacement=len(features) > len(chance), generator=generator)
    tokens = sae.normalize_input(activations[drawn.to(activations.device)]) - sae.b_dec
    directions = torch.nn.functional.normalize(tokens, dim=1).to(sae.W_dec.dtype)  # (dead, d_in)
    alive = ~dead
    usual = sae.W_enc[:, alive].norm(dim=0).mean() if bool(alive.any()) else sae.W_enc.new_ones(())
    sae.W_dec[features] = directions
    sae.W_enc[:, features] = directions.T * (ENCODER_NORM * usual)
    sae.b_enc[features] = 0
    for name, axis in (("W_dec", 0), ("W_enc", 1), ("b_enc", 0)):
        for key in ("exp_avg", "exp_avg_sq"):
            if key in moments[name]:
                moments[name][key].index_fill_(axis, features, 0)
    return len(features)
