"""What labels are measured on: the tokens of a text with those beside them, and where each feature fires."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .top_contexts import Batch

LEAST_SAMPLE, SAMPLED_FIRINGS = 256, 1 << 23  # of each feature, of all: more are drawn from, so that memory is bounded
NOTHING = -1  # in place of the token before the first one of a context, and after the last
# The odd constant of Knuth's multiplicative hashing: documents are halved by it.
_KNUTH = 2654435761


@dataclass(frozen=True)
class FiringTokens:
    """The tokens of a text that an SAE reads, in its order."""

    token_ids: np.ndarray  # (tokens,) int32
    before: np.ndarray  # (tokens,) int32 ids of the tokens before them, NOTHING at the start of a context
    after: np.ndarray
    held_out: np.ndarray  # (tokens,) bool: of the half of the documents that labels are scored on, not chosen


@dataclass(frozen=True)
class Firings:
    """Tokens on which one feature fires: all, or a sample of them."""

    tokens: np.ndarray  # (n,) int64 places in the text
    activations: np.ndarray  # (n,) float32
    weights: np.ndarray  # (n,) float32: how many of the feature's firings each one stands for


class FiringSample:
    """Gathers where features fire: all of it until a feature has fired `limit` times, then fewer and fewer.

    The n-th firing of a feature is drawn with probability `limit` / n and stands for n / `limit` ones, so that sums
    over the sample estimate those over the text without bias. Some `limit * (1 + log(n / limit))` of n are kept.

    Args:
        d_sae: features. limit: see above; default: by the number of features, 2,048 for 4,096 of them.
    """

    def __init__(self, d_sae: int, limit: int | None = None) -> None:
        self._d_sae = d_sae
        self._limit = limit or max(LEAST_SAMPLE, SAMPLED_FIRINGS // d_sae)
        self._fired = torch.zeros(d_sae, dtype=torch.int64)
        self._read = 0
        self._tokens: list[Tensor] = []  # (4, n) int32 each: token, the one before, the one after, document's half
        self._firings: list[tuple[Tensor, ...]] = []

    def add(self, batch: Batch, features: Tensor, places: Tensor, activations: Tensor, draws: Tensor) -> None:
        """Take a batch.

        Args:
            batch: b contexts of t tokens. features, places, activations: (n,) of every firing, places within b * t.
            draws: (n,) numbers in (0, 1] as good as drawn at random.
        """
        read = batch.read.flatten()
        self._tokens.append(_columns(batch)[:, read].int().cpu())
        self._fired = self._fired.to(features.device)
        self._fired += torch.bincount(features, minlength=self._d_sae)
        share = (self._limit / self._fired).clamp_max(1)[features]
        kept = (draws <= share).nonzero()[:, 0]
        tokens = (read.cumsum(0) - 1)[places[kept]] + self._read
        parts = features[kept].int(), tokens.int(), activations[kept].float(), 1 / share[kept].float()
        self._firings.append(tuple(part.cpu() for part in parts))
        self._read += self._tokens[-1].shape[1]

    def tokens(self) -> FiringTokens:
        """Return the tokens read so far."""
        token_ids, before, after, held_out = torch.cat(self._tokens, 1).numpy()
        return FiringTokens(token_ids, before, after, held_out.astype(bool))

    def by_feature(self) -> list[Firings]:
        """Return the firings of every feature, in order."""
        features, *columns = map(torch.cat, zip(*self._firings, strict=True))
        order = features.argsort(stable=True)
        ends = torch.bincount(features, minlength=self._d_sae).cumsum(0)[:-1].numpy()
        parts = [np.split(column[order].numpy(), ends) for column in columns]
        return [Firings(tokens.astype(np.int64), a, w) for tokens, a, w in zip(*parts, strict=True)]


def _columns(batch: Batch) -> Tensor:
    """Return of each of the b * t tokens its id, those of its neighbours and the half of its document, (4, b * t)."""
    ids = batch.input_ids
    width = ids.shape[1]
    positions = torch.arange(width, device=ids.device)
    before, after = ids.roll(1, 1), ids.roll(-1, 1)
    # Where the context begins with a token that is not read, such as BOS, that is no word before the first one.
    first = (positions == 0) | ((positions == 1) & ~batch.read[:, :1])
    before = before.where(~first, NOTHING)
    after = after.where(positions + 1 < batch.lengths[:, None], NOTHING)
    half = (batch.documents * _KNUTH >> 16) & 1
    return torch.stack([ids, before, after, half[:, None].expand_as(ids)]).flatten(1)
