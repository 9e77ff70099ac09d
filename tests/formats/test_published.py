"""What others have published is told by its files, and computes what its formula says."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_selortho
from hf_selortho import SelOrthoError
from hf_selortho.commands.info import main as info
from hf_selortho.formats.load import describe_sae
from hf_selortho.formats.registry import registry
from tests.formats import published as p

_LEARNING = (
    "AutoEncoder AutoEncoderNew AutoEncoderTopK BatchTopKSAE MatryoshkaBatchTopKSAE JumpReluAutoEncoder "
    "GatedAutoEncoder"
).split()
_KINDS = ("standard", "scaled", "jumprelu", "gated", "abstopk", "batchtopk")
_Z = "model.layers.3.self_attn.o_proj"
_MLP = {"layer": 3, "site": "mlp_in", "target": "mlp_out"}
# Writer, format, and what is known of site and language model.
CASES = {
    "gemma_scope": (p.gemma_scope, "gemma_scope", {"layer": 3, "site": "attn_z", "hook_name": _Z}),
    "gemma_scope_embedding": (p.gemma_scope_embedding, "gemma_scope", {"hook_name": "model.embed_tokens"}),
    "gemma_scope_2": (p.gemma_scope_2, "gemma_scope_2", {"site": "attn_z", "lm_name": "google/gemma-3-270m"}),
    "gemma_scope_2 by its path": (partial(p.gemma_scope_2, config=False), "gemma_scope_2", {"hook_side": "input"}),
    **{f"dictionary_learning {kind}": (partial(p.dictionary_learning, kind=kind), "dictionary_learning",
        {"layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped"}) for kind in _LEARNING},
    "backup": (partial(p.dictionary_learning, kind="BatchTopKSAE", norm=3.5), "dictionary_learning", {}),
    "backup of topk": (partial(p.dictionary_learning, norm=3.5), "dictionary_learning", {}),
    "qwen_scope": (p.qwen_scope, "qwen_scope", {"layer": 3, "lm_name": "Qwen/Qwen3-1.7B-Base", "k": 5}),
    **{f"saelens {kind}": (partial(p.saelens, kind=kind), "saelens", {"site": "mlp_out", "layer": 3})
        for kind in _KINDS},
    "saelens with a factor": (partial(p.saelens, kind="standard", normalize="expected_average_only_in"),
        "saelens", {}),
    "llama_scope": (p.llama_scope, "llama_scope", {"layer": 3, "lm_name": "meta-llama/Llama-3.1-8B"}),
    "llamascopium": (p.llamascopium, "llamascopium", {"lm_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"}),
    "llamascopium 2": (partial(p.llamascopium, act="topk", names="lens", pt=True), "llamascopium", {"layer": 3}),
    "llamascopium relu": (partial(p.llamascopium, act="relu", names="lens"), "llamascopium", {}),
    "gemma_scope transcoder": (partial(p.gemma_scope, repository="gemma-scope-2b-pt-transcoders"), "gemma_scope",
        {"hook_name": "blocks.3.ln2.hook_normalized", "target": "mlp_out", "layer": None}),
    "gemma_scope_2 transcoder": (partial(p.gemma_scope_2, site="transcoder"), "gemma_scope_2", _MLP),
    "gemma_scope_2 affine": (partial(p.gemma_scope_2, site="transcoder", skip=True), "gemma_scope_2", _MLP),
    "saelens transcoder": (partial(p.saelens, kind="transcoder"), "saelens", _MLP),
    "saelens skip": (partial(p.saelens, kind="jumprelu_skip_transcoder"), "saelens", _MLP | {"skip": True}),
    "circuit_tracer": (p.circuit_tracer, "circuit_tracer_layer", _MLP | {"lm_name": "google/gemma-2-2b"}),
    "circuit_tracer relu": (partial(p.circuit_tracer, threshold=False, skip=False), "circuit_tracer_layer", _MLP),
    "llama_scope transcoder": (partial(p.llama_scope, kind="TC", norms=(7.0, 3.4)), "llama_scope",
        {"hook_name": "blocks.3.ln2.hook_normalized", "target": "mlp_out", "layer": None}),
    "sparsify transcoder": (partial(p.sparsify, transcode=True, skip_connection=True), "sparsify",
        {"site": "layers.3.mlp:input", "target": "layers.3.mlp:output", "hook_side": "input"}),
    "sparsify": (p.sparsify, "sparsify", {"layer": 3, "site": "layers.3.mlp:output"}),
    "sparsify signed": (partial(p.sparsify, signed=True), "sparsify", {"hook_name": "layers.3.mlp"}),
    "hook_z": (p.hook_z, "hook_z", {"layer": 3, "site": "attn_z"}),
    "goodfire": (p.goodfire, "goodfire", {"layer": 3, "lm_name": "meta-llama/Llama-3.1-8B-Instruct"}),
    "qresearch": (p.qresearch, "qresearch", {"layer": 3, "lm_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"}),
    "openai": (p.openai, "openai", {"layer": 3, "site": "resid_mid", "lm_name": "openai-community/gpt2"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_format_is_known_by_its_files_and_computes_its_formula(case, tmp_path, monkeypatch) -> None:
    write, format, facts = CASES[case]
    monkeypatch.chdir(tmp_path)  # names of repositories are those of folders here
    folder, formula = write(Path())
    name, lookup = (str(folder.parent), {"subfolder": folder.name}) if "jbloom" in str(folder) else (str(folder), {})
    assert describe_sae(name, "auto", lookup)[0] == format
    sae = hf_selortho.load(name, **lookup)
    config = sae.config
    assert {key: getattr(config, key) for key in facts} == facts
    x = 2 * torch.randn(200, p.D, generator=torch.Generator().manual_seed(0))
    h, y = formula(x)
    assert 0 < (h > 0).double().mean() < 1
    torch.testing.assert_close(sae.encode(x).double(), h, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x).double(), y, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_not_exact_is_read_on_request_and_says_what_is_lost(tmp_path, caplog) -> None:
    folder, formula = p.cross_layer(tmp_path)
    with pytest.raises(SelOrthoError, match="writes to several layers: with --approximate .* encode is exact"):
        hf_selortho.load(folder)
    sae, x = hf_selortho.load(folder, approximate=True), torch.randn(50, p.D)
    assert "is not read exactly: what it writes to later layers" in caplog.text and sae.config.target == "mlp_out"
    h, y = formula(x)
    torch.testing.assert_close(sae.encode(x).double(), h, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x).double(), y, atol=2e-5, rtol=1e-5)
    lens, _ = p.saelens(tmp_path, "standard", "expected_average_only_in")
    with pytest.raises(SelOrthoError, match="a factor that is not among the weights, and known of few repositories"):
        hf_selortho.load(lens)
    assert hf_selortho.load(lens, approximate=True).config.d_in == p.D


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file, of an object in it where the key has a dot."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            *outer, inner = key.split("__")
            (content[outer[0]] if outer else content)[inner] = value
        (folder / name).write_text(json.dumps(content))

    return change


def torch_file(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / name)


def arrays(**changes: np.ndarray) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with np.load(folder / "params.npz") as whole:
            np.savez(folder / "params.npz", **{**whole, **changes})

    return change


def renamed(root: Path) -> Path:
    p.qwen_scope(root)[0].parent.rename(root / "mine")
    return root / "mine/layer3.sae.pt"


def several(root: Path) -> Path:
    return p.qwen_scope(root)[0].parent


def of_two(root: Path) -> Path:
    folder, other = p.gemma_scope_2(root)[0], p.sparsify(root)[0]
    shutil.copytree(other, folder, dirs_exist_ok=True)
    return folder


def without_hooks(root: Path) -> Path:
    file = p.circuit_tracer(root)[0]
    (file.parent / "config.yaml").unlink()
    return file


def version_5(folder: Path) -> None:
    torch.save(torch.load(folder / "3.pt", weights_only=True) | {"activation": "TopK"}, folder / "3.pt")


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


_HUGE = torch.zeros(1).expand(1 << 20, 1 << 20)
_LEARNING_1 = partial(p.dictionary_learning, kind="AutoEncoder")
# Writer, what is changed in its folder, and what is said.
REFUSALS = {
    "code": (p.qresearch, torch_file("sae.pt", {"encoder.weight": Code()}), r"would run code .*(posix|nt)\.system"),
    "a module": (p.qresearch, torch_file("sae.pt", torch.nn.Linear(2, 2)), r"would run code .*Linear"),
    "no dict": (p.qresearch, torch_file("sae.pt", [torch.zeros(3)]), "holds no dict of tensors"),
    "more than there is": (p.qresearch, torch_file("sae.pt", {"encoder.weight": _HUGE}), "claims more numbers"),
    "no zip": (p.hook_z, lambda folder: (folder / "gpt2_L3_Hcat.pt").write_bytes(b"PK"), "is damaged"),
    "other pickles": (p.qresearch, lambda folder: (folder / "sae.pt").rename(folder / "sae.bin"), "can run code"),
    "two formats": (of_two, None, "the files of sparsify and Gemma Scope 2: say which with format, sparsify or gemma_"),
    "several files": (several, None, r"holds 2 files of weights \(layer3.sae.pt, layer4.sae.pt\): name one, such as"),
    "no k": (renamed, None, "holds SAEs of Qwen Scope, but its path does not say k"),
    "no hooks": (without_hooks, None, "does not say what its transcoders read: expected a config.yaml"),
    "dict_class": (_LEARNING_1, edit("config.json", trainer__dict_class="CrossCoder"), "dict_class='CrossCoder'"),
    "no config": (_LEARNING_1, lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
    "glu": (p.llamascopium, edit("config.json", use_glu_encoder=True), "the encoder is a product of two"),
    "token-wise": (p.llamascopium, edit("config.json", norm_activation="token-wise"), "normalised by its own norm"),
    "crosscoder": (p.llamascopium, edit("config.json", sae_type="crosscoder"), "another kind of dictionary"),
    "batchtopk": (p.llamascopium, edit("config.json", act_fn="batchtopk"), "keeps the largest of a batch"),
    "no norm": (p.llama_scope, edit("hyperparams.json", dataset_average_activation_norm=None), "mean norms None"),
    "layer norm": (p.openai, version_5, "each token is normalised by its own mean and norm"),
    "temporal": (p.saelens, edit("cfg.json", architecture="temporal"), "depend on those of the tokens before it"),
    "matching pursuit": (p.saelens, edit("cfg.json", architecture="matching_pursuit"), "one after the other"),
    "width": (p.gemma_scope, arrays(b_dec=np.zeros(p.D + 1, np.float32)), "b_dec has the shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_read_is_refused_by_its_name_and_nothing_is_run(case, tmp_path, monkeypatch) -> None:
    write, change, message = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    found = write(tmp_path)
    folder = found if isinstance(found, Path) else found[0]
    if change is not None:
        change(folder)
    with pytest.raises(SelOrthoError, match=message) as caught:
        hf_selortho.load(folder)
    assert "\n" not in str(caught.value) and not Path("was_run").exists()


def test_a_file_is_named_as_the_rest_of_its_place(tmp_path) -> None:
    file, _ = p.qwen_scope(tmp_path)
    for name, lookup in ((file, {}), (tmp_path, {"subfolder": f"{file.parent.name}/{file.name}"})):
        assert hf_selortho.load(name, **lookup).config.layer == 3


def test_info_says_what_is_known_and_what_is_not_and_reads_no_weights(tmp_path, capsys, monkeypatch) -> None:
    folder, _ = p.gemma_scope_2(tmp_path, "transcoder", skip=True)
    monkeypatch.setattr("hf_selortho.formats.tensor_files.TensorFile.read", None)
    info([str(folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    expected = {"format": "Gemma Scope 2", "kind": "transcoder", "lm_name": "google/gemma-3-270m", "layer": 3}
    expected |= {"site": "mlp_in", "target": "mlp_out", "activation": "jumprelu", "d_in": p.D, "d_sae": p.F, "l0": 10}
    expected |= {"dtype": "F32", "skip": True, "unknown": ["lm_revision", "context_length"]}
    assert {key: found.get(key) for key in expected} == expected
    info([str(p.llama_scope(tmp_path)[0])])
    said = capsys.readouterr().out
    assert re.search(r"folded: +the mean norms of the activations, the norms of the decoder rows\n", said)
    sae = hf_selortho.SelOrthoSAE(hf_selortho.SelOrthoConfig(d_in=4, d_sae=8, layer=1))
    for layer in (1, 2):
        sae.save_pretrained(tmp_path / f"run/layer_{layer}")
    info([str(tmp_path / "run/layer_1")])
    assert re.search(r"format: +hf_selortho\nkind: +SAE\nlayer: +1\n", capsys.readouterr().out)
    info([str(tmp_path / "run")])
    assert "layer_1, layer_2" in capsys.readouterr().out


def test_the_page_knows_the_config_of_an_sae_of_another_library_without_its_weights(tmp_path, monkeypatch) -> None:
    pytest.importorskip("gradio")
    from hf_selortho.browser.catalog import open_catalog

    for case in ("gemma_scope_2", "saelens abstopk", "saelens gated", "llamascopium", "saelens skip"):
        write = next(write for key, (write, *_) in CASES.items() if key.startswith(case))
        folder, _ = write(tmp_path / case.replace(" ", "_"))
        config = hf_selortho.load(folder, approximate=True).config
        with monkeypatch.context() as patched:
            patched.setattr("hf_selortho.formats.description.Description.plain", None)
            shown = open_catalog(str(folder), None)["main"].config
        assert shown.own_settings() == config.own_settings()


def test_the_facts_of_repositories_are_those_of_the_registry() -> None:
    directory = pytest.importorskip("sae_lens.loading.pretrained_saes_directory").get_pretrained_saes_directory()
    factors: dict[str, dict[str, float]] = {}
    for release in directory.values():
        if release.conversion_func is None and release.repo_id.lower() in registry():
            for name, factor in release.norm_scaling_factor.items():
                if factor is not None:
                    factors.setdefault(release.repo_id.lower(), {})[release.saes_map[name]] = factor
    assert factors == {name: facts["factors"] for name, facts in registry().items() if "factors" in facts}
