"""Small deterministic trainings through `scripts/train.py`, and what they leave as numbers.

Nothing here imports the package: files may move and be renamed, command lines and file formats stay.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

TRAIN = Path(__file__).with_name("train_without_report.py")
STEPS = 20
D_SAE = 64
LAYER = 1
LOGGED_STEPS = (1, 10, 20)
LOGGED_FIGURES = ("loss", "fvu", "l0", "dead_features")
MOST_PAIRS = 50

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 6},
    "batchtopk": {"activation": "batchtopk", "k": 6},
    "matryoshka": {"activation": "batchtopk", "k": 6, "matryoshka_prefixes": [16, D_SAE]},
    "jumprelu": {"activation": "jumprelu", "jumprelu_threshold": 0.2, "l0_coefficient": 0.01},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {"penalty": "none"},
    "selective": {"penalty": "selective"},
    "decoder": {"penalty": "selective", "penalty_space": "decoder"},
    "exclusion": {"penalty": "selective", "penalty_space": "exclusion"},
    "full": {"penalty": "full"},
    "ortsae": {"penalty": "ortsae", "ortsae_chunk": 20},
}
TOPK = ACTIVATIONS["topk"]
OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "topk-carried": {**TOPK, "carry_decay": 0.5},
    "relu-carried": {"carry_decay": 0.8, "min_support": 1},
    "topk-pearson": {**TOPK, "correlation": "pearson"},
    "relu-pearson": {"correlation": "pearson"},
    "relu-pearson-full": {"correlation": "pearson", "penalty": "full"},
    "relu-sum": {"reduction": "sum", "ortho_coefficient": 0.01},
    "topk-alike": {**TOPK, "decoder_ratio": 0.5},
    "relu-nearest": {"decoder_ratio": 0.5, "decoder_pairs": "nearest", "ortsae_chunk": 20},
    "topk-every-step": {**TOPK, "penalty_schedule": "every_step"},
    "relu-every-step": {"penalty_schedule": "every_step", "decoder_ratio": 0.5},
    "relu-threshold": {"pair_fraction": 0.2, "correlation_threshold": 0.4},
    "topk-decoder-activation": {**TOPK, "penalty_space": "decoder", "selection_space": "activation"},
    "relu-activation-decoder": {"selection_space": "decoder"},
    "relu-each-step": {"selection_interval": 1},
    "topk-aux": {**TOPK, "k": 2, "aux_k": 3, "aux_coefficient": 0.5},
    "topk-no-aux": {**TOPK, "k": 2, "aux_k": 0},
    "relu-raw": {"input_normalization": "none", "min_support": 9},
    "relu-free": {"ortho_coefficient": 0.0},
}
VARIANTS = {f"{a}-{p}": {**x, **y} for a, x in ACTIVATIONS.items() for p, y in PENALTIES.items()} | OTHER_SETTINGS

SETTINGS: dict[str, Any] = {
    "lm_dtype": "float32", "layer": LAYER, "text_column": "text", "context_length": 32, "max_steps": STEPS,
    "batch_size": 128, "buffer_contexts": 32, "refresh_every": 4, "learning_rate": 3e-3, "logging_steps": 1,
    "eval_samples": 0, "d_sae": D_SAE, "pair_fraction": 0.02, "selection_interval": 4, "ortho_coefficient": 0.3,
    "dead_after_tokens": 128, "cpu": True, "cpu_threads": 1,
}  # fmt: skip
SEVERAL = {"variants": VARIANTS}
RESAMPLED = {"resample_every": 6, "l1_coefficient": 3.0, "learning_rate": 0.05}
ACCUMULATED = {
    "gradient_accumulation_steps": 2, "max_grad_norm": 0.2, "warmup_steps": 4, "decay_steps": 0.3,
    "ortho_budget": "gradient", "ortho_budget_value": 0.05, "variants": {"topk": TOPK},
}  # fmt: skip
RUNS = {"several": SEVERAL, "resampled": RESAMPLED, "accumulated": ACCUMULATED}
OF_TWO_PROCESSES = ("topk-carried", "relu-pearson", "topk-alike", "topk-every-step", "topk-aux")
TWO_PROCESSES = {
    "variants": {n: v for n, v in VARIANTS.items() if n not in OTHER_SETTINGS or n in OF_TWO_PROCESSES}
}  # fmt: skip


def write_inputs(folder: Path) -> dict[str, Any]:
    """Write a language model, 16 wide, and a text; returns the arguments that name them.

    The weights come from a generator of numpy whose numbers never change.
    """
    words = [f"word{number}" for number in range(120)]
    config = Gemma3TextConfig(
        vocab_size=len(words) + 4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model, numbers = Gemma3ForCausalLM(config), numpy.random.RandomState(0)
    with torch.no_grad():
        for _, weights in sorted(model.named_parameters()):
            weights.copy_(torch.from_numpy(0.3 * numbers.standard_normal(tuple(weights.shape))).float())
    model.save_pretrained(folder / "lm")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "lm")
    order = random.Random(0)
    texts = [
        " ".join(words[int(len(words) * order.random() ** 2)] for _ in range(12 + int(20 * order.random())))
        for _ in range(160)
    ]
    text = folder / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts), encoding="utf-8")
    return {"model": folder / "lm", "dataset": text}


def command_line(output: Path, *settings: dict[str, Any]) -> list[str]:
    """Arguments of `scripts/train.py`; later settings replace earlier ones."""
    merged = {**SETTINGS, "output_dir": output}
    for part in settings:
        merged.update(part)
    if "variants" in merged:
        file = output.with_name(f"{output.name}-variants.json")
        file.write_text(json.dumps(merged["variants"]), encoding="utf-8")
        merged["variants"] = file
    return [
        word
        for name, value in merged.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def train_in_processes(checkout: Path, arguments: list[str], processes: int) -> None:
    """Run `scripts/train.py` of a checkout in processes of its own; what it said is in the error if it failed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "PYTEST_"))}
    own = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(TRAIN), *arguments],
        **{"cwd": checkout, "env": {**kept, **own}, "capture_output": True, "text": True, "timeout": 600},
    )
    if done.returncode != 0:
        raise RuntimeError(f"scripts/train.py ended with {done.returncode}:\n{done.stderr[-4000:]}")


