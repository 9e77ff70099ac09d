"""Train an SAE on a tensor of your own activations, with nothing but PyTorch around the model.

python examples/train_on_a_tensor.py
"""

import torch

from hf_selortho import SelOrthoConfig, SelOrthoSAE

torch.manual_seed(0)
directions = torch.nn.functional.normalize(torch.randn(96, 64), dim=1)
strengths = torch.rand(20_000, 96) * (torch.rand(20_000, 96) < 0.03)
activations = strengths @ directions + 0.3  # (tokens, d_in): put your own here

config = SelOrthoConfig(d_in=64, d_sae=128, activation="topk", k=4, ortho_coefficient=0.03, selection_interval=1)
sae = SelOrthoSAE(config)
centred = activations - activations.mean(0)
sae.set_input_statistics(activations.mean(0), float(centred.square().sum(1).mean().sqrt()))
adam = torch.optim.Adam(sae.parameters(), lr=3e-3)

for step in range(300):
    batch = activations[torch.randint(len(activations), (1024,))]
    output = sae(batch, return_feature_acts=False)  # the loss is all that is needed: sparse where that is faster
    output.loss.backward()
    sae.project_decoder_gradient()  # no gradient along the decoder rows, ...
    adam.step()
    adam.zero_grad()
    sae.normalize_decoder()  # ... whose norm stays 1
    if step % 100 == 99:
        losses = {name: round(float(value.detach()), 4) for name, value in output.losses.items()}
        print(step + 1, losses, "most correlated pair:", round(float(output.pairs.correlation[0]), 2))

sae.eval()
h = sae.encode(activations[:1000])
unexplained = (sae.decode(h) - activations[:1000]).square().sum() / centred[:1000].square().sum()
print(f"FVU {unexplained:.3f}, L0 {float((h > 0).sum(1).float().mean()):.1f}")
sae.save_pretrained("runs/tensor")  # SelOrthoSAE.from_pretrained("runs/tensor") loads it
