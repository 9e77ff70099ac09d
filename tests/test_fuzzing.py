"""Whatever a file holds, it is read or refused in the words of the package: no other error, crash, hang or memory.

Real files of every kind that the package reads are mutated and read again in processes of their own. The random
numbers of an input come from its kind, the seed and its number alone; in an empty folder, input 1234 of seed 3 is read
again by `python .../tests/test_fuzzing.py 3 manifest:1234:1`.
"""

from __future__ import annotations

import copy
import faulthandler
import gzip
import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import logging as transformers_logging

import hf_selortho
from hf_selortho import ConfigError, SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.configuration_selortho import SITES
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_batches import CachedBatches
from hf_selortho.data.cache_manifest import HELD_OUT, TRAIN
from hf_selortho.data.cache_report import report_table
from hf_selortho.data.pair_history import PAIR_HISTORY, read_pair_history, snapshot_bytes, snapshot_name
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.index_writer import INDEX, IndexWriter
from hf_selortho.features.records import (
    BINS,
    FeatureContext,
    FeatureRecord,
    JointContext,
    Neighbour,
    PairRecord,
    TokenEffect,
)
from hf_selortho.hub.model_card import render_model_card
from scripts import cache_activations
from tests.formats import published
from tests.goldens.trainings import write_inputs

ROOT = Path(__file__).parents[1]
SECONDS, GIGABYTE = 5, 1 << 30  # that one input may take; that a process may take on top
# How many inputs of each kind the long test reads, more than 10,000 in all: more where one takes little time.
COUNTS = {
    "manifest": 2_900,
    "config": 2_300,
    "weights": 1_300,
    "index": 800,
    "shard": 800,
    "pairs": 400,
    "feature_index": 900,
    "card": 250,
    "published": 1_600,
    "parquet": 500,
    "text": 350,
}


# ---------------------------------------------------------------------------------------------------- properties