def read_numbers(output: Path) -> dict[str, Any]:
    """Figures of some steps, norms of the weights and last pairs of every SAE of a run by its variant.

    "base" is the SAE with the settings of the command line.
    """
    several = sorted(path.parent for path in output.glob("layer_*/model.safetensors"))
    base = f"layer_{LAYER}"
    folders = {path.name.removeprefix(f"{base}_").replace(base, "base"): path for path in several} or {"base": output}
    return {name: _numbers(folder) for name, folder in folders.items()}


def _numbers(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row for row in rows}
    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if tensor.numel()}
    numbers: dict[str, Any] = {
        "steps": {str(step): {name: _short(by_step[step][name]) for name in LOGGED_FIGURES} for step in LOGGED_STEPS},
        "weights": {name: _norm_and_projection(tensor) for name, tensor in sorted(weights.items())},
    }
    snapshots = sorted((folder / "pair_history").glob("step_*.safetensors"))
    if snapshots:
        pairs = load_file(snapshots[-1])
        numbers["pairs"] = {
            "step": int(snapshots[-1].stem.removeprefix("step_")),
            "count": len(pairs["i"]),
            "i": pairs["i"][:MOST_PAIRS].tolist(),
            "j": pairs["j"][:MOST_PAIRS].tolist(),
        }
    return numbers


def _norm_and_projection(tensor: torch.Tensor) -> list[float]:
    """The norm, which W_dec always has, and the product with a fixed wave."""
    flat = tensor.double().flatten()
    return [_short(float(flat.norm())), _short(float(flat @ torch.arange(len(flat)).double().cos()))]


def _short(value: float) -> float:
    return float(f"{value:.7g}")
