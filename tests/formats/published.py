"""Tiny SAEs in every format, each written as its library writes it, with what it computes in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F = 8, 24
# Feature activations and reconstruction of activations (tokens, D).
Formula = Callable[[Tensor], tuple[Tensor, Tensor]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights() -> dict[str, Tensor]:
    """Random ones, whose decoder rows have unequal norms."""
    return {
        "W_enc": draw(D, F, seed=1),
        "W_dec": draw(F, D, seed=2),
        "b_enc": draw(F, seed=3),
        "b_dec": draw(D, seed=4),
    }


THRESHOLD = draw(F, seed=5)  # negative ones, too


def relu(z: Tensor) -> Tensor:
    return z.clamp(min=0)


def jump(threshold: Tensor | float) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.where((z > threshold) & (z > 0), z, 0)


def top(k: int) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.zeros_like(z).scatter(1, z.topk(k).indices, relu(z.topk(k).values))


def formula(
    act: Callable[[Tensor], Tensor] = relu, subtracts: bool = False, norms: bool = False, s: float = 1.0, **more: Tensor
) -> Formula:
    """z = (s x - [b_dec]) W_enc + b_enc, times the norms of the rows; y = (h W_dec + b_dec) / s [+ x W_skip]."""
    w = {name: tensor.double() for name, tensor in {**weights(), **more}.items()}
    n = w["W_dec"].norm(dim=1) if norms else torch.ones(F).double()

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.double()
        h = act(((s * x - w["b_dec"] * subtracts) @ w["W_enc"] + w["b_enc"]) * n)
        return h, ((h / n) @ w["W_dec"] + w["b_dec"]) / s + (x @ w["W_skip"] if "W_skip" in w else 0)

    return compute


def _safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _torch(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def linear(encoder: str = "encoder", decoder: str = "decoder", bias: str = "decoder.bias") -> dict[str, Tensor]:
    w = weights()
    tensors = {f"{encoder}.weight": w["W_enc"].T.contiguous(), f"{encoder}.bias": w["b_enc"]}
    return tensors | {f"{decoder}.weight": w["W_dec"].T.contiguous(), bias: w["b_dec"]}


def gemma_scope(root: Path, repository: str = "gemma-scope-2b-pt-att") -> tuple[Path, Formula]:
    folder = root / repository / "layer_3/width_16k/average_l0_9"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", threshold=THRESHOLD.numpy(), **{key: t.numpy() for key, t in weights().items()})
    return folder, formula(jump(THRESHOLD))


def gemma_scope_embedding(root: Path) -> tuple[Path, Formula]:
    folder = root / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_9"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", threshold=THRESHOLD.numpy(), **{key: t.numpy() for key, t in weights().items()})
    return folder, formula(jump(THRESHOLD), s=D**-0.5)


def gemma_scope_2(root: Path, site: str = "attn_out", config: bool = True, skip: bool = False) -> tuple[Path, Formula]:
    folder = root / f"gemma-scope-2-270m-pt/{site}/layer_3_width_16k_l0_small{'_affine' * skip}"
    tensors = {key.lower(): tensor for key, tensor in weights().items()} | {"threshold": THRESHOLD}
    more = {"W_skip": draw(D, D, seed=6)} if skip else {}
    _safetensors(folder / "params.safetensors", tensors | ({"affine_skip_connection": more["W_skip"]} if skip else {}))
    hooks = {"attn_out": ["self_attn.o_proj.input"] * 2, "transcoder": ["pre_feedforward_layernorm.output"]}
    hooks["transcoder"] += ["post_feedforward_layernorm.output"]
    hooks |= {"resid_post": ["output"] * 2, "mlp_out": ["post_feedforward_layernorm.output"] * 2}
    if config:
        content = {"hf_hook_point_in": f"model.layers.3.{hooks[site][0]}", "width": F, "l0": 10, "type": "sae"}
        content |= {"hf_hook_point_out": f"model.layers.3.{hooks[site][1]}", "architecture": "jump_relu"}
        _json(folder / "config.json", content | {"model_name": "gemma-v3-270m-pt", "affine_connection": skip})
    return folder, formula(jump(THRESHOLD), **more)


def dictionary_learning(root: Path, kind: str = "AutoEncoderTopK", norm: float | None = None) -> tuple[Path, Formula]:
    folder, w, k = root / "run/resid_post_layer_3/trainer_0", weights(), torch.tensor(5)
    square = {"W_enc": w["W_enc"], "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    gated = {key: tensor for key, tensor in linear(bias="decoder_bias").items() if key != "encoder.bias"}
    gates = {"r_mag": draw(F, seed=7), "gate_bias": draw(F, seed=8), "mag_bias": draw(F, seed=9)}
    one = torch.tensor(0.2)
    tensors, computes = {
        "AutoEncoder": (linear(bias="bias"), formula(subtracts=True, norms=True)),
        "AutoEncoderNew": (linear(), formula()),
        "AutoEncoderTopK": (linear(bias="b_dec") | {"k": k, "threshold": -one}, formula(top(5), subtracts=True)),
        "BatchTopKSAE": (linear(bias="b_dec") | {"k": k, "threshold": one}, formula(jump(0.2), subtracts=True)),
        "MatryoshkaBatchTopKSAE": (
            square | {"k": k, "threshold": -one, "group_sizes": torch.tensor([8, 16])},
            formula(subtracts=True),
        ),
        "JumpReluAutoEncoder": (square | {"threshold": THRESHOLD}, formula(jump(THRESHOLD))),
        "GatedAutoEncoder": (gated | gates, _gated(*gates.values())),
    }[kind]
    content: Any = tensors
    if norm is not None:  # a backup made in training
        content = {"step": 7, "ae": tensors, "optimizer": {}, "config": {}, "norm_factor": torch.tensor(norm)}
        inner, computes = computes, lambda x: tuple(norm * part for part in inner(x.double() / norm))
    _torch(folder / "ae.pt", content)
    trainer = {"dict_class": kind, "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped", "k": 5}
    trainer |= {"submodule_name": "resid_post_layer_3", "activation_dim": D, "dict_size": F}
    _json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out", "d_submodule": D}})
    return folder, computes


def _gated(r_mag: Tensor, b_gate: Tensor, b_mag: Tensor, subtracts: bool = True) -> Formula:
    w = {name: tensor.double() for name, tensor in weights().items()}

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = (x.double() - w["b_dec"] * subtracts) @ w["W_enc"]
        h = (pre + b_gate > 0) * relu(pre * r_mag.double().exp() + b_mag)
        return h, h @ w["W_dec"] + w["b_dec"]

    return compute


def qwen_scope(root: Path) -> tuple[Path, Formula]:
    w, folder = weights(), root / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    stored = {key: tensor.T.contiguous() if key[0] == "W" else tensor for key, tensor in w.items()}
    for layer in (3, 4):
        _torch(folder / f"layer{layer}.sae.pt", {key: tensor.bfloat16().float() for key, tensor in stored.items()})
    rounded = {key: tensor.bfloat16().float() for key, tensor in w.items()}
    return folder / "layer3.sae.pt", formula(top(5), **rounded)


def saelens(root: Path, kind: str = "gated", normalize: str = "none", **settings: Any) -> tuple[Path, Formula]:
    name = "gemma_2b_blocks.12.hook_resid_post_16384"
    folder = root / ("jbloom/Gemma-2b-Residual-Stream-SAEs" if normalize != "none" else "lens")
    w, one = weights(), torch.tensor(0.2, dtype=torch.float64)
    gates = {"r_mag": draw(F, seed=7), "b_gate": draw(F, seed=8), "b_mag": draw(F, seed=9)}
    factor, skip = draw(F, seed=10).abs() + 0.5, draw(D, D, seed=6)
    s, reads_lm = 0.21381938399317255 if normalize != "none" else 1.0, {"hook_name": "blocks.3.hook_mlp_out"}
    writes = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    tensors, computes, metadata = {
        "standard": (w, formula(subtracts=True, s=s), reads_lm),
        "scaled": (w | {"scaling_factor": factor}, _scaled(factor), reads_lm),
        "jumprelu": (
            w | {"log_threshold": THRESHOLD},
            formula(jump(THRESHOLD.double().exp()), subtracts=True),
            reads_lm,
        ),
        "gated": ({**{k: t for k, t in w.items() if k != "b_enc"}, **gates}, _gated(**gates), reads_lm),
        "abstopk": (w, None, reads_lm),
        "batchtopk": (w | {"topk_threshold": one}, formula(jump(0.2), subtracts=True, norms=True), reads_lm),
        "transcoder": (w, formula(), writes),
        "jumprelu_skip_transcoder": (
            w | {"W_skip": skip.T, "threshold": THRESHOLD},
            formula(jump(THRESHOLD), W_skip=skip),
            writes,
        ),
    }[kind]
    folder = folder / name if normalize != "none" else folder
    _safetensors(folder / "sae_weights.safetensors", tensors)
    config = {"architecture": "standard" if kind == "scaled" else kind, "d_in": D, "d_sae": F, "dtype": "float32"}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": normalize, "reshape_activations": "none"}
    config |= {"k": 5} if kind in ("abstopk", "batchtopk") else {}
    config |= {"rescale_acts_by_decoder_norm": True} if kind == "batchtopk" else {}
    config |= {"finetuning_scaling_factor": True} if kind == "scaled" else {}
    config |= {"d_out": D} if "transcoder" in kind else {}
    _json(folder / "cfg.json", config | {"metadata": {"model_name": "gpt2-small", **metadata}} | settings)
    return folder, computes or _signed


def _scaled(factor: Tensor) -> Formula:
    inner, w = formula(subtracts=True), weights()

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        h = inner(x)[0]
        return h, (h * factor) @ w["W_dec"].double() + w["b_dec"]

    return compute


def _signed(x: Tensor) -> tuple[Tensor, Tensor]:
    """The five largest by absolute value, as twice as many features of one sign."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    z = (x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    h = torch.zeros_like(z).scatter(1, (largest := z.abs().topk(5).indices), z.gather(1, largest))
    return torch.cat([relu(h), relu(-h)], 1), h @ w["W_dec"] + w["b_dec"]


