"""Activation caches in repositories of the Hub, as a real HTTP server answers for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.caches import write_cache
from tests.loopback_hub import LoopbackHub

# In a process of its own, as the Hugging Face libraries read HF_ENDPOINT once, when they are imported.
CLIENT = """
import hashlib, json, sys

from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_batches import CachedBatches, held_out_batches
from hf_selortho.errors import SelOrthoError


def digest(source):
    "Commit, and sha256 of all that is held out and of more than an epoch of batches."
    cache = ActivationCache(source)
    batches = CachedBatches(cache, [2, 5], batch_size=10, pool_tokens=20)
    digest = hashlib.sha256()
    for held_out in held_out_batches(cache, [2, 5], 7):
        digest.update(held_out[5].numpy().tobytes())
    for _ in range(10):
        batch = batches.next_batch()
        digest.update(batch.by_layer[2].numpy().tobytes() + batch.origins.document_ids.numpy().tobytes())
    batches.release()
    return [cache.revision, digest.hexdigest()]


results = {}
for source in SOURCES:
    try:
        results[source] = digest(source)
    except SelOrthoError as error:
        results[source] = f"ERROR {error}"
print(json.dumps(results))
"""
TRAINING = (
    "--layer 2 --d_sae 16 --pair_fraction 0.02 --batch_size 16 --max_steps 3 --learning_rate 1e-3 --eval_samples 0 "
    "--cpu"
)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "extra": lambda acts: shutil.copy(acts / "layer_2" / "00000.safetensors", acts / "layer_2" / "00077.safetensors"),
    "missing": lambda acts: (acts / "layer_5" / "00001.safetensors").unlink(),
    "flipped": lambda acts: flip(acts / "layer_2" / "00001.safetensors"),
    "empty": lambda acts: (acts / "manifest.json").unlink(),
}
MESSAGES = {
    "hub:acme/extra": ["shard hub:acme/extra/layer_2/00077.safetensors is not in manifest.json;"],
    "hub:acme/missing": ["shard hub:acme/missing/layer_5/00001.safetensors is missing;"],
    "hub:acme/flipped": ["/layer_2/00001.safetensors is damaged: its sha256 is", "hf download acme/flipped"],
    "hub:acme/empty": ['"acme/empty"', "manifest.json"],
    "hub:acme/none": ['unknown dataset "acme/none"', "neither on the Hub nor a local path"],
    "hub:acme/acts@v9": ['dataset "acme/acts" has no revision "v9"'],
    "hub:acme/gated": ['dataset "acme/gated" is gated', "https://huggingface.co/datasets/acme/gated", "hf auth login"],
    "hub:acme": ["expected owner/name[@revision]"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, Any]:
    """What a client has read online, in offline mode and while nobody answers; a training; requests; commits."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, branch in enumerate(("main", "v2")):
        write_cache(folder / branch, [40, 30 + seed], held_out=(20,))
    with LoopbackHub() as hub:
        commits = {branch: hub.upload("acme/acts", folder / branch, "dataset", branch) for branch in ("main", "v2")}
        hub.create_repo("acme/gated", "dataset", gated=True)
        for name, harm in DAMAGE.items():
            copy = Path(shutil.copytree(folder / "main", folder / name))
            harm(copy)
            hub.upload(f"acme/{name}", copy, "dataset")
        good = ["hub:acme/acts", "hub:acme/acts@v2", f"hub:acme/acts@{commits['v2']}"]

        def ask(sources: list[str], offline: bool = False) -> dict[str, Any]:
            start = "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n" if offline else ""
            done = hub.run(f"{start}SOURCES = {sources!r}\n{CLIENT}", folder / "home", token=None)
            assert done.returncode == 0, done.stderr[-3000:]
            return json.loads(done.stdout.splitlines()[-1])

        online = ask([*good, str(folder / "main"), str(folder / "v2"), *MESSAGES])
        train = ["scripts/train.py", *TRAINING.split(), "--activations", good[0], "--output_dir", str(folder / "run")]
        training = hub.run(train, folder / "home", token=None)
        offline = ask([*good, "hub:acme/none"], offline=True)
        requests = list(hub.requests)
        hub.stop()
        alone = ask([*good[1:], "hub:acme/none"])
    found = {"online": online, "offline": offline, "alone": alone, "training": training, "requests": requests}
    return {**found, "good": good, "commits": commits, "folder": folder}


def test_batches_are_those_of_the_folder_and_each_file_is_downloaded_once(answers) -> None:
    for source, branch in zip(answers["good"], ("main", "v2", "v2"), strict=True):
        _, expected = answers["online"][str(answers["folder"] / branch)]
        assert answers["online"][source] == [answers["commits"][branch], expected]
    assert answers["online"][answers["good"][0]] != answers["online"][answers["good"][1]]
    fetched = [r.path for r in answers["requests"] if r.method == "GET" and "acme/acts/resolve" in r.path]
    assert len(fetched) == len(set(fetched)) > 0


def test_the_training_script_trains_on_a_repository(answers) -> None:
    assert answers["training"].returncode == 0, answers["training"].stderr
    config = json.loads((answers["folder"] / "run" / "config.json").read_text())
    assert (config["layer"], config["lm_name"], config["dataset"]) == (2, "google/gemma-2-2b", "fancyzhx/ag_news")


@pytest.mark.parametrize("network", ["offline", "alone"])
def test_what_was_downloaded_is_read_without_the_hub(network, answers) -> None:
    for source, found in answers[network].items():
        if source == "hub:acme/none":
            reason = "offline mode is on" if network == "offline" else "the Hub cannot be reached"
            assert 'dataset "acme/none" is not in the local cache and ' in found and reason in found
        else:
            assert found == answers["online"][source]


@pytest.mark.parametrize("source", MESSAGES)
def test_what_is_wrong_is_one_line(source, answers) -> None:
    found = answers["online"][source]
    assert found.startswith("ERROR ") and "\n" not in found
    for part in MESSAGES[source]:
        assert part in found
