"""What other libraries write beside an SAE is obeyed, means nothing, is listed once, or is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config

from hf_selortho import SelOrthoError, SelOrthoSAE
from hf_selortho.commands.convert import main as convert
from hf_selortho.commands.evaluate import main as evaluate
from hf_selortho.features import FeatureCapture
from hf_selortho.formats import load_sae, saelens_keys, write_saelens
from hf_selortho.formats.registry import registry

D_IN = 32
_CENTRED = {"center_writing_weights": True}
# Of SAELens 6; a value at "metadata.x" or "kwargs.x" is of that object.
CONFIG: dict[str, Any] = {"architecture": "standard", "d_in": D_IN, "d_sae": 2 * D_IN, "dtype": "float32"}
CONFIG |= {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
METADATA: dict[str, Any] = {"model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_post", "context_size": 32}
METADATA |= {"prepend_bos": True, "seqpos_slice": [None], "hook_head_index": None}


def saelens(folder: Path, **changes: Any) -> Path:
    """An SAE that reconstructs every activation whose mean over the entries is 0, and no other."""
    folder.mkdir(parents=True)
    identity = torch.eye(D_IN)
    centre = identity - 1 / D_IN
    weights = {"W_enc": torch.cat([centre, -centre], 1).contiguous(), "W_dec": torch.cat([identity, -identity])}
    weights |= {"b_enc": torch.zeros(2 * D_IN), "b_dec": torch.zeros(D_IN)}
    save_file(weights, folder / "sae_weights.safetensors")
    metadata = METADATA | {"model_from_pretrained_kwargs": {}}
    config = CONFIG | {"metadata": metadata}
    for key, value in changes.items():
        place, _, name = key.rpartition(".")
        {"": config, "metadata": metadata, "kwargs": metadata["model_from_pretrained_kwargs"]}[place][name] = value
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def sparsify(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    rows = torch.eye(D_IN)
    weights = {"encoder.weight": rows, "W_dec": rows.clone(), "encoder.bias": torch.zeros(D_IN)}
    save_file(weights | {"b_dec": torch.zeros(D_IN)}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D_IN, "num_latents": D_IN, "k": 4} | changes))
    return folder


_WEIGHTS = "of other weights than those on the Hub"


@pytest.mark.parametrize(
    ("write", "key", "value", "reason"),
    [
        (saelens, "normalize_activations", "layer_norm", "each token is normalised by its own norm"),
        (saelens, "normalize_activations", "constant_norm_rescale", "each token is normalised by its own norm"),
        (saelens, "normalize_activations", "expected_average_only_in", "with --approximate"),
        (saelens, "normalize_activations", True, "with --approximate"),
        (saelens, "normalize_activations", "covariance_whitening", "choose the finished SAE"),
        (saelens, "reshape_activations", "hook_q", "expected 'none' or 'hook_z'"),
        (saelens, "finetuning_scaling_factor", "yes", "expected true or false"),
        (saelens, "d_out", "16", "expected a whole number"),
        (saelens, "apply_b_dec_to_input", "False", "expected true or false"),
        (saelens, "rescale_acts_by_decoder_norm", 1, "expected true or false"),
        (saelens, "metadata.hook_head_index", 0, "is of one attention head"),
        (saelens, "metadata.seqpos_slice", [3, None], "some positions of a context only"),
        (saelens, "metadata.seqpos_slice", [None, None, 2], "some positions of a context only"),
        (saelens, "metadata.seqpos_slice", "all", "some positions of a context only"),
        (saelens, "metadata.prepend_bos", 1, "expected true or false"),
        (saelens, "metadata.context_size", "32", "expected a whole number"),
        (saelens, "metadata.context_size", 1, "expected at least 2 tokens"),
        (saelens, "metadata.hook_name", ["blocks.1.hook_resid_post"], "expected a text"),
        (saelens, "metadata.model_from_pretrained_kwargs", "centred", "expected an object of arguments"),
        (saelens, "kwargs.center_writing_weights", "yes", "expected true or false"),
        (saelens, "kwargs.checkpoint_value", 1000, "only the checkpoints of Pythia"),
        (saelens, "kwargs.checkpoint_index", 0, _WEIGHTS),
        (saelens, "kwargs.load_in_8bit", True, _WEIGHTS),
        (saelens, "kwargs.revision", 7, "expected a text"),
        (sparsify, "transcode", 1, "expected true or false"),
        (sparsify, "activation", "groupmax", "expected 'topk'"),
    ],
)
def test_a_key_that_cannot_be_obeyed_is_refused_with_the_reason(write, key, value, reason, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=reason) as caught:
        load_sae(write(tmp_path / "sae", **{key: value}))
    assert "\n" not in str(caught.value) and f"{key.rpartition('.')[2]}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (saelens, {"normalize_activations": False, "finetuning_scaling_factor": False, "d_out": D_IN, "lr": 1e-3}),
        (saelens, {"metadata.seqpos_slice": [1, None], "metadata.hook_name_out": METADATA["hook_name"]}),
        (saelens, {"metadata.seqpos_slice": None, "metadata.exclude_special_tokens": [3], "wandb_id": "x"}),
        (saelens, {"kwargs.fold_ln": True, "kwargs.n_devices": 2, "kwargs.dtype": "bfloat16"}),
        (saelens, {"kwargs.load_in_8bit": False, "kwargs.checkpoint_value": None, **{"kwargs.center_unembed": True}}),
        (sparsify, {"transcode": False, "signed": False, "multi_topk": True, "normalize_decoder": False}),
    ],
)
def test_keys_that_change_nothing_are_passed_over_in_silence(write, changes, tmp_path, caplog) -> None:
    sae = load_sae(write(tmp_path / "layers.1", **changes))
    assert sae.config.layer == 1 and not sae.config.centered and not caplog.records


@pytest.mark.parametrize(
    ("write", "changes", "listed"),
    [
        (saelens, {"whitening": 3, "metadata.chat": 1, "kwargs.rotary": 2},
         "metadata.chat, model_from_pretrained_kwargs.rotary, whitening"),
        (sparsify, {"hookpoint_in": "layers.0", "mean": 1}, "hookpoint_in, mean"),
    ],
)  # fmt: skip
def test_keys_that_are_unknown_are_listed_in_one_line(write, changes, listed, tmp_path, caplog) -> None:
    load_sae(write(tmp_path / "layers.1", **changes))
    (record,) = caplog.records
    assert record.getMessage().endswith(f"cfg.json: not used, as their meaning is not known here: {listed}")


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"kwargs.revision": "v2"}, {"lm_revision": "v2", "centered": False}),
        ({"metadata.model_name": "pythia-70m", "kwargs.checkpoint_value": 512}, {"lm_revision": "step512"}),
        ({"metadata.prepend_bos": False, "metadata.context_size": 64}, {"prepend_bos": False, "context_length": 64}),
        ({"kwargs.center_writing_weights": True}, {"centered": True, "layer": 1}),
        # TransformerLens centres no model with RMSNorm, and within a block nobody sees it
        ({"kwargs.center_writing_weights": True, "metadata.model_name": "gemma-2-2b"}, {"centered": False}),
        ({"kwargs.center_writing_weights": True, "metadata.hook_name": "blocks.1.mlp.hook_post"}, {"centered": False}),
        ({"kwargs.center_writing_weights": True, "metadata.hook_name": "blocks.1.hook_mlp_out"}, {"centered": True}),
    ],
)
def test_a_key_that_is_obeyed_becomes_a_setting(changes, settings, tmp_path) -> None:
    config = load_sae(saelens(tmp_path / "sae", **changes)).config
    assert {name: getattr(config, name) for name in settings} == settings
    write_saelens(load_sae(tmp_path / "sae"), tmp_path / "back")
    again = load_sae(tmp_path / "back").config
    assert {name: getattr(again, name) for name in settings} == settings


def test_what_only_the_registry_of_saelens_knows_of_a_repository_is_obeyed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    saelens(Path("jbloom/GPT2-Small-SAEs-Reformatted"))
    assert load_sae("jbloom/GPT2-Small-SAEs-Reformatted").config.centered
    saelens(Path("JoshEngels/Mistral-7B-Residual-Stream-SAEs"))
    with pytest.raises(SelOrthoError, match="constant_norm_rescale"):
        load_sae("JoshEngels/Mistral-7B-Residual-Stream-SAEs")


def test_what_the_registry_overrides_is_what_saelens_has_in_it() -> None:
    directory = pytest.importorskip("sae_lens.loading.pretrained_saes_directory").get_pretrained_saes_directory()
    keys = {"model_from_pretrained_kwargs", "normalize_activations"}
    overrides = {
        release.repo_id.lower(): {key: release.config_overrides[key] for key in keys & release.config_overrides.keys()}
        for release in directory.values()
        if release.config_overrides and keys & release.config_overrides.keys()
    }
    assert overrides == {name: facts["overrides"] for name, facts in registry().items() if "overrides" in facts}


def test_every_key_that_saelens_and_sparsify_write_is_in_a_table() -> None:
    registry = pytest.importorskip("sae_lens.registry")
    runner = pytest.importorskip("sae_lens.config").LanguageModelSAERunnerConfig
    read = ("standard", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
    configs = [runner, *(registry.SAE_TRAINING_CLASS_REGISTRY[kind][1] for kind in read)]
    keys = {field.name for config in configs for field in dataclasses.fields(config)}
    keys |= pytest.importorskip("sae_lens.loading.pretrained_sae_loaders").LLM_METADATA_KEYS
    assert saelens_keys.CONFIG.check(dict.fromkeys(keys), "cfg.json") == []


@pytest.fixture(scope="module")
def centred_lm(tiny_tokenizer, tmp_path_factory) -> Path:
    """A GPT-2 whose residual stream has a mean over its entries, which differs from token to token."""
    folder, size = tmp_path_factory.mktemp("lm"), {"n_embd": D_IN, "n_layer": 3, "n_head": 4, "n_positions": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tiny_tokenizer), **size))
        with torch.no_grad():
            model.transformer.wte.weight.add_(0.2 * torch.randn(len(tiny_tokenizer), 1))
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_centred_activations_are_reconstructed_by_every_way_to_read_them(
    centred_lm, sample_text_files, tmp_path
) -> None:
    theirs = saelens(tmp_path / "theirs", **{"kwargs.center_writing_weights": True})
    for source, target, to in (("theirs", "ours", "selortho"), ("ours", "back", "saelens")):
        convert([str(tmp_path / source), str(tmp_path / target), "--to", to])
    written = json.loads((tmp_path / "back/cfg.json").read_text())["metadata"]
    assert written["model_from_pretrained_kwargs"] == _CENTRED
    reads = ["--model", str(centred_lm), "--lm_dtype", "float32", "--dataset", str(sample_text_files.csv), "--cpu"]
    reads += ["--held_out_fraction", "0.3", "--eval_samples", "8", "--eval_ce_samples", "4"]
    for name in ("theirs", "ours", "back"):
        evaluate([str(tmp_path / name), *reads, "--output", str(tmp_path / "m.json")])
        metrics = json.loads((tmp_path / "m.json").read_text())["evaluation"]
        assert metrics["fvu"] < 1e-6
        assert metrics["ce_reconstruction"] == pytest.approx(metrics["ce_clean"], abs=1e-5)
    sae = load_sae(theirs)
    x = torch.randn(50, D_IN) + 5 * torch.randn(50, 1)
    x_centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(sae.encode(x), sae.encode(x_centred), atol=1e-5, rtol=0)
    torch.testing.assert_close(sae.decode(sae.encode(x)), x_centred, atol=1e-5, rtol=0)
    torch.testing.assert_close(sae(x).reconstruction, x, atol=1e-5, rtol=0)


def test_transformer_lens_computes_the_centred_activations(centred_lm) -> None:
    lens = pytest.importorskip("transformer_lens")
    model = AutoModelForCausalLM.from_pretrained(centred_lm)
    ids = torch.arange(3, 40)[None]
    hidden = model(ids, output_hidden_states=True).hidden_states[2]
    config = lens.loading_from_pretrained.convert_gpt2_weights  # the library's own conversion and centring
    cfg = lens.HookedTransformerConfig(
        n_layers=3, d_model=D_IN, n_ctx=64, d_head=8, n_heads=4, d_vocab=model.config.vocab_size, act_fn="gelu_new",
        normalization_type="LN",
    )  # fmt: skip
    theirs = lens.HookedTransformer(cfg)
    theirs.load_and_process_state_dict(
        config(model, cfg), fold_ln=False, center_writing_weights=True, center_unembed=False, fold_value_biases=False
    )
    _, cache = theirs.run_with_cache(ids)
    expected = cache["blocks.1.hook_resid_post"]
    torch.testing.assert_close(hidden - hidden.mean(-1, keepdim=True), expected, atol=1e-4, rtol=1e-4)


def test_centred_activations_of_a_language_model_without_layer_norm_are_refused(tiny_lm, tmp_path) -> None:
    sae = load_sae(saelens(tmp_path / "sae", **{"kwargs.center_writing_weights": True}))
    with pytest.raises(SelOrthoError, match="has no LayerNorm"):
        FeatureCapture(sae, tiny_lm("llama"))
    assert FeatureCapture(sae, tiny_lm("gpt2")).capture(["the cat"])[0].feature_acts.shape[1] == 2 * D_IN


@pytest.mark.parametrize(
    ("write", "folder", "changes", "hook"),
    [
        (saelens, "sae", {"metadata.hook_name": (hook := "blocks.1.ln2.hook_normalized")}, hook),
        (saelens, "sae", {"metadata.hook_name": "blocks.1.attn.hook_q"}, "blocks.1.attn.hook_q"),
    ],
)
def test_a_hook_that_no_module_gives_is_not_read_at_a_layer(
    write, folder, changes, hook, tiny_lm_dir, tmp_path
) -> None:
    theirs = write(tmp_path / folder, **changes)
    for layer in ([], ["--layer", "1"]):
        with pytest.raises(SelOrthoError, match=f"this SAE reads {hook}, "):
            evaluate([str(theirs), "--model", str(tiny_lm_dir("gpt2")), "--dataset", "none.csv", "--cpu", *layer])


@pytest.mark.parametrize(
    ("content", "library"),
    [
        ({"architecture": "jump_relu", "hf_hook_point_in": "model.layers.5.output", "width": 48}, "Gemma Scope 2"),
        ({"trainer": {"dict_class": "AutoEncoderTopK"}, "buffer": {"ctx_len": 128}}, "dictionary_learning"),
        ({"hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "x", "act_fn": "jumprelu"}, "Llamascopium"),
        ({"d_in": 16, "d_sae": 48, "dataset_path": "x/y"}, "SAELens, .* with cfg.json and sae_weights.safetensors"),
        ({"sae": {"k": 4}, "batch_size": 32}, "sparsify, .* with cfg.json and sae.safetensors"),
        ({"anything": 1}, "model_type=None, expected 'selortho_sae': this is no SAE"),
    ],
)
def test_a_config_without_model_type_is_of_the_library_that_wrote_it(content, library, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "sae_weights.safetensors").touch()  # a name that several libraries use
    with pytest.raises(SelOrthoError, match=library) as caught:
        SelOrthoSAE.from_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(SelOrthoError, match="lacks|is damaged|of an SAE of sparsify"):
        load_sae(tmp_path)


def test_a_config_of_another_library_beside_a_format_that_is_read_changes_nothing(tmp_path) -> None:
    folder = saelens(tmp_path / "sae")
    (folder / "config.json").write_text(json.dumps({"d_in": D_IN, "d_sae": 7}))
    assert load_sae(folder).config.d_sae == 2 * D_IN
    write_saelens(load_sae(folder), tmp_path / "again")
    assert load_sae(tmp_path / "again").config.layer == 1
