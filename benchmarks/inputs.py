"""What a benchmark runs on: batches of activations, real or synthetic, and an SAE of a realistic sparsity."""

from __future__ import annotations

import math
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_selortho.errors import SelOrthoError
from hf_selortho.modeling_selortho import SelOrthoSAE

SAMPLE_TOKENS = 8192  # tokens on which thresholds are set
BLOCK = 512  # features whose thresholds are found at once
SPREAD = 1.5  # standard deviation of the logarithm of the firing frequencies
LARGEST_FREQUENCY = 0.5  # of a feature whose threshold is set
LARGEST_L0 = 0.25  # share of the features that thresholds can make fire on average
ACTIVE_CAUSES = 24  # active causes of a synthetic token


class Batches:
    """Batches (B, d_in) out of activations (tokens, d_in), shuffled once; number t is the same for everyone."""

    def __init__(self, activations: Tensor, size: int, device: torch.device, seed: int = 0, limit: int = 64) -> None:
        if len(activations) < size:
            raise SelOrthoError(f"{len(activations)} tokens of activations: fewer than --batch {size}")
        order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(seed))
        order = order[: min(limit, len(activations) // size) * size]
        self.rows = activations[order.to(activations.device)].float().to(device)  # (batches * B, d_in)
        self.size = size

    def __len__(self) -> int:
        return len(self.rows) // self.size

    def at(self, number: int) -> Tensor:
        """Batch `number`, going round when there are fewer."""
        start = number % len(self) * self.size
        return self.rows[start : start + self.size]

    def statistics(self) -> tuple[Tensor, float]:
        """Mean (d_in,) and root mean squared norm about it, as an SAE's input normalisation takes them."""
        mean = self.rows.double().mean(0)
        squares = sum(float((part.double() - mean).square().sum()) for part in self.rows.split(self.size))
        return mean.float(), math.sqrt(squares / len(self.rows))


def load_activations(path: str, tensor: str | None = None) -> Tensor:
    """Activations (tokens, d_in) of a safetensors file, or of a .pt file that holds tensors only.

    Args:
        path: the file. tensor: its name in the file; None: the only one, or "activations".

    Raises:
        SelOrthoError: no such file, not readable, several tensors, or not of two axes and floating.
    """
    if not Path(path).is_file():
        raise SelOrthoError(f"--activations {path}: no such file")
    try:
        tensors = _read_safetensors(path) if path.endswith(".safetensors") else _read_pt(path)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise SelOrthoError(
            f"--activations {path}: expected a .safetensors file, or a .pt file of tensors alone ({_first_line(error)})"
        ) from error
    name = tensor or ("activations" if "activations" in tensors else next(iter(tensors), ""))
    if name not in tensors or (tensor is None and name != "activations" and len(tensors) > 1):
        raise SelOrthoError(f"--activations {path} holds {', '.join(tensors) or 'no tensor'}: choose one with --tensor")
    found = tensors[name]
    if found.ndim != 2 or not found.is_floating_point():
        raise SelOrthoError(
            f"--activations {path}: {name} has shape {tuple(found.shape)} and dtype {found.dtype}, expected floats of "
            "shape (tokens, d_in)"
        )
    if not bool(torch.isfinite(found).all()):
        raise SelOrthoError(f"--activations {path}: {name} holds NaN or infinity")
    return found


def synthetic_activations(tokens: int, d_in: int, seed: int = 0) -> Tensor:
    """Activations (tokens, d_in) of a sparse feature model.

    Each token is the sum of a few of `4 d_in` random unit directions, frequent ones more often (Zipf), times
    exponential strengths; a common mean and a little noise are added.
    """
    generator = torch.Generator().manual_seed(seed)
    causes = 4 * d_in
    directions = torch.nn.functional.normalize(torch.randn(causes, d_in, generator=generator), dim=1)
    weights = 1 / torch.arange(1, causes + 1).float().sqrt()
    mean = torch.randn(d_in, generator=generator)
    parts = []
    for start in range(0, tokens, 1024):
        count = min(1024, tokens - start)
        chosen = torch.multinomial(weights.expand(count, -1), min(ACTIVE_CAUSES, causes), generator=generator)
        strengths = torch.empty(chosen.shape).exponential_(generator=generator)
        scattered = torch.zeros(count, causes).scatter_(1, chosen, strengths)
        noise = 0.02 * torch.randn(count, d_in, generator=generator)
        parts.append(scattered @ directions + mean + noise)
    return torch.cat(parts)


@torch.no_grad()
def prepare(sae: SelOrthoSAE, activations: Tensor, target_l0: float, seed: int = 0) -> None:
    """Set `b_enc` of an untrained ReLU SAE so that its L0 is `target_l0`, its features firing unequally often.

    Each feature's threshold is a quantile of its pre-activations on a sample of `activations` (tokens, d_in); the
    firing frequencies follow a log-normal distribution, as those of trained SAEs roughly do.

    Raises:
        SelOrthoError: more features would have to fire than thresholds can bring about.
    """
    n = len(sae.b_enc)
    check_l0(n, target_l0)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(activations), generator=generator)[:SAMPLE_TOKENS].to(activations.device)
    x = sae.normalize_input(activations[rows].to(sae.device))  # (S, d_in)
    wanted = firing_frequencies(n, target_l0, generator) * len(x)
    fires = (wanted + torch.rand(n, generator=generator)).floor().long()  # of S tokens; right on average
    order = fires.argsort(descending=True)  # blocks of similar counts: few of the largest have to be found
    for features in order.split(BLOCK):
        counts = fires[features]
        z = sae.W_enc[:, features.to(x.device)].T @ x.T  # (block, S)
        largest = z.topk(min(len(x), int(counts[0]) + 1), dim=1).values
        last, counts = largest.shape[1] - 1, counts[:, None].to(x.device)
        above = largest.gather(1, (counts - 1).clamp_min(0))
        below = largest.gather(1, counts.clamp_max(last))
        silent = largest[:, :1].abs() * 1e-3  # a feature that does not fire stays just below its threshold
        threshold = torch.where(counts == 0, below + silent, (above + below) / 2)
        sae.b_enc[features.to(x.device)] = -threshold[:, 0]


def check_l0(n: int, target_l0: float) -> None:
    """Refuse an L0 that [`prepare`] cannot bring about on n features."""
    if not 0 < target_l0 <= LARGEST_L0 * n:
        raise SelOrthoError(
            f"--l0 {target_l0:g} with {n} features: expected more than 0 and at most {LARGEST_L0 * n:g}"
        )


def firing_frequencies(n: int, target_l0: float, generator: torch.Generator) -> Tensor:
    """Log-normal firing frequencies (n,) of sum `target_l0`, none above a half."""
    frequencies = torch.exp(SPREAD * torch.randn(n, generator=generator))
    for _ in range(50):  # cutting the largest takes from the sum, scaling brings others above
        frequencies = (frequencies * (target_l0 / frequencies.sum())).clamp_max(LARGEST_FREQUENCY)
    return frequencies


def _read_safetensors(path: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _read_pt(path: str) -> dict[str, Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, Tensor):
        return {"activations": found}
    return {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
