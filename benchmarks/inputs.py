"""What a benchmark runs on: batches of activations, real or synthetic, and an SAE of a realistic sparsity."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_selortho.configuration_selortho import SelOrthoConfig
from hf_selortho.data.buffer import ActivationBuffer
from hf_selortho.data.contexts import ContextStream, Cutter
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.errors import SelOrthoError
from hf_selortho.language_models.capture import ActivationCapture, only
from hf_selortho.language_models.loading import LanguageModel
from hf_selortho.modeling_selortho import SelOrthoSAE

SAMPLE_TOKENS = 8192  # tokens on which thresholds are set
BLOCK = 512  # features whose thresholds are found at once
SPREAD = 1.5  # standard deviation of the logarithm of the firing frequencies
LARGEST_FREQUENCY = 0.5  # of a feature whose threshold is set
LARGEST_L0 = 0.25  # share of the features that thresholds can make fire on average
ACTIVE_CAUSES = 24  # active causes of a synthetic token
BUFFERED, CONTEXT_LENGTH = 6, 128  # batches and tokens of a context of the buffer that is timed


class Batches:
    """Batches (B, d_in) out of activations (tokens, d_in), shuffled once; number t is the same for every case."""

    def __init__(self, activations: Tensor, size: int, device: torch.device, seed: int = 0, limit: int = 64) -> None:
        if len(activations) < size:
            raise SelOrthoError(f"{len(activations)} tokens of activations: fewer than --batch {size}")
        order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(seed))
        order = order[: min(limit, len(activations) // size) * size]
        self.rows = activations[order.to(activations.device)].float().to(device)  # (batches * B, d_in)
        self.size = size

    def at(self, number: int) -> Tensor:
        """Return batch `number`, going round when there are fewer."""
        start = number % (len(self.rows) // self.size) * self.size
        return self.rows[start : start + self.size]


def load_activations(path: str) -> Tensor:
    """Load the activations (tokens, d_in) of a safetensors file: its tensor "activations", or its only one.

    Raises:
        SelOrthoError: not readable, several tensors, or not finite floats of two axes.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SelOrthoError(f"--activations {path}: expected a .safetensors file ({error})") from error
    found = tensors.get("activations") if len(tensors) != 1 else next(iter(tensors.values()))
    if found is None:
        raise SelOrthoError(f"--activations {path} holds {', '.join(tensors)}: expected a tensor named activations")
    if found.ndim != 2 or not found.is_floating_point() or not bool(torch.isfinite(found).all()):
        raise SelOrthoError(
            f"--activations {path}: a tensor of shape {tuple(found.shape)} and dtype {found.dtype}, expected finite "
            "floats of shape (tokens, d_in)"
        )
    return found


def time_language_model(lm: LanguageModel, layer: int, dataset: str, batch: int) -> tuple[Tensor, dict[str, float]]:
    """Time the language model up to a layer and the shuffle buffer behind it, each by itself.

    Returns:
        Activations (tokens, d_in), and the tokens a second of both.
    """
    capture = ActivationCapture(lm, layer)
    stream = ContextStream(open_documents(TextSource(dataset)), Cutter(lm.tokenizer, context_length=CONTEXT_LENGTH))
    contexts = math.ceil(BUFFERED * batch / CONTEXT_LENGTH)
    buffer = ActivationBuffer(
        capture, stream, contexts=contexts, context_length=CONTEXT_LENGTH, batch_size=batch, refresh_every=BUFFERED
    )
    buffer.statistics(progress=True)  # warms the language model up
    started = time.perf_counter()
    served = [only(buffer.next_batch().by_layer) for _ in range(BUFFERED)]  # all that it serves without a refresh
    wait_for(capture.device)
    buffered = time.perf_counter() - started
    fresh = stream.take(contexts)
    started = time.perf_counter()
    captured = capture.capture_all(fresh)
    wait_for(capture.device)
    speeds = {
        "lm_tokens_per_second": len(captured) / (time.perf_counter() - started),
        "buffer_tokens_per_second": BUFFERED * batch / buffered,
    }
    return torch.cat(served), speeds


def wait_for(device: torch.device) -> None:
    """Return once a GPU has done what it was given; a CPU has by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synthetic_activations(tokens: int, d_in: int, seed: int = 0) -> Tensor:
    """Draw activations (tokens, d_in) of a sparse feature model.

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


def make_sae(config: SelOrthoConfig, batches: Batches, l0: float | None, seed: int = 0) -> SelOrthoSAE:
    """Make an untrained SAE that reads the batches; with `l0`, so many of its features fire on average."""
    torch.manual_seed(seed)
    sae: Any = SelOrthoSAE(config)
    sae.to(batches.rows.device)
    mean = batches.rows.double().mean(0)
    squares = sum(float((part.double() - mean).square().sum()) for part in batches.rows.split(batches.size))
    sae.set_input_statistics(mean.float(), math.sqrt(squares / len(batches.rows)))
    if l0 is not None:
        set_thresholds(sae, batches.rows, l0, seed)
    made: SelOrthoSAE = sae
    return made


@torch.no_grad()
def set_thresholds(sae: SelOrthoSAE, activations: Tensor, l0: float, seed: int = 0) -> None:
    """Set `b_enc` of an untrained ReLU SAE so that `l0` features fire on a token, some of them more often than others.

    Each feature's threshold is a quantile of its pre-activations on a sample of `activations` (tokens, d_in); the
    firing frequencies follow a log-normal distribution, as those of trained SAEs roughly do.

    Raises:
        SelOrthoError: more features would have to fire than thresholds can bring about.
    """
    n = len(sae.b_enc)
    check_l0(n, l0)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(activations), generator=generator)[:SAMPLE_TOKENS].to(activations.device)
    x = sae.normalize_input(activations[rows].to(sae.device))  # (S, d_in)
    frequencies = torch.exp(SPREAD * torch.randn(n, generator=generator))
    for _ in range(50):  # cutting the largest takes from the sum, scaling brings others above
        frequencies = (frequencies * (l0 / frequencies.sum())).clamp_max(LARGEST_FREQUENCY)
    fires = (frequencies * len(x) + torch.rand(n, generator=generator)).floor().long()  # of S tokens; right on average
    for features in fires.argsort(descending=True).split(BLOCK):  # of similar counts: few of the largest are needed
        counts = fires[features]
        z = sae.W_enc[:, features.to(x.device)].T @ x.T  # (block, S)
        largest = z.topk(min(len(x), int(counts[0]) + 1), dim=1).values
        counts = counts[:, None].to(x.device)
        above = largest.gather(1, (counts - 1).clamp_min(0))
        below = largest.gather(1, counts.clamp_max(largest.shape[1] - 1))
        silent = largest[:, :1].abs() * 1e-3  # a feature that does not fire stays just below its threshold
        threshold = torch.where(counts == 0, below + silent, (above + below) / 2)
        sae.b_enc[features.to(x.device)] = -threshold[:, 0]


def check_l0(n: int, l0: float) -> None:
    """Refuse an L0 that thresholds cannot bring about on n features."""
    if not 0 < l0 <= LARGEST_L0 * n:
        raise SelOrthoError(f"--l0 {l0:g} with {n} features: expected more than 0 and at most {LARGEST_L0 * n:g}")
