"""The probe of a language model takes seconds, however slow it is, and finds its speed."""

from __future__ import annotations

import time

import pytest
import torch

from hf_selortho.data.contexts import ContextStream, Cutter, count_tokens
from hf_selortho.data.probe import SampleBatches, probe_capture
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.language_models.capture import ActivationCapture


@pytest.fixture
def stream(tiny_lm, sample_text_files) -> ContextStream:
    documents = open_documents(TextSource(str(sample_text_files.csv)))
    return ContextStream(documents, Cutter(tiny_lm("llama").tokenizer, 32))


class SlowCapture(ActivationCapture):
    per_token = 0.0
    seen = 0

    def capture_all(self, contexts):
        tokens = count_tokens(contexts)
        self.seen += tokens
        time.sleep(self.per_token * tokens)
        return super().capture_all(contexts)


@pytest.mark.parametrize(("per_token", "most"), [(0.02, 3 * 32), (0.002, 1000), (0.0, 100_000)])
def test_the_slower_the_model_the_less_it_reads(per_token, most, stream, tiny_lm) -> None:
    capture = SlowCapture(tiny_lm("llama"), [1, 2])
    capture.per_token = per_token
    started = time.perf_counter()
    parts, found = probe_capture(capture, stream, 0.5)
    assert time.perf_counter() - started < 0.5 + 3 * 32 * max(per_token, 0.02)
    assert 2 <= len(parts) and 32 <= capture.seen <= most
    assert per_token <= found < per_token + 0.01


def test_a_sample_gives_batches_of_any_size_and_usable_statistics(stream, tiny_lm) -> None:
    parts, _ = probe_capture(ActivationCapture(tiny_lm("llama"), [1, 2]), stream, 0.0)
    sample = SampleBatches(parts, 1000)
    batch = sample.next_batch()
    rows = torch.cat([part.by_layer[2] for part in parts]).float()
    assert batch.by_layer[2].shape == (1000, 32) and len(batch.origins) == 1000
    assert all(bool((row == rows).all(1).any()) for row in batch.by_layer[2][:50])
    statistics = sample.statistics()[2]
    torch.testing.assert_close(statistics.mean, rows.mean(0))
    assert statistics.scale == pytest.approx(float((rows - rows.mean(0)).square().sum(1).mean()) ** 0.5, rel=1e-4)
