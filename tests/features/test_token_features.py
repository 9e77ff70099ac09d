"""From a text to what fires on each of its tokens, as in training."""

from __future__ import annotations

import logging

import pytest
import torch

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.features import FeatureCapture, inspect
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.contexts import Context, pad_batch

TEXT = "The minister built two bridges near the coast. A company sold a cheap phone in 12 cases."


@pytest.fixture
def sae(tiny_lm):
    return make_sae(tiny_lm("gemma3"))


def make_sae(lm, **settings) -> SelOrthoSAE:
    named = {"lm_name": lm.name, "lm_revision": lm.revision, "layer": 2, "context_length": 16}
    return SelOrthoSAE(SelOrthoConfig(**{"d_in": 32, "d_sae": 64, **named, **settings})).eval()


def test_tokens_and_features_are_those_of_the_training(sae, tiny_lm) -> None:
    lm = tiny_lm("gemma3")
    text = FeatureCapture(sae, lm).capture([TEXT])[0]
    ids = lm.tokenizer(TEXT, add_special_tokens=False).input_ids
    bos, width = lm.tokenizer.bos_token_id, 15
    pieces = [[bos, *ids[start : start + width]] for start in range(0, len(ids), width)]
    assert text.token_ids.tolist() == [token for piece in pieces for token in piece] and len(pieces) > 1
    assert text.positions.tolist() == [place for piece in pieces for place in range(len(piece))]
    assert text.trained_on.tolist() == [token != bos for token in text.token_ids.tolist()]
    assert "".join(token for token, known in zip(text.tokens, text.trained_on, strict=True) if known) == TEXT
    for number, piece in enumerate(pieces):  # each context by itself
        hidden = ActivationCapture(lm, 2).hidden_states(*pad_batch([Context(0, piece)], 0))[2][0]
        rows = slice(sum(map(len, pieces[:number])), sum(map(len, pieces[: number + 1])))
        torch.testing.assert_close(text.feature_acts[rows], sae.encode(hidden), atol=1e-4, rtol=1e-4)


def test_several_texts_are_read_at_once(sae, tiny_lm) -> None:
    capture = FeatureCapture(sae, tiny_lm("gemma3"))
    texts = [TEXT, "A river.", TEXT.upper()]
    for together, text in zip(capture.capture(texts), texts, strict=True):
        alone = capture.capture([text])[0]
        assert together.text == text and together.tokens == alone.tokens
        torch.testing.assert_close(together.feature_acts, alone.feature_acts, atol=1e-4, rtol=1e-4)


def test_top_and_strongest(sae, tiny_lm) -> None:
    text = inspect(sae, TEXT, tiny_lm("gemma3"))
    acts = text.feature_acts
    assert text.top(3)[0] == []  # BOS
    for place, top in enumerate(text.top(3)):
        if text.trained_on[place]:
            expected = acts[place].sort(descending=True).values[:3]
            assert [f.activation for f in top] == expected[expected > 0].tolist()
            assert [acts[place, f.feature].item() for f in top] == [f.activation for f in top]
    peaks = acts[text.trained_on].amax(0)
    strongest = text.strongest(4)
    assert [f.activation for f in strongest] == peaks.sort(descending=True).values[:4].tolist()
    assert text.on(strongest[0].feature).max().item() >= strongest[0].activation
    assert len(text.strongest(10**6)) == int((peaks > 0).sum())


def test_sinks_are_marked(tiny_lm) -> None:
    lm = tiny_lm("gemma3")
    everything = inspect(make_sae(lm), TEXT, lm)
    batch = pad_batch([Context(0, everything.token_ids[:16].tolist())], 0)
    hidden = ActivationCapture(lm, 2).hidden_states(*batch)[2][0]
    norms = hidden.float().norm(dim=1)
    limit = norms[1:].sort().values[7].item() * 1.0001
    text = inspect(make_sae(lm, max_norm=limit), TEXT, lm)
    assert text.trained_on[:16].tolist() == [False, *(norm <= limit for norm in norms[1:].tolist())]
    assert [bool(top) for top in text.top()][:16] == text.trained_on[:16].tolist()


def test_the_method_of_the_sae_loads_the_language_model_and_spells_pieces_of_characters(sae) -> None:
    (text,) = sae.capture([TEXT + " 🗼"])
    assert len(text) > 16 and not any("\ufffd" in token or token == "" for token in text.tokens)


def test_another_language_model_is_named(sae, tiny_lm, tiny_lm_dir, caplog) -> None:
    other = tiny_lm("llama")
    with caplog.at_level(logging.WARNING):
        inspect(sae, TEXT, other)
    (warning,) = caplog.messages
    assert f'"{sae.config.lm_name}" at {sae.config.lm_revision}' in warning
    assert f'"{other.name}" at {other.revision}' in warning
    caplog.clear()
    later = make_sae(tiny_lm("gemma3"), lm_revision="b" * 40)  # the same model, another commit
    with caplog.at_level(logging.WARNING):
        inspect(later, TEXT, str(tiny_lm_dir("gemma3")))
    assert "b" * 40 in caplog.messages[0] and str(sae.config.lm_revision) in caplog.messages[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        inspect(sae, TEXT)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        ({"layer": None}, TEXT, "layer=None in the SAE's config"),
        ({"lm_name": None}, TEXT, "pass the language model"),
        ({"d_in": 16}, TEXT, "is 32 wide, the SAE reads d_in=16"),
        ({"layer": 9}, TEXT, "layer 9 is out of range"),
        ({}, "", "text 0 of 1 holds no token: ''"),
    ],
)
def test_what_cannot_be_read_is_refused(settings, text, message, tiny_lm) -> None:
    with pytest.raises(SelOrthoError, match=message):
        inspect(make_sae(tiny_lm("gemma3"), **settings), text)
