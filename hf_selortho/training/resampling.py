"""Resampling of dead features (Bricken et al. 2023, "Towards Monosemanticity"), for every activation function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..modeling_selortho import SelOrthoSAE
from ..process_group import SINGLE_PROCESS, ProcessGroup

ENCODER_NORM = 0.2  # of a resampled feature at least, as a share of the mean encoder norm of those alive
ABOVE_BAR = 1.5  # a resampled feature fires on tokens that lie at least 1 / 1.5 as far along its direction as its own
_CHUNK_ELEMENTS = 1 << 24  # pre-activations held at once


@torch.no_grad()
def resample_dead(
    sae: SelOrthoSAE,
    moments: dict[str, dict[str, Tensor]],
    dead: Tensor,
    activations: Tensor,
    errors: Tensor,
    generator: torch.Generator,
    group: ProcessGroup = SINGLE_PROCESS,
    target: Tensor | None = None,
) -> int:
    """Point dead features at tokens that are reconstructed badly, and let them fire there; returns how many there were.

    Tokens are drawn with a probability proportional to the square of their error. With `t` the drawn token, normalised
    and less `b_dec`, a feature's decoder row becomes `t / |t|`, its encoder column the same times a norm `c`, and its
    bias is such that its pre-activation on the token is `c |t|`. The norm is a fifth of the usual one, or what it takes
    for `c |t|` to be 1.5 times the bar that a pre-activation has to pass there to fire. The bar is

    - relu: 0;
    - topk: the token's k-th largest pre-activation among the living features;
    - batchtopk: the fixed threshold, which follows those of the training batches and stays as it is;
    - jumprelu: the feature's threshold, which becomes the median of those of the living features.

    A transcoder's features read along the token itself, and write along what it is to become, less `b_dec` and what a
    skip adds.

    Adam forgets what it knew of these features.

    Args:
        moments: Adam's state by parameter, in the parameters' shapes ([`SAEOptimizer.moments`]).
        dead: (n,) bool. activations: (B, d_in), raw. errors: (B,) squared errors of these tokens.
        generator: on the CPU, in the same state on all processes.
        group: processes whose tokens are candidates together.
        target: of a transcoder, what the tokens are to become, (B, d_out), raw.
    """
    features = dead.nonzero()[:, 0]
    if len(features) == 0:
        return 0
    activations, errors = group.gather(activations), group.gather(errors)
    chance = errors.double().cpu().square()
    chance = chance / chance.max().clamp_min(torch.finfo(torch.float64).tiny) + 1e-12  # enough tokens of some chance
    drawn = torch.multinomial(chance, len(features), replacement=len(features) > len(chance), generator=generator)
    activations = activations[drawn.to(activations.device)]  # (dead, d_in)
    x = sae.normalize_input(activations).to(sae.W_dec.dtype)
    center = x.new_zeros(x.shape[1]) if sae.config.is_transcoder else sae.b_dec
    tokens = x - center
    directions = torch.nn.functional.normalize(tokens, dim=1)
    usual = sae.W_enc[:, ~dead].norm(dim=0).mean() if not bool(dead.all()) else sae.W_enc.new_ones(())
    bars = _bars(sae, dead, x)
    norms = torch.maximum(ENCODER_NORM * usual, ABOVE_BAR * bars / tokens.norm(dim=1).clamp_min(1e-12))
    if target is None:
        sae.W_dec[features] = directions
    else:
        y = sae.normalize_target(activations, group.gather(target)[drawn.to(activations.device)])
        skipped = x @ sae.W_skip if sae.config.skip else 0
        sae.W_dec[features] = torch.nn.functional.normalize(y.to(sae.W_dec.dtype) - sae.b_dec - skipped, dim=1)
    sae.W_enc[:, features] = directions.T * norms
    sae.b_enc[features] = -norms * (directions @ center)
    for name, axis in {"W_dec": 0, "W_enc": 1, "b_enc": 0, "log_threshold": 0}.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in moments.get(name, {}):
                moments[name][key].index_fill_(axis, features, 0)
    return len(features)


def _bars(sae: SelOrthoSAE, dead: Tensor, x: Tensor) -> Tensor:
    """Return what the pre-activation of each dead feature has to pass on its token of `x` (dead, d_in): (dead,).

    Jumprelu's thresholds are set on the way.
    """
    config = sae.config
    if config.activation == "jumprelu":
        living = sae.log_threshold[~dead]
        level = living.median() if len(living) else living.new_tensor(math.log(config.jumprelu_threshold))
        sae.log_threshold[dead] = level
        return level.exp().expand(len(x))
    if config.activation == "batchtopk":
        return sae.threshold.expand(len(x))
    if config.activation == "topk" and config.k is not None and int((~dead).sum()) >= config.k:
        k, n = config.k, len(dead)
        chunks = x.split(max(1, _CHUNK_ELEMENTS // n))
        kth = [sae.pre_activations(chunk).masked_fill(dead, -torch.inf).topk(k).values[:, -1] for chunk in chunks]
        return torch.cat(kth).clamp_min(0)
    return x.new_zeros(len(x))
