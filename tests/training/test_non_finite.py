"""Loss spikes, scaled losses and weights that are not finite: a trainer on its own, with batches made for it."""

from __future__ import annotations

import dataclasses
import logging
import signal
import statistics

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from hypothesis import given
from hypothesis import strategies as st

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.data.buffer import ActivationBatch
from hf_selortho.errors import NonFiniteError
from hf_selortho.language_models.capture import TokenOrigins
from hf_selortho.training.arguments import RunArguments
from hf_selortho.training.checkpoint import Checkpoints
from hf_selortho.training.non_finite import SPIKE_WINDOW, LossSpikes, NonFinitePolicy, first_not_finite
from hf_selortho.training.sae_trainer import SAETrainer
from hf_selortho.training.trainer import Trainer

D_IN, TOKENS = 16, 64


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def batch_of(number: int, scale: float = 1.0) -> ActivationBatch:
    generator = torch.Generator().manual_seed(number)
    rows = scale * torch.randn(TOKENS, D_IN, generator=generator)
    documents = torch.full((TOKENS,), number)
    return ActivationBatch({0: rows}, TokenOrigins.of(documents, *(torch.arange(TOKENS) for _ in range(3))))


def make_trainer(accelerator: Accelerator, policy: NonFinitePolicy | None = None, **settings: object) -> SAETrainer:
    sae = SelOrthoSAE(SelOrthoConfig(d_in=D_IN, d_sae=32, pair_fraction=0.05, selection_interval=1))
    arguments = dataclasses.replace(RunArguments(), max_steps=10_000, learning_rate=1e-3, **settings)
    return SAETrainer(accelerator, sae, arguments, None, policy=policy)


def weights_of(trainer: SAETrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.sae.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=160), st.floats(1.5, 20))
def test_a_spike_is_a_loss_beyond_a_multiple_of_the_median_of_those_before(losses, factor) -> None:
    spikes, expected = LossSpikes(factor), 0
    for step, loss in enumerate(losses):
        before = losses[max(0, step - SPIKE_WINDOW) : step]
        expected += len(before) >= 20 and loss > factor * statistics.median(before)
        copy = LossSpikes(factor)
        copy.load_state_dict(spikes.state_dict())
        spikes = copy  # what a checkpoint keeps is enough to go on
        spikes.add(step + 1, loss, batch_of(step).origins)
        assert spikes.count == expected


def test_a_spike_is_said_with_its_documents(accelerator, caplog) -> None:
    trainer = make_trainer(accelerator, loss_spike_factor=10.0)
    with caplog.at_level(logging.WARNING):
        for number in range(40):
            trainer.train_step(batch_of(number, scale=20.0 if number == 33 else 1.0), last=True)
    (said,) = [record.getMessage() for record in caplog.records if "loss spike" in record.getMessage()]
    assert said.startswith("loss spike at step 34: ") and said.endswith("documents of the batch: 33")
    assert "times the median of the 33 steps before" in said and trainer.spikes.count == 1


def test_a_scale_too_large_for_the_gradients_is_no_error(accelerator, tmp_path) -> None:
    policy = NonFinitePolicy(tmp_path)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer = make_trainer(accelerator, policy)
    before, scales = weights_of(trainer), []
    for number in range(40):
        trainer.train_step(batch_of(number, scale=10.0), last=True)
        scales.append(trainer.scaler.get_scale())
        if scales[-1] < 2.0**127 and number == 0:
            assert torch.equal(weights_of(trainer)["W_enc"], before["W_enc"])  # that step was not taken
    assert scales[0] == 2.0**126 and scales[-1] > 1  # halved until the gradients fit
    assert not same(before, weights_of(trainer))
    assert policy.skipped == 0 and not (tmp_path / "debug").exists()


def test_a_gradient_that_no_scale_makes_finite_is_one(accelerator, tmp_path) -> None:
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer = make_trainer(accelerator, NonFinitePolicy(tmp_path))
    trainer.sae.W_dec.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinity in the gradient, however small .* at step 3"):
        for number in range(9):
            trainer.train_step(batch_of(number), last=True)
    assert list((tmp_path / "debug").iterdir())


