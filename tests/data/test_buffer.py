from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from hf_selortho import SelOrthoError
from hf_selortho.data.buffer import ActivationBuffer
from hf_selortho.data.contexts import ContextStream, Cutter
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.language_models.capture import ActivationCapture, only


@pytest.fixture
def make_buffer(tiny_lm, sample_text_files):
    def build(seed: int = 0, longest: int = 32, **settings) -> ActivationBuffer:
        lm = tiny_lm("gemma3")
        documents = open_documents(TextSource(str(sample_text_files.csv)))
        stream = ContextStream(documents, Cutter(lm.tokenizer, context_length=longest), seed=seed)
        defaults = {"contexts": 24, "context_length": 32, "batch_size": 64, "refresh_every": 4, "seed": seed}
        return ActivationBuffer(ActivationCapture(lm, 1), stream, **{**defaults, **settings})

    return build


def test_statistics_are_those_of_what_the_buffer_holds(make_buffer) -> None:
    buffer = make_buffer(max_norm_ratio=None)
    statistics = buffer.statistics()[1]
    held = buffer.state_dict()[0]["activations.1"]
    assert len(held) == 24 * 32
    torch.testing.assert_close(statistics.mean, held.mean(0), atol=1e-4, rtol=1e-4)
    centred = (held - held.mean(0)).square().sum(1).mean().sqrt()
    assert statistics.scale == pytest.approx(float(centred), rel=1e-4)
    assert statistics.median_norm == pytest.approx(float(held.norm(dim=1).median()))
    assert statistics.max_norm is None


def test_sinks_are_dropped_from_the_first_fill_on(make_buffer) -> None:
    buffer = make_buffer(max_norm_ratio=1.1)
    statistics = buffer.statistics()[1]
    assert statistics.max_norm == pytest.approx(1.1 * statistics.median_norm)
    assert len(buffer.state_dict()[0]["activations.1"]) == 24 * 32
    assert buffer.counts["dropped_sinks"] > 0
    for _ in range(9):
        assert only(buffer.next_batch().by_layer).norm(dim=1).max() <= statistics.max_norm * (1 + 1e-5)
    assert buffer.counts["tokens_kept"] >= 24 * 32 + 2 * 4 * 64


def test_every_activation_is_used_once(make_buffer) -> None:
    buffer = make_buffer(longest=256)  # each document is one context, so that place and document name a token
    buffer.statistics()
    seen = set()
    for _ in range(16):  # four rounds: 1024 tokens of one epoch
        batch = buffer.next_batch()
        assert only(batch.by_layer).shape == (64, 32) and only(batch.by_layer).dtype == torch.float32
        rows = set(zip(batch.origins.document_ids.tolist(), batch.origins.positions.tolist(), strict=True))
        assert len(rows) == 64 and not rows & seen
        seen |= rows


def test_reuse_divides_the_forward_passes(make_buffer) -> None:
    once, often = make_buffer(), make_buffer(reuse=4.0)
    once.statistics(), often.statistics()
    filled = once.counts["tokens_kept"]
    for _ in range(41):
        once.next_batch(), often.next_batch()
    assert once.counts["tokens_kept"] - filled == pytest.approx(10 * 4 * 64, rel=0.2)
    assert often.counts["tokens_kept"] - filled == pytest.approx(10 * 64, rel=0.35)
    assert int(often.state_dict()[0]["uses"].max()) < 12  # the most used leave first


def test_batches_mix_documents_by_the_seed(make_buffer) -> None:
    batches = []
    for seed in (0, 0, 1):
        buffer = make_buffer(seed=seed)
        buffer.statistics()
        batches.append(buffer.next_batch().origins.table)
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    assert len(batches[0][:, 0].unique()) > 8


@pytest.mark.parametrize("reuse", [1.0, 3.0])
@pytest.mark.parametrize("before", [1, 6])
def test_a_saved_buffer_goes_on_with_the_same_batches(make_buffer, reuse, before) -> None:
    buffer = make_buffer(reuse=reuse)
    buffer.statistics()
    for _ in range(before):
        buffer.next_batch()
    tensors, rest = buffer.state_dict()
    saved, text = save({key: value.contiguous() for key, value in tensors.items()}), json.dumps(rest)
    expected = [buffer.next_batch() for _ in range(12)]
    again = make_buffer(reuse=reuse)
    again.load_state_dict(load(saved), json.loads(text))
    for batch in expected:
        other = again.next_batch()
        assert torch.equal(only(batch.by_layer), only(other.by_layer))
        assert torch.equal(batch.origins.table, other.origins.table)
    assert again.counts == buffer.counts


def test_a_buffer_that_is_too_small(make_buffer) -> None:
    with pytest.raises(
        SelOrthoError, match="holds 7 x 32 = 224 tokens .* fewer than the 4 batches of 64 .*--buffer_contexts"
    ):
        make_buffer(contexts=7)
    with pytest.raises(SelOrthoError, match="buffer_reuse=0.5"):
        make_buffer(reuse=0.5)
