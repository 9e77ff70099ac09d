"""A Hub on this machine: a real HTTP server that speaks what the real client of huggingface_hub speaks.

    with LoopbackHub() as hub:
        done = hub.run("import huggingface_hub; ...", home=tmp_path / "home")  # in a process of its own

Uploads go the client's way without Xet. `inject` makes requests fail as networks and servers do.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loopback_storage import (
    Commit,
    Repo,
    Storage,
    StoredFile,
    content_of,
    folders_of,
    is_large,
    large_file,
)

ROOT = Path(__file__).parents[1]
PAGE = 5  # entries of a page of a listing: few, so that clients have to ask for the next
WRITE, READ, OWNERS = "hf_" + "w" * 34, "hf_" + "r" * 34, ("acme", "org")
_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class Request(NamedTuple):
    """A request as it was answered."""

    method: str
    path: str  # with its query
    status: int | None  # None: the connection was closed without an answer
    token: str | None
    range: str | None
    received: int  # bytes of its body
    sent: int = 0  # bytes of the body of the answer


@dataclass
class Fault:
    """What happens to the first `times` requests that match, after `after` matching ones were served well."""

    method: str
    path: str  # a pattern that is searched in the path and query
    times: int = 1
    after: int = 0
    status: int | None = None  # answered in place of the real answer
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None  # bytes of the answer, or of an upload, after which the connection closes
    lose_answer: bool = False  # serve it, then close the connection
    damage: Callable[[bytes], bytes] | None = None  # of the body of the answer
    before: Callable[[], object] | None = None  # called first


class LoopbackHub:
    """The server, its repositories, and processes that are its clients."""

    token, read_token = WRITE, READ

    def __init__(self) -> None:
        self.storage = Storage()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.stopped = False

    def __enter__(self) -> LoopbackHub:
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Nobody answers any more, on connections that are open either."""
        self.stopped = True
        self._server.shutdown()
        self._server.server_close()

    def create_repo(
        self, name: str, kind: str = "model", private: bool = False, gated: bool = False, sdk: str | None = None
    ) -> None:
        self.storage.create(name, kind, private, gated, sdk)

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes | Path],
        message: str = "somebody else's commit",
        branch: str = "main",
        kind: str = "model",
    ) -> str:
        """Commit as somebody else would, on the Hub's pages; the repository and the branch are made if missing."""
        with self.lock:
            repo = self.storage.repos.get((kind, name)) or self.storage.create(name, kind)
            parent = repo.resolve(branch) or repo.resolve("main")
            content = {path: content_of(data) for path, data in files.items()}
            commit = self.storage.make_commit(repo, message, content, parent)
            repo.refs[f"refs/heads/{branch}"] = commit.oid
            return commit.oid

    def upload(self, name: str, folder: Path, kind: str = "model", branch: str = "main") -> str:
        """Commit a folder."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.commit(name, {p.relative_to(folder).as_posix(): p for p in paths}, branch=branch, kind=kind)

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        commit = self.storage.repos[kind, name].resolve(revision)
        assert commit is not None, f"{name} has no revision {revision}"
        return {path: self.storage.read(file) for path, file in commit.files.items()}

    def commits(self, name: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """Newest first."""
        return self.storage.repos[kind, name].history(revision)

    def tag(self, name: str, tag: str, commit: str | None = None, kind: str = "model") -> None:
        repo = self.storage.repos[kind, name]
        repo.refs[f"refs/tags/{tag}"] = commit or repo.refs["refs/heads/main"]

    def inject(self, *faults: Fault) -> None:
        self.faults += faults

    def asked(self, method: str, path: str) -> list[Request]:
        """Requests of a method whose path matches."""
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]

    def served(self, name: str) -> list[Request]:
        """Downloads of a file, or of parts of it: `range` is what was asked for, `sent` the bytes of the answer."""
        return [r for r in self.asked("GET", rf"/resolve/[^/]+/{re.escape(name)}(\?|$)") if r.status in (200, 206)]

    def environment(self, home: Path, token: str | None = WRITE) -> dict[str, str]:
        """Of a client: this Hub, a home of its own, nothing of the tests' offline mode."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def run(
        self, what: str | Sequence[str], home: Path, token: str | None = WRITE, bare_python: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Python code, or a script with its arguments, in a client's process of its own.

        Args:
            bare_python: of an environment without our package, which is then not to be found on other ways either.
        """
        python = bare_python or sys.executable
        command = [python, "-c", what] if isinstance(what, str) else [python, *what]
        environment = self.environment(home, token)
        home.mkdir(parents=True, exist_ok=True)
        if bare_python:
            del environment["PYTHONPATH"]
        place = home if bare_python else ROOT
        return subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
        )


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """An answer that is no."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status, self.headers, self.more = status, {"X-Error-Message": message}, more
        if code:
            self.headers["X-Error-Code"] = code


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._received = 0
        if self.hub.stopped:
            self.close_connection = True
            return
        fault = self._fault()
        if fault and fault.before:
            fault.before()
        if fault and fault.cut_after is not None and self.command in ("PUT", "POST"):
            self._received = len(self.rfile.read(min(fault.cut_after, int(self.headers.get("Content-Length") or 0))))
            self._close()
            return
        body = self._body()
        if fault and fault.status:
            self._answer(fault.status, fault.body, fault.headers)
            return
        try:
            with self.hub.lock:
                status, content, headers = self._serve(body)
        except Refused as refused:
            said = json.dumps({"error": str(refused), **refused.more}).encode()
            status, content, headers = refused.status, said, refused.headers
        if fault and fault.lose_answer:
            self._close()
            return
        if fault and fault.damage:
            content = fault.damage(content)
        self._answer(status, content, headers, fault.cut_after if fault else None)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, self.path):
                    if fault.after:
                        fault.after -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._received = len(body)
        return body

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str], cut_after: int | None = None) -> None:
        sent = b"" if self.command == "HEAD" else body[:cut_after]
        self._note(status, len(sent))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(sent)
        if cut_after is not None:
            self.wfile.flush()
            self.close_connection = True

    def _close(self) -> None:
        self._note(None)
        self.close_connection = True

    def _note(self, status: int | None, sent: int = 0) -> None:
        token, asked = self._token(), self.headers.get("Range")
        self.hub.requests.append(Request(self.command, self.path, status, token, asked, self._received, sent))

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _serve(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        words = [unquote(word) for word in parts.path.strip("/").split("/")]
        if self._token() not in (None, WRITE, READ) and words[0] != "lfs":
            raise Refused(401, message="Invalid credentials in Authorization header")
        if words[0] == "lfs":
            return self._large(words[1], body)
        if words[0] == "api":
            return self._api(words[1:], body)
        kind = _KINDS.get(words[0], "model")
        words = words[1:] if words[0] in _KINDS else words
        if words[2:3] == ["resolve"]:
            return self._resolve(self._repo(kind, words[:2], reads=True), words[3], "/".join(words[4:]))
        if words[1].endswith(".git"):
            self._repo(kind, [words[0], words[1].removesuffix(".git")], writes=True)
            return self._large_batch(json.loads(body))
        raise Refused(404, message=f"no such page: {self.path}")

    def _api(self, words: Sequence[str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if words == ["whoami-v2"]:
            if self._token() is None:
                raise Refused(401, message="Invalid username or password.")
            return _json({"type": "user", "name": "acme", "orgs": [{"name": "org"}], "auth": {}})
        if words == ["validate-yaml"]:
            return _json({"errors": [], "warnings": []})
        if words == ["repos", "create"]:
            return self._create(json.loads(body))
        kind, rest = _KINDS[words[0]], list(words[3:])
        action = rest.pop(0) if rest else "info"
        writes = self.command == "POST" and action in ("commit", "preupload", "branch")
        if "create_pr" in self.query:
            writes = False  # whoever reads may propose
            self._need_token()
        repo = self._repo(kind, words[1:3], writes=writes, reads=action == "auth-check")
        if action == "discussions":
            return _json(self._discussions(repo))
        if action == "auth-check":
            return _json({})
        if action == "branch":
            return self._branch(repo, rest[0])
        revision = rest.pop(0) if rest else "main"
        commit = repo.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if action == "commit":
            return self._commit(repo, revision, commit, body)
        if action == "commits":
            entries = [_commit_entry(c) for c in repo.history(revision)]
            return self._page(entries)
        if action == "tree":
            return self._tree(commit, "/".join(rest))
        return _json(self._answer_about(action, repo, commit, body))

    def _answer_about(self, action: str, repo: Repo, commit: Commit, body: bytes) -> Any:
        if action == "preupload":
            return {"files": [_preupload_entry(file, commit) for file in json.loads(body)["files"]]}
        if action == "paths-info":
            paths = parse_qs(body.decode())["paths"] if b"paths=" in body else json.loads(body)["paths"]
            return [_tree_entry(path, commit.files[path]) for path in paths if path in commit.files]
        if action in ("info", "revision"):
            files = [{"rfilename": path} for path in sorted(commit.files)]
            about = {"id": repo.name, "sha": commit.oid, "private": repo.private, "siblings": files, "tags": []}
            of_space = {"sdk": repo.sdk} if repo.kind == "space" else {}
            return {**about, **of_space, "gated": "manual" if repo.gated else False}
        raise Refused(404, message=f"no such page: {self.path}")

    def _repo(self, kind: str, words: Sequence[str], reads: bool = False, writes: bool = False) -> Repo:
        name, token = "/".join(words), self._token()
        repo = self.hub.storage.repos.get((kind, name))
        if repo is None or (repo.private and token is None):
            raise Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if writes:
            self._need_token()
            if token == READ or words[0] not in OWNERS:
                raise Refused(403, message="You don't have the rights to write to this repository")
        if reads and repo.gated and token != WRITE:
            raise Refused(401 if token is None else 403, "GatedRepo", f"Access to {kind} {name} is restricted.")
        return repo

    def _need_token(self) -> None:
        if self._token() is None:
            raise Refused(401, message="Invalid username or password.")

    def _create(self, asked: Mapping[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        self._need_token()
        owner, kind = asked.get("organization") or "acme", asked.get("type") or "model"
        if self._token() == READ or owner not in OWNERS:
            raise Refused(403, message=f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else f'{kind}s/'}{name}"
        if (kind, name) in self.hub.storage.repos:
            raise Refused(409, message="You already created this repo", url=url)
        sdk = asked.get("sdk")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.storage.create(name, kind, private=bool(private), sdk=sdk)
        return _json({"url": url, "name": name, "id": name})

    def _discussions(self, repo: Repo) -> dict[str, Any]:
        about = {"author": {"name": "acme"}, "createdAt": "2026-01-01T00:00:00.000Z", "status": "open"}
        about |= {"isPullRequest": True, "repo": {"name": repo.name, "type": repo.kind}}
        found = [{**about, "num": number, "title": title} for number, title in repo.proposals.items()]
        return {"discussions": found, "count": len(found), "start": 0}

    def _branch(self, repo: Repo, name: str) -> tuple[int, bytes, dict[str, str]]:
        if f"refs/heads/{name}" in repo.refs:
            raise Refused(409, message=f"Reference {name} already exists")
        repo.refs[f"refs/heads/{name}"] = repo.refs["refs/heads/main"]
        return _json({})

    def _tree(self, commit: Commit, folder: str) -> tuple[int, bytes, dict[str, str]]:
        prefix, recursive = f"{folder}/" if folder else "", self.query.get("recursive", "").lower() in ("true", "1")
        entries = [_tree_entry(path, file) for path, file in commit.files.items()]
        entries += [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders_of(commit.files)
        ]
        within = [entry for entry in entries if entry["path"].startswith(prefix)]
        if not recursive:
            within = [entry for entry in within if "/" not in entry["path"].removeprefix(prefix)]
        if folder and not within:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        return self._page(sorted(within, key=lambda entry: entry["path"]))

    def _page(self, entries: list[Any]) -> tuple[int, bytes, dict[str, str]]:
        start = int(self.query.get("cursor", 0))
        status, body, headers = _json(entries[start : start + PAGE])
        if start + PAGE < len(entries):
            path = urlsplit(self.path).path
            rest = "".join(f"&{key}={value}" for key, value in self.query.items() if key != "cursor")
            headers["Link"] = f'<{self.hub.url}{path}?cursor={start + PAGE}{rest}>; rel="next"'
        return status, body, headers

    def _commit(self, repo: Repo, revision: str, head: Commit, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        proposes = "create_pr" in self.query
        parent = header.get("parentCommit")
        if parent and parent != head.oid and not proposes:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files: dict[str, bytes | StoredFile] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage.blobs:
                    raise Refused(400, message=f"the content of {value['path']} was never uploaded")
                files[value["path"]] = large_file(value["oid"], len(self.hub.storage.blobs[value["oid"]]))
        title, message = header["summary"], header.get("description", "")
        commit = self.hub.storage.make_commit(repo, title, files, head, message)
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        answer = {"commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{prefix}{repo.name}/commit/{commit.oid}"}
        if proposes:
            number = len(repo.proposals) + 1
            repo.proposals[number] = title
            repo.refs[f"refs/pr/{number}"] = commit.oid
            answer["pullRequestUrl"] = f"{self.hub.url}/{prefix}{repo.name}/discussions/{number}"
        else:
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            repo.refs[ref] = commit.oid
        return _json({"success": True, **answer})

    def _large_batch(self, asked: Mapping[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        objects = []
        for entry in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            is_there = entry["oid"] in self.hub.storage.blobs
            objects.append({"oid": entry["oid"], "size": entry["size"], **({} if is_there else {"actions": upload})})
        return _json({"transfer": "basic", "objects": objects})

    def _large(self, oid: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="the content does not have the announced hash")
        self.hub.storage.blobs[oid] = body
        return _json({})

    def _resolve(self, repo: Repo, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            refused = Refused(404, "EntryNotFound", "Entry not found")
            refused.headers |= headers
            raise refused
        content = self.hub.storage.read(file)
        headers |= {"ETag": f'"{file.etag}"', "X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked is None or not (asked[1] or asked[2]):
            if self.command == "HEAD":
                headers["Content-Length"] = str(file.size)
            return 200, content, headers
        last = int(asked[2]) if asked[1] and asked[2] else file.size - 1
        start = int(asked[1]) if asked[1] else max(0, file.size - int(asked[2]))  # "-500": the last 500 bytes
        end = min(last, file.size - 1)
        if start >= file.size or start > end:
            refused = Refused(416, message="Range not satisfiable")
            refused.headers["Content-Range"] = f"bytes */{file.size}"
            raise refused
        headers["Content-Range"] = f"bytes {start}-{end}/{file.size}"
        return 206, content[start : end + 1], headers


def _json(content: Any, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps(content).encode(), {"Content-Type": "application/json"}


def _commit_entry(commit: Commit) -> dict[str, Any]:
    about = {"authors": [{"user": "acme"}], "date": "2026-01-01T00:00:00.000Z"}
    return {"id": commit.oid, "title": commit.title, "message": commit.message, **about}


def _tree_entry(path: str, file: StoredFile) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    lfs = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return {**entry, "lfs": lfs} if file.sha256 else entry


def _preupload_entry(asked: Mapping[str, Any], commit: Commit) -> dict[str, Any]:
    mode = "lfs" if is_large(asked["path"], asked["size"]) else "regular"
    there = commit.files.get(asked["path"])
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there.etag if there else None}
