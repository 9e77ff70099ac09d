"""Nothing private is published: canaries in the home folder, user name and host name, over real HTTP."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_selortho.hub.space import REQUIREMENTS
from hf_selortho.utils.privacy import private_names, without_paths
from tests.data.caches import write_cache
from tests.finished_run import save_run
from tests.hub_client import HubClient
from tests.loopback_hub import LoopbackHub

USER, HOST = "canaryuser", "canary-host-7"
SECRET = "hf_" + "aB3" * 11
PATCHED = f"""
import platform, socket
socket.gethostname = platform.node = lambda: {HOST!r}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("disk") / "home" / USER


@pytest.fixture(scope="module")
def client(hub, home):
    environment = {**hub.environment(home / "hf"), "HOME": str(home), "USER": USER, "LOGNAME": USER}
    with HubClient(environment) as client:
        client.run(PATCHED)
        yield client


@pytest.fixture(scope="module")
def lm(home, tiny_lm_dir) -> Path:
    """A language model in the home folder."""
    folder = home / "canaryfolder-models" / "lm"
    folder.parent.mkdir(parents=True)
    return Path(folder.parent, "lm").symlink_to(tiny_lm_dir("llama")) or folder


@pytest.fixture(scope="module")
def texts(home, sample_text_files) -> Path:
    path = home / "canaryfolder letters" / "to-my-love.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(sample_text_files.csv.read_bytes())
    return path


@pytest.fixture(scope="module")
def run(home, lm, texts) -> Path:
    """A run with paths wherever a training, an evaluation or an index might have put some."""
    names = {"lm_name": str(lm), "lm_revision": f"local-sha256:{'0' * 64}", "dataset": str(texts)}
    folder = save_run(home / "canaryfolder-runs" / "x", **names)
    arguments = {"model": str(lm), "dataset": str(texts), "output_dir": str(folder), "model_revision": None}
    arguments |= {"resume_from_checkpoint": f"{folder}/checkpoints/9", "preset": "~/canaryfolder-models/p.json"}
    command = f"python {home}/code/train.py --dataset '{texts}' --model={lm} --rdzv_endpoint {HOST}:29500"
    told = {"command": f"{command} --token {SECRET}", "arguments": arguments, "node": f"{USER}@{HOST}.lan"}
    (folder / "run.json").write_text(json.dumps(told))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["evaluation"]["compared_with"] = {str(home / "other"): {"matched_cosine": 0.5, "shared_features": 0.5}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "feature_index").mkdir()
    facts = {"lm": {"name": str(lm), "revision": "local-sha256:0"}, "text": {"dataset": str(texts), "revision": None}}
    (folder / "feature_index/index.json").write_text(json.dumps({**facts, "twin": {"name": f"{home}/twin"}}))
    for stray in ("notes.txt", "debug/batch.json", "feature_index/notes.txt", "pictures/.old.json"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_text(f"not yours: {home}")
    return folder


def searched(hub: LoopbackHub, repo: str, kind: str = "model") -> dict[str, bytes]:
    """The files of a repository, in none of which a canary stands; nor in its commits."""
    files = hub.files(repo, kind=kind)
    said = "\n".join(f"{commit.title} {commit.message}" for commit in hub.commits(repo, kind=kind))
    for name, content in {**files, "commits": said.encode()}.items():
        for canary in (USER, HOST, "canaryfolder", "to-my-love", SECRET, hub.token):
            assert canary.encode() not in content.lower(), (name, canary)
    assert not [name for name in files if name.endswith((".pyc", "notes.txt", "batch.json", ".old.json"))]
    return files


def test_a_published_run_holds_no_canary(hub, client, run) -> None:
    done = client.script("push_to_hub", str(run), "--repo_id", "acme/run", "--include_index")
    assert done.code == 0, done.err
    assert "publish the model and say where with --model_id" in done.err and "--dataset_id" in done.err
    assert "shows pieces of the text local:text, of at most 48 tokens each" in done.err
    files = searched(hub, "acme/run")
    config = json.loads(files["config.json"])
    assert (config["lm_name"], config["dataset"]) == ("local:model", "local:text")
    assert json.loads(files["feature_index/index.json"])["lm"]["name"] == "local:model"
    told = json.loads(files["run.json"])
    command = "python train.py --dataset local:text --model=local:model --rdzv_endpoint localhost:29500 --token '***'"
    assert told["command"] == command and told["arguments"]["output_dir"] == "x"
    assert 'lm="FOLDER")' in files["README.md"].decode()


@pytest.mark.parametrize(
    "code",
    [
        "sae.push_to_hub('acme/REPO')",
        "sae.save_pretrained(str(Path.home() / 'saved'), push_to_hub=True, repo_id='acme/REPO')",
    ],
)
def test_an_sae_published_from_python_holds_no_canary(code, hub, client, run) -> None:
    repo = f"python-{len(code)}"
    start = "from pathlib import Path\nfrom hf_selortho import SelOrthoSAE\n"
    start += f"sae = SelOrthoSAE.from_pretrained({str(run)!r})\n"
    client.run(start + code.replace("REPO", repo))
    assert json.loads(searched(hub, f"acme/{repo}")["config.json"])["lm_name"] == "local:model"
    for way in ("push_to_hub('acme/config')", "save_pretrained('c', push_to_hub=True, repo_id='acme/config')"):
        assert "use SelOrthoSAE.push_to_hub" in client.failure(f"{start}sae.config.{way}")
    assert ("model", "acme/config") not in hub.storage.repos


def test_a_published_cache_holds_no_canary_and_is_still_read(hub, client, home, lm, texts) -> None:
    folder = home / "canaryfolder-acts"
    write_cache(folder, [9, 7], (5,))
    manifest = json.loads((folder / "manifest.json").read_text())
    local = {"lm_name": str(lm), "lm_revision": "local-sha256:0", "dataset": str(texts), "dataset_revision": None}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **local}))
    done = client.script("push_to_hub", str(folder), "--repo_id", "acme/acts", "--license", "mit")
    assert done.code == 0 and "--activations hub:acme/acts" in done.out, done.err
    files = searched(hub, "acme/acts", "dataset")
    assert b"license: mit" in files["README.md"] and b"hub:acme/acts" in files["README.md"]
    code = """
from hf_selortho.data.activation_cache import ActivationCache
cache = ActivationCache("hub:acme/acts")
print(cache.manifest.rows, cache.manifest.lm_name, len(cache.read(cache.manifest.shards[0], [2])))
"""
    assert client.run(code) == "16 local:model 9\n"


