"""The loopback Hub, as the real client sees it: what other tests rely on."""

from __future__ import annotations

import urllib.error
import urllib.request

from tests.loopback_hub import Fault

SETUP = """
import os, pathlib, hashlib
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, CommitOperationAdd
from huggingface_hub import errors
api = HfApi()
"""


def test_who_may_do_what(hub, client) -> None:
    hub.create_repo("acme/private", private=True)
    hub.create_repo("acme/gated", gated=True)
    hub.commit("acme/gated", {"a.txt": b"one"})
    hub.create_repo("else/where")
    code = f"""
def tried(call):
    try:
        return call()
    except errors.HfHubHTTPError as error:
        return type(error).__name__, error.response.status_code

reader, wrong = {hub.read_token!r}, "hf_" + "x" * 34
print(api.whoami()["name"], tried(lambda: api.whoami(token=wrong)))
print(tried(lambda: api.model_info("acme/private", token=False)), api.model_info("acme/private").private)
print(tried(lambda: hf_hub_download("acme/gated", "a.txt", token=reader)))
print(tried(lambda: api.model_info("acme/none")))
print(tried(lambda: api.create_repo("acme/new", token=reader)), tried(lambda: api.create_repo("else/new")))
op = [CommitOperationAdd("a.txt", b"x")]
print(tried(lambda: api.create_commit("else/where", op, commit_message="m")))
print(api.create_repo("acme/private", exist_ok=True).repo_id)
"""
    assert client.run(SETUP + code).splitlines() == [
        "acme ('HfHubHTTPError', 401)",
        "('RepositoryNotFoundError', 401) True",
        "('GatedRepoError', 403)",
        "('RepositoryNotFoundError', 404)",
        "('HfHubHTTPError', 403) ('HfHubHTTPError', 403)",
        "('HfHubHTTPError', 403)",
        "acme/private",
    ]


def test_faults(hub, client, tmp_path) -> None:
    content = bytes(range(256)) * 100_000  # 25 MB
    hub.commit("acme/faults", {"large.bin": content, "small.txt": b"12345"})
    hub.inject(
        Fault("GET", "faults/resolve/.*large.bin", cut_after=15_000_000),
        Fault("GET", "faults/resolve/.*small.txt", damage=lambda body: b"x" + body[1:]),
        Fault("HEAD", "faults/resolve/.*small.txt", status=503, times=2),
        Fault("POST", "faults/commit", lose_answer=True),
    )
    code = """
print(hashlib.sha256(pathlib.Path(hf_hub_download("acme/faults", "large.bin")).read_bytes()).hexdigest())
for attempt in range(3):
    try:
        print(pathlib.Path(hf_hub_download("acme/faults", "small.txt")).read_text())
        break
    except errors.LocalEntryNotFoundError as error:
        print(error.__cause__.response.status_code)
try:
    api.create_commit("acme/faults", [CommitOperationAdd("small.txt", b"new")], commit_message="lost")
except Exception as error:
    print(type(error).__name__)
"""
    lines = client.run(SETUP + code).splitlines()
    assert lines[0] == hub.commits("acme/faults")[1].files["large.bin"].sha256
    assert any(r.range for r in hub.asked("GET", "faults/resolve/.*large.bin"))  # it went on where it was cut off
    assert lines[-2:] == ["x2345", "RemoteProtocolError"]
    assert hub.commits("acme/faults")[0].title == "lost"


def test_ranges_are_answered_and_counted(hub, client) -> None:
    content = bytes(range(256)) * 8192  # 2 MB
    hub.commit("acme/ranges", {"one.parquet": content, "sub/two.txt": b"0123456789"})
    code = """
from huggingface_hub import HfFileSystem
with HfFileSystem().open("acme/ranges/one.parquet", "rb", cache_type="none") as file:
    file.seek(256_000)
    print(file.read(512) == bytes(range(256)) * 2)
    file.seek(-8, 2)
    print(file.read())
"""
    assert client.run(SETUP + code).splitlines() == ["True", str(content[-8:])]
    served = hub.served("one.parquet")
    assert [(r.range, r.status, r.sent) for r in served] == [
        ("bytes=256000-256511", 206, 512),
        (f"bytes={len(content) - 8}-{len(content) - 1}", 206, 8),
    ]
    ranges = {
        "bytes=2-4": (206, b"234", "bytes 2-4/10"),
        "bytes=7-": (206, b"789", "bytes 7-9/10"),
        "bytes=-3": (206, b"789", "bytes 7-9/10"),
        "bytes=8-99": (206, b"89", "bytes 8-9/10"),
        "bytes=10-": (416, None, "bytes */10"),
        "lines=1-2": (200, b"0123456789", None),
    }
    for asked, (status, body, said) in ranges.items():
        request = urllib.request.Request(f"{hub.url}/acme/ranges/resolve/main/sub/two.txt", headers={"Range": asked})
        try:
            answer = urllib.request.urlopen(request)
            assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (status, body, said), asked
        except urllib.error.HTTPError as error:
            assert (error.code, error.headers["Content-Range"]) == (status, said), asked
    assert sum(r.sent for r in hub.served("sub/two.txt")) == 3 + 3 + 3 + 2 + 10
