"""The pairs of features to decorrelate: the exact set `T` of eq. 5, of a batch or of a running average over batches."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import finite_number, whole_number
from .configuration_selortho import SelOrthoConfig
from .errors import SelOrthoError
from .pair_search import BLOCKS, Blocks, Columns, PairSearch, Score, co_activations
from .pairs import BestPairs, FeatureNorms, Pairs, feature_norms, power_of_two_scale, strongest
from .process_group import SINGLE_PROCESS, ProcessGroup
from .sparse_ops import ActiveFeatures, FeatureActivations, as_float, feature_activations

logger = logging.getLogger(__name__)
_logged: set[tuple[int, int]] = set()  # pairs asked for and features for which it was said that they are too many

SPARSE_BELOW = 0.1  # activations of a lower density are handled through their non-zero entries
EMA_PAIRS = 8  # co-activations that a running average keeps, as a multiple of the pairs asked for
# Decayed tokens below which a feature starts afresh: what it carried no longer shows beside a single new token, but its
# pairs would keep their correlation, and with it their place under the limit, for ever (in the end as 0 / 0).
FORGOTTEN = 2.0**-20


@dataclass(frozen=True)
class Selection:
    """Pairs that were selected, and the batch whose correlations they carry, if they are those of a batch."""

    pairs: Pairs
    features: FeatureActivations | None = None
    norms: FeatureNorms | None = None  # of these features


def pair_count(n: int, pair_fraction: float) -> int:
    """Return the number of pairs asked for: `ceil(pair_fraction * n (n - 1) / 2)`."""
    return math.ceil(pair_fraction * (n * (n - 1) // 2))


def select_pairs(
    h: Tensor | FeatureActivations,
    pair_fraction: float = 1e-3,
    min_support: int = 1,
    correlation: str = "cosine",
    method: str = "auto",
    group: ProcessGroup | None = None,
    correlation_threshold: float = 0.0,
    score: Score | None = None,
) -> Pairs:
    """Select the exact set `T` of eq. 5: the most correlated eligible pairs of features of a batch.

    A pair is eligible if both features fired on at least `min_support` tokens. `ceil(pair_fraction * P)` pairs of
    largest `|c_ij|` are taken (all eligible ones if they are fewer), ties broken by (i, j). Memory is that of the
    pairs, of the active entries and of one tile, never `(n, n)`.

    Args:
        h: feature activations, (B, n), any floating dtype; the arithmetic is float32 (float64 for float64).
        pair_fraction: share of the `P = n (n - 1) / 2` pairs, in (0, 1].
        min_support: tokens on which each feature of a pair must have fired.
        correlation: "cosine" (eq. 4) or "pearson".
        method: "tiles" (blocks of the correlation matrix, memory of one of them), "coactivation" (sums over the
            features that fire together, cost independent of n; not for Pearson), or "auto", the cheaper one. The set is
            the same.
        group: processes whose rows together are the batch; each returns the same pairs. Default: this process alone.
        correlation_threshold: pairs of a lower `|c_ij|` are left out.
        score: ranks the pairs by `score(c, i, j)` (m,) in place of the correlations `c` (m,) of the features `i < j`
            (m,); its absolute value must not exceed `|c|`.

    Raises:
        SelOrthoError: an argument is not allowed.
        NonFiniteError: the activations hold NaN or infinity.
    """
    features, group = feature_activations(h), group or SINGLE_PROCESS
    return select(features, pair_fraction, min_support, correlation, method, group, correlation_threshold, score).pairs


@torch.no_grad()
def select(
    features: FeatureActivations,
    pair_fraction: float,
    min_support: int = 1,
    correlation: str = "cosine",
    method: str = "auto",
    group: ProcessGroup = SINGLE_PROCESS,
    correlation_threshold: float = 0.0,
    score: Score | None = None,
    blocks: Blocks = BLOCKS,
) -> Selection:
    """Select pairs as [`select_pairs`] does, and remember the batch that they come from."""
    if not 0 < finite_number(pair_fraction, "pair_fraction") <= 1:
        raise SelOrthoError(f"pair_fraction={pair_fraction!r}: expected a share in (0, 1]")
    finite_number(correlation_threshold, "correlation_threshold")
    whole_number(min_support, "min_support")
    check_correlation(correlation)
    if method not in ("auto", "tiles", "coactivation"):
        raise SelOrthoError(f"method={method!r}: expected 'auto', 'tiles' or 'coactivation'")
    with torch.autocast(features.values.device.type, enabled=False):
        norms = feature_norms(features, correlation, group)
        density = float(norms.support.sum()) / max(1, norms.tokens * features.n)
        sparse = method == "coactivation" or group.size > 1 or density < SPARSE_BELOW
        columns = Columns(features.to_active() if sparse else features, norms, min_support, group)
        asked = pair_count(columns.n, pair_fraction)
        pairs = PairSearch(columns, score, group, blocks).best(asked, method, correlation_threshold)
    if len(pairs) < asked and correlation_threshold == 0 and (asked, columns.n) not in _logged:
        _logged.add((asked, columns.n))
        logger.info(
            "%d pairs were asked for, but only %d are eligible (both features active on at least %d tokens of the "
            "batch, of %d features): taking these; said once",
            asked, len(pairs), min_support, columns.n,
        )  # fmt: skip
    return Selection(pairs, features, norms)


def check_correlation(correlation: str) -> None:
    """Raise a SelOrthoError unless there is such a correlation."""
    if correlation not in ("cosine", "pearson"):
        raise SelOrthoError(f"correlation={correlation!r}: expected 'cosine' or 'pearson'")


class CoactivationEMA:
    """Exponential moving sums over batches: `S <- decay S + S_batch` of `<h_i, h_j>`, `|h_i|^2` and support.

    Features too rare for one batch count in a selection by `S_ij / sqrt(S_ii S_jj)`. At most `limit` pairs are kept,
    those of the largest such correlation, ties broken by (i, j); a pair that was dropped starts again from 0, so that
    what is kept is then a lower bound. With a decay of 0 the selection is that of the latest batch.

    Args:
        n: number of features.
        decay: share of the earlier sums that a batch carries over, in [0, 1).
        limit: pairs kept; with fewer than a selection asks for, it is filled up with pairs that count as 0.
        blocks: sizes of what is held at once.
    """

    def __init__(self, n: int, decay: float, limit: int, blocks: Blocks = BLOCKS) -> None:
        self.n, self.decay, self.limit, self.blocks = n, decay, limit, blocks
        self.keys = torch.zeros(0, dtype=torch.int64)  # (m,) i * n + j, rising
        self.sums = torch.zeros(0)  # (m,)
        self.squares = torch.zeros(n)
        self.support = torch.zeros(n)  # decayed number of tokens

    @staticmethod
    def of_config(config: SelOrthoConfig) -> CoactivationEMA:
        """Return empty sums for a training with these settings."""
        assert config.d_sae is not None
        limit = EMA_PAIRS * pair_count(config.d_sae, config.pair_fraction)
        return CoactivationEMA(config.d_sae, config.carry_decay, limit)

    @torch.no_grad()
    def update(self, h: Tensor | FeatureActivations, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Add a batch of feature activations (B, n), the global one under data parallelism.

        Beside what is kept, memory is that of the active entries and of one block of co-activations.

        Raises:
            NonFiniteError: the activations hold NaN or infinity.
        """
        active = feature_activations(h).to_active()
        norms = feature_norms(active, "cosine", group)
        self._decay(norms.squares.device)
        self.squares = self.squares + norms.squares.float()
        self.support = self.support + norms.support.float()
        self._add_pairs(group.gather_active(active.with_values(as_float(active.values))))

    def select(self, pair_fraction: float, min_support: int, correlation_threshold: float = 0.0) -> Pairs:
        """Select the most correlated pairs by the moving sums, in the order of [`select_pairs`].

        Args:
            pair_fraction: share of the `n (n - 1) / 2` pairs, in (0, 1]; all eligible ones if they are fewer.
            min_support: decayed tokens on which both features of a pair must have fired.
            correlation_threshold: pairs of a lower `|c_ij|` are left out.
        """
        eligible = (self.support >= min_support) & (self.squares > 0)
        kept = (eligible[self.keys // self.n] & eligible[self.keys % self.n]).nonzero()[:, 0]
        count = int(eligible.sum())
        limit = min(pair_count(self.n, pair_fraction), count * (count - 1) // 2)
        best = BestPairs(limit, self.sums, correlation_threshold**2, self.blocks.slack)
        best.offer(self._signed_squares(self.keys[kept], self.sums[kept]), self.keys[kept])
        return best.pairs(eligible.nonzero()[:, 0], self.n)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything kept, as tensors."""
        return {name: getattr(self, name) for name in ("keys", "sums", "squares", "support")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a [`state_dict`]."""
        self.keys, self.sums, self.squares, self.support = (state[n] for n in ("keys", "sums", "squares", "support"))

    def _decay(self, device: torch.device) -> None:
        """Let all sums fade, and forget the features of which nothing is left."""
        support = self.support.to(device) * self.decay
        living = support >= FORGOTTEN
        self.support = torch.where(living, support, 0)
        self.squares = torch.where(living, self.squares.to(device) * self.decay, 0)
        keys, sums = self.keys.to(device), self.sums.to(device) * self.decay
        kept = (living[keys // self.n] & living[keys % self.n]).nonzero()[:, 0]
        self.keys, self.sums = keys[kept], sums[kept]

    def _add_pairs(self, active: ActiveFeatures) -> None:
        """Add the sums of a batch to those kept, a block of features at a time, keeping the `limit` best."""
        untouched = torch.ones_like(self.keys, dtype=torch.bool)
        keys, sums = self.keys[:0], self.sums[:0]
        for found in co_activations(active, self.blocks):  # a pair comes up once
            block = found.i * self.n + found.j
            added = found.sums.float()
            if len(self.keys):
                place = torch.searchsorted(self.keys, block).clamp_max(len(self.keys) - 1)
                known = (self.keys[place] == block).nonzero()[:, 0]
                added[known] += self.sums[place[known]]
                untouched[place[known]] = False
            keys, sums = torch.cat([keys, block]), torch.cat([sums, added])
            if len(keys) > self.limit + max(self.blocks.slack, self.limit // 4):
                keys, sums = self._strongest(keys, sums)
        rest = untouched.nonzero()[:, 0]
        keys, sums = self._strongest(torch.cat([keys, self.keys[rest]]), torch.cat([sums, self.sums[rest]]))
        order = keys.argsort()
        self.keys, self.sums = keys[order], sums[order]

    def _strongest(self, keys: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `limit` pairs of largest correlation, ties broken by (i, j)."""
        if len(keys) <= self.limit:
            return keys, sums
        kept = strongest(self._signed_squares(keys, sums).abs(), keys, self.limit)
        return keys[kept], sums[kept]

    def _signed_squares(self, keys: Tensor, sums: Tensor) -> Tensor:
        """Return `c |c|` of pairs (m,) whose features both have sums; powers of two keep it in the range of floats."""
        i, j = keys // self.n, keys % self.n
        scale = torch.where(self.squares > 0, power_of_two_scale(self.squares.sqrt()), 0)
        scaled, squares = sums * scale[i] * scale[j], self.squares * scale.square()
        return scaled * scaled.abs() / (squares[i] * squares[j])
