"""Features of SAEs at attention heads and of transcoders: index, steering, logit lens and page against plain hooks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.evaluation.last_tokens import read_last_tokens
from hf_selortho.features import FeatureCapture, FeatureIndex, Sampling, Steer, Steering, head_norms
from hf_selortho.features.build import IndexSettings, Sources, build_feature_index
from hf_selortho.features.index_writer import IndexWriter
from hf_selortho.features.logit_lens import sae_logits, top_logits
from hf_selortho.features.token_features import open_capture

LAYER, D_SAE, TOKENS = 2, 24, 400
TEXT = "The minister built two bridges near the coast."
OF_LAYER = f"model.layers.{LAYER}"
HEADS = {"site": "attn_z", "hook_name": f"{OF_LAYER}.self_attn.o_proj", "hook_side": "input"}
TRANSCODER = {"site": "mlp_in", "target": "mlp_out", "skip": True, "d_out": 32}
KINDS = pytest.mark.parametrize("sae", [HEADS, TRANSCODER], indirect=True, ids=["attn_z", "transcoder"])


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return tiny_lm("gemma3")


@pytest.fixture
def sae(lm, request) -> SelOrthoSAE:
    return make_sae(lm, **request.param)


def make_sae(lm, seed: int = 0, **settings) -> SelOrthoSAE:
    torch.manual_seed(seed)
    named = {"lm_name": lm.name, "lm_revision": lm.revision, "layer": LAYER, "context_length": 24, "min_support": 2}
    sae = SelOrthoSAE(SelOrthoConfig(**{"d_in": 32, "d_sae": D_SAE, "pair_fraction": 0.05, **named, **settings})).eval()
    with torch.no_grad():
        sae.b_enc.uniform_(-0.1, 0.1)
        sae.set_input_statistics(torch.randn(32), 3.0)
        if sae.config.is_transcoder:
            sae.set_output_statistics(torch.randn(32), 0.5)
            sae.W_skip.normal_()
    return sae


@contextmanager
def recorded(lm, site: str) -> Iterator[list[Tensor]]:
    """What passes at a site of Gemma, or what another module gives, (1, t, n) of each forward pass, by a plain hook."""
    paths = {"attn_z": f"{OF_LAYER}.self_attn.o_proj", "mlp_in": f"{OF_LAYER}.pre_feedforward_layernorm"}
    module, seen = lm.model.get_submodule(paths.get(site, site)), list[Tensor]()
    if site == "attn_z":
        handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def make_sources(sae, lm, path, **parts) -> Sources:
    documents = open_documents(TextSource(str(path), held_out_fraction=0.5))
    return Sources(sae, open_capture(sae.config, lm, LAYER), documents, "small", "0" * 64, **parts)


def write_index(sources: Sources, folder) -> FeatureIndex:
    with IndexWriter(folder) as writer:
        build_feature_index(sources, IndexSettings(tokens=TOKENS), writer, progress=False)
    return FeatureIndex.open(folder)


@KINDS
def test_what_fires_is_what_a_plain_hook_reads(sae, lm) -> None:
    reading = FeatureCapture(sae, lm).capture([TEXT])[0]
    with recorded(lm, sae.config.site) as seen, torch.no_grad():
        lm.model(reading.token_ids[None])
    torch.testing.assert_close(reading.feature_acts, sae.encode(seen[0][0]), atol=1e-5, rtol=1e-4)
    assert reading.trained_on.tolist() == [False] + [True] * (len(reading) - 1)


@KINDS
def test_an_index_says_its_site_and_counts_what_fires_there(sae, lm, sample_text_files, tmp_path) -> None:
    sources = make_sources(sae, lm, sample_text_files.txt)
    index = write_index(sources, tmp_path / "feature_index")
    facts, config = index.facts["sae"], sae.config
    assert (facts["site"], facts["target"]) == (config.site, config.target)
    heads = config.site == "attn_z"
    hook = (HEADS["hook_name"], "input") if heads else (f"{OF_LAYER}.pre_feedforward_layernorm", "output")
    assert (facts["hook_name"], facts["hook_side"]) == hook
    assert facts.get("target_hook_name") == (f"{OF_LAYER}.post_feedforward_layernorm" if config.target else None)
    contexts, held = sources.contexts(), 0
    with recorded(lm, config.site) as seen, torch.no_grad():
        while held < TOKENS:
            ids = next(contexts).input_ids
            held += len(ids) - 1
            lm.model(torch.tensor([ids]))
    h = torch.cat([sae.encode(x[0, 1:]) for x in seen])  # without BOS
    assert [index.feature(f).fires for f in range(D_SAE)] == (h > 0).sum(0).tolist()
    largest = torch.tensor([index.feature(f).max_activation for f in range(D_SAE)])
    torch.testing.assert_close(largest, h.amax(0), atol=1e-4, rtol=1e-4)
    shares = index.feature(0).head_shares
    if heads:
        expected = sae.W_dec[0].detach().view(4, 8).square().sum(1)
        torch.testing.assert_close(torch.tensor(shares), expected / expected.sum(), atol=1e-3, rtol=1e-3)
        assert index.facts["heads"] == 4 and index.logit_lens == (
            f"through {OF_LAYER}.self_attn.o_proj, {OF_LAYER}.post_attention_layernorm"
        )
    else:
        assert shares == [] and index.facts["heads"] is None and index.logit_lens == "direct"


def test_norms_of_heads(lm) -> None:
    sae = make_sae(lm, **HEADS)
    with torch.no_grad():
        sae.W_dec[3] = 0
        sae.W_dec[3, 8:16] = torch.arange(8.0)  # the second of four heads
    norms = head_norms(sae, lm)
    assert norms.shape == (D_SAE, 4) and norms[3].tolist() == pytest.approx([0, 140**0.5, 0, 0])
    with pytest.raises(SelOrthoError, match="reconstructs mlp_out"):
        head_norms(make_sae(lm, **TRANSCODER), lm)


@KINDS
def test_steering_adds_the_direction_where_the_sae_writes(sae, lm) -> None:
    steering, short = Steering(sae, lm), Sampling(max_new_tokens=8)
    with recorded(lm, "lm_head") as logits:
        plain = steering.generate(TEXT, (), short)
        steering.generate(TEXT, [Steer(f, "scale", 1.0) for f in range(D_SAE)], short)
    half = len(logits) // 2  # those of each text
    assert all(torch.equal(a, b) for a, b in zip(logits[:half], logits[half:], strict=True))
    with recorded(lm, "mlp_in" if sae.config.target else "attn_z") as read, recorded(lm, "lm_head") as logits:
        steered = steering.generate(TEXT, [Steer(3, "clamp", 40.0)], short)
    h = sae.encode(torch.cat(read, 1)[0])[:, 3].detach()
    torch.testing.assert_close(steered.feature_acts[1:, 0], h[1:], atol=1e-4, rtol=1e-4)
    by_hand = steered_by_hand(sae, lm, torch.tensor([steered.token_ids]), 3, 40.0)
    start = steered.prompt_tokens
    torch.testing.assert_close(torch.cat(logits, 1)[0, -8:], by_hand[-8:], atol=1e-3, rtol=1e-3)
    assert by_hand[start - 1 : -1].argmax(1).tolist() == steered.token_ids[start:] != plain.token_ids[start:]


@torch.no_grad()
def steered_by_hand(sae, lm, ids: Tensor, feature: int, value: float) -> Tensor:
    """Logits (t, vocabulary) of one pass in which the feature is held at a value, on all tokens but BOS."""
    config, read, scale = sae.config, [], sae.output_scale if sae.config.is_transcoder else sae.input_scale

    def moved(x: Tensor, y: Tensor) -> Tensor:
        shift = (value - sae.encode(x)[..., feature])[..., None] * sae.W_dec[feature] * scale
        shift[:, 0] = 0
        return y + shift

    heads, norms = ".self_attn.o_proj", (".pre_feedforward_layernorm", ".post_feedforward_layernorm")
    before, after = (lm.model.get_submodule(OF_LAYER + path) for path in norms)
    if config.target is None:
        module = lm.model.get_submodule(OF_LAYER + heads)
        handles = [module.register_forward_pre_hook(lambda _module, inputs: (moved(inputs[0], inputs[0]),))]
    else:
        handles = [before.register_forward_hook(lambda _m, _i, x: read.append(x))]
        handles.append(after.register_forward_hook(lambda _m, _i, y: moved(read[-1], y)))
    try:
        return lm.model(ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def test_the_logit_lens_goes_through_the_output_projection(lm) -> None:
    sae = make_sae(lm, **HEADS)
    found = sae_logits(sae, open_capture(sae.config, lm, LAYER), progress=False)
    layer = lm.layers[LAYER]
    projected = sae.raw_directions() @ layer.self_attn.o_proj.weight.T
    gained = projected * (1 + layer.post_attention_layernorm.weight)  # the norm of Gemma, but for the size
    expected = top_logits(lm, gained.detach(), progress=False)
    for own, other in zip(found, expected, strict=True):
        assert [e.token_id for e in own.positive] == [e.token_id for e in other.positive]
        assert [e.logit for e in own.negative] == pytest.approx([e.logit for e in other.negative], rel=1e-3)


def test_a_direction_that_is_not_added_has_no_logits(lm) -> None:
    sae = make_sae(lm, site="mlp_in")
    found = sae_logits(sae, open_capture(sae.config, lm, LAYER), progress=False)
    assert len(found) == D_SAE and not any(one.positive for one in found)


def test_a_twin_of_another_site_and_another_width_are_refused(lm, sample_text_files, tmp_path) -> None:
    heads, other = make_sae(lm, **HEADS), make_sae(lm, **TRANSCODER)
    with pytest.raises(SelOrthoError, match=r"twin other has site=mlp_in, target=mlp_out, the SAE site=attn_z"):
        write_index(make_sources(heads, lm, sample_text_files.txt, twin=other, twin_name="other"), tmp_path / "i")
    wide = make_sae(lm, **HEADS)
    wide.config.d_in = 64
    with pytest.raises(SelOrthoError, match=f"the input of {OF_LAYER}.self_attn.o_proj of .* is 32 wide"):
        FeatureCapture(wide, lm)
    foreign = make_sae(lm, layer=None, hook_name=f"blocks.{LAYER}.ln2.hook_normalized")
    with pytest.raises(SelOrthoError, match="ln2.hook_normalized, which is no site that is read here"):
        FeatureCapture(foreign, lm)


def test_last_tokens_of_sites_are_kept_apart(lm, tmp_path) -> None:
    sets, rows = {"set": ["two bridges", "the coast"]}, {}
    for site in ("resid_post", "attn_z", "resid_post"):
        capture = open_capture(make_sae(lm, site=site).config, lm, LAYER)
        ((_, by_layer),) = read_last_tokens(capture, sets, 16, prepend_bos=True, cache=tmp_path, progress=False)
        rows.setdefault(site, []).append(by_layer[LAYER])
    assert torch.equal(*rows["resid_post"]) and not torch.equal(rows["resid_post"][0], rows["attn_z"][0])
    assert len(list(tmp_path.iterdir())) == 2


def test_the_page_shows_the_heads_of_a_feature(lm, sample_text_files, tmp_path) -> None:
    pytest.importorskip("gradio")
    from hf_selortho.browser.address import Address
    from hf_selortho.browser.catalog import open_catalog
    from hf_selortho.browser.live_model import LiveModel
    from hf_selortho.browser.views import Views

    folder = tmp_path / "run" / f"layer_{LAYER}"
    sae = make_sae(lm, **HEADS)
    sae.save_pretrained(folder)
    index = write_index(make_sources(sae, lm, sample_text_files.txt), folder / "feature_index")
    figures = {"layers": 3, "ce": 3.25, "ce_replaced": 4.125}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"all_layers": {"": figures}}))
    catalog = open_catalog(str(folder), None)
    views = Views(catalog, LiveModel(catalog, "none"))
    record = index.feature(1)
    best = max(range(4), key=lambda head: record.head_shares[head])
    page = views.render(Address(view="feature", id=1))
    assert "Heads it writes to" in page and page.index(f"head {best}<") < page.index(f"head {(best + 1) % 4}<")
    assert f"logits through {OF_LAYER}.self_attn.o_proj" in page
    assert f"layer {LAYER}, attention heads (attn_z)" in views.render(Address(view="start"))
    run = views.render(Address(view="run"))
    assert f"{OF_LAYER}.self_attn.o_proj" in run and "All 3 layers replaced at once" in run
    assert catalog["main"].all_layers == figures
