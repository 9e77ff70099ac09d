"""The format of SAELens, against the real library: what it loads of ours, and what we load of its."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.formats import load_sae, write_saelens
from hf_selortho.formats.names import lens_name

KINDS = {
    "relu": {},
    "topk": {"activation": "topk", "k": 5},
    "batchtopk": {"activation": "batchtopk", "k": 5},
    "matryoshka": {"activation": "batchtopk", "k": 5, "matryoshka_prefixes": [16, 48]},
    "jumprelu": {"activation": "jumprelu"},
}


@pytest.fixture(scope="module")
def sae_lens():
    return pytest.importorskip("sae_lens")


def activations(tokens: int = 200) -> torch.Tensor:
    """As those of Gemma: a mean far larger than the spread, norms of thousands."""
    generator = torch.Generator().manual_seed(1)
    mean = 900 * torch.randn(24, generator=generator)
    return mean + 60 * torch.randn(tokens, 24, generator=generator)


def make_sae(kind: str, **settings) -> SelOrthoSAE:
    named = {"lm_name": "google/gemma-2-2b", "lm_revision": "c" * 40, "layer": 12, "hook_name": "model.layers.12"}
    sae = SelOrthoSAE(SelOrthoConfig(**{"d_in": 24, "d_sae": 48, **named, **KINDS[kind], **settings})).eval()
    x = activations()
    sae.set_input_statistics(x.mean(0), float((x - x.mean(0)).square().sum(1).mean().sqrt()))
    with torch.no_grad():
        for name in ("b_enc", "b_dec"):
            getattr(sae, name).normal_(0, 0.05)
        if kind in ("batchtopk", "matryoshka"):
            sae.threshold.fill_(0.11)
        if kind == "jumprelu":
            sae.log_threshold.uniform_(-4, -1.5)
    return sae


def assert_same(h: torch.Tensor, x_hat: torch.Tensor, sae: SelOrthoSAE, x: torch.Tensor) -> None:
    """Feature activations within 1e-5; reconstructions within 1e-5 of their largest entry."""
    own = sae.encode(x)
    assert 0 < (own > 0).float().mean() < 1
    torch.testing.assert_close(h, own, atol=1e-5, rtol=1e-5)
    decoded = sae.decode(own)
    torch.testing.assert_close(x_hat, decoded, atol=1e-5 * decoded.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sae_lens_computes_what_we_compute(kind, sae_lens, tmp_path) -> None:
    sae, x = make_sae(kind), activations()
    write_saelens(sae, tmp_path / "lens", {"l0": 7.5})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "lens")
    h = theirs.encode(x)
    assert_same(h, theirs.decode(h), sae, x)
    expected = {"relu": "standard", "topk": "topk"}.get(kind, "jumprelu")
    assert theirs.cfg.architecture() == expected and theirs.cfg.normalize_activations == "none"
    about = theirs.cfg.metadata
    assert (about.model_name, about.hook_name, about.l0) == ("gemma-2-2b", "blocks.12.hook_resid_post", 7.5)
    assert (about.hf_hook_name, about.prepend_bos) == ("model.layers.12", True)


@pytest.mark.parametrize(("kind", "skip"), [("relu", True), ("batchtopk", False), ("jumprelu", True)])
@torch.no_grad()
def test_transcoders_are_those_of_sae_lens(kind, skip, sae_lens, tmp_path) -> None:
    places = {"site": "mlp_in", "target": "mlp_out", "target_hook_name": "model.layers.12.post_feedforward_layernorm"}
    sae, x = make_sae(kind, skip=skip, d_out=16, **places), activations()
    sae.set_output_statistics(torch.randn(16), 3.0)
    if skip:
        sae.W_skip.normal_(0, 0.1)
    write_saelens(sae, tmp_path / "lens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "lens")
    torch.testing.assert_close(theirs.encode(x), sae.encode(x), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(theirs(x), sae.reconstruct(x), atol=1e-2, rtol=1e-3)
    about = theirs.cfg.metadata
    assert (about.hook_name_out, about.hf_hook_name_out) == ("blocks.12.hook_mlp_out", places["target_hook_name"])
    of_heads = make_sae(kind, site="attn_z", hook_side="input")
    write_saelens(of_heads, tmp_path / "heads")
    apart = x.unflatten(-1, (4, -1))  # as TransformerLens has them
    lens = sae_lens.SAE.load_from_disk(tmp_path / "heads")
    torch.testing.assert_close(lens.encode(apart), of_heads.encode(x), atol=1e-3, rtol=1e-3)
    heads = json.loads((tmp_path / "heads" / "cfg.json").read_text())["metadata"]
    assert (heads["hook_name"], heads["hf_hook_name"]) == ("blocks.12.attn.hook_z", "model.layers.12.input")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_there_and_back(kind, tmp_path) -> None:
    sae, x = make_sae(kind), activations()
    write_saelens(sae, tmp_path / "lens")
    again = load_sae(tmp_path / "lens")
    h = again.encode(x)
    assert_same(h, again.decode(h), sae, x)
    config = again.config
    assert (config.lm_name, config.lm_revision, config.layer) == ("google/gemma-2-2b", "c" * 40, 12)
    again.save_pretrained(tmp_path / "own")
    own = SelOrthoSAE.from_pretrained(tmp_path / "own")
    assert torch.equal(own.encode(x), h) and torch.equal(own.decode(h), again.decode(h))


def theirs_of(sae_lens, kind: str, **settings):
    """An SAE made by the library itself, with random weights."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    classes = {
        "standard": (StandardSAE, StandardSAEConfig),
        "topk": (TopKSAE, TopKSAEConfig),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    }
    model, config = classes[kind]
    sae = model(config(d_in=24, d_sae=48, **settings))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "pythia-70m-deduped", "blocks.3.hook_resid_pre"
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(0, 0.3)
    return sae


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "rescaled", "jumprelu"])
@torch.no_grad()
def test_we_compute_what_sae_lens_computes(kind, subtracts, sae_lens, tmp_path) -> None:
    settings = {"topk": {"k": 6, "rescale_acts_by_decoder_norm": False}, "rescaled": {"k": 6}}.get(kind, {})
    theirs = theirs_of(sae_lens, kind.replace("rescaled", "topk"), apply_b_dec_to_input=subtracts, **settings)
    theirs.save_model(tmp_path / "lens")
    sae, x = load_sae(tmp_path / "lens"), torch.randn(100, 24)
    h = theirs.encode(x)
    assert_same(h, theirs.decode(h), sae, x)
    config = sae.config
    assert (config.lm_name, config.layer, config.penalty) == ("EleutherAI/pythia-70m-deduped", 2, "none")