def circuit_tracer(root: Path, threshold: bool = True, skip: bool = True) -> tuple[Path, Formula]:
    folder, w, more = root / "transcoders", weights(), {"W_skip": draw(D, D, seed=6)} if skip else {}
    tensors = w | {"W_enc": w["W_enc"].T} | {key: tensor.T for key, tensor in more.items()}
    for layer in (3, 4):
        jumps = {"activation_function.threshold": THRESHOLD} if threshold else {}
        _safetensors(folder / f"layer_{layer}.safetensors", tensors | jumps)
    (folder / "config.yaml").write_text(
        'model_name: "google/gemma-2-2b"\nmodel_kind: transcoder_set\nscan: x/y\n'
        "feature_input_hook: mlp.hook_in  # with the gain\nfeature_output_hook: 'hook_mlp_out'\n"
    )
    return folder / "layer_3.safetensors", formula(jump(THRESHOLD) if threshold else relu, **more)


def cross_layer(root: Path) -> tuple[Path, Formula]:
    folder, w, decoder = root / "clt", weights(), draw(F, 3, D, seed=11)
    tensors = {"W_enc_3": w["W_enc"].T, "b_enc_3": w["b_enc"], "b_dec_3": w["b_dec"], "threshold_3": THRESHOLD}
    _safetensors(folder / "W_enc_3.safetensors", tensors)
    _safetensors(folder / "W_dec_3.safetensors", {"W_dec_3": decoder})
    (folder / "config.yaml").write_text("feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n")
    return folder, formula(jump(THRESHOLD), W_dec=decoder.sum(1))


