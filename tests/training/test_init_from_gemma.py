"""What --init_from saves: an SAE of the embedded Gemma goes on, on a fine-tuned copy that reads another domain."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.data.buffer import ActivationBatch, ActivationStatistics
from hf_selortho.data.python_docs import python_docs
from hf_selortho.language_models.capture import ActivationCapture, TokenOrigins
from hf_selortho.language_models.loading import LanguageModel, load_language_model
from hf_selortho.training.arguments import RunArguments
from hf_selortho.training.sae_trainer import SAETrainer
from hf_selortho.training.starting_point import StartingPoint

LAYER, LENGTH, BATCH, STEPS = 3, 64, 1024, 200


@pytest.fixture
def lm() -> Iterator[LanguageModel]:
    """A copy of the embedded Gemma that ends after the layer that is read, to be trained."""
    lm = load_language_model("gemma-3-270m", dtype="float32")
    lm.model.model.layers = lm.model.model.layers[: LAYER + 1]
    yield lm
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def contexts(lm: LanguageModel, text: str, count: int) -> Tensor:
    """Token ids (count, LENGTH), each with BOS first."""
    ids = torch.tensor(lm.tokenizer(text, add_special_tokens=False).input_ids[: count * (LENGTH - 1)])
    return torch.cat([torch.full((count, 1), lm.tokenizer.bos_token_id), ids.view(count, -1)], 1)


def fine_tune(lm: LanguageModel, ids: Tensor, steps: int) -> tuple[float, float]:
    """Train the layers to predict the domain's tokens, among those of the domain; returns the loss before and after."""
    vocabulary, targets = ids.unique(return_inverse=True)
    unembed = lm.model.get_input_embeddings().weight[vocabulary].detach()
    parameters = [p.requires_grad_() for p in lm.model.model.layers.parameters()]
    adam, losses = torch.optim.Adam(parameters, lr=2e-4), []
    for _ in range(steps):
        rows = torch.randint(len(ids), (4,))
        hidden = lm.model.model(ids[rows], use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(
            (hidden[:, :-1] @ unembed.T).flatten(0, 1), targets[rows, 1:].flatten()
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss))
    lm.model.requires_grad_(False)
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


@torch.no_grad()
def activations(lm: LanguageModel, ids: Tensor) -> Tensor:
    """Activations (tokens, d_in) after the layer, without BOS and sinks."""
    capture = ActivationCapture(lm, LAYER)
    parts = [capture.hidden_states(part, torch.ones_like(part))[LAYER][:, 1:].flatten(0, 1) for part in ids.split(16)]
    x = torch.cat(parts).float()
    norms = x.norm(dim=1)
    return x[norms < 4 * norms.median()]


def statistics_of(x: Tensor) -> ActivationStatistics:
    return ActivationStatistics(x.mean(0), float((x - x.mean(0)).square().sum(1).mean().sqrt()), 1.0, None)


def train(sae: SelOrthoSAE, x: Tensor, steps: int, learning_rate: float) -> SelOrthoSAE:
    arguments = RunArguments(
        max_steps=steps, learning_rate=learning_rate, warmup_steps=0.05, decay_steps=0.3, cpu=True, logging_steps=10**6
    )
    trainer = SAETrainer(Accelerator(cpu=True), sae.train(), arguments, None)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        trainer.train_step(ActivationBatch({LAYER: x[rows]}, TokenOrigins(torch.zeros(BATCH, 4, dtype=torch.int64))))
    return sae.eval()


@torch.no_grad()
def fvu(sae: SelOrthoSAE, x: Tensor) -> float:
    return float((sae.reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.slow
def test_an_sae_of_the_base_model_reaches_a_new_ones_fvu_on_a_fine_tune_with_a_tenth_of_its_tokens(lm) -> None:
    config = SelOrthoConfig(d_in=640, d_sae=1024, layer=LAYER, activation="topk", k=32, penalty="none")
    prose = contexts(lm, "\n\n".join(python_docs()[:400]), 500)
    files = sorted(Path(inspect.__file__).parent.glob("*.py"))[:60]
    code = contexts(lm, "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files), 600)
    x = activations(lm, prose)
    start = SelOrthoSAE(config)
    start.set_input_statistics(statistics_of(x).mean, statistics_of(x).scale)
    train(start, x, STEPS, 2e-3)
    own = fvu(start, x)
    losses = fine_tune(lm, code[:500], 200)
    tuned, held_out = activations(lm, code[:500]), activations(lm, code[500:])
    torch.manual_seed(0)
    scratch = SelOrthoSAE(config)
    scratch.set_input_statistics(statistics_of(tuned).mean, statistics_of(tuned).scale)
    train(scratch, tuned, STEPS, 2e-3)
    going_on = StartingPoint(start, {"name": "start"}).new_sae(config, statistics_of(tuned), measured=True)
    train(going_on, tuned, STEPS // 10, 2e-3)
    before, new, continued = (fvu(sae, held_out) for sae in (start, scratch, going_on))
    said = (
        f"LM loss {losses[0]:.2f} -> {losses[1]:.2f}; FVU on its own text {own:.4f}; on the fine-tune: start "
        f"{before:.4f}, from scratch {new:.4f} ({STEPS * BATCH} tokens), going on {continued:.4f} "
        f"({STEPS // 10 * BATCH} tokens): {(before - continued) / (before - new):.1%} of the gain"
    )
    assert losses[1] < losses[0] - 0.5, said
    assert before - continued >= 0.95 * (before - new) > 0, said
