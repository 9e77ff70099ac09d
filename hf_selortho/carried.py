"""Co-activations carried over from batch to batch, so that features too rare for one batch count in the selection."""

from __future__ import annotations

import torch
from torch import Tensor

from .decorrelation import feature_norms
from .pair_scores import FeatureNorms
from .pair_selection import (
    SLACK,
    BestPairs,
    Columns,
    Pairs,
    all_pair_sums,
    first_pairs,
    pair_count,
    power_of_two_scale,
    strongest,
)
from .process_group import SINGLE_PROCESS, ProcessGroup
from .sparse_ops import ActiveFeatures, active_features

# Decayed tokens below which a feature starts afresh: what it carried no longer shows beside a single new token, but its
# pairs would keep their correlation, and with it their place under the limit, for ever (in the end as 0 / 0).
FORGOTTEN = 2.0**-20


class CarriedSums:
    """Exponential moving sums over batches: `S <- decay S + S_batch` of `<h_i, h_j>`, `|h_i|^2`, support and tokens.

    The carried correlation is `S_ij / sqrt(S_ii S_jj)`. At most `limit` pairs are kept, those of the largest carried
    correlation, ties broken by (i, j); a pair that was dropped starts again from 0, so that what is carried is then a
    lower bound. With a decay of 0 the selection is that of the latest batch.

    Args:
        n: number of features.
        decay: share of the earlier sums that a batch carries over, in [0, 1).
        limit: pairs kept; with fewer than a selection asks for, it is filled up with pairs that count as 0.
    """

    def __init__(self, n: int, decay: float, limit: int) -> None:
        self.n, self.decay, self.limit = n, decay, limit
        self.keys = torch.zeros(0, dtype=torch.int64)  # (m,) i * n + j, rising
        self.sums = torch.zeros(0)  # (m,)
        self.squares = torch.zeros(n)
        self.support = torch.zeros(n)  # decayed number of tokens
        self.tokens = 0.0  # decayed

    @torch.no_grad()
    def update(self, h: Tensor | ActiveFeatures, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Add a batch of feature activations (B, n), the global one under data parallelism.

        Beside what is carried, memory is that of the active entries and of one block of co-activations.

        Raises:
            SelOrthoError: the activations hold NaN or infinity.
        """
        active = h if isinstance(h, ActiveFeatures) else active_features(h)
        norms = feature_norms(active, "cosine", group)
        everything = FeatureNorms(torch.ones_like(norms.squares), norms.support, None, norms.tokens)  # scales nothing
        columns = Columns(active, everything, 1)
        if group.size > 1:
            assert columns.active is not None
            columns.active = group.gather_active(columns.active)
        self._decay(norms.squares.device)
        self.squares = self.squares + norms.squares.float()
        self.support = self.support + norms.support.float()
        self.tokens = self.tokens * self.decay + norms.tokens
        self._add_pairs(columns)

    def select(self, pair_fraction: float, min_support: int, correlation_threshold: float = 0.0) -> Pairs:
        """The most correlated pairs by what is carried, in the order of [`select_pairs`].

        Args:
            pair_fraction: share of the `n (n - 1) / 2` pairs, in (0, 1]; all eligible ones if they are fewer.
            min_support: decayed tokens on which both features of a pair must have fired.
            correlation_threshold: pairs of a lower `|c_ij|` are left out.
        """
        eligible = (self.support >= min_support) & (self.squares > 0)
        kept = (eligible[self.keys // self.n] & eligible[self.keys % self.n]).nonzero()[:, 0]
        count = int(eligible.sum())
        limit = min(pair_count(self.n, pair_fraction), count * (count - 1) // 2)
        best = BestPairs(limit, self.keys.device, self.sums.dtype, correlation_threshold)
        if limit > 0:
            best.offer(self._signed_squares(self.keys[kept], self.sums[kept]), self.keys[kept])
        if correlation_threshold == 0 and len(best) < limit:  # as in `select_pairs`: the smallest (i, j) first
            zeros = first_pairs(eligible.nonzero()[:, 0], self.n, best.keys, limit)
            best.offer(best.squares.new_zeros(len(zeros)), zeros)
        return best.pairs(self.n)

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

    def _decay(self, device: torch.device) -> None:
        """Let all sums fade, and forget the features of which nothing is left."""
        support = self.support.to(device) * self.decay
        living = support >= FORGOTTEN
        self.support = torch.where(living, support, 0)
        self.squares = torch.where(living, self.squares.to(device) * self.decay, 0)
        keys, sums = self.keys.to(device), self.sums.to(device) * self.decay
        kept = (living[keys // self.n] & living[keys % self.n]).nonzero()[:, 0]
        self.keys, self.sums = keys[kept], sums[kept]

    def _add_pairs(self, columns: Columns) -> None:
        """Add the sums of a batch to those carried, a block of features at a time, keeping the `limit` best."""
        untouched = torch.ones_like(self.keys, dtype=torch.bool)
        keys, sums = self.keys[:0], self.sums[:0]
        for found in all_pair_sums(columns):  # a pair comes up once
            block = columns.keys(found.i, found.j)
            added = found.sums.float()
            if len(self.keys):
                place = torch.searchsorted(self.keys, block).clamp_max(len(self.keys) - 1)
                known = (self.keys[place] == block).nonzero()[:, 0]
                added[known] += self.sums[place[known]]
                untouched[place[known]] = False
            keys, sums = torch.cat([keys, block]), torch.cat([sums, added])
            if len(keys) > self.limit + max(SLACK, self.limit // 4):
                keys, sums = self._strongest(keys, sums)
        rest = untouched.nonzero()[:, 0]
        keys, sums = self._strongest(torch.cat([keys, self.keys[rest]]), torch.cat([sums, self.sums[rest]]))
        order = keys.argsort()
        self.keys, self.sums = keys[order], sums[order]

    def _strongest(self, keys: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The `limit` pairs of largest correlation, ties broken by (i, j)."""
        if len(keys) <= self.limit:
            return keys, sums
        kept = strongest(self._signed_squares(keys, sums).abs(), keys, self.limit)
        return keys[kept], sums[kept]

    def _signed_squares(self, keys: Tensor, sums: Tensor) -> Tensor:
        """`c |c|` of pairs (m,) whose features both carry something; powers of two keep it in the range of floats."""
        i, j = keys // self.n, keys % self.n
        scale = torch.where(self.squares > 0, power_of_two_scale(self.squares.sqrt()), 0)
        scaled, squares = sums * scale[i] * scale[j], self.squares * scale.square()
        return scaled * scaled.abs() / (squares[i] * squares[j])