def llama_scope(root: Path, kind: str = "R", norms: tuple[float, float] = (6.25, 6.25)) -> tuple[Path, Formula]:
    """As lm-saes computes it: both norms are folded in, then the decoder rows; the threshold is of the result."""
    folder, w = root / f"Llama3_1-8B-Base-L3{kind}-8x", {key: tensor.double() for key, tensor in weights().items()}
    _safetensors(folder / "checkpoints/final.safetensors", linear())
    hooks = {"R": ["hook_resid_post"] * 2, "TC": ["ln2.hook_normalized", "hook_mlp_out"]}[kind]
    config = {"d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.4, "top_k": 50}
    config |= {"hook_point_in": f"blocks.3.{hooks[0]}", "hook_point_out": f"blocks.3.{hooks[1]}"}
    config |= {
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": dict(zip(("in", "out"), norms, strict=True)),
    }
    config |= {"sparsity_include_decoder_norm": True, "use_decoder_bias": True, "use_glu_encoder": False}
    _json(folder / "hyperparams.json", config | {"apply_decoder_bias_to_pre_encoder": False})
    s, t = (math.sqrt(D) / norm for norm in norms)
    n = (w["W_dec"] * s / t).norm(dim=1)

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        h = jump(0.4)((x.double() @ w["W_enc"] + w["b_enc"] / s) * n)
        return h, (h / n) @ (w["W_dec"] * s / t) + w["b_dec"] / t

    return folder, compute


def llamascopium(root: Path, act: str = "jumprelu", names: str = "linear", pt: bool = False) -> tuple[Path, Formula]:
    """As Llamascopium computes it: activations are scaled, and the gate is on z times the norms of the decoder rows."""
    folder, w, hook = root / "Llama-Scope-R1-Distill/L3R", weights(), "blocks.3.hook_resid_post"
    lens = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    tensors = linear() if names == "linear" else lens
    prefix = "activation_function." if names == "lens" else ""
    tensors |= {f"{prefix}log_jumprelu_threshold": THRESHOLD} if act == "jumprelu" else {}
    tensors |= {f"dataset_average_activation_norm.{hook}": torch.tensor(4.0)}
    if pt:
        _torch(folder / "sae_weights.pt", {"sae": tensors})
    else:
        _safetensors(folder / "sae_weights.safetensors", tensors)
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": F // D, "act_fn": act, "top_k": 5}
    config |= {"hook_point_in": hook, "hook_point_out": hook, "norm_activation": "dataset-wise"}
    _json(folder / "config.json", config | {"sparsity_include_decoder_norm": True})
    function = {"relu": relu, "jumprelu": jump(THRESHOLD.double().exp()), "topk": top(5)}[act]
    return folder, formula(function, norms=act != "relu", s=math.sqrt(D) / 4)


def sparsify(root: Path, **settings: Any) -> tuple[Path, Formula]:
    transcode = settings.get("transcode", False)
    folder, w, skip = root / "sae/layers.3.mlp/seed1", weights(), {"W_skip": draw(D, D, seed=6)}
    skip = skip if settings.get("skip_connection") else {}
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    _safetensors(folder / "sae.safetensors", tensors | {key: tensor.T for key, tensor in skip.items()})
    _json(folder / "cfg.json", {"d_in": D, "num_latents": F, "k": 5, "activation": "topk", **settings})
    return folder, _signed if settings.get("signed") else formula(top(5), subtracts=not transcode, **skip)


def hook_z(root: Path) -> tuple[Path, Formula]:
    _torch(root / "z/gpt2_L3_Hcat.pt", weights())
    _json(root / "z/gpt2_L3_Hcat_cfg.json", {"act_size": D, "dict_size": F, "act_name": "blocks.3.attn.hook_z"})
    return root / "z", formula(subtracts=True)


def goodfire(root: Path) -> tuple[Path, Formula]:
    folder = root / "Llama-3.1-8B-Instruct-SAE-l3"
    _torch(
        folder / "Llama-3.1-8B-Instruct-SAE-l3.pth", linear("encoder_linear", "decoder_linear", "decoder_linear.bias")
    )
    return folder, formula()


def qresearch(root: Path) -> tuple[Path, Formula]:
    folder = root / "DeepSeek-R1-Distill-Llama-8B-SAE-l3"
    _torch(folder / "sae.pt", linear())
    return folder, formula()


def openai(root: Path) -> tuple[Path, Formula]:
    folder, content = root / "gpt2-small/resid_post_attn/autoencoders", linear(bias="pre_bias")
    content["latent_bias"] = content.pop("encoder.bias")
    statistics = {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_mean_square": draw(F)}
    statistics |= {"latents_activation_frequency": torch.zeros(F, dtype=torch.long)}
    _torch(folder / "3.pt", content | statistics | {"activation": "ReLU", "activation_state_dict": {}})
    return folder, formula(subtracts=True)
