"""Activations of a repository of the Hub, as a real HTTP server answers for it: read, trained on, cached, refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from hf_selortho import SelOrthoSAE
from scripts import cache_activations, train

ROOT = Path(__file__).parents[2]
COMMITS = {"main": "c0ffee" + "0" * 34, "v2": "decade" + "0" * 34}
TRAINING = (
    "--layer 1 --d_sae 64 --pair_fraction 0.01 --batch_size 128 --max_steps 6 --learning_rate 1e-3 --eval_samples 10 "
    "--cpu"
).split()

# In a process of its own, as the Hugging Face libraries read HF_ENDPOINT once, when they are imported.
_CLIENT = """
import hashlib, json, sys
from pathlib import Path

from hf_selortho.data.cache_batches import ShardBatches, held_out_batches
from hf_selortho.data.activation_cache import ActivationStore
from hf_selortho.errors import SelOrthoError
from scripts import train


def digest(source):
    "Commit, and sha256 of all that is held out and of 40 batches, more than an epoch."
    store = ActivationStore(source)
    batches = ShardBatches(store, [1, 2], batch_size=100, pool_tokens=1000)
    found = hashlib.sha256(repr(store.held_out_contexts()).encode())
    for held_out in held_out_batches(store, [1, 2], 100):
        for tensor in held_out.values():
            found.update(tensor.numpy().tobytes())
    for _ in range(40):
        batch = batches.next_batch()
        for tensor in (*batch.by_layer.values(), batch.origins.document_ids, batch.origins.positions):
            found.update(tensor.numpy().tobytes())
    batches.release()
    return [store.revision, found.hexdigest()]


def opened(source):
    return ActivationStore(source).revision


def trained(source):
    output = Path(sys.argv[1], source.partition(":")[2].replace("/", "-"))
    said = ""
    try:
        train.main(["--activations", source, *training, "--output_dir", str(output)])
    except SelOrthoError as error:
        said = str(error)
    return [said, sorted(path.name for path in output.glob("**/*.safetensors"))]


tasks, training = json.loads(sys.argv[2])
results = {}
for kind, source in tasks:
    try:
        results[f"{kind} {source}"] = globals()[kind](source)
    except SelOrthoError as error:
        results[f"{kind} {source}"] = f"ERROR {error}"
print(json.dumps(results))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Answers as the Hub does for dataset repositories; each has a folder for every branch."""

    def __init__(self, repositories: dict[str, dict[str, Path]], gated: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories, self.gated, self.requests = repositories, gated, list[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {unquote(self.path)}")

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, X_Error_Code=code, X_Error_Message="refused")

    def do_GET(self) -> None:
        """/api/datasets/OWNER/NAME[/revision/REV, /tree/REV or /auth-check], /datasets/OWNER/NAME/resolve/REV/FILE."""
        words = [unquote(word) for word in urlparse(self.path).path.strip("/").split("/")]
        is_page = words.pop(0) == "api" and words.pop(0) == "datasets"
        repository, kind, revision = "/".join(words[:2]), "".join(words[2:3]), "".join(words[3:4]) or "main"
        branches = self.server.repositories.get(repository)
        branch = next((name for name, commit in COMMITS.items() if revision in (name, commit)), "")
        gated = repository in self.server.gated
        if branches is None:
            self.refuse(404, "RepoNotFound")
        elif gated and (kind == "auth-check" or not is_page):
            self.refuse(401, "GatedRepo")
        elif branch not in branches:
            self.refuse(404, "RevisionNotFound")
        elif kind == "tree":
            files = (path for path in sorted(branches[branch].rglob("*")) if path.is_file())
            entries = [self.entry(path.relative_to(branches[branch]).as_posix(), path) for path in files]
            self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")
        elif is_page:
            page = {"id": repository, "sha": COMMITS[branch], "gated": "manual" if gated else False, "siblings": []}
            self.reply(200, json.dumps(page).encode(), Content_Type="application/json")
        elif not (path := branches[branch].joinpath(*words[4:])).is_file():
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMITS[branch])
        else:
            body = path.read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            self.reply(200, body, X_Repo_Commit=COMMITS[branch], ETag=f'"{etag}"')

    do_HEAD = do_POST = do_GET  # noqa: N815

    def entry(self, name: str, path: Path) -> dict[str, Any]:
        return {
            "type": "file",
            "path": name,
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@dataclass
class Answers:
    """What the tests look at."""

    online: dict[str, Any]
    offline: dict[str, Any]  # HF_HUB_OFFLINE=1
    alone: dict[str, Any]  # nobody answers
    script: subprocess.CompletedProcess[str]  # scripts/train.py, online
    requests: list[str]
    folders: dict[str, Path]  # by "online", "offline": where runs went; by branch: the harvest


def flip(path: Path) -> None:
    """Another bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def damage(whole: Path, folder: Path) -> dict[str, dict[str, Path]]:
    """Repositories "acme/extra" and so on: copies of the harvest, each with one fault."""
    repositories = {}
    for name in ("extra", "missing", "flipped", "flipped-tokens", "short", "empty"):
        copy = Path(shutil.copytree(whole, folder / name))
        repositories[f"acme/{name}"] = {"main": copy}
        if name == "extra":
            shutil.copy(copy / "layer_1" / "00000.safetensors", copy / "layer_1" / "00077.safetensors")
        elif name == "missing":
            (copy / "layer_2" / "00001.safetensors").unlink()
        elif name == "flipped":
            flip(copy / "layer_1" / "00002.safetensors")
        elif name == "flipped-tokens":
            flip(copy / "held_out" / "tokens" / "00000.safetensors")
        elif name == "short":
            shard = copy / "layer_1" / "00002.safetensors"
            shard.write_bytes(shard.read_bytes()[:-1])
        else:
            (copy / "manifest.json").unlink()
    return repositories


