from __future__ import annotations

import pytest
import torch

from hf_selortho import SelOrthoError
from hf_selortho.language_models.capture import ActivationCapture, NonFiniteActivationsError, length_batches
from hf_selortho.language_models.contexts import Context, pad_batch
from hf_selortho.language_models.sites import HookSite, find_site

ARCHITECTURES = ["gemma2", "gemma3", "llama", "gpt2"]


@pytest.fixture
def contexts(tiny_tokenizer, sample_documents) -> list[Context]:
    texts = sample_documents[:12]
    ids = tiny_tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        Context(100 + number, [tiny_tokenizer.bos_token_id, *row[: 5 + 4 * number]]) for number, row in enumerate(ids)
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 2])
def test_hidden_states_are_those_of_transformers(arch, layer, tiny_lm, contexts) -> None:
    lm = tiny_lm(arch)
    input_ids, attention_mask = pad_batch(contexts, lm.tokenizer.pad_token_id)
    hidden = ActivationCapture(lm, layer).hidden_states(input_ids, attention_mask)[layer]
    with torch.no_grad():
        expected = lm.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    real = attention_mask.bool()
    torch.testing.assert_close(hidden[real], expected.hidden_states[layer + 1][real])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_above_the_hook_never_run_and_no_hook_is_left_behind(arch, tiny_lm, contexts) -> None:
    lm = tiny_lm(arch)
    before = [dict(layer._forward_hooks) for layer in lm.layers]  # transformers leaves some of its own
    ran: list[int] = []
    ActivationCapture(lm, 1)  # which looks at the model in a first short pass, unless one has before
    handles = [
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(lm.layers)
    ]
    try:
        ActivationCapture(lm, 1).capture_all(contexts[:2])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1]
    with pytest.raises(ZeroDivisionError), ActivationCapture(lm, 1).splice(lambda h: h):
        _ = 1 / 0
    assert [dict(layer._forward_hooks) for layer in lm.layers] == before


def test_capture_leaves_out_padding_and_special_tokens_and_says_where_each_token_is_from(tiny_lm, contexts) -> None:
    lm = tiny_lm("gemma3")
    capture = ActivationCapture(lm, 1, batch_tokens=64)  # several batches of different lengths
    captured = capture.capture_all(contexts)
    positions = captured.origins.positions
    assert len(captured) == sum(len(c.input_ids) - 1 for c in contexts)
    assert captured.dropped_special == len(contexts) and captured.dropped_sinks == 0
    assert (positions > 0).all() and not captured.by_layer[1].requires_grad
    ids = [lm.tokenizer.bos_token_id, 50, lm.tokenizer.eos_token_id, 60]
    assert ActivationCapture(lm, 1).capture_all([Context(0, ids)]).origins.positions.tolist() == [1, 3]
    for context in contexts:  # alone, without padding, every context has the same activations
        alone = capture.hidden_states(*pad_batch([context], 0))[1][0, 1:]
        rows = captured.origins.document_ids == context.document_id
        assert positions[rows].tolist() == list(range(1, len(context.input_ids)))
        torch.testing.assert_close(captured.by_layer[1][rows], alone, atol=1e-4, rtol=1e-4)


def test_sinks_are_left_out_and_counted(tiny_lm, contexts) -> None:
    lm = tiny_lm("gemma3")
    everything = ActivationCapture(lm, 2).capture_all(contexts)
    norms = everything.by_layer[2].norm(dim=1)
    limit = float(norms.median())
    captured = ActivationCapture(lm, 2, max_norm=limit).capture_all(contexts)
    assert captured.dropped_sinks == int((norms > limit).sum()) > 0
    assert len(captured) + captured.dropped_sinks == len(everything)
    assert captured.by_layer[2].norm(dim=1).max() <= limit


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_splice_changes_what_comes_after_the_layer(arch, tiny_lm, contexts) -> None:
    lm = tiny_lm(arch)
    capture = ActivationCapture(lm, 1)
    input_ids, attention_mask = pad_batch(contexts, lm.tokenizer.pad_token_id)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    with torch.no_grad():
        clean = lm.model(**inputs).logits
        with capture.splice(lambda h: h.clone()):
            same = lm.model(**inputs).logits
        inputs_above: list[torch.Tensor] = []
        handle = lm.layers[2].register_forward_pre_hook(lambda _module, args: inputs_above.append(args[0]))
        with capture.splice(torch.zeros_like):
            zeroed = lm.model(**inputs).logits
        handle.remove()
        after = lm.model(**inputs).logits
    assert torch.equal(clean, same) and torch.equal(clean, after)
    assert not torch.allclose(clean, zeroed) and not inputs_above[0].any()


