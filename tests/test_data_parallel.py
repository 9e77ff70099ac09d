"""Two and four real gloo processes on parts of a batch equal one process on the whole of it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.decorrelation import BatchGroup

SETTINGS = [
    {"penalty": "selective", "reduction": "mean"},
    {"penalty": "selective", "correlation": "pearson", "reduction": "sum", "min_support": 9},
    {"penalty": "full"},
]
STEPS, TOKENS = 20, 48


def train(settings: dict, rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """Weights after 20 steps of Adam, the last loss and the last pairs."""
    torch.manual_seed(0)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=12, d_sae=40, pair_fraction=0.02, ortho_coefficient=0.5, **settings))
    model = sae if processes == 1 else DistributedDataParallel(sae)
    group = None if processes == 1 else BatchGroup()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(STEPS):
        x = torch.randn(TOKENS, 12)[rank::processes]  # every process draws the whole batch and keeps its part
        out = model(x, group=group)
        out.loss.backward()
        sae.project_decoder_gradient()
        optimizer.step()
        optimizer.zero_grad()
        sae.normalize_decoder()
    pairs = out.pairs.keys(40) if out.pairs is not None else torch.zeros(0, dtype=torch.int64)
    return {**sae.state_dict(), "ortho": out.losses["ortho"].detach(), "pairs": pairs}


def run_process(rank: int, processes: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    torch.save([train(settings, rank, processes) for settings in SETTINGS], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_are_one(processes, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_process, (processes, port, str(tmp_path)), nprocs=processes)
    for number, settings in enumerate(SETTINGS):
        expected = train(settings)
        for rank in range(processes):
            found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[number]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=lambda m, s=settings: f"{s}: {m}")
