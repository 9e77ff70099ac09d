"""Sums over tokens of given pairs of features, from dense copies of a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .sparse_ops import ActiveFeatures, csr, row_offsets

CHUNK_ELEMENTS = 1 << 21  # of the dense copy of some features on some tokens, in the cache if it can be
CHUNK_TOKENS = 512  # but no fewer tokens: for each chunk, all pairs are gone through


def pair_sums(h: Tensor | ActiveFeatures, i: Tensor, j: Tensor) -> Tensor:
    """`<h_i, h_j>` of given pairs (T,), with a dense copy of a few tokens of the features that occur in them."""
    sums = (h.values if isinstance(h, ActiveFeatures) else h).new_zeros(len(i))
    if len(i) == 0:
        return sums
    occurring, number = occurring_features(i, j, h.n if isinstance(h, ActiveFeatures) else h.shape[1])
    rows, order = number[i].int().sort(stable=True)
    cols = number[j][order]
    shape = (len(occurring), len(occurring))
    pattern = csr(row_offsets(torch.bincount(rows, minlength=shape[0])), cols, sums, shape)
    for chunk in token_chunks(h, occurring):
        pattern = torch.sparse.sampled_addmm(pattern, chunk.block, chunk.block.T)
    sums[order] = pattern.values()
    return sums


def occurring_features(i: Tensor, j: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Features that occur in pairs (U,), rising, and the number of each feature among them (n,), -1 for the others."""
    occurs = torch.zeros(n, dtype=torch.bool, device=i.device)
    occurs[i] = occurs[j] = True
    features = occurs.nonzero()[:, 0]
    number = features.new_full((n,), -1)
    number[features] = torch.arange(len(features), device=i.device)
    return features, number


class TokenChunk(NamedTuple):
    """Some features on some tokens."""

    block: Tensor  # (U, tokens) dense
    entries: Tensor  # (m,) where the active entries of the block lie in the batch
    places: Tensor  # (m,) where they lie in the flattened block


def token_chunks(h: Tensor | ActiveFeatures, features: Tensor) -> Iterator[TokenChunk]:
    """Dense copies of the given features (U,), a few tokens at a time; entries and places for active features only."""
    tokens = h.tokens if isinstance(h, ActiveFeatures) else len(h)
    step = max(CHUNK_TOKENS, CHUNK_ELEMENTS // max(1, len(features)))
    nothing = features.new_zeros(0)
    if isinstance(h, Tensor):
        for start in range(0, tokens, step):
            yield TokenChunk(h[start : start + step, features].T.contiguous(), nothing, nothing)
        return
    number = features.new_full((h.n,), -1)
    number[features] = torch.arange(len(features), device=features.device)
    for start in range(0, tokens, step):
        width = min(step, tokens - start)
        first, last = int(h.crow[start]), int(h.crow[start + width])
        rank = number[h.cols[first:last]]
        kept = (rank >= 0).nonzero()[:, 0]
        places = torch.add(h.rows[first:last][kept] - start, rank[kept], alpha=width)
        entries = kept + first
        block = h.values.new_zeros(len(features) * width).scatter_(0, places, h.values[entries])
        yield TokenChunk(block.view(-1, width), entries, places)