_OWN = {f.name: f for f in SelOrthoConfig.own_fields()}
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, 10**400, -(10**30)])
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["topk", "batchtopk", "full", "same", "float32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_SHARE = st.floats(0, 1, exclude_max=True)
_WEIGHT = st.floats(0, 1e300)
_COUNT = st.integers(1, 2**63 - 1)
_TEXT = st.none() | st.text(max_size=12)


@st.composite
def allowed_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Any combination of own settings that is allowed."""
    found: dict[str, Any] = {"d_in": draw(_COUNT), "d_sae": draw(_COUNT)}
    found["activation"] = draw(st.sampled_from(["relu", "topk", "batchtopk", "jumprelu"]))
    if "topk" in found["activation"]:
        found["k"] = draw(st.integers(1, found["d_sae"]))
    if found["activation"] == "batchtopk" and draw(st.booleans()):
        inner = draw(st.sets(st.integers(1, found["d_sae"]), max_size=4))
        found["matryoshka_prefixes"] = sorted(inner | {found["d_sae"]})
    choices = {
        "penalty": ["selective", "full", "ortsae", "none"],
        "penalty_space": ["activation", "decoder", "redundancy", "exclusion"],
        "selection_space": ["same", "activation", "decoder", "redundancy"],
        "decoder_pairs": ["alike", "nearest"],
        "correlation": ["cosine", "pearson"],
        "reduction": ["mean", "sum"],
        "penalty_schedule": ["on_selection", "every_step"],
        "input_normalization": ["standard", "none"],
        "prepend_bos": [True, False],
        "centered": [True, False],
    }
    found |= {name: draw(st.sampled_from(values)) for name, values in choices.items()}
    selects_by = found["penalty_space"] if found["selection_space"] == "same" else found["selection_space"]
    if found["correlation"] == "cosine" and selects_by == "activation":
        found["carry_decay"] = draw(_SHARE)
    for name in ("l1_coefficient", "l0_coefficient", "aux_coefficient", "ortho_coefficient"):
        found[name] = draw(_WEIGHT | st.integers(0, 1000))
    for name in ("jumprelu_bandwidth", "jumprelu_threshold"):
        found[name] = draw(st.floats(1e-300, 1e300))
    found["pair_fraction"] = draw(st.floats(0, 1, exclude_min=True))
    found["decoder_ratio"] = draw(_WEIGHT)
    found["correlation_threshold"] = draw(_SHARE)
    for name in ("min_support", "selection_interval"):
        found[name] = draw(_COUNT)
    for name in ("aux_k", "layer"):
        found[name] = draw(st.none() | st.integers(0, 2**63 - 1))
    found["min_tokens"] = draw(st.none() | _COUNT)
    for name in ("context_length", "ortsae_chunk"):
        found[name] = draw(st.integers(2, 2**63 - 1))
    found["max_norm_ratio"] = draw(st.none() | st.floats(1, 1e300, exclude_min=True))
    found["max_norm"] = draw(st.none() | st.floats(0, 1e300, exclude_min=True))
    found["held_out_fraction"] = draw(st.none() | _SHARE)
    for name in ("lm_name", "lm_revision", "hook_name", "dataset", "dataset_revision", "dataset_config"):
        found[name] = draw(_TEXT)
    sites = draw(st.lists(st.sampled_from([*SITES, "model.layers.3.mlp:input"]), min_size=2, max_size=2, unique=True))
    found |= {"site": sites[0], "target": draw(st.sampled_from([None, sites[1]]))}
    if found["target"]:
        found |= {"d_out": draw(_COUNT), "skip": draw(st.booleans()), "centered": False}
    else:
        found |= {"d_out": None, "skip": False}
    for side in ("hook_side", "target_hook_side"):
        found[side] = draw(st.sampled_from(["input", "output"]))
    found["chat_roles"] = draw(st.none() | st.lists(st.text(max_size=8), max_size=3))
    found |= {name: draw(_TEXT) for name in ("target_hook_name", "chat_column")}
    found |= {name: draw(_TEXT) for name in ("dataset_split", "text_column", "separator", "encoding")}
    return found


@settings(max_examples=200, deadline=None)
@given(allowed_settings())
def test_every_configuration_survives_being_saved(chosen) -> None:
    assert chosen.keys() | {"k", "matryoshka_prefixes", "carry_decay", "config_version"} == _OWN.keys()
    config = SelOrthoConfig(**chosen)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = SelOrthoConfig.from_pretrained(folder)
    assert loaded.own_settings() == config.own_settings()
    assert {name: loaded.own_settings()[name] for name in chosen} == chosen


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from([*_OWN, "dtype", "architectures", "id2label", "return_dict"]), value=_JSON)
def test_any_value_in_any_field_is_kept_or_refused(name, value) -> None:
    content = {"model_type": SelOrthoConfig.model_type, "d_in": 8, "d_sae": 16, name: value}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(content))
        try:
            config = SelOrthoConfig.from_pretrained(folder)
        except ConfigError as error:
            assert str(error)
            return
        if name in _OWN:
            assert getattr(config, name) == value
        config.save_pretrained(folder)
        assert SelOrthoConfig.from_pretrained(folder).own_settings() == config.own_settings()


# ----------------------------------------------------------------------------------------------------- mutations

_NUMBERS = [0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan")]
_STRINGS = ["", "1", "-1", "../../etc/passwd", "/etc/passwd", "x" * 70_000, "\ud800", "\0", "\u202e", "{{ 7 * 7 }}"]
_STRUCTURES: list[Any] = [None, True, False, [], {}, [None], {"a": 1}, [[[[]]]], {"": {"": {}}}, [0] * 1000]
_VALUES = [*_NUMBERS, *_STRINGS, *_STRUCTURES]
_TOKENS = [
    *(b"NaN", b"-Infinity", b"1e999", b"-1", b"null", b"true", b"0", b"9" * 400, b"9" * 5000),
    *(b"[" * 3000, b'{"a":' * 2000, b"[[]]", b"{}", b'"', b",", b":", b"]", b"}", b"\n\n", b"\r", b"\t"),
    *(b"../../etc/passwd", b"/etc/passwd", b"A" * 70_000, b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"\xef\xbb\xbf"),
    *((2**63).to_bytes(8, "little"), b"\xff" * 8, b"\x00" * 8, (10**9).to_bytes(8, "little")),
]


def mutated(rng: random.Random, data: bytes, suffix: str) -> bytes:
    """Another version of a file, changed in its bytes or in the values of its JSON."""
    if suffix == ".json" and rng.random() < 0.6:
        return _with_other_values(rng, data)
    if suffix == ".safetensors" and rng.random() < 0.6:
        length = int.from_bytes(data[:8], "little")
        header = _with_other_values(rng, data[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        _change_bytes(rng, changed)
    return bytes(changed)


def _change_bytes(rng: random.Random, data: bytearray) -> None:
    # the ends of a file are where formats keep what they are
    near_the_end = rng.random() < 0.3
    start = rng.randrange(max(0, len(data) - 300), len(data) + 1) if near_the_end else rng.randrange(len(data) + 1)
    end = min(len(data), start + int(rng.expovariate(1 / 20)))
    action = rng.choice(["flip", "flip", "truncate", "delete", "duplicate", "splice", "overwrite", "random"])
    if action == "flip" and data:
        data[start % len(data)] ^= 1 << rng.randrange(8)
    elif action == "truncate":
        del data[start:]
    elif action == "delete":
        del data[start:end]
    elif action == "duplicate":
        data[start:start] = data[start:end] * rng.choice([1, 1, 2, 50])
    elif action == "splice":
        data[start:start] = rng.choice(_TOKENS)
    elif action == "overwrite":
        data[start:end] = rng.choice(_TOKENS)[: rng.choice([8, 40, 100_000])]
    else:
        data[start:end] = rng.randbytes(end - start)


def _with_other_values(rng: random.Random, data: bytes) -> bytes:
    content = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = _change_value(rng, content)
    return json.dumps(content, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def _change_value(rng: random.Random, content: Any) -> Any:
    """Change, delete, rename, double or move one value somewhere below."""
    holder, keys = content, list[Any]()
    while isinstance(holder, (dict, list)) and holder and (not keys or rng.random() < 0.75):
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        keys.append((holder, key))
        holder = holder[key]
    if not keys or rng.random() < 0.01:
        return copy.deepcopy(rng.choice(_VALUES))
    holder, key = keys[-1]
    action = rng.choice(["change", "change", "change", "delete", "rename", "double", "copy"])
    if action == "delete":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        holder[rng.choice(["", "../x", "auto_map", "self", "_x", str(key) + "_", "1", "\0"])] = holder.pop(key)
    elif action == "double" and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif action == "copy":
        other = rng.choice(keys)
        holder[key] = json.loads(json.dumps(other[0][other[1]]))
    else:
        holder[key] = _other_value(rng, holder[key])
    return content


def _other_value(rng: random.Random, value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice([value + 1, value - 1, -value, value * 1000, str(value), [value], value == 0])
    return copy.deepcopy(rng.choice(_VALUES))


# ------------------------------------------------------------------------------------------------- what is mutated


@dataclass(frozen=True)
class Target:
    """Files of one kind, and what reads them as users do."""

    files: list[Path]
    use: Callable[[Path], None]


def targets() -> dict[str, Target]:
    """Write real files of each kind into the working directory."""
    written = write_inputs(Path())["dataset"].read_text().splitlines()[:40]
    _write_texts([json.loads(line)["text"] for line in written])
    cache_activations.main(
        "--model lm --lm_dtype float32 --dataset texts/a.jsonl --layers 0 1 --context_length 32 --stored_dtype float32 "
        "--shard_tokens 300 --held_out_fraction 0.2 --eval_samples 5 --output_dir acts --cpu".split()
    )
    torch.manual_seed(0)
    sae = SelOrthoSAE(SelOrthoConfig(d_in=16, d_sae=24, activation="batchtopk", k=3, lm_name="org/lm", layer=1))
    sae.save_pretrained("sae")
    sae.save_pretrained("parts", max_shard_size="1KB")
    _write_pairs(Path("sae"))
    _write_feature_index(Path("sae"))
    Path("card.json").write_text(json.dumps(_card_facts(sae.config)))
    folder = Path("acts")
    shards = [folder / "tokens/00000.safetensors", folder / "layer_0/00001.safetensors"]
    return {
        "manifest": Target([folder / "manifest.json"], lambda path: _use_activations(path.parent)),
        "config": Target([Path("sae/config.json")], lambda path: _use_sae(path.parent)),
        "weights": Target([Path("sae/model.safetensors")], lambda path: _use_sae(path.parent)),
        "index": Target([Path("parts/model.safetensors.index.json")], lambda path: _use_sae(path.parent)),
        "shard": Target([*shards, folder / "held_out/tokens/00000.safetensors"], _use_shard),
        "pairs": Target(sorted(Path("sae", PAIR_HISTORY).iterdir()), lambda path: _use_pairs(path.parents[1])),
        "feature_index": Target(sorted(Path("sae", INDEX).iterdir()), lambda path: _use_feature_index(path.parent)),
        "published": _published(),
        "card": Target([Path("card.json")], _use_card),
        "parquet": Target(sorted(Path("texts").glob("*.parquet")), _use_texts),
        "text": Target([path for path in sorted(Path("texts").iterdir()) if path.suffix != ".parquet"], _use_texts),
    }


def _published() -> Target:
    """SAEs in the formats of other libraries, by each of their files."""
    writers = (
        *(published.gemma_scope, published.gemma_scope_2, published.dictionary_learning, published.qwen_scope),
        *(published.saelens, published.circuit_tracer, published.llama_scope, published.llamascopium),
        *(published.sparsify, published.hook_z, published.goodfire, published.openai, published.qresearch),
        published.cross_layer,
    )
    places: dict[Path, Path] = {}
    for number, write in enumerate(writers):
        place = write(Path(f"published_{number}"))[0]
        folder = place if place.is_dir() else place.parent
        places |= {path: place for path in sorted(folder.rglob("*")) if path.is_file()}
    return Target(list(places), lambda path: _use_published(places[path]))


def _use_published(place: Path) -> None:
    sae = hf_selortho.load(place, approximate=True)
    sae.encode(torch.zeros(2, sae.config.d_in or 0))


def _write_pairs(folder: Path) -> None:
    (folder / PAIR_HISTORY).mkdir()
    i = torch.arange(20)
    for step in (1, 41):
        data = snapshot_bytes(step, i, i + 2, torch.linspace(-1, -0.1, 20))
        (folder / PAIR_HISTORY / snapshot_name(step)).write_bytes(data)


def _write_feature_index(folder: Path) -> None:
    tokens, acts, counts = ["<bos>", " the", " market"], [0.0, 0.5, 0.0], [1] * BINS
    effects, near = [TokenEffect(5, " the", 1.5)], [Neighbour(1, 0.5, 0.25, 7)]
    contexts = [FeatureContext("top", 7, 0, 1, 0.5, 1.0, tokens, acts)]
    joint = [JointContext("both", 7, 0, 1, tokens, acts, acts)]
    with IndexWriter(folder / INDEX) as writer:
        writer.add_features(
            FeatureRecord(n, f"label {n}", "tokens", 9, 0.1, 0.5, 0.2, counts, effects, effects, near, near, contexts)
            for n in range(24)
        )
        writer.add_pairs(
            PairRecord(
                n, n + 1, "nested", 0.5, 0.4, 1, 2, 0.9, 0.8, 0.3, 0.2, 0.1, 9, 9, 5, [1, 41], [None, 0.5], joint
            )
            for n in range(0, 20, 2)
        )
        writer.facts = {name: {} for name in ("sae", "lm", "text", "features", "pairs")}


def _use_feature_index(folder: Path) -> None:
    index = FeatureIndex.open(folder)
    for number in range(min(len(index), 30)):
        index.feature(number)
        index.summary(number)
    for row in index.pair_table.slice(0, 12).to_pylist():
        index.pair(row["a"], row["b"])
    index.search_labels("label")
    index.search_promoted("the")


def _write_texts(texts: list[str]) -> None:
    Path("texts").mkdir()
    rows = pyarrow.table({"text": texts, "label": list(range(len(texts)))})
    pyarrow.parquet.write_table(rows, "texts/plain.parquet", compression="none", use_dictionary=False)
    pyarrow.parquet.write_table(rows, "texts/usual.parquet")
    Path("texts/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines = Path("texts/a.jsonl").read_bytes()
    Path("texts/b.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    Path("texts/a.json").write_text(json.dumps([{"text": text, "n": [1, {"a": None}]} for text in texts]))
    Path("texts/a.csv").write_text("text,label\n" + "".join(f'"{text}",1\n' for text in texts))
    Path("texts/a.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    Path("texts/a.txt").write_text("\n\n".join(texts))


def _card_facts(config: SelOrthoConfig) -> dict[str, Any]:
    evaluation = {
        **{"samples": 100, "tokens": 5282, "mse": 244799.3, "fvu": 0.103, "explained_variance": 0.897, "l0": 115.2},
        **{"l1": 3.13, "active_features": 23, "active_fraction": 0.96, "dead_features": 1, "dead_fraction": 0.04},
        **{"peak_correlation": 0.86, "mean_correlation": 0.08, "top_correlation": 0.28, "selected_pairs": 8},
        **{"unique_features": 4.1, "max_decoder_cosine": 0.2, "ce_samples": 6, "ce_tokens": 350, "ce_clean": 3.7},
        **{"ce_reconstruction": 5.4, "ce_zero_ablation": 14.7, "loss_recovered": 0.84},
    }
    return {
        "config": {**config.own_settings(), "lm_revision": "c" * 40, "dataset": "org/texts", "dataset_split": "train"},
        "metrics": {
            "evaluation": evaluation,
            "training": {
                "fvu": 0.09,
                "l0": 117.3,
                "pair_churn": 0.3,
                "steps": 15,
                "tokens": 6144,
                "seconds_per_step": 1,
            },
            "data": {"contexts": 80, "tokens_kept": 6234, "dropped_special": 80, "dropped_sinks": 12},
        },
        "run": {
            "command": "accelerate launch scripts/train.py",
            "arguments": {"output_dir": "runs/x", "learning_rate": 3e-4, "batch_size": 4096, "seed": 0},
            **{"versions": {"torch": "2.13.0"}, "hardware": "two cores", "wall_seconds": 431.2, "peak_memory_gb": 1.5},
            **{"started": "2026-01-01", "pictures": ["pictures/training_curves.png"]},
        },
        **{"twin": {"evaluation": evaluation}, "repo_id": "org/sae", "license": "mit", "license_link": "https://x.org"},
    }


def _use_activations(folder: Path) -> None:
    store = ActivationCache(str(folder))
    CachedBatches(store, store.manifest.layers, batch_size=1).statistics()
    store.held_out_contexts()
    for part, entries in ((TRAIN, store.manifest.shards), (HELD_OUT, store.manifest.held_out)):
        for entry in entries:
            store.read(entry, store.manifest.layers, part)
    report_table(store.manifest)


def _use_shard(path: Path) -> None:
    """With a manifest that knows it, so that it is believed as far as possible."""
    folder = Path("acts")
    manifest, name, data = folder / "manifest.json", path.relative_to(folder).as_posix(), path.read_bytes()
    original = manifest.read_bytes()
    content = json.loads(original)
    entry = next(e for part in ("shards", "held_out") for e in content[part] if name in e["files"])
    entry["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.write_text(json.dumps(content))
    try:
        _use_activations(folder)
    finally:
        manifest.write_bytes(original)


def _use_sae(folder: Path) -> None:
    sae = SelOrthoSAE.from_pretrained(folder)
    assert sae.config.d_in is not None
    sae.eval()(torch.zeros(2, sae.config.d_in))


def _use_pairs(folder: Path) -> None:
    for snapshot in read_pair_history(folder, d_sae=24):
        assert bool(
            (snapshot.j < 24).all() and (snapshot.i < snapshot.j).all() and snapshot.correlation.isfinite().all()
        )


def _use_card(path: Path) -> None:
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # metrics.json and run.json are read by others
    if isinstance(facts, dict):
        names = ("config", "metrics", "run", "repo_id", "twin", "license", "license_link")
        str(render_model_card(**{name: facts.get(name) for name in names}))


def _use_texts(path: Path) -> None:
    documents = open_documents(TextSource(dataset=str(path)))
    for _ in (*documents.train(0, 0), *documents.held_out()):
        pass


# ------------------------------------------------------------------------------------------------------ processes


def work(seed: int, jobs: list[str]) -> None:
    """In a process of its own: read mutated files, `kind:first:count`; write report.json to the working directory."""
    import resource  # Windows has none

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # whatever share of the cores a worker of pytest has
    made = targets()
    for target in made.values():
        for path in target.files:
            target.use(path)
    before, outcomes, failures = peak(), Counter[str](), list[str]()
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + 8 * GIGABYTE, space + 8 * GIGABYTE))  # a stop before the machine's
    for name, numbers in ((job.split(":")[0], map(int, job.split(":")[1:])) for job in jobs):
        first, count = numbers
        originals = {path: path.read_bytes() for path in made[name].files}
        for number in range(first, first + count):
            sys.stderr.write(f"{name}:{number}\n")  # where it ended, if it ends here
            rng = random.Random(f"{name} {seed} {number}")
            path = rng.choice(made[name].files)
            path.write_bytes(mutated(rng, originals[path], path.suffix))
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            outcome = _outcome(made[name], path)
            faulthandler.cancel_dump_traceback_later()
            path.write_bytes(originals[path])
            if peak() - before > GIGABYTE:
                sys.exit(f"it takes {peak() - before:,} bytes")
            outcomes[f"{name} {outcome}"] += 1
            failures += [] if outcome in ("read", "refused") else [f"{name}:{number} of seed {seed}: {outcome}"]
    Path("report.json").write_text(json.dumps([outcomes, failures]))


def _outcome(target: Target, path: Path) -> str:
    """What happened: "read", "refused" if the package said itself why not, or a fault."""
    try:
        target.use(path)
    except SelOrthoError as error:
        return "refused" if 0 < len(str(error)) < 5000 else f"a message of {len(str(error))} characters"
    except BaseException as error:  # noqa: BLE001  whatever it is, it is the finding
        places = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-3:]]
        return f"{type(error).__name__}: {str(error)[:200]!a} in {' '.join(places)}"
    return "read"


@pytest.mark.skipif(sys.platform != "linux", reason="limits and measures a process as Linux does")
@pytest.mark.parametrize(
    ("seed", "share"),
    [
        pytest.param(1, 20, id="five hundred"),
        pytest.param(2, 1, id="ten thousand", marks=pytest.mark.slow),
    ],
)
def test_damaged_files_are_read_or_refused(seed: int, share: int, tmp_path: Path) -> None:
    halves = {name: count // share // 2 for name, count in COUNTS.items()}
    folders = [tmp_path / "first", tmp_path / "second"]
    running = []
    for number, folder in enumerate(folders):
        folder.mkdir()
        environment = {
            **os.environ,
            **{"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
            **{
                "ARROW_DEFAULT_MEMORY_POOL": "system",
                "HF_DEACTIVATE_ASYNC_LOAD": "1",
            },  # memory and threads as they come
            **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        }
        jobs = [f"{name}:{number * half}:{half}" for name, half in halves.items()]
        with open(folder / "errors", "w") as errors:
            command = [sys.executable, str(Path(__file__).resolve()), str(seed), *jobs]
            output = {"stdout": subprocess.DEVNULL, "stderr": errors}
            running.append(subprocess.Popen(command, cwd=folder, env=environment, **output))
    outcomes: Counter[str] = Counter()
    for folder, process in zip(folders, running, strict=True):
        assert process.wait() == 0, (folder / "errors").read_text(errors="replace")[-3000:]
        found, failures = json.loads((folder / "report.json").read_text())
        assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:20])
        outcomes.update(found)
    assert sum(outcomes.values()) == 2 * sum(halves.values())
    for name in COUNTS:  # mutations that are all refused, or none, try nothing
        assert outcomes[f"{name} read"] and outcomes[f"{name} refused"], outcomes


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2:])