@pytest.mark.parametrize(
    "option", ["--include_index", "--license=other --license_link=x", "--twin=x", "--seeds=x", "--template=x"]
)
def test_options_of_saes_are_refused_for_a_cache(option, hub, client, tmp_path) -> None:
    write_cache(tmp_path, [9], (5,))
    done = client.script("push_to_hub", str(tmp_path), "--repo_id", "acme/acts-of", *option.split())
    assert done.code == 2 and f"{option.split()[-1].partition('=')[0]}: {tmp_path} holds cached activations" in done.err


def test_a_space_holds_no_canary(hub, client, run) -> None:
    pytest.importorskip("gradio")
    assert client.script("push_to_hub", str(run), "--repo_id", "acme/shown").code == 0
    done = client.script("deploy_space", "--space", "acme/page", "--sae", "acme/shown")
    assert done.code == 0, done.err
    files = hub.files("acme/page", kind="space")
    assert REQUIREMENTS in files and not any("__pycache__" in name or name.endswith(".pyc") for name in files)
    for name, content in files.items():
        assert USER.encode() not in content and HOST.encode() not in content, name


def test_a_local_model_and_text_are_published_under_their_ids(hub, client, lm, texts, home) -> None:
    """And a training that pushes itself: others capture with what it has published, without naming the model."""
    hub.upload("org/lm", lm)
    commits = {
        "model": hub.upload("org/lm", lm, "model", "feature/x"),
        "dataset": hub.commit("org/texts", {"t.csv": texts}, kind="dataset"),
    }
    settings = {
        "model": lm, "lm_dtype": "float32", "layer": 1, "dataset": texts, "d_sae": 64, "context_length": 32,
        "batch_size": 128, "buffer_contexts": 32, "refresh_every": 4, "max_steps": 2, "eval_samples": 4,
        "eval_ce_samples": 2, "output_dir": home / "trained", "cpu": True, "push_to_hub": True,
        "hub_model_id": "org/sae", "model_id": "org/lm@feature%2Fx", "dataset_id": "org/texts@main",
    }  # fmt: skip
    done = client.script("train", *[part for key, value in settings.items() for part in (f"--{key}", str(value))])
    assert done.code == 0 and "one of this machine" not in done.err, done.err[-2000:]
    files = searched(hub, "org/sae")
    config, card = json.loads(files["config.json"]), files["README.md"].decode()
    assert (config["lm_name"], config["lm_revision"]) == ("org/lm", commits["model"])
    assert (config["dataset"], config["dataset_revision"]) == ("org/texts", commits["dataset"])
    assert "base_model: org/lm" in card and "- org/texts" in card
    assert json.loads(files["saelens/cfg.json"])["metadata"]["hf_model_name"] == "org/lm"
    told = json.loads(files["run.json"])["arguments"]
    assert (told["model"], told["model_revision"]) == ("org/lm", commits["model"])
    code = "from hf_selortho import SelOrthoSAE\nsae = SelOrthoSAE.from_pretrained('org/sae')\n"
    assert client.run(f"{code}print(len(sae.capture(['The market sold.'])))") == "1\n"
    done = client.script("push_to_hub", str(home / "trained"), "--repo_id", "org/sae", "--model_id", "org/none")
    assert done.code == 2 and 'unknown model "org/none"' in done.err


