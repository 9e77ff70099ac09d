"""Select pairs by a score of your own: here correlations count less where the two decoder directions differ.

A score ranks the pairs in place of the correlation; it must not exceed it, so that the search stays exact.

python examples/selection_score.py
"""

import torch

from hf_selortho import select_pairs

torch.manual_seed(0)
h = torch.relu(torch.randn(2048, 512) - 1.5)  # feature activations (tokens, features)
h[:, 1] = h[:, 0] + 0.1 * torch.relu(torch.randn(2048))  # features 0 and 1 fire together and point the same way
h[:, 3] = h[:, 2]  # features 2 and 3 fire together, but point apart
W_dec = torch.nn.functional.normalize(torch.randn(512, 64), dim=1)  # decoder directions
W_dec[1] = W_dec[0]


def alike(correlation: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Multiply the correlation of each pair by the absolute cosine of its directions."""
    return correlation * (W_dec[i] * W_dec[j]).sum(1).abs()


for name, score in (("correlation", None), ("correlation times cosine", alike)):
    pairs = select_pairs(h, pair_fraction=1e-4, score=score)
    first = int(pairs.i[0]), int(pairs.j[0])
    print(f"{name}: {len(pairs)} pairs, first {first} at {float(pairs.correlation[0]):.2f}")
