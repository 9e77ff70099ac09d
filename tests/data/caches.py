"""Small activation caches made by hand, for tests of what reads them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_manifest import FORMAT, FORMAT_VERSION, shard_path

D_IN = 4


def summary(layer: int, **changes: Any) -> dict[str, Any]:
    """Fifteen tokens of norms near 100, and five sinks near 1000."""
    histogram = [0] * 512
    histogram[266], histogram[319] = 15, 5  # bins from 2^(-10 + 266/16) = 99 and 2^(-10 + 319/16) = 981
    return {
        "hook_name": f"layers.{layer}", "hook_side": "output", "mean": [0.5] * D_IN, "scale": 2.0, "median_norm": 100.0, "max_norm": 400.0,
        "largest_norm": 1000.0, "norm_histogram": histogram,
        "sinks_by_position": [0, 3, 1, 0, 0, 0, 0, 0, 0, 0, 1], **changes,
    }  # fmt: skip


def content(**changes: Any) -> dict[str, Any]:
    """A manifest of layers 2 and 5 without shards."""
    counts = {
        "rows": 1990, "tokens": 2030, "contexts": 30, "dropped_special": 30, "dropped_sinks": 10, "documents": 20,
        "dropped_tails": 4,
    }  # fmt: skip
    return {
        "format": FORMAT, "version": FORMAT_VERSION,
        "lm_name": "google/gemma-2-2b", "lm_revision": "c" * 40, "lm_dtype": "bfloat16", "lm_batch_tokens": 1024,
        "lm_device": "cpu", "tokenizer_sha256": "0" * 64,
        "dataset": "fancyzhx/ag_news", "dataset_revision": "d" * 40, "dataset_config": None, "split": "train",
        "text_column": None, "separator": None, "encoding": None, "streaming": False, "held_out_fraction": 0.1,
        "chat_column": None, "chat_roles": None, "site": "resid_post", "target": None, "target_statistics": {},
        "text_fingerprint": None, "text_rows": 1000, "seed": 0, "context_length": 128, "prepend_bos": True, "min_tokens": 8,
        "layers": [2, 5], "stored_dtype": "float32", "max_norm_ratio": 4.0, "max_tokens": None,
        "held_out_contexts": 9, "shard_tokens": 100, "processes": 1, "counts": counts, "versions": {"python": "3"},
        "statistics": {"2": summary(2), "5": summary(5)}, "shards": [], "held_out": [], **changes,
    }  # fmt: skip


def write_cache(folder: Path, sizes: list[int], held_out: tuple[int, ...] = ()) -> ActivationCache:
    """Shards of these many rows; row n of all holds n in every component at layer 2, and -n at layer 5."""
    manifest = content()
    start = 0
    for key, part, rows_of in (("shards", "", sizes), ("held_out", "held_out/", held_out)):
        for number, rows in enumerate(rows_of):
            ids = torch.arange(start, start + rows)
            start += rows
            origins = {name: ids.int() for name in ("token_ids", "positions", "context_ids", "document_ids")}
            values = ids[:, None].float().expand(-1, D_IN).contiguous()
            files = {}
            named = {"tokens": origins, "layer_2": {"activations": values}, "layer_5": {"activations": -values}}
            for name, tensors in named.items():
                path, data = shard_path(part, name, number), save(tensors)
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)
                files[path] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            manifest[key].append({"number": number, "rows": rows, "files": files})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return ActivationCache(str(folder))
