"""The evaluator on real (small, random) language models of four architectures, against plain computations."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation.evaluator import Evaluation, _token_batches, evaluate_saes
from hf_selortho.evaluation.metrics import Reconstruction, Sparsity, correlation_summary, max_decoder_cosine
from hf_selortho.evaluation.replacement import next_token_losses
from hf_selortho.language_models.capture import ActivationCapture, only
from hf_selortho.language_models.contexts import Context, pad_batch

LAYER = 1


@pytest.fixture(scope="module")
def contexts(tiny_tokenizer, sample_documents) -> list[Context]:
    ids = [tiny_tokenizer(text).input_ids[:48] for text in sample_documents[:60]]
    return [Context(number, row[: 20 + number % 29]) for number, row in enumerate(ids)]


def identity_sae(width: int, **settings) -> SelOrthoSAE:
    """relu(x) - relu(-x) = x: a reconstruction without error."""
    sae = SelOrthoSAE(SelOrthoConfig(d_in=width, d_sae=2 * width, **settings)).eval()
    eye = torch.eye(width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye], dim=0))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def evaluate_sae(sae: SelOrthoSAE, capture: ActivationCapture, contexts: list[Context], **settings) -> Evaluation:
    (evaluation,) = evaluate_saes([sae], capture, contexts, progress=False, **settings)
    return evaluation


def zero_sae(width: int) -> SelOrthoSAE:
    sae = identity_sae(width)
    sae.W_dec.data.zero_()
    return sae


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "llama", "gpt2"])
def test_losses_are_those_of_transformers(arch, tiny_lm, contexts):
    """Gemma 2's random logits are far into its softcapping, so a head applied without it would show."""
    capture = ActivationCapture(tiny_lm(arch), LAYER)
    input_ids, mask = pad_batch(contexts[:8], capture.lm.tokenizer.pad_token_id)
    with torch.inference_mode():
        losses = next_token_losses(capture, input_ids, mask)
        labels = input_ids.masked_fill(mask == 0, -100)
        expected = capture.lm.model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    assert len(losses) == int(mask[:, 1:].sum())
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "llama", "gpt2"])
def test_perfect_reconstruction_loses_nothing(arch, tiny_lm, contexts):
    lm = tiny_lm(arch)
    metrics = evaluate_sae(identity_sae(32), ActivationCapture(lm, LAYER), contexts).metrics
    assert metrics["fvu"] == pytest.approx(0, abs=1e-9) and metrics["explained_variance"] == pytest.approx(1)
    assert metrics["ce_reconstruction"] == pytest.approx(metrics["ce_clean"], rel=1e-4)
    assert metrics["ce_zero_ablation"] != pytest.approx(metrics["ce_clean"], rel=1e-3)
    assert metrics["loss_recovered"] == pytest.approx(1, abs=0.01)
    assert metrics["l0"] == pytest.approx(32) and metrics["dead_features"] == 0


def test_reconstruction_of_zero_is_zero_ablation_and_the_model_stays_as_it_was(tiny_lm, contexts):
    capture = ActivationCapture(tiny_lm("gemma3"), LAYER)
    input_ids, mask = pad_batch(contexts[:2], 0)
    before = next_token_losses(capture, input_ids, mask)
    metrics = evaluate_sae(zero_sae(32), capture, contexts).metrics
    assert torch.equal(next_token_losses(capture, input_ids, mask), before)
    assert metrics["ce_reconstruction"] == metrics["ce_zero_ablation"]
    assert metrics["loss_recovered"] == 0
    x = capture.capture_all(contexts).by_layer[LAYER]
    expected = Reconstruction.of(x, torch.zeros_like(x)).figures()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_bos_and_sinks_keep_their_activations(tiny_lm, contexts, caplog):
    """Where nothing may be replaced, replacing changes nothing: every sequence is BOS and a token to predict, or a
    sink."""
    lm = tiny_lm("gemma3")
    short = [Context(c.document_id, c.input_ids[:2]) for c in contexts]
    with caplog.at_level(logging.WARNING):
        metrics = evaluate_sae(zero_sae(32), ActivationCapture(lm, LAYER), short).metrics
    assert metrics["ce_clean"] == metrics["ce_reconstruction"] == metrics["ce_zero_ablation"]
    assert "loss_recovered" not in metrics and "loss_recovered" in caplog.text
    assert metrics["ce_tokens"] == metrics["ce_samples"] == len(short)

    norms = ActivationCapture(lm, LAYER).capture_all(contexts).by_layer[LAYER].norm(dim=1)
    strict, loose = (ActivationCapture(lm, LAYER, max_norm=norms.quantile(q).item()) for q in (0.1, 0.9))
    few, most = (evaluate_sae(zero_sae(32), c, contexts).metrics for c in (strict, loose))
    assert few["tokens"] < most["tokens"]
    assert few["ce_zero_ablation"] != most["ce_zero_ablation"]


