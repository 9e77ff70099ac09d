"""One training step of an SAE up to its loss, eq. 7: on the active entries alone where these are few, exactly.

The dense way holds pre-activations (B, n). The other way computes them a few tokens at a time and keeps what fires, so
that `(B, n)` never exists. Loss and gradients are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .activation_functions import JumpReLU, activate
from .configuration_selortho import SelOrthoConfig
from .pairs import Pairs
from .penalties import PenaltyPlan, penalty
from .process_group import SINGLE_PROCESS, ProcessGroup
from .sparse_ops import ActiveFeatures, DenseFeatures, FeatureActivations, SparseEncode

if TYPE_CHECKING:
    from .modeling_selortho import SelOrthoSAE

CHUNK_ROWS = 128  # tokens whose pre-activations are held at once: enough for matrix products at full speed
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}  # pre-activations held at once, if that is more tokens
# Densities below which the active entries are cheaper than dense arithmetic; the CPU's is measured (benchmark.py)
SPARSE_BELOW = {"cpu": 0.08, "cuda": 0.004}


@dataclass(frozen=True)
class Step:
    """What a batch gives before the gradients are computed."""

    features: FeatureActivations  # (B, d_sae)
    y_hat: Tensor  # (B, d_out), normalised reconstruction
    losses: dict[str, Tensor]  # weighted terms of eq. 7
    pairs: Pairs | None  # that the selective penalty acted on
    threshold: Tensor | None  # batchtopk: the smallest activation that this batch kept


@dataclass(frozen=True)
class _Encoded:
    """Feature activations of a batch, and what the loss needs to know about how they came about."""

    h: FeatureActivations
    threshold: Tensor | None = None  # batchtopk: the smallest activation that was kept
    l0: Tensor | None = None  # jumprelu: mean L0 with a gradient to the thresholds


def run_step(
    sae: SelOrthoSAE,
    x: Tensor,
    y: Tensor,
    group: ProcessGroup | None = None,
    plan: PenaltyPlan | None = None,
    dead: Tensor | None = None,
    dense: bool = False,
) -> Step:
    """Encode normalised activations `x` (B, d_in), reconstruct `y` (B, d_out), and compute the terms of eq. 7.

    `y` is `x`, but for a transcoder.

    Args:
        sae: in training mode, batchtopk looks at the batch instead of its fixed threshold.
        group: processes whose tokens together are the batch; default: this process alone.
        plan: what the penalty does; default: select pairs and act on them.
        dead: which features are dead (d_sae,), for the auxiliary loss of topk and batchtopk.
        dense: give feature activations as an ordinary tensor.
    """
    group, config = group or SINGLE_PROCESS, sae.config
    encoded = None
    if not dense and sae.training and torch.is_grad_enabled() and not x.requires_grad:
        encoded = _encode_active(sae, x, group)
    if encoded is None:
        encoded = _encode_dense(sae, x, group)
    y_hat, reconstruction = _reconstruct(sae, x, y, encoded.h)
    if not sae.training and "redundancy" in (config.penalty_space, config.selection_space):
        plan = PenaltyPlan(acts=False)  # loaded, but no longer trained with
    ortho, pairs = penalty(config, encoded.h, sae.W_dec, group, plan)
    losses = {"reconstruction": reconstruction, **_sparsity_losses(config, encoded), "ortho": ortho}
    if dead is not None and sae.aux_features > 0:
        losses["aux"] = _aux_loss(sae, x, y - y_hat.detach(), dead)
    return Step(encoded.h, y_hat, losses, pairs, encoded.threshold)


def _encode_dense(sae: SelOrthoSAE, x: Tensor, group: ProcessGroup) -> _Encoded:
    config, z = sae.config, sae.pre_activations(x)
    if config.activation == "batchtopk" and sae.training:
        least = batch_threshold(z.detach().flatten(), _wanted(config, len(x), x.device, group), group)
        return _Encoded(DenseFeatures(torch.where((z >= least) & (z > 0), z, 0)), threshold=least)
    if config.activation == "jumprelu":
        h, fired = JumpReLU.apply(z, sae.inference_threshold(), config.jumprelu_bandwidth)
        return _Encoded(DenseFeatures(h), l0=fired / len(x))
    return _Encoded(DenseFeatures(activate(config.activation, z, config.k, sae.inference_threshold())))


def _encode_active(sae: SelOrthoSAE, x: Tensor, group: ProcessGroup) -> _Encoded | None:
    """Encode as active entries with gradients to the encoder; None if there are too many of them."""
    config = sae.config
    thresholds = sae.inference_threshold() if config.activation == "jumprelu" else None
    with torch.no_grad():
        found = _find_active(sae, x, thresholds, group)
    if found is None:
        return None
    pattern, least = found
    z = SparseEncode.apply(x, sae.W_enc, sae.b_enc, pattern)
    if thresholds is None:
        return _Encoded(pattern.with_values(torch.relu(z)), threshold=least)
    h, fired = JumpReLU.apply(z, thresholds, config.jumprelu_bandwidth, pattern.cols)
    return _Encoded(pattern.with_values(h), l0=fired / len(x))


def _find_active(
    sae: SelOrthoSAE, x: Tensor, thresholds: Tensor | None, group: ProcessGroup
) -> tuple[ActiveFeatures, Tensor | None] | None:
    """Find the pre-activations that pass, a few tokens at a time, and the smallest of them with batchtopk.

    Jumprelu's may lie below the threshold by half of the bandwidth, where the threshold still learns from them.
    """
    config, n, kind = sae.config, sae.W_enc.shape[1], x.device.type
    limit = SPARSE_BELOW.get(kind, 0.0)
    if config.k is not None and config.k > limit * n:
        return None
    wanted = _wanted(config, len(x), x.device, group) if config.activation == "batchtopk" else None
    lower: Tensor | float = 0.0 if thresholds is None else thresholds - config.jumprelu_bandwidth / 2
    places, values, count = list[Tensor](), list[Tensor](), 0  # token * n + feature
    rows = max(CHUNK_ROWS, CHUNK_ELEMENTS.get(kind, 1 << 28) // n)
    for start, z in _pre_activation_chunks(x, sae.W_enc, sae.b_enc, rows):
        if config.activation == "topk":
            assert config.k is not None
            best, cols = z.topk(config.k, dim=-1, sorted=False)
            values.append(best.flatten())
            places.append((cols + torch.arange(start, start + len(z), device=z.device)[:, None] * n).flatten())
            continue
        flat = (z > lower).view(-1).nonzero()[:, 0]
        values.append(z.view(-1)[flat])
        places.append(flat + start * n)
        count += len(flat)
        if start == 0 and config.k is None:
            # under data parallelism all processes have to take the same way, as they talk along it
            share = torch.tensor([count / max(1, z.numel())], device=x.device)
            if float(group.sum(share)) / group.size > limit:
                return None
        if wanted is not None and count > 2 * wanted:
            # raise the bar to what the entries so far say: the threshold of the batch can only be higher
            all_values = torch.cat(values)
            least = all_values.topk(wanted, sorted=False).values.min()
            kept = all_values >= least
            places, values, count = [torch.cat(places)[kept]], [all_values[kept]], int(kept.sum())
            lower = torch.nextafter(least, torch.zeros_like(least))
    flat, found = torch.cat(places), torch.cat(values)
    del places, values  # they may be large
    if wanted is None:
        return ActiveFeatures.at(flat, found, len(x), n), None
    least = batch_threshold(found, wanted, group)
    return ActiveFeatures.at(flat[found >= least], found[found >= least], len(x), n), least


def _wanted(config: SelOrthoConfig, tokens: int, device: torch.device, group: ProcessGroup) -> int:
    """Return the entries that batchtopk keeps, `B k`; B counts the tokens of all processes."""
    assert config.k is not None
    return int(group.sum(torch.tensor([tokens], device=device))) * config.k


def batch_threshold(z: Tensor, wanted: int, group: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Return the `wanted`-th largest of the pre-activations (m,) of all processes, 0 if fewer are positive."""
    best = z.topk(min(wanted, len(z)), sorted=False).values
    if group.size > 1:
        best = group.gather(best)
        best = best.topk(min(wanted, len(best)), sorted=False).values
    return best.min().clamp_min(0)


