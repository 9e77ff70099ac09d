"""Text written with features changed: against the language models' own `generate` and whole forward passes."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.features.sampling import Sampling, choose
from hf_selortho.features.steering import Generation, Steer, Steering
from hf_selortho.language_models.capture import ActivationCapture

PROMPT = "The minister built two bridges near the coast."
ARCHITECTURES = ["gemma2", "gemma3", "llama", "gpt2"]
LAYER = 1


@pytest.fixture(params=ARCHITECTURES)
def steering(request, tiny_lm) -> Steering:
    return make_steering(tiny_lm(request.param))


def make_steering(lm, **settings) -> Steering:
    named = {"lm_name": lm.name, "lm_revision": lm.revision, "layer": LAYER, "context_length": 100}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sae = SelOrthoSAE(SelOrthoConfig(**{"d_in": lm.d_model, "d_sae": 48, **named, **settings})).eval()
        sae.b_enc.data.normal_()
        sae.set_input_statistics(torch.randn(lm.d_model), 1.5)
    return Steering(sae, lm)


def prompt_ids(steering: Steering) -> list[int]:
    tokenizer = steering.lm.tokenizer
    return [tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False).input_ids]


def layer_output(steering: Steering, ids: list[int]) -> Tensor:
    """(t, d_in), of a plain forward pass."""
    rows = torch.tensor([ids])
    return ActivationCapture(steering.lm, LAYER).hidden_states(rows, torch.ones_like(rows))[LAYER][0]


@torch.no_grad()
def steered_logits(steering: Steering, ids: list[int], steers: list[Steer]) -> Tensor:
    """(t, vocabulary): the whole text in one pass without a cache, each decoder row added by hand."""
    sae, lm = steering.sae, steering.lm
    special = torch.tensor([token in lm.tokenizer.all_special_ids for token in ids])

    def hook(_module, _inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        h, changed = sae.encode(x), x.clone()
        for steer in steers:
            target = steer.value if steer.mode == "clamp" else steer.value * h[..., steer.feature]
            move = target - h[..., steer.feature]
            changed += move[..., None] * sae.W_dec[steer.feature] * sae.input_scale * ~special[:, None]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = lm.layers[LAYER].register_forward_hook(hook)
    try:
        return lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()


def live_feature(steering: Steering) -> int:
    """The one that fires most over the prompt."""
    return int(steering.sae.encode(layer_output(steering, prompt_ids(steering)))[1:].sum(0).argmax())


def test_without_steers_it_is_what_the_language_model_writes(steering) -> None:
    ids = prompt_ids(steering)
    plain = steering.lm.model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0].tolist()
    end = {steering.lm.tokenizer.eos_token_id}
    plain = plain[: next((place for place in range(len(ids), len(plain)) if plain[place] in end), None)]
    generation = steering.generate(PROMPT)
    assert generation.token_ids == plain and generation.prompt_tokens == len(ids) and generation.prompt == PROMPT
    whole = steering.lm.tokenizer.decode(plain, skip_special_tokens=True)
    assert PROMPT + generation.text == whole.rstrip("\ufffd")  # without the half character at its end
    assert "".join(generation.tokens[1 : len(ids)]) == PROMPT
    assert generation.feature_acts.shape == (len(generation), 0)


@pytest.mark.parametrize("mode, value", [("clamp", 30.0), ("scale", -20.0)])
def test_token_by_token_as_without_a_cache(steering, mode: str, value: float) -> None:
    steers = [Steer(live_feature(steering), mode, value), Steer(3, "clamp", 2.0)]
    generation = steering.generate(PROMPT, steers)
    logits = steered_logits(steering, generation.token_ids, steers)
    start = generation.prompt_tokens
    assert logits[start - 1 : -1].argmax(1).tolist() == generation.token_ids[start:]
    assert generation.ended or len(generation) == start + 40


def residuals(steering: Steering, steers: list[Steer], prompt: str = PROMPT) -> tuple[Tensor, Tensor, Generation]:
    """The residual stream (tokens, d_in) as the layer computes it and as the next layer reads it."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    layers = steering.lm.layers
    handles = [
        layers[LAYER].register_forward_hook(lambda _m, _i, out: before.append(out[0] if type(out) is tuple else out)),
        layers[LAYER + 1].register_forward_pre_hook(lambda _module, inputs: after.append(inputs[0])),
    ]
    try:
        generation = steering.generate(prompt, steers)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(before, 1)[0], torch.cat(after, 1)[0], generation


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_the_residual_stream_moves_as_the_reconstruction_does(tiny_lm, activation: str) -> None:
    steering = make_steering(tiny_lm("gemma3"), activation=activation, **({"k": 8} if "topk" in activation else {}))
    sae, a, b, c = steering.sae, live_feature(steering), 3, 7
    before, after, generation = residuals(
        steering, [Steer(a, "clamp", 12.5), Steer(b, "scale", 3.0), Steer(c, "scale", 0.0)]
    )
    h = sae.encode(before)
    changed = h.clone()
    changed[:, a], changed[:, b], changed[:, c] = 12.5, 3 * h[:, b], 0
    expected = before + sae.decode(changed) - sae.decode(h)
    torch.testing.assert_close(after[1:], expected[1:], atol=1e-3, rtol=1e-3)
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1:], before[1:])  # BOS
    torch.testing.assert_close(generation.feature_acts[1:], h[1:, [a, b, c]], atol=1e-4, rtol=1e-4)
    assert not generation.feature_acts[0].any() and len(generation.feature_acts) == len(generation)