GOOD = ("hub:acme/acts", "hub:acme/acts@v2", f"hub:acme/acts@{COMMITS['v2']}")


@pytest.fixture(scope="module")
def answers(tiny_lm_dir, sample_documents, tmp_path_factory) -> Answers:
    folder = tmp_path_factory.mktemp("hub")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_documents[:60]))
    branches = {}
    for seed, branch in enumerate(COMMITS):
        branches[branch] = folder / branch
        cache_activations.main([
            *("--model", str(tiny_lm_dir("llama")), "--lm_dtype", "float32", "--dataset", str(texts), "--cpu"),
            *("--layers", "1", "2", "--stored_dtype", "float32", "--shard_tokens", "400", "--seed", str(seed)),
            *("--held_out_fraction", "0.2", "--eval_samples", "20", "--output_dir", str(branches[branch])),
        ])  # fmt: skip
    repositories = {
        "acme/acts": branches,
        "acme/gated": branches,
        "acme/partly": branches,
        **damage(branches["main"], folder),
    }
    server = Hub(repositories, gated={"acme/gated"})
    folders = {**branches, "home": folder / "home", "online": folder / "online", "offline": folder / "offline"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(folders["home"]), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "PYTHONPATH": str(ROOT)}

    def run(arguments: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            **{"env": {**environment, **changes}, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 120},
            check=False,
        )

    def ask(output: Path, tasks: list[tuple[str, str]], **changes: str) -> dict[str, Any]:
        done = run(["-c", _CLIENT, str(output), json.dumps([tasks, TRAINING])], **changes)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    try:
        script = run(
            ["scripts/train.py", "--activations", GOOD[0], *TRAINING, "--output_dir", str(folders["online"] / "run")]
        )
        read = [("digest", source) for source in (*GOOD, *map(str, branches.values()))]
        online = ask(
            folders["online"],
            [
                *read,
                ("opened", "hub:acme/partly"),
                *(("trained", source) for source in _MESSAGES),
                *(("digest", source) for source in _LINES),
            ],
        )
    finally:
        server.close()
    cached = [("digest", source) for source in (*GOOD, "hub:acme/partly", "hub:acme/none")]
    with ThreadPoolExecutor() as pool:
        offline = pool.submit(ask, folders["offline"], [*cached, ("trained", GOOD[0])], HF_HUB_OFFLINE="1")
        alone = ask(folders["offline"], cached)
    return Answers(online, offline.result(), alone, script, server.requests, folders)


def test_batches_are_those_of_the_folder(answers) -> None:
    branches = {"main": GOOD[:1], "v2": GOOD[1:]}
    for branch, sources in branches.items():
        _, expected = answers.online[f"digest {answers.folders[branch]}"]
        for source in sources:
            assert answers.online[f"digest {source}"] == [COMMITS[branch], expected]
    assert answers.online[f"digest {GOOD[0]}"] != answers.online[f"digest {GOOD[1]}"]


def test_each_shard_is_downloaded_once(answers) -> None:
    fetched = [line for line in answers.requests if re.match("GET /datasets/acme/acts/.*safetensors", line)]
    shards = {path.read_bytes() for name in COMMITS for path in answers.folders[name].rglob("*.safetensors")}
    assert len(fetched) == len(set(fetched)) == len(shards)  # those held out are the same in both branches