def test_who_has_not_the_local_model_is_told_how_to_pass_one(hub, client, lm, home) -> None:
    revision = client.run(f"from hf_selortho.language_models.loading import find_revision as f\nprint(f({str(lm)!r}))")
    names = {"lm_name": str(lm), "lm_revision": revision.strip(), "d_in": 32, "layer": 1, "dataset": "/x/t.csv"}
    folder = save_run(home / "captured", hook_name="model.layers.1", **names)
    assert client.script("push_to_hub", str(folder), "--repo_id", "acme/captured").code == 0
    code = "from hf_selortho import SelOrthoSAE\nsae = SelOrthoSAE.from_pretrained('acme/captured')\n"
    said = client.failure(f"{code}sae.capture(['The market sold.'])")
    assert '"local:model" is a folder of the machine' in said and "lm=" in said
    answer = client.script("evaluate_sae", "acme/captured", "--cpu")
    assert answer.code == 2 and "text that was not published: --dataset is needed" in answer.err.splitlines()[-1]
    heard = (
        "import logging\nheard = []\nlogging.getLogger('hf_selortho.features.token_features').warning = heard.append\n"
    )
    print_it = f"print(len(sae.capture(['The market sold.'], lm={str(lm)!r})))"
    assert client.run(f"{code}{heard}{print_it}") == "1\n"  # and no warning of another language model


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--model_id", "lm", '--model_id: unknown model "lm": neither on the Hub'),
        ("--model_id", "/x/lm", "expected owner/name[@revision]"),
        ("--dataset_id", "a b/c", '--dataset_id: unknown dataset "a b/c"'),
        ("--dataset_id", "a/b@", "expected owner/name[@revision]"),
        ("--commit_message", f"of {HOST}", f"--commit_message holds the name of this machine ('{HOST}')"),
    ],
)
def test_what_is_no_id_is_refused(option, value, said, hub, client, run) -> None:
    done = client.script("push_to_hub", str(run), "--repo_id", "acme/refused", option, value)
    assert done.code == 2 and said in done.err.strip().splitlines()[-1]
    assert ("model", "acme/refused") not in hub.storage.repos


def test_an_id_for_what_came_from_the_hub_is_refused(client, home) -> None:
    folder = save_run(home / "of-the-hub", lm_name="org/other", lm_revision="c" * 40)
    done = client.script("push_to_hub", str(folder), "--repo_id", "acme/refused", "--model_id", "org/lm")
    assert done.code == 2 and "the run has read org/other, which is no model of this machine" in done.err


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 9))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def safetensors(path: Path, words: str) -> None:
    save_file({"x": torch.zeros(2)}, path, {"trained on": words})


def parquet(path: Path, words: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1]}, metadata={"source": words}), path)


WRITERS = {
    "metrics.jsonl": lambda path, words: path.write_text(json.dumps({"step": 1, "file": words})),
    "README.md": lambda path, words: path.write_text(f"# See `{words}`"),
    "a.png": lambda path, words: path.write_bytes(png(chunk(b"tEXt", b"Source\0" + words.encode()))),
    "b.png": lambda path, words: path.write_bytes(png(chunk(b"zTXt", b"S\0\0" + zlib.compress(words.encode())))),
    "model.safetensors": safetensors,
    "features.parquet": parquet,
    "app.pyc": lambda path, words: path.write_bytes(b"\xa7\x0d\0\0" + compile("1", words, "exec").co_filename.encode()),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("HOME/texts/x.csv", "the home folder"),
        (f"/scratch/{USER}/x.csv", "the user name"),
        (f"nfs://{HOST}/x.csv", "the name of this machine"),
        (SECRET, "an access token"),
    ],
)
def test_the_gate_refuses_any_file_that_holds_a_canary(name, words, what, hub, client, home, tmp_path) -> None:
    WRITERS[name](tmp_path / name, words.replace("HOME", str(home)))
    code = "from pathlib import Path\nfrom hf_selortho.hub.push import push_folder\n"
    said = client.failure(f"{code}push_folder(Path({str(tmp_path)!r}), 'acme/gate')")
    assert f"{name} holds {what}" in said and "so nothing was pushed: " in said and SECRET not in said
    assert ("model", "acme/gate") not in hub.storage.repos