def test_weights_that_become_infinite_end_the_run_whatever_the_policy(accelerator, tmp_path) -> None:
    trainer = make_trainer(accelerator, NonFinitePolicy(tmp_path, "skip"))
    trainer.train_step(batch_of(0), last=True)
    trainer.arguments = dataclasses.replace(trainer.arguments, learning_rate=float("inf"))
    with pytest.raises(NonFiniteError, match=r"in the weights, \w+ \(.* numbers\), after step 2, which cannot"):
        trainer.train_step(batch_of(1), last=True)
    assert [path.name for path in (tmp_path / "debug").iterdir()] == ["step_000002.safetensors"]


@pytest.mark.parametrize("bad", [0, 2])
def test_a_step_of_several_batches_is_left_out_whole(bad, accelerator, tmp_path) -> None:
    policy = NonFinitePolicy(tmp_path, "skip")
    trainer = make_trainer(accelerator, policy, gradient_accumulation_steps=3)
    twin = make_trainer(accelerator, gradient_accumulation_steps=3)
    twin.sae.load_state_dict(trainer.sae.state_dict())
    for number in range(3):
        trainer.train_step(batch_of(number, torch.inf if number == bad else 1.0), last=number == 2)
    assert (trainer.state.step, trainer.state.skipped, policy.skipped) == (1, 1, 1)
    assert same(weights_of(trainer), weights_of(twin))
    twin.state.step, twin.state.tokens = 1, trainer.state.tokens
    twin.state.tokens_since_fired.copy_(trainer.state.tokens_since_fired)
    for one in (trainer, twin):  # what was added up before it is forgotten
        for number in range(3, 6):
            one.train_step(batch_of(number), last=number == 5)
    assert same(weights_of(trainer), weights_of(twin))


def test_a_batch_of_several_saes_counts_once_and_is_kept_once_for_each_layer(tmp_path) -> None:
    policy = NonFinitePolicy(tmp_path, "skip", limit=2)
    for number in (1, 2):  # of one step
        batch = batch_of(number)
        for layer in (3, 3, 8, 3):
            policy.handle("it", batch.origins, {layer: batch.by_layer[0]})
    assert policy.skipped == 2
    names = [f"step_000001{more}.safetensors" for more in ("", "_2", "_3", "_4")]
    assert sorted(path.name for path in (tmp_path / "debug").iterdir()) == names
    with pytest.raises(NonFiniteError, match="it at step 1: .*batch number 3 .*more than --max_skipped 2: do this"):
        policy.handle("it", batch_of(3).origins, {}, "do this")


class Batches:
    """The least that a source of batches is."""

    def next_batch(self) -> ActivationBatch:
        return batch_of(0)

    def state_dict(self):
        return {}, {}

    def hold(self, reader: object) -> None:
        pass


@pytest.mark.parametrize("every", [0, 1])
def test_a_signal_after_the_last_step_stops_before_the_evaluation(every, accelerator, tmp_path) -> None:
    trainer = make_trainer(accelerator)
    arguments = dataclasses.replace(trainer.arguments, max_steps=3, checkpoint_every=every)
    checkpoints = Checkpoints(accelerator, tmp_path, {}, every)
    looks = []

    class Late:
        @property
        def received(self) -> int | None:
            looks.append(trainer.state.step)
            return signal.SIGTERM if looks.count(3) > 1 else None  # the loop has seen that it is done

    assert Trainer([trainer], Batches(), arguments, checkpoints, Late()).fit() == signal.SIGTERM
    assert checkpoints.latest is not None and checkpoints.latest.name == "step_000003"
    assert Trainer([trainer], Batches(), arguments, Checkpoints(accelerator, tmp_path, {})).fit() is None


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    mixed = torch.cat([torch.ones(3, 7), torch.full((5, 7), torch.nan)])
    assert first_not_finite({"whole": torch.ones(2), "none": None, "mixed": mixed}) == "mixed (35 of 56 numbers)"
    assert first_not_finite({"large": torch.full((5, 7), 3e38), "none": None}) is None  # though its sum is infinite