def test_a_factor_of_one_leaves_every_bit(tiny_lm) -> None:
    lm = tiny_lm("gemma2")
    coarse = replace(lm, model=copy.deepcopy(lm.model).bfloat16())
    before, after, _ = residuals(make_steering(coarse), [Steer(f, "scale", 1.0) for f in range(48)])
    assert after.dtype is torch.bfloat16 and torch.equal(before, after)


def test_sinks_and_special_tokens_are_left_alone(tiny_lm) -> None:
    lm = tiny_lm("llama")
    norms = layer_output(make_steering(lm), prompt_ids(make_steering(lm))).norm(dim=1)
    steering = make_steering(lm, max_norm=float(norms[1:].median()) + 1e-3)
    before, after, generation = residuals(steering, [Steer(2, "clamp", 9.0)])
    sink = before.norm(dim=1) > steering.sae.config.max_norm
    assert 1 < sink[1:].sum() < len(sink) - 2
    same = (before == after).all(1)
    assert torch.equal(same[1:], sink[1:]) and same[0]
    assert not generation.feature_acts[same].any()


def test_a_seed_names_a_text(tiny_lm) -> None:
    steering = make_steering(tiny_lm("gpt2"))
    steers = [Steer(live_feature(steering), "scale", 2.0)]
    state = torch.get_rng_state()
    texts = [steering.generate(PROMPT, steers, Sampling(temperature=1.0, seed=seed)).token_ids for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert steering.generate(PROMPT, steers, Sampling(temperature=1.0, seed=1)).token_ids == texts[0]


def test_two_texts_at_a_time_do_not_mix(tiny_lm) -> None:
    steering = make_steering(tiny_lm("gemma2"))
    arguments = [(PROMPT, [Steer(3, "clamp", 50.0)]), ("A river", [Steer(4, "clamp", 50.0)]), (PROMPT, [])]
    arguments = [(*these, Sampling(20, 0.9, seed=seed)) for seed, these in enumerate(arguments)]
    lasts: dict[int, list[int]] = {}
    for parts in itertools.zip_longest(*(steering.stream(*these) for these in arguments)):
        lasts |= {number: part.token_ids for number, part in enumerate(parts) if part is not None}
    assert list(lasts.values()) == [steering.generate(*these).token_ids for these in arguments]


def test_the_stream_grows_by_a_token_and_leaves_no_hook(steering) -> None:
    hooks = steering.lm.layers[LAYER]._forward_hooks
    before = dict(hooks)  # transformers leaves some of its own on a model that was asked for hidden states
    steers = [Steer(0, "clamp", 3.0)]
    whole = steering.generate(PROMPT, steers, Sampling(6))
    assert hooks == before
    stream = steering.stream(PROMPT, steers, Sampling(6))
    for number in range(1, 4):
        part = next(stream)
        assert part.token_ids == whole.token_ids[: part.prompt_tokens + number]
        assert whole.text.startswith(part.text) and torch.equal(part.feature_acts, whole.feature_acts[: len(part)])
        assert hooks == before  # while the caller holds it
    stream.close()
    assert hooks == before
    steering.sae.W_dec.data[0] = torch.nan
    with pytest.raises(SelOrthoError, match="not finite after clamp 3.0 of feature 0"):
        steering.generate(PROMPT, steers)
    assert hooks == before


def test_the_text_ends_where_the_language_model_ends_it(tiny_lm) -> None:
    steering = make_steering(tiny_lm("gemma3"))
    plain = steering.generate(PROMPT)
    place = plain.prompt_tokens + 3
    steering._end_ids = {plain.token_ids[place]}
    cut = plain.token_ids.index(plain.token_ids[place], plain.prompt_tokens)
    stream = list(steering.stream(PROMPT))
    assert stream[-1].ended and not any(part.ended for part in stream[:-1]) and not plain.ended
    assert stream[-1].token_ids == plain.token_ids[:cut]
    steering._end_ids = {plain.token_ids[plain.prompt_tokens]}
    assert steering.generate(PROMPT).text == "" and steering.generate(PROMPT).ended


def test_choose() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0, -50.0])

    def drawn(**settings) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.tensor([choose(logits, Sampling(**settings), generator) for _ in range(4000)]).bincount(
            minlength=5
        )

    assert drawn()[1] == 4000 and drawn(temperature=1e-40)[1] == 4000 and drawn(temperature=2.0, top_p=1e-9)[1] == 4000
    for temperature in (1.0, 2.5):
        shares = drawn(temperature=temperature) / 4000
        torch.testing.assert_close(shares, (logits / temperature).softmax(0), atol=0.03, rtol=0)
    nucleus = drawn(temperature=1.0, top_p=0.7)  # 0.64 + 0.24
    assert nucleus[[0, 3, 4]].sum() == 0
    torch.testing.assert_close(nucleus[[1, 2]] / 4000, logits[[1, 2]].softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Steer(1, "add", 1.0), "mode 'add' of feature 1: choose scale or clamp"),
        (lambda: Steer(1, "clamp", -1.0), "clamp -1.0 of feature 1: activations are never negative; take 0 or more"),
        (lambda: Steer(1, "scale", float("nan")), "scale of feature 1 nan: expected a finite number"),
        (lambda: Sampling(max_new_tokens=0), "max_new_tokens 0: expected a number of at least 1"),
        (lambda: Sampling(temperature=-0.1), "temperature -0.1: expected 0"),
        (lambda: Sampling(top_p=0), "top_p 0: expected more than 0"),
        (lambda: Sampling(seed=-1), "seed -1: expected a number from 0 to"),
    ],
)
def test_values_that_are_not_allowed(make, message: str) -> None:
    with pytest.raises(SelOrthoError, match=message):
        make()