def test_nan_names_the_documents(tiny_lm, contexts) -> None:
    lm = tiny_lm("llama")
    row = lm.model.get_input_embeddings().weight[contexts[3].input_ids[2]]
    before = row.clone()
    row.fill_(torch.nan)
    try:
        with pytest.raises(NonFiniteActivationsError, match=r"at model\.layers\.1, on \d+ tokens of documents .*103"):
            ActivationCapture(lm, 1).capture_all(contexts)
    finally:
        row.copy_(before)


def test_layer_out_of_range(tiny_lm) -> None:
    for layer in (-1, 4, 99):
        with pytest.raises(SelOrthoError, match=f"layer {layer} is out of range: .* has 4 layers, choose 0 to 3"):
            ActivationCapture(tiny_lm("llama"), layer)


def test_batches_are_of_similar_length_and_bounded() -> None:
    contexts = [Context(n, [1] * length) for n, length in enumerate([3, 9, 4, 8, 2, 7, 12])]
    batches = [[contexts[number] for number in numbers] for numbers in length_batches(contexts, 16)]
    assert sorted(c.document_id for batch in batches for c in batch) == list(range(7))
    assert all(len(batch) * max(len(c.input_ids) for c in batch) <= 18 for batch in batches)
    assert [len(c.input_ids) for batch in batches for c in batch] == [12, 9, 8, 7, 4, 3, 2]
    assert [len(b) for b in length_batches([Context(0, [1] * 40), Context(1, [1] * 40)], 16)] == [1, 1]


def test_a_site_is_an_input_or_an_output_that_a_function_may_replace(tiny_lm, contexts) -> None:
    lm = tiny_lm("gemma3")
    tokens = dict(zip(("input_ids", "attention_mask"), pad_batch(contexts, 0), strict=True))
    seen: list[torch.Tensor] = []
    sites = [find_site(lm, 1, "resid_post"), HookSite("model.layers.2", "input"), HookSite("model.layers.2.mlp")]
    handles = [site.hook(lm.model, seen.append) for site in sites]
    handles.append(HookSite("model.layers.3", "input").hook(lm.model, torch.zeros_like))
    with torch.no_grad():
        lm.model(**tokens)
        for handle in handles:
            handle.remove()
        above = lm.layers[3].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        lm.model(**tokens)
        above.remove()
    assert sites[0] == HookSite("model.layers.1", "output") and torch.equal(seen[0], seen[1])
    assert seen[2].shape == seen[0].shape and not torch.equal(seen[2], seen[1])
    assert len(seen) == 4 and seen[3].any()  # no hook is left


@pytest.mark.slow
def test_the_real_gemma_gives_what_its_own_hidden_states_give(embedded_lm) -> None:
    ids = embedded_lm.tokenizer("The central bank raised interest rates on Thursday.")["input_ids"]
    input_ids = torch.tensor([ids])
    hidden = ActivationCapture(embedded_lm, 8).hidden_states(input_ids, torch.ones_like(input_ids))[8]
    with torch.no_grad():
        expected = embedded_lm.model(input_ids=input_ids, output_hidden_states=True).hidden_states[9]
    assert hidden.shape == (1, len(ids), 640)
    torch.testing.assert_close(hidden.float(), expected.float(), rtol=2e-2, atol=2.0)
