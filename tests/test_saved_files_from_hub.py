"""SAEs of the Hub, as a real HTTP server answers for it: checked as those of a folder are, and of one commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hf_selortho import SelOrthoConfig, SelOrthoSAE

# In a process of its own, as the Hugging Face libraries read HF_ENDPOINT once, when they are imported.
CLIENT = """
import hashlib, http.server, json, os, sys, threading
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT, CACHE, SECRET = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
COMMITS = {"main": "a" * 40, "v2": "b" * 40, "later": "c" * 40}
requests, moving = [], False


class Hub(http.server.BaseHTTPRequestHandler):
    # /api/models/OWNER/NAME[/revision/REV], /OWNER/NAME/resolve/REV/FILE; a folder for every repository and branch
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

    def do_GET(self):
        words = [unquote(word) for word in urlparse(self.path).path.strip("/").split("/")]
        is_page = words[:2] == ["api", "models"]
        words = words[2:] if is_page else words
        repository, revision, file = "/".join(words[:2]), (words[3:4] or ["main"])[0], "/".join(words[4:])
        requests.append(f"{revision} {file}")
        if moving and revision == "main" and file == "model.safetensors":
            revision = "later"  # somebody has pushed since config.json was asked for
        branch = next((name for name, commit in COMMITS.items() if revision in (name, commit)), "")
        if repository == "acme/private" and self.headers.get("Authorization") != f"Bearer {SECRET}":
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif not (ROOT / repository).is_dir():
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif not (ROOT / repository / branch).is_dir() or not branch:
            self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif is_page:
            page = {"id": repository, "sha": COMMITS[branch], "gated": False, "siblings": [], "tags": []}
            self.reply(200, json.dumps(page).encode(), Content_Type="application/json")
        elif not (path := ROOT / repository / branch / file).is_file():
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMITS[branch])
        else:
            body = path.read_bytes()
            self.reply(200, body, X_Repo_Commit=COMMITS[branch], ETag=f'"{hashlib.sha256(body).hexdigest()}"')

    do_HEAD = do_POST = do_GET


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE

found = {}


def attempt(key, name, **options):
    requests.clear()
    try:
        sae = SelOrthoSAE.from_pretrained(name, **{"cache_dir": CACHE, **options})
        found[key] = [sae.config.layer, sae.config.name_or_path, float(sae.input_scale), requests[:]]
    except SelOrthoError as error:
        chain, here = "", error
        while here is not None:
            chain, here = f"{chain} {here}", here.__cause__ or here.__context__
        found[key] = ["refused", str(error), SECRET in chain, requests[:]]


