"""Publishing while networks and servers fail: one clear line, nothing half-published, nothing twice."""

from __future__ import annotations

import re

import pytest

from tests.finished_run import save_run
from tests.hub.test_push import own_commits, push, refused, snapshot
from tests.hub_client import HubClient
from tests.loopback_hub import Fault, LoopbackHub

LARGE = {"d_sae": 20_000, "d_in": 32}  # weights of 5 MB


@pytest.fixture(autouse=True)
def _no_faults_left(hub):
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with HubClient(hub.environment(tmp_path_factory.mktemp("home"))) as client:
        client.run("from hf_selortho.utils import hub\nhub._PAUSE = 0.05  # seconds between attempts\n")
        yield client


def others_push(hub, repo: str):
    return lambda: hub.commit(repo, {"config.json": b'{"model_type": "selortho_sae", "theirs": 1}'})


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("busy", [Fault("POST", "/commit/", status=503, times=2), Fault("POST", "/preupload/", status=503, times=1)]),
        ("limited", [Fault("POST", "/commit/", status=429, headers={"Retry-After": "1"})]),
        ("cut-twice", [Fault("PUT", "/lfs/", cut_after=2_000_000, times=2)]),
        ("lost", [Fault("POST", "/commit/", lose_answer=True)]),
        ("lost-busy", [Fault("POST", "/commit/", lose_answer=True), Fault("GET", "/models/", status=503, after=4)]),
    ],
)  # fmt: skip
def test_what_passes_is_waited_for(name, faults, hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run", seed=sum(name.encode()), **LARGE)  # weights that the Hub has not got
    before = snapshot(run)
    hub.inject(*faults)
    assert "in one commit" in push(client, run, f"acme/{name}")
    assert hub.files(f"acme/{name}")["model.safetensors"] == before["model.safetensors"]
    assert own_commits(hub, f"acme/{name}") == ["Upload SAE with hf_selortho"]
    assert snapshot(run) == before and sum(fault.times for fault in faults) == 0
    hub.faults.clear()
    assert "has all of this already" in push(client, run, f"acme/{name}")


def test_a_proposal_whose_answer_is_lost_is_made_once(hub, client, tmp_path) -> None:
    hub.create_repo("acme/lost-proposal")
    hub.inject(Fault("POST", "/commit/", lose_answer=True))
    said = push(client, save_run(tmp_path / "run"), "acme/lost-proposal", "--create_pr")
    assert "/acme/lost-proposal/discussions/1" in said
    assert hub.storage.repos["model", "acme/lost-proposal"].proposals.keys() == {1}


def test_an_upload_that_breaks_off_goes_on_where_it_was(hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run", **LARGE)
    hub.inject(Fault("POST", "/commit/", status=503, times=99))
    said = refused(client, run, "acme/broken")
    assert "the Hub cannot be reached for acme/broken" in said and "run the same command again" in said
    assert own_commits(hub, "acme/broken") == []  # nothing of it is to be seen
    hub.faults.clear()
    sent = len(hub.asked("PUT", "/lfs/"))
    push(client, run, "acme/broken")
    assert len(hub.asked("PUT", "/lfs/")) == sent  # the weights had arrived


def test_whoever_pushes_in_between_is_not_overwritten(hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run")
    push(client, run, "acme/race")
    (run / "pictures/a.png").write_bytes(b"another picture")
    hub.inject(Fault("POST", "/commit/", before=others_push(hub, "acme/race")))
    assert "somebody else has changed config.json of acme/race" in refused(client, run, "acme/race")
    assert own_commits(hub, "acme/race") == ["somebody else's commit", "Upload SAE with hf_selortho"]
    assert b"theirs" in hub.files("acme/race")["config.json"]
    assert hub.files("acme/race")["pictures/a.png"] == b"png of a.png"


WRONG, READ = "hf_" + "x" * 34, LoopbackHub.read_token


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (WRONG, "acme/token", "does not accept your access token"),
        (None, "acme/token", "does not accept your access token, or there is none"),
        (READ, "acme/token", "may not write to acme/token: .* --create_pr"),
        ("write", "else/where", "may not write to else/where"),
        (READ, "acme/there", "may not write to acme/there"),
    ],
)
def test_who_may_not_write_is_told(token, repo, message, hub, client, tmp_path) -> None:
    if ("model", "acme/there") not in hub.storage.repos:
        hub.create_repo("acme/there")
    run = save_run(tmp_path / "run")
    before, mine = snapshot(run), hub.token
    client.run(set_token(mine if token == "write" else token))
    try:
        said = refused(client, run, repo)
    finally:
        client.run(set_token(mine))
    assert re.search(message, said), said
    assert snapshot(run) == before and not any(value in said for value in (WRONG, READ, mine))
    assert ("model", "acme/token") not in hub.storage.repos and own_commits(hub, "acme/there") == []


def set_token(token: str | None) -> str:
    change = f"os.environ['HF_TOKEN'] = {token!r}" if token else "os.environ.pop('HF_TOKEN', None)"
    return f"import os\n{change}\n"


def test_metadata_that_the_hub_refuses_is_told(hub, client, tmp_path) -> None:
    body = b'{"errors": [{"message": "license must be one of these"}]}'
    hub.inject(Fault("POST", "/validate-yaml", status=400, body=body))
    said = refused(client, save_run(tmp_path / "run"), "acme/metadata", "--license", "mine")
    assert "license must be one of these" in said and own_commits(hub, "acme/metadata") == []


@pytest.mark.slow
def test_without_a_network_it_says_so(hub, client, tmp_path) -> None:
    offline = "from huggingface_hub import constants\nconstants.HF_HUB_OFFLINE = {}\n"
    client.run(offline.format(True))
    try:
        said = refused(client, save_run(tmp_path / "run"), "acme/offline")
    finally:
        client.run(offline.format(False))
    assert "cannot be reached for acme/offline" in said
