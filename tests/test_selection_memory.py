"""Memory of the selection at 65,536 features, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys
import torch
from hf_selortho import decorrelation_penalty, select_pairs
from hf_selortho.sparse_ops import ActiveFeatures

torch.set_num_threads(2)
B, n, L0 = 4096, 65536, 64
generator = torch.Generator().manual_seed(0)
frequency = torch.exp(torch.randn(n, generator=generator))  # skewed, as the features of a trained SAE are
cols = torch.cat([  # L0 different features of each token
    (torch.log(frequency) - torch.empty(64, n).exponential_(generator=generator).log()).topk(L0).indices
    for _ in range(0, B, 64)
])
values = torch.rand(B, L0, generator=generator) + 0.1

def high_water():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

def forget_the_past():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

if sys.argv[1] == "active":
    h = ActiveFeatures(torch.arange(0, B * L0 + 1, L0), cols.flatten(), values.flatten(), n)
else:
    h = torch.zeros(B, n, dtype=getattr(torch, sys.argv[1]))
    for start in range(0, B, 64):  # a little at a time: this must not raise the mark
        h[start : start + 64].scatter_(1, cols[start : start + 64], values[start : start + 64].to(h.dtype))
select_pairs(torch.rand(64, 300))  # what torch takes once
forget_the_past()
before = high_water()
pairs = select_pairs(h, 1e-3, min_support=1)
selected = high_water() - before
if sys.argv[1] == "active":
    h.values.requires_grad_()
    decorrelation_penalty(h, pairs).backward()
json.dump({"pairs": len(pairs), "selection": selected, "penalty": high_water() - before}, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["float32", "bfloat16", "active"])
def test_less_than_a_gigabyte_beyond_the_input(form) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, form], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["pairs"] == 2_147_451  # ceil(0.001 * 65,536 * 65,535 / 2)
    assert measured["selection"] < 1e9
    assert measured["penalty"] < 1e9
