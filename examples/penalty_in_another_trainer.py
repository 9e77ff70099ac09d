"""Add the decorrelation penalty to an SAE of your own: select the pairs of a batch, add the penalty to your loss.

python examples/penalty_in_another_trainer.py
"""

import torch

from hf_selortho import decorrelation_penalty, select_pairs

torch.manual_seed(0)
activations = torch.randn(4096, 16) @ torch.randn(16, 64)
encoder, decoder = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)

for step in range(200):
    h = torch.relu(encoder(activations))  # (tokens, features), any activation function
    loss = (decoder(h) - activations).square().mean() + 1e-3 * h.sum(1).mean()
    pairs = select_pairs(h.detach(), pair_fraction=0.001, min_support=4)  # exact, without a (features, features) matrix
    (loss + decorrelation_penalty(h, pairs, coefficient=0.1)).backward()
    adam.step()
    adam.zero_grad()
    if step % 50 == 0:
        print(step, f"loss {float(loss.detach()):.3f}, top correlations {float(pairs.correlation.abs().mean()):.3f}")