@torch.no_grad()
def test_configs_before_version_6_are_read(sae_lens, tmp_path) -> None:
    theirs = theirs_of(sae_lens, "standard")
    theirs.save_model(tmp_path)
    old = {"d_in": 24, "d_sae": 48, "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_post"}
    old |= {"activation_fn_str": "relu", "context_size": 64, "prepend_bos": False, "normalize_activations": "none"}
    old["dtype"] = "float32"
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    sae, x = load_sae(tmp_path), torch.randn(100, 24)
    h = sae_lens.SAE.load_from_disk(tmp_path).encode(x)
    torch.testing.assert_close(sae.encode(x), h, atol=1e-5, rtol=1e-5)
    config = sae.config
    assert (config.lm_name, config.layer, config.context_length) == ("openai-community/gpt2", 8, 64)
    assert config.prepend_bos is False
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    old["hook_point"] = old.pop("hook_name")
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    assert load_sae(tmp_path).config.layer == 8
    torch.testing.assert_close(load_sae(tmp_path).encode(x), sae_lens.SAE.load_from_disk(tmp_path).encode(x))


@pytest.fixture
def saved(tmp_path) -> Path:
    write_saelens(make_sae("jumprelu"), tmp_path / "lens")
    return tmp_path / "lens"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, "missing: b_gate, b_mag, r_mag; unexpected: b_enc, threshold"),
        ({"architecture": "topk"}, "k=None, expected the number"),
        ({"architecture": "standard"}, "unexpected: threshold"),
        ({"d_sae": 10**9}, "has the shape"),
        ({"d_in": "24"}, "d_in='24', expected a positive"),
    ],
)
def test_what_is_not_read_is_named(changes, message, saved) -> None:
    config = json.loads((saved / "cfg.json").read_text())
    (saved / "cfg.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SelOrthoError, match=message) as caught:
        load_sae(saved)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_named(saved) -> None:
    weights = saved / "sae_weights.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    weights.write_bytes(whole[:-100])
    with pytest.raises(SelOrthoError, match="is damaged or incomplete"):
        load_sae(saved)
    save_file({**tensors, "b_enc": tensors["b_enc"] * torch.nan}, weights)
    with pytest.raises(SelOrthoError, match="b_enc holds NaN or infinity"):
        load_sae(saved)
    weights.write_bytes(whole)
    (saved / "cfg.json").write_text("{")
    with pytest.raises(SelOrthoError, match="is not valid JSON"):
        load_sae(saved)
    (saved / "cfg.json").unlink()
    with pytest.raises(SelOrthoError, match=r"lacks cfg\.json"):
        load_sae(saved)


def test_names_of_other_types_are_left_out(saved, caplog) -> None:
    config = json.loads((saved / "cfg.json").read_text())
    config["metadata"] |= {"hf_model_name": 7, "model_name": [], "dataset_path": {}}
    (saved / "cfg.json").write_text(json.dumps(config))
    settings = load_sae(saved).config
    assert (settings.lm_name, settings.dataset, settings.layer) == (None, None, 12)
    assert "not known here: dataset_path, hf_model_name, model_name" in caplog.text


def test_nothing_is_left_where_there_is_no_room(small_disks) -> None:
    disk = small_disks("64k")
    if not disk.mounted:
        pytest.skip("no file system may be mounted here")
    with pytest.raises(SelOrthoError, match="the disk is full"):
        write_saelens(make_sae("relu", d_sae=4096), disk.folder / "lens")
    assert list(disk.folder.iterdir()) == []


def test_weights_that_are_not_finite_are_not_exported(tmp_path) -> None:
    sae = make_sae("relu")
    with torch.no_grad():
        sae.b_dec[3] = torch.inf
    with pytest.raises(SelOrthoError, match="holds NaN or infinity: export an earlier checkpoint"):
        write_saelens(sae, tmp_path / "lens")
    assert list(tmp_path.iterdir()) == []


def test_the_config_of_another_model_does_not_hide_the_sae_beside_it(saved) -> None:
    (saved / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_sae(saved).config.activation == "jumprelu"
    (saved / "sae_weights.safetensors").unlink()
    with pytest.raises(SelOrthoError, match="model_type='llama', expected 'selortho_sae'"):
        load_sae(saved)


def test_files_outside_of_the_folder_are_not_read(saved, tmp_path) -> None:
    (saved / "cfg.json").rename(tmp_path / "cfg.json")
    (saved / "cfg.json").symlink_to(tmp_path / "cfg.json")
    with pytest.raises(SelOrthoError, match="leads out of"):
        load_sae(saved)


@pytest.mark.parametrize(("name", "lookup"), [("a\0b", {}), (".", {"subfolder": "x\0"})])
def test_names_with_a_nul_byte_are_refused(name, lookup) -> None:
    with pytest.raises(SelOrthoError, match="NUL byte"):
        load_sae(name, **lookup)


def test_every_name_of_a_language_model_that_is_written_is_one_of_transformer_lens(sae_lens) -> None:
    names = pytest.importorskip("transformer_lens.loading_from_pretrained")
    for official in names.OFFICIAL_MODEL_NAMES:
        assert names.get_official_model_name(lens_name(official)) == official
