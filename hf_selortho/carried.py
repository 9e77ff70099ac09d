"""Co-activations carried over from batch to batch, so that features too rare for one batch count in the selection."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch_group import BatchGroup
from .decorrelation import feature_norms
from .pair_scores import FeatureNorms
from .pair_selection import BestPairs, Columns, Pairs, all_pair_sums, pair_count
from .sparse_ops import ActiveFeatures, active_features


class CarriedSums:
    """Exponential moving sums over batches: `S <- decay S + S_batch` of `<h_i, h_j>`, `|h_i|^2`, support and tokens.

    The carried correlation is `S_ij / sqrt(S_ii S_jj)`. At most `limit` pairs are kept, those of the largest carried
    correlation; a pair that was dropped starts again from 0, so that what is carried is then a lower bound.
    """

    def __init__(self, n: int, decay: float, limit: int) -> None:
        self.n, self.decay, self.limit = n, decay, limit
        self.keys = torch.zeros(0, dtype=torch.int64)  # (m,) i * n + j, rising
        self.sums = torch.zeros(0)  # (m,)
        self.squares = torch.zeros(n)
        self.support = torch.zeros(n)
        self.tokens = 0.0

    @torch.no_grad()
    def update(self, h: Tensor | ActiveFeatures, group: BatchGroup | None = None) -> None:
        """Add a batch of feature activations (B, n), the global one under data parallelism."""
        active = h if isinstance(h, ActiveFeatures) else active_features(h)
        norms = feature_norms(active, "cosine", group)
        everything = FeatureNorms(torch.ones_like(norms.squares), norms.support, None, norms.tokens)  # scales nothing
        columns = Columns(active, everything, 1)
        if group is not None:
            assert columns.active is not None
            columns.active = group.gather_active(columns.active)
        device = norms.squares.device
        keys, sums = [self.keys.to(device)], [self.sums.to(device) * self.decay]
        for found in all_pair_sums(columns):
            keys.append(columns.keys(found.i, found.j))
            sums.append(found.sums.float())
        self.keys, place = torch.cat(keys).unique(return_inverse=True)
        self.sums = torch.zeros(len(self.keys), device=device).index_add_(0, place, torch.cat(sums))
        self.squares = self.squares.to(device) * self.decay + norms.squares.float()
        self.support = self.support.to(device) * self.decay + norms.support.float()
        self.tokens = self.tokens * self.decay + norms.tokens
        self._forget()

    def select(self, pair_fraction: float, min_support: int, correlation_threshold: float = 0.0) -> Pairs:
        """The most correlated pairs by what is carried; both features need `min_support` in the decayed counts."""
        squares = self._signed_squares()
        i, j = self.keys // self.n, self.keys % self.n
        eligible = (self.support >= min_support) & (self.squares > 0)
        kept = (eligible[i] & eligible[j]).nonzero()[:, 0]
        limit = min(pair_count(self.n, pair_fraction), len(kept))
        best = BestPairs(limit, squares.device, squares.dtype, correlation_threshold)
        if limit > 0:
            best.offer(squares[kept], self.keys[kept])
        signed, keys = best.sorted()
        correlation = signed.sign() * signed.abs().sqrt().clamp_max(1)
        return Pairs(keys // self.n, keys % self.n, correlation)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything carried, as tensors."""
        tokens = torch.tensor(self.tokens, dtype=torch.float64)
        return {
            "keys": self.keys, "sums": self.sums, "squares": self.squares, "support": self.support, "tokens": tokens
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a [`state_dict`]."""
        self.keys, self.sums = state["keys"], state["sums"]
        self.squares, self.support, self.tokens = state["squares"], state["support"], float(state["tokens"])

    def _signed_squares(self) -> Tensor:
        i, j = self.keys // self.n, self.keys % self.n
        return self.sums * self.sums.abs() / (self.squares[i] * self.squares[j])

    def _forget(self) -> None:
        if len(self.keys) > self.limit:
            strongest = self._signed_squares().abs().topk(self.limit, sorted=False).indices.sort().values
            self.keys, self.sums = self.keys[strongest], self.sums[strongest]