attempt("plain", "acme/sae")
attempt("cached", "acme/sae", local_files_only=True)
attempt("revision", "acme/sae", revision="v2")
attempt("commit", "acme/sae", revision="b" * 40)
attempt("subfolder", "acme/sae", subfolder="layer_3")
attempt("parts", "acme/parts")
attempt("parts cached", "acme/parts", local_files_only=True)
attempt("private", "acme/private", token=SECRET)
attempt("private without token", "acme/private", token=False, cache_dir=CACHE + "-2")
attempt("private with another token", "acme/private", token=SECRET + "x", cache_dir=CACHE + "-2")
attempt("too wide", "acme/wide")
attempt("pickle", "acme/pickle", token=SECRET)
attempt("index that leads out", "acme/out")
attempt("another model", "acme/llama", token=SECRET)
attempt("unknown", "acme/nothing", token=SECRET)
attempt("unknown revision", "acme/sae", revision="v3", token=SECRET)
attempt("no id", "a/b/c/d", token=SECRET)
moving = True
attempt("while somebody pushes", "acme/moving", cache_dir=CACHE + "-3")
server.shutdown()
server.server_close()
attempt("nobody answers, cached", "acme/sae", local_files_only=True)
attempt("nobody answers", "acme/parts", cache_dir=CACHE + "-4", local_files_only=True)
snapshot = next(Path(CACHE, "models--acme--sae", "snapshots", "a" * 40).glob("config.json")).parent
attempt("snapshot as a folder", str(snapshot))
print(json.dumps(found))
"""


def save(folder: Path, layer: int, **options) -> SelOrthoSAE:
    """An SAE that can be told by its layer, in the config, and its input scale, in the weights."""
    sae = SelOrthoSAE(SelOrthoConfig(d_in=12, d_sae=30, layer=layer))
    sae.input_scale.fill_(layer)
    sae.save_pretrained(folder, **options)
    return sae


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_saes_of_the_hub(tmp_path) -> None:
    hub, secret = tmp_path / "hub" / "acme", "hf_" + "aB3" * 11
    save(hub / "sae" / "main", 1)
    save(hub / "sae" / "v2", 2)
    save(hub / "sae" / "main" / "layer_3", 3)
    save(hub / "parts" / "main", 4, max_shard_size="1KB")
    save(hub / "private" / "main", 5)
    save(hub / "moving" / "main", 6)
    save(hub / "moving" / "later", 7)
    for name in ("wide", "pickle", "out", "llama"):
        save(hub / name / "main", 8, max_shard_size="1KB" if name == "out" else "1GB")
    change(hub / "wide" / "main" / "config.json", d_sae=10**9)
    change(hub / "llama" / "main" / "config.json", model_type="llama")
    change(
        hub / "out" / "main" / "model.safetensors.index.json", weight_map={"W_enc": "../../sae/main/model.safetensors"}
    )
    (hub / "pickle" / "main" / "model.safetensors").rename(hub / "pickle" / "main" / "pytorch_model.bin")

    online = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, hub.parent, tmp_path / "cache", secret],
        env={**online, "HF_HUB_DISABLE_XET": "1"},
        **{"capture_output": True, "text": True, "timeout": 200, "check": False},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    loaded = {"plain": 1, "cached": 1, "revision": 2, "commit": 2, "subfolder": 3, "parts": 4, "parts cached": 4}
    loaded |= {"private": 5, "while somebody pushes": 6, "nobody answers, cached": 1, "snapshot as a folder": 1}
    for key, layer in loaded.items():
        assert found[key][0] == found[key][2] == layer, (key, found[key])
    assert found["plain"][1] == "acme/sae" and found["parts"][1] == "acme/parts"
    assert found["cached"][3] == [] and found["parts cached"][3] == []
    commit = "a" * 40
    assert f"{commit} model.safetensors" in found["plain"][3]
    assert "main model.safetensors" not in found["while somebody pushes"][3]

    refused = {
        "private without token": "cannot load the SAE 'acme/private': acme/private is not a local folder",
        "private with another token": "cannot load the SAE 'acme/private'",
        "too wide": "W_dec has the shape (30, 12), d_in and d_sae of the config give (1000000000, 12)",
        "pickle": "cannot load the SAE 'acme/pickle': it holds no model.safetensors; other formats",
        "index that leads out": "names '../../sae/main/model.safetensors': expected safetensors files beside it",
        "another model": "model_type='llama', expected 'selortho_sae'",
        "unknown": "cannot load the SAE 'acme/nothing': acme/nothing is not a local folder",
        "unknown revision": "cannot load the SAE 'acme/sae': v3 is not a valid git identifier",
        "no id": "cannot load the SAE 'a/b/c/d'",
        "nobody answers": "cannot load the SAE 'acme/parts'",
    }
    for key, message in refused.items():
        assert found[key][0] == "refused" and message in found[key][1], (key, found[key])
        assert "\n" not in found[key][1] and not found[key][2]  # no token, in the causes either
    assert found.keys() == loaded.keys() | refused.keys()
    assert not any("model" in request for request in found["another model"][3])  # no weights of whatever it is
    written = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert secret.encode() not in written
