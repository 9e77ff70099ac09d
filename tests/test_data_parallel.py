"""Two and four real gloo processes on parts of a batch equal one process on the whole of it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from hf_selortho import SelOrthoConfig, SelOrthoSAE, training_step
from hf_selortho.pair_selection import CoactivationEMA, select_pairs
from hf_selortho.penalties import PenaltyPlan, decorrelation_penalty
from hf_selortho.process_group import ProcessGroup
from hf_selortho.sparse_ops import active_features

SETTINGS = [
    {"penalty": "selective", "reduction": "mean"},
    {"penalty": "selective", "correlation": "pearson", "reduction": "sum", "min_support": 9},
    {"penalty": "full"},
    {"activation": "topk", "k": 6, "sparse": True},
    {"activation": "topk", "k": 6, "sparse": True, "correlation": "pearson"},
    {"activation": "batchtopk", "k": 6},
    {"activation": "batchtopk", "k": 6, "sparse": True, "matryoshka_prefixes": [8, 40]},
    {"activation": "jumprelu", "sparse": True, "jumprelu_threshold": 0.5, "l0_coefficient": 0.1},
    {"penalty_space": "exclusion", "min_support": 1, "decoder_ratio": 0.5},
    {"decoder_ratio": 2.0, "sparse": True},
    {"decoder_ratio": 2.0, "decoder_pairs": "nearest"},
    {"penalty_space": "decoder", "selection_space": "activation"},
    {"penalty": "ortsae", "ortsae_chunk": 15},
    {"sparse": True, "selection_interval": 3, "penalty_schedule": "every_step"},
    {"sparse": True, "selection_interval": 3, "carry_decay": 0.5},
]
STEPS, TOKENS = 20, 48


def train(settings: dict, rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """Weights after 20 steps of Adam, the last loss, the last pairs and the threshold."""
    settings = dict(settings)
    training_step.SPARSE_BELOW["cpu"] = 2.0 if settings.pop("sparse", False) else 0.0
    torch.manual_seed(0)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=12, d_sae=40, pair_fraction=0.02, ortho_coefficient=0.5, **settings)).train()
    model = sae if processes == 1 else DistributedDataParallel(sae)
    group = ProcessGroup.of_run()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    carried = CoactivationEMA(40, sae.config.carry_decay, 10_000)

    def select(h):
        carried.update(h, group)
        return carried.select(0.02, 4)

    pairs = None
    for step in range(STEPS):
        x = torch.randn(TOKENS, 12)[rank::processes]  # every process draws the whole batch and keeps its part
        selects = step % sae.config.selection_interval == 0
        use = select if sae.config.carry_decay else None
        out = model(x, group, PenaltyPlan(True, None if selects else pairs, seed=step, select=use), None, False)
        out.loss.backward()
        sae.project_decoder_gradient()
        optimizer.step()
        optimizer.zero_grad()
        sae.normalize_decoder()
        pairs = out.pairs
        if out.threshold is not None:
            sae.update_threshold(out.threshold)
    keys = pairs.keys(40) if pairs is not None else torch.zeros(0, dtype=torch.int64)
    return {**sae.state_dict(), "ortho": out.losses["ortho"].detach(), "pairs": keys}


def select_from_parts(rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """Pairs of one large batch, of which each process has a part of another size, and the penalty's value."""
    found = {}
    group = ProcessGroup.of_run()
    for correlation in ("cosine", "pearson"):
        for method in ("tiles", "coactivation"):
            generator = torch.Generator().manual_seed(5)
            h = torch.randint(-6, 4, (64, 700), generator=generator).clamp_min(0).float()
            part = h if processes == 1 else h.tensor_split([5, 20, 41][: processes - 1])[rank]
            pairs = select_pairs(active_features(part), 1e-3, 2, correlation, method, group)
            penalty = decorrelation_penalty(part, pairs, 1.0, "mean", correlation, group)
            found[f"{correlation} {method}"] = pairs.keys(700)
            found[f"{correlation} {method} penalty"] = penalty
    return found


def run_process(rank: int, processes: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    trained = [train(settings, rank, processes) for settings in SETTINGS]
    torch.save([*trained, select_from_parts(rank, processes)], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_together_are_one(processes, tmp_path, monkeypatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_process, (processes, port, str(tmp_path)), nprocs=processes)
    monkeypatch.setattr(training_step, "SPARSE_BELOW", dict(training_step.SPARSE_BELOW))
    for rank in range(processes):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(
            torch.equal(found[-1][name], value) for name, value in select_from_parts().items() if "pen" not in name
        )
        torch.testing.assert_close(found.pop(), select_from_parts())
        for number, settings in enumerate(SETTINGS):
            torch.testing.assert_close(
                found[number], train(settings), atol=1e-5, rtol=1e-4, msg=lambda m, s=settings: f"{s}: {m}"
            )