def test_the_training_script_trains_what_it_trains_on_the_folder(answers, tmp_path) -> None:
    assert answers.script.returncode == 0, answers.script.stderr
    run = answers.folders["online"] / "run"
    train.main(["--activations", str(answers.folders["main"]), *TRAINING, "--output_dir", str(tmp_path / "run")])
    found, expected = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
    manifest = json.loads((answers.folders["main"] / "manifest.json").read_text())
    config = SelOrthoSAE.from_pretrained(run).config
    assert config.own_settings() == SelOrthoSAE.from_pretrained(tmp_path / "run").config.own_settings()
    assert (config.layer, config.lm_name, config.lm_revision) == (
        1, manifest["model"]["name"], manifest["model"]["revision"]
    )  # fmt: skip
    assert config.dataset == manifest["text"]["dataset"] and config.dataset.endswith("texts.jsonl")
    assert json.loads((run / "run.json").read_text())["arguments"]["activations"] == "hub:acme/acts"


@pytest.mark.parametrize("source", GOOD)
@pytest.mark.parametrize("network", ["offline", "alone"])
def test_what_was_downloaded_is_read_without_the_hub(network, source, answers) -> None:
    assert getattr(answers, network)[f"digest {source}"] == answers.online[f"digest {source}"]


def test_training_goes_on_without_the_hub(answers) -> None:
    assert answers.offline[f"trained {GOOD[0]}"] == ["", ["model.safetensors", "step_000001.safetensors"]]
    found, expected = (
        load_file(folder / "model.safetensors")
        for folder in (answers.folders["offline"] / "acme-acts", answers.folders["online"] / "run")
    )
    assert all(found[name].equal(expected[name]) for name in expected)


def test_without_the_hub_what_is_not_cached_is_named(answers) -> None:
    part = answers.online["opened hub:acme/partly"]
    assert part == COMMITS["main"]
    expected = {
        "offline": "offline mode is on (HF_HUB_OFFLINE)",
        "alone": "the Hub cannot be reached",
    }
    for network, reason in expected.items():
        found = getattr(answers, network)["digest hub:acme/partly"]
        assert found.startswith("ERROR shard hub:acme/partly/held_out/tokens/00000.safetensors cannot be downloaded (")
        assert reason in found and "\n" not in found
        found = getattr(answers, network)["digest hub:acme/none"]
        assert found.startswith('ERROR dataset "acme/none" is not in the local cache and ') and reason in found


_MESSAGES = {
    "hub:acme/extra": "/layer_1/00077.safetensors is not in manifest.json;",
    "hub:acme/missing": "/layer_2/00001.safetensors is missing;",
    "hub:acme/flipped": "/layer_1/00002.safetensors is damaged: its sha256 is [0-9a-f]{64}, expected [0-9a-f]{64};",
    "hub:acme/flipped-tokens": "/held_out/tokens/00000.safetensors is damaged: its sha256 is",
    "hub:acme/short": r"/layer_1/00002.safetensors has \d+ bytes, expected \d+;",
}


@pytest.mark.parametrize("source", _MESSAGES)
def test_damaged_repositories_name_the_shard_and_train_nothing(source, answers) -> None:
    message, saved = answers.online[f"trained {source}"]
    assert message.startswith(f"shard {source}") and "\n" not in message and saved == []
    assert re.search(_MESSAGES[source], message), message


@pytest.mark.parametrize("name", ["extra", "missing"])
def test_a_wrong_listing_is_seen_before_any_shard_is_downloaded(name, answers) -> None:
    fetched = [line for line in answers.requests if line.startswith(f"GET /datasets/acme/{name}/")]
    assert len(fetched) == 1 and fetched[0].endswith("/manifest.json")


_LINES = {
    "hub:acme/none": ['unknown dataset "acme/none"', "neither on the Hub nor a local path"],
    "hub:acme/acts@v9": ['dataset "acme/acts" has no revision "v9"'],
    "hub:acme/gated": ['dataset "acme/gated" is gated', "https://huggingface.co/datasets/acme/gated", "hf auth login"],
    "hub:acme/empty": ['"acme/empty"', "manifest.json"],
}


@pytest.mark.parametrize("source", _LINES)
def test_what_the_hub_refuses_is_one_line(source, answers) -> None:
    found = answers.online[f"digest {source}"]
    assert found.startswith("ERROR ") and "\n" not in found
    for part in _LINES[source]:
        assert part in found