def _pre_activation_chunks(x: Tensor, W_enc: Tensor, b_enc: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield first token and pre-activations (rows, n) of a few tokens at a time, always in the same memory."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else W_enc.dtype
    with torch.autocast(kind, enabled=False):
        x, W_enc, b_enc = x.to(dtype), W_enc.to(dtype), b_enc.to(dtype)
        memory = x.new_empty(min(rows, len(x)), W_enc.shape[1])
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            z = torch.addmm(b_enc, part, W_enc, out=memory[: len(part)])
            yield start, z if dtype == torch.float64 else z.float()


def _reconstruct(sae: SelOrthoSAE, x: Tensor, y: Tensor, h: FeatureActivations) -> tuple[Tensor, Tensor]:
    """Compute the normalised reconstruction (B, d_out) and its loss, the mean over the prefixes of a Matryoshka SAE."""
    prefixes, W_dec = sae.config.matryoshka_prefixes, sae.W_dec
    bias = sae.b_dec + x.to(W_dec.dtype) @ sae.W_skip if sae.config.skip else sae.b_dec
    if prefixes is None:
        y_hat = h.decode(W_dec) + bias
        return y_hat, (y_hat.to(y.dtype) - y).square().sum(-1).mean()
    parts = h.decode(W_dec, prefixes)  # (B, prefixes, d_out)
    nested = parts.cumsum(1) + (bias[:, None] if sae.config.skip else bias)
    return nested[:, -1], (nested.to(y.dtype) - y[:, None]).square().sum(-1).mean()


def _sparsity_losses(config: SelOrthoConfig, encoded: _Encoded) -> dict[str, Tensor]:
    values = encoded.h.values
    zero = values.new_zeros((), dtype=torch.float32)
    if encoded.l0 is not None:
        return {"l1": zero, "l0_penalty": config.l0_coefficient * encoded.l0}
    if config.activation != "relu" or config.l1_coefficient == 0:
        return {"l1": zero}
    return {"l1": config.l1_coefficient * values.float().sum() / encoded.h.tokens}  # h >= 0: its L1 norm is its sum


def _aux_loss(sae: SelOrthoSAE, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """Let the dead features with the largest pre-activations explain the residual (Gao et al. 2024, section A.2)."""
    features = dead.nonzero()[:, 0]
    if len(features) == 0:
        return x.new_zeros(())
    z = x.to(sae.W_enc.dtype) @ sae.W_enc[:, features] + sae.b_enc[features]  # (B, dead)
    if len(features) > sae.aux_features:
        least = z.detach().topk(sae.aux_features, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        z = torch.where(z >= least, z, 0)
    explained = torch.relu(z) @ sae.W_dec[features]
    return sae.config.aux_coefficient * (explained.to(x.dtype) - residual).square().sum(-1).mean()