@pytest.fixture
def alice(monkeypatch) -> None:
    """The machine of somebody with a plain name."""
    for name, value in {"HOME": "/home/alice", "USER": "alice", "LOGNAME": "alice", "HOSTNAME": "jupiter"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "jupiter")
    monkeypatch.setattr("platform.node", lambda: "jupiter")


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("alice/sae", False), ("https://huggingface.co/alice/sae/tree/main", False), ("[a](/spaces/x) by alice", False),
        ("/home/alicexx/x", False), ("alice", False), ("jupiterian", False), ("/home/alice", True),
        ('"/data/alice/x"', True), ("file:///data/alice", True), ("~alice/x", True), ("../alice/x", True),
        ("C:\\\\Users\\\\alice\\\\x", True), ("x:/data/alice/y", True), ("on Jupiter.lan", True),
        ("mnt/home/alice/x", True),
    ],
)  # fmt: skip
def test_a_private_name_is_told_from_an_id_of_the_hub(alice, text, private) -> None:
    assert bool(list(private_names(text.encode()))) == private


def test_names_that_everybody_has_are_not_private(monkeypatch) -> None:
    for name, value in {"HOME": "/root", "USER": "root", "LOGNAME": "root", "HOSTNAME": "gemma"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "gemma")
    monkeypatch.setattr("platform.node", lambda: "gemma")
    for text in ("the root of it", "/srv/root/x", "site/root", "google/gemma-2-2b", "Gemma is", "/rooted"):
        assert not list(private_names(text.encode())), text
    assert list(private_names(b'"/root/x.csv"'))


@pytest.mark.parametrize(
    ("key", "value", "public"),
    [
        ("dataset", "/home/alice/my letters.csv", "local:text"), ("dataset", "letters.csv", "local:text"),
        ("dataset", "org/letters", "org/letters"), ("model", "~/lm", "local:model"), ("model", "./lm", "local:model"),
        ("activations", "hub:org/acts@main", "hub:org/acts@main"), ("activations", "/x/acts", "local:activations"),
        ("output_dir", "/home/alice/runs/x", "x"), ("output_dir", "runs/x", "runs/x"),
        ("output_dir", "/data/alice", "local"),
        ("output_dir", "C:\\Users\\alice\\x", "x"), ("separator", "\\t", "\\t"), ("separator", "/", "/"),
        ("said", "cannot read /home/alice/x.csv: no such file", "cannot read x.csv: no such file"),
        ("said", "see https://huggingface.co/alice/sae", "see https://huggingface.co/alice/sae"),
        ("command", "a --dataset 'my letters/x.csv' --top 3", "a --dataset local:text --top 3"),
        ("command", "a --dataset=/x/it\\'s.csv --model org/lm", "a --dataset=local:text --model org/lm"),
        ("command", "train.py --variants '{\"a\": {\"k\": 1}}'", "train.py --variants '{\"a\": {\"k\": 1}}'"),
    ],
)  # fmt: skip
def test_paths_in_settings_become_names_that_are_visibly_local(alice, key, value, public) -> None:
    assert without_paths({key: [value]}) == {key: [public]}


def test_a_home_with_blanks_is_not_left_in_a_text(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/jane o'doe")
    said = {"said": "see /home/jane o'doe/x y/letters.csv: no such file", "at": "C:/x and /home/jane o'doe/z"}
    assert "jane" not in str(without_paths(said)) and "doe" not in str(without_paths(said))


def test_what_lies_in_the_cache_of_the_hub_is_published_under_its_id(hub, client, home) -> None:
    folder = f"{home}/hf/hub/models--org--lm-x/snapshots/{'b' * 40}"
    run = save_run(home / "cached", lm_name=folder, lm_revision="local-sha256:0")
    assert client.script("push_to_hub", str(run), "--repo_id", "acme/cached").code == 0
    config = json.loads(hub.files("acme/cached")["config.json"])
    assert (config["lm_name"], config["lm_revision"]) == ("org/lm-x", "b" * 40)


def test_every_push_goes_through_the_gate() -> None:
    root = Path(__file__).parents[2] / "hf_selortho"
    sends = re.compile(r"create_commit\(|upload_file\(|upload_folder\(|upload_large_folder\(|super\(\)\.push_to_hub")
    found = {path.relative_to(root).as_posix(): len(sends.findall(path.read_text())) for path in root.rglob("*.py")}
    # that of the config is of a copy on the Hub, where this package is not installed
    assert {name: n for name, n in found.items() if n} == {"hub/push.py": 1, "configuration_selortho.py": 1}