def test_errors_come_before_the_first_token(tiny_lm) -> None:
    steering = make_steering(tiny_lm("gpt2"))
    for prompt, steers, message in [
        ("", [], "the prompt '' holds no token"),
        (PROMPT, [Steer(48, "scale", 0.0)], "feature 48: expected a number from 0 to 47"),
        (PROMPT, [Steer(1, "scale", 0.0), Steer(1, "clamp", 2.0)], "feature 1 is steered 2 times"),
    ]:
        with pytest.raises(SelOrthoError, match=message):
            steering.stream(prompt, steers)
    room = 100 - 1 - 40
    tokens = len(steering.lm.tokenizer(PROMPT * 9, add_special_tokens=False).input_ids)
    with pytest.raises(
        SelOrthoError, match=f"{tokens} tokens after BOS and 40 new ones.*shorten the prompt to {room} "
    ):
        steering.stream(PROMPT * 9)
    with pytest.raises(SelOrthoError, match="contexts of 100 tokens; ask for fewer new tokens"):
        steering.stream(PROMPT, sampling=Sampling(100))
    fitting = Sampling(100 - len(prompt_ids(steering)))
    assert len(steering.generate(PROMPT, sampling=fitting)) <= 100


def test_a_prompt_that_spells_a_special_token_is_text(tiny_lm) -> None:
    steering = make_steering(tiny_lm("gemma2"), prepend_bos=False)
    generation = steering.generate("a <eos> <bos> b", sampling=Sampling(1))
    assert not set(generation.token_ids[: generation.prompt_tokens]) & set(steering.lm.tokenizer.all_special_ids)


def sea_feature(lm, layer: int) -> tuple[Tensor, float]:
    """A direction (d_in,) of length 1 from other texts to texts about the sea, and how far apart they are."""
    reader = ActivationCapture(lm, layer)

    def mean(*texts: str) -> Tensor:
        rows = [torch.tensor([[2, *lm.tokenizer(text, add_special_tokens=False).input_ids]]) for text in texts]
        return torch.cat([reader.hidden_states(ids, torch.ones_like(ids))[layer][0, 1:].float() for ids in rows]).mean(
            0
        )

    sea = mean(
        "The ship sails the ocean waves to the sea and the harbour.", "Sailors on the boat cross the water of the sea."
    )
    other = mean("The law was passed by a vote of members.", "The company sold a phone for a low price in March.")
    distance = float((sea - other).norm())
    return (sea - other) / distance, distance


@pytest.mark.slow
def test_the_real_gemma_writes_of_the_sea(embedded_lm) -> None:
    named = {"lm_name": embedded_lm.name, "lm_revision": embedded_lm.revision, "layer": 6, "context_length": 128}
    sae = SelOrthoSAE(SelOrthoConfig(d_in=640, d_sae=8, **named)).eval()
    sae.W_dec.data[4], distance = sea_feature(embedded_lm, 6)
    steering = Steering(sae, embedded_lm)
    prompt = "On the first day, we"
    strong = [Steer(4, "clamp", 1.5 * distance)]
    plain, sea = steering.generate(prompt), steering.generate(prompt, strong)
    words = ("sea", "ocean", "ship", "boat", "water", "sail", "wave")
    assert any(word in sea.text for word in words), sea.text
    assert not any(word in plain.text for word in words), plain.text
    ids = torch.tensor([plain.token_ids[: plain.prompt_tokens]])
    theirs = embedded_lm.model.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()
    assert theirs[: len(plain)] == plain.token_ids
    drawn = [steering.generate(prompt, strong, Sampling(20, 0.8, 0.95, seed)).text for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