def test_figures_are_those_of_all_tokens_at_once(tiny_lm, contexts):
    torch.manual_seed(1)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=32, d_sae=48, min_support=2, pair_fraction=0.01)).eval()
    sae.b_enc.data -= 0.5
    capture = ActivationCapture(tiny_lm("llama"), LAYER)
    evaluation = evaluate_sae(sae, capture, contexts, batch_size=10_000, ce_samples=0)  # a single batch
    metrics, arrays = evaluation.metrics, evaluation.arrays
    with torch.no_grad():
        x = capture.capture_all(contexts).by_layer[LAYER]
        h = sae.encode(x)
        summary = correlation_summary(h, 0.01, 2)
        expected = Reconstruction.of(x, sae.decode(h)).figures() | Sparsity.of(h).figures()
        expected |= {
            "samples": len(contexts),
            "tokens": len(x),
            "peak_correlation": summary.peak,
            "mean_correlation": summary.mean,
            "top_correlation": summary.top,
            "selected_pairs": summary.selected_pairs,
            "unique_features": summary.unique_features,
            "max_decoder_cosine": max_decoder_cosine(sae.W_dec).mean().item(),
        }
    assert metrics.keys() == expected.keys()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert np.allclose(arrays["feature_density"], (h > 0).double().mean(0).numpy(), atol=1e-9)
    assert arrays["max_decoder_cosine"].shape == (48,)
    assert arrays["correlation_counts"].sum() == math.comb(summary.eligible_features, 2)
    assert float(arrays["correlation_threshold"]) == pytest.approx(summary.threshold, abs=1e-5)


def test_every_token_is_measured_once_whatever_the_batch_size(tiny_lm, contexts):
    sae, capture = identity_sae(32), ActivationCapture(tiny_lm("gemma3"), LAYER)
    results = [evaluate_sae(sae, capture, contexts, batch_size=size, ce_samples=0) for size in (37, 500, 10**6)]
    for result in results:
        assert result.metrics["tokens"] == sum(len(c.input_ids) - 1 for c in contexts)
        assert result.metrics["l1"] == pytest.approx(results[0].metrics["l1"], rel=1e-5)
        assert np.allclose(result.arrays["feature_density"], results[0].arrays["feature_density"])


def test_batches_mix_documents(tiny_lm, contexts):
    """100 consecutive tokens would come from three or four documents."""
    capture = ActivationCapture(tiny_lm("gemma3"), LAYER)
    batches = [only(b) for b in _token_batches(capture, contexts, 100, seed=0, progress=False)]
    everything = capture.capture_all(contexts)
    assert {len(b) for b in batches[:-1]} == {100}
    assert torch.allclose(torch.cat(batches).sort(0).values, everything.by_layer[LAYER].sort(0).values, atol=1e-5)
    nearest = torch.cdist(batches[0], everything.by_layer[LAYER]).argmin(1)
    assert len(everything.origins.document_ids[nearest].unique()) > 20


def test_the_same_contexts_and_seed_give_the_same_figures_as_json(tiny_lm, contexts):
    sae, capture = identity_sae(32), ActivationCapture(tiny_lm("gemma3"), LAYER)
    first, second = (evaluate_sae(sae, capture, contexts, batch_size=200, ce_samples=5).metrics for _ in range(2))
    assert json.loads(json.dumps(first, allow_nan=False)) == first == second and first["ce_samples"] == 5


def test_without_correlations_to_speak_of(tiny_lm, contexts):
    """An SAE whose features never fire has no eligible pair: the figures are left out, not NaN."""
    sae = identity_sae(32)
    sae.b_enc.data -= 1e6
    evaluation = evaluate_sae(sae, ActivationCapture(tiny_lm("gemma3"), LAYER), contexts, ce_samples=0)
    assert evaluation.metrics["dead_fraction"] == 1 and evaluation.metrics["selected_pairs"] == 0
    assert "peak_correlation" not in evaluation.metrics
    assert all(math.isfinite(value) for value in evaluation.metrics.values())


def test_errors(tiny_lm, contexts):
    capture = ActivationCapture(tiny_lm("gemma3"), LAYER)
    with pytest.raises(SelOrthoError, match=r"32\): this SAE reads activations of width d_in=33 \(google/gemma-2-2b"):
        evaluate_sae(identity_sae(33, lm_name="google/gemma-2-2b"), capture, contexts)
    with pytest.raises(SelOrthoError, match="no held-out contexts"):
        evaluate_sae(identity_sae(32), capture, [])
    with pytest.raises(SelOrthoError, match="no held-out token is left"):
        evaluate_sae(identity_sae(32), capture, [Context(0, [capture.lm.tokenizer.bos_token_id])])


@pytest.mark.slow
def test_cross_entropy_of_the_real_gemma_in_chunks_is_the_plain_one(embedded_lm, sample_documents):
    """262,144 logits a token in bfloat16, against the log-softmax of the whole batch in float32."""
    capture = ActivationCapture(embedded_lm, 8)
    ids = [embedded_lm.tokenizer(text, add_special_tokens=False).input_ids[:31] for text in sample_documents[:4]]
    contexts = [Context(number, [embedded_lm.tokenizer.bos_token_id, *row]) for number, row in enumerate(ids)]
    input_ids, mask = pad_batch(contexts, 0)
    with torch.inference_mode():
        losses = next_token_losses(capture, input_ids, mask)
        logits = embedded_lm.model(input_ids=input_ids, attention_mask=mask).logits.float()
    plain = -logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0][mask[:, 1:].bool()]
    assert torch.allclose(losses, plain, atol=1e-4)
    metrics = evaluate_sae(identity_sae(640), capture, contexts).metrics
    assert metrics["loss_recovered"] > 0.99 and metrics["ce_zero_ablation"] > metrics["ce_clean"] + 2
