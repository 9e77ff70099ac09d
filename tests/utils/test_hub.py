"""A real HTTP server answers as the Hub does; then nobody answers any more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_selortho

# Everything in one process of its own: the Hugging Face libraries read HF_ENDPOINT once, when they are imported.
_CLIENT = """
import hashlib, http.server, json, os, sys, threading
from pathlib import Path
from urllib.parse import urlparse

MODEL = Path(sys.argv[1])
COMMIT = "c0ffee" + "0" * 34
PAGES = {"acme/open": False, "acme/gated": "manual"}


class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.reply(status, X_Error_Code=code, X_Error_Message=message)

    def do_GET(self):
        parts = urlparse(self.path).path.strip("/").split("/")
        is_page = parts[0] == "api"
        names = [part for part in parts if part not in ("api", "models", "datasets")]
        repository, rest = "/".join(names[:2]).lower(), names[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        if self.headers.get("Authorization") == "Bearer hf_expired":
            self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
        elif repository not in PAGES:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT) and rest != ["auth-check"]:
            self.refuse(404, "RevisionNotFound", "Invalid rev id: " + revision)
        elif rest == ["auth-check"]:
            self.refuse(401, "GatedRepo", "Access is restricted")
        elif is_page and rest[:1] == ["tree"]:
            self.reply(200, b"[]", Content_Type="application/json")
        elif is_page:
            page = {"id": repository, "sha": COMMIT, "gated": PAGES[repository], "siblings": [], "tags": []}
            self.reply(200, json.dumps(page).encode(), Content_Type="application/json")
        elif PAGES[repository]:
            self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo", "Access is restricted")
        elif not (MODEL / rest[2]).is_file():
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            body = (MODEL / rest[2]).read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            self.reply(200, body, X_Repo_Commit=COMMIT, ETag=etag)

    do_HEAD = do_POST = do_GET


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

from hf_selortho.language_models.loading import load_language_model
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.errors import SelOrthoError

results = {}


def note(name, call):
    try:
        results[name] = call()
    except SelOrthoError as error:
        results[name] = f"ERROR {error}"


note("unknown model", lambda: load_language_model("acme/none"))
note("gated model", lambda: load_language_model("acme/gated"))
note("gated model with token", lambda: load_language_model("acme/gated", token="hf_other"))
note("expired token", lambda: load_language_model("acme/open", token="hf_expired"))
note("unknown revision", lambda: load_language_model("acme/open", revision="v9"))
note("name in other cases", lambda: load_language_model("Acme/OPEN", dtype="float32").name)
note("model", lambda: load_language_model("acme/open", dtype="float32").revision)
for streaming in (False, True):
    kind = " stream" if streaming else ""
    note("unknown dataset" + kind, lambda: open_documents(TextSource("acme/none", streaming=streaming)))
    note("gated dataset" + kind, lambda: open_documents(TextSource("acme/gated", streaming=streaming)))
note("unknown dataset revision", lambda: open_documents(TextSource("acme/open", dataset_revision="v9")))
server.shutdown()
server.server_close()
note("cached model, no network", lambda: load_language_model("acme/open", dtype="float32").revision)
note("cached commit, no network", lambda: load_language_model("acme/open", revision=COMMIT).revision)
note("other revision, no network", lambda: load_language_model("acme/open", revision="v9"))
note("model, no network", lambda: load_language_model("acme/none"))
note("dataset, no network", lambda: open_documents(TextSource("acme/none")))
note("stream, no network", lambda: open_documents(TextSource("acme/none", streaming=True)))
print(json.dumps(results))
"""
_COMMIT = "c0ffee" + "0" * 34
_UNKNOWN = "neither on the Hub nor a local path"
_ACCEPT = "accept its terms at https://huggingface.co/"
_EXPECTED = {
    "unknown model": ['unknown model "acme/none"', _UNKNOWN],
    "gated model": ["is gated", _ACCEPT + "acme/gated", "hf auth login", "HF_TOKEN"],
    "gated model with token": ["is gated", _ACCEPT + "acme/gated", "the account of your token"],
    "expired token": ["check your token"],
    "unknown revision": ['model "acme/open" has no revision "v9"'],
    "unknown dataset": ['unknown dataset "acme/none"', _UNKNOWN],
    "unknown dataset stream": ['unknown dataset "acme/none"', _UNKNOWN],
    "gated dataset": ["is gated", _ACCEPT + "datasets/acme/gated"],
    "gated dataset stream": ["is gated", _ACCEPT + "datasets/acme/gated"],
    "unknown dataset revision": ['dataset "acme/open" has no revision "v9"'],
    "other revision, no network": ["the Hub cannot be reached", "--preset demo"],
    "model, no network": ["the Hub cannot be reached", "--preset demo"],
    "dataset, no network": ["the Hub cannot be reached", "--preset demo"],
    "stream, no network": ["the Hub cannot be reached", "--preset demo"],
}


@pytest.fixture(scope="module")
def answers(tiny_lm_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("hub-home")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    environment["PYTHONPATH"] = str(Path(hf_selortho.__file__).parents[1])
    command = [sys.executable, "-c", _CLIENT, str(tiny_lm_dir("llama"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", _EXPECTED)
def test_what_the_hub_refuses_is_one_line(case: str, answers: dict[str, str]) -> None:
    assert answers[case].startswith("ERROR ")
    assert "\n" not in answers[case]
    for part in _EXPECTED[case]:
        assert part in answers[case]


def test_a_name_is_recorded_in_the_cases_of_the_hub(answers: dict[str, str]) -> None:
    assert answers["name in other cases"] == "acme/open"


@pytest.mark.parametrize("case", ["model", "cached model, no network", "cached commit, no network"])
def test_revision_is_the_resolved_commit_also_without_network(case: str, answers: dict[str, str]) -> None:
    assert answers[case] == _COMMIT
