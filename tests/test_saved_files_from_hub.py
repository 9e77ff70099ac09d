"""SAEs of the Hub, over real HTTP: checked as those of a folder are, all files of one commit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.formats import write_saelens
from tests.formats import published
from tests.hub_client import HubClient
from tests.loopback_hub import Fault, LoopbackHub

SECRET = LoopbackHub.token
IMPORTS = "from hf_selortho import SelOrthoConfig, SelOrthoSAE\n"


def save(folder: Path, layer: int, **options) -> SelOrthoSAE:
    """An SAE that can be told by its layer, in the config, and its input scale, in the weights."""
    sae = SelOrthoSAE(SelOrthoConfig(d_in=12, d_sae=30, layer=layer))
    sae.input_scale.fill_(layer)
    sae.save_pretrained(folder, **options)
    return sae


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    with LoopbackHub() as hub:
        commit = hub.upload("acme/sae", save_all(folder / "sae", 2))
        hub.tag("acme/sae", "v2", commit)
        hub.commit("acme/sae", files_of(save_all(folder / "dev", 9)), branch="dev")
        hub.upload("acme/sae", save_all(folder / "newer", 1))
        save(folder / "layers/layer_3", 3)
        save(folder / "layers/layer_12", 12)
        write_saelens(save(folder / "own", 3), folder / "lens/blocks.3/lens")
        save(folder / "parts", 4, max_shard_size="1KB")
        for name in ("wide", "pickle", "llama", "moving"):
            save(folder / name, 8)
        change(folder / "wide/config.json", d_sae=10**9)
        change(folder / "llama/config.json", model_type="llama")
        (folder / "pickle/model.safetensors").rename(folder / "pickle/pytorch_model.bin")
        for name in ("layers", "lens", "parts", "wide", "pickle", "llama", "moving"):
            hub.upload(f"acme/{name}", folder / name)
        hub.create_repo("acme/private", private=True)
        hub.upload("acme/private", save_all(folder / "private", 5))
        hub.create_repo("acme/gated", gated=True)
        hub.upload("acme/gated", folder / "private")
        yield hub


def save_all(folder: Path, layer: int) -> Path:
    save(folder, layer)
    return folder


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with HubClient(hub.environment(tmp_path_factory.mktemp("home"))) as client:
        client.run("from hf_selortho.utils import hub\nhub._PAUSE = 0.05  # seconds between attempts\n")
        yield client


@pytest.fixture(autouse=True)
def _fresh(hub):
    hub.requests.clear()
    yield
    hub.faults.clear()


def load(client: HubClient, call: str) -> list:
    """Layer, name and scale of what is loaded by `from_pretrained(...)` with these arguments."""
    shown = "print([sae.config.layer, sae.config.name_or_path, float(sae.input_scale)])"
    return json.loads(client.run(f"{IMPORTS}sae = SelOrthoSAE.from_pretrained({call})\n{shown}").replace("'", '"'))


def test_the_formats_of_others_are_loaded_too(hub, client) -> None:
    code = """
from hf_selortho.formats import load_sae
print(load_sae("acme/lens", subfolder="blocks.3/lens").config.layer, load_sae("acme/sae", revision="v2").config.layer)
"""
    assert client.run(code) == "3 2\n"


def test_what_others_published_is_described_by_its_header_alone_and_loaded_offline_afterwards(
    hub, client, tmp_path
) -> None:
    folder, _ = published.gemma_scope_2(tmp_path)
    name = "acme/gemma-scope-2-270m-pt"
    hub.upload(name, tmp_path / "gemma-scope-2-270m-pt")
    where = f"'{name}', {{'subfolder': {folder.relative_to(tmp_path / 'gemma-scope-2-270m-pt').as_posix()!r}}}"
    shown = "from hf_selortho.formats.info import sae_info\nfound = sae_info({})\nprint(found['d_sae'], found['site'])"
    assert client.run(shown.format(where)) == f"{published.F} attn_z\n"
    assert all(request.range for request in hub.requests if request.method == "GET" and "params" in request.path)
    code = f"import hf_selortho\nname, lookup = {where}\nprint(hf_selortho.load(name, **lookup).config.site)"
    assert client.run(code) == "attn_z\n"
    hub.requests.clear()
    offline = "from huggingface_hub import constants\nconstants.HF_HUB_OFFLINE = {}\n"
    client.run(offline.format(True))
    try:
        assert client.run(code) == "attn_z\n" and hub.requests == []
    finally:
        client.run(offline.format(False))


def refusal(client: HubClient, call: str) -> str:
    """The one line in which it is refused; no access token is in it or in its causes."""
    code = f"""{IMPORTS}
from hf_selortho import SelOrthoError
try:
    SelOrthoSAE.from_pretrained({call})
except SelOrthoError as error:
    chain, here = "", error
    while here is not None:
        chain, here = f"{{chain}} {{here}}", here.__cause__ or here.__context__
    print({SECRET!r} in chain)
    print(error)
"""
    secret, said, *more = client.run(code).splitlines()
    assert secret == "False" and more == []
    return said


@pytest.mark.parametrize(
    ("call", "layer"),
    [
        ("'acme/sae'", 1),
        ("'acme/sae', revision='dev'", 9),
        ("'acme/sae', revision='v2'", 2),
        ("'acme/sae', revision=COMMIT", 2),
        ("'acme/layers', subfolder='layer_12'", 12),
        ("'acme/parts'", 4),
        (f"'acme/private', token={SECRET!r}", 5),
        ("'acme/gated'", 5),
    ],
)
def test_every_way_of_naming_one(call, layer, hub, client) -> None:
    commit = hub.storage.repos["model", "acme/sae"].refs["refs/tags/v2"]
    found = load(client, call.replace("COMMIT", repr(commit)))
    assert found == [layer, call.split("'")[1], layer]


def test_after_one_download_nothing_is_asked(hub, client) -> None:
    for call, layer in (("'acme/sae'", 1), ("'acme/parts'", 4)):
        load(client, call)
        hub.requests.clear()
        assert load(client, f"{call}, local_files_only=True")[0] == layer and hub.requests == []
        offline = "from huggingface_hub import constants\nconstants.HF_HUB_OFFLINE = {}\n"
        client.run(offline.format(True))
        try:
            assert load(client, call)[0] == layer and hub.requests == []
        finally:
            client.run(offline.format(False))


def test_nobody_answers(tmp_path, hub) -> None:
    with LoopbackHub() as other:
        other.storage = hub.storage
        with HubClient(other.environment(tmp_path / "home")) as client:
            assert load(client, "'acme/sae'")[0] == 1
            other.stop()
            assert load(client, "'acme/sae'")[0] == 1
            assert "is not in the local cache and the Hub cannot be reached" in refusal(client, "'acme/layers'")
            snapshot = next((tmp_path / "home/hub/models--acme--sae/snapshots").iterdir())
            assert load(client, repr(str(snapshot)))[0] == 1


def test_a_cache_of_ones_own(hub, client, tmp_path) -> None:
    call = f"'acme/private', cache_dir={str(tmp_path)!r}, token={SECRET!r}"
    assert load(client, call)[0] == 5 and (tmp_path / "models--acme--private").is_dir()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in written


def test_all_files_are_those_of_one_commit(hub, client, tmp_path) -> None:
    newer = save_all(tmp_path / "newer", 7)
    push = lambda: hub.upload("acme/moving", newer)  # noqa: E731  somebody pushes once the config has been asked for
    hub.inject(Fault("HEAD", "moving/resolve/.*/model.safetensors", before=push))
    assert load(client, f"'acme/moving', cache_dir={str(tmp_path)!r}") == [8, "acme/moving", 8]
    assert load(client, f"'acme/moving', cache_dir={str(tmp_path)!r}") == [7, "acme/moving", 7]


def test_a_server_that_is_busy_is_waited_for_or_named(hub, client, tmp_path) -> None:
    hub.inject(Fault("GET", "models/acme/parts", status=503, times=99))
    said = refusal(client, f"'acme/parts', cache_dir={str(tmp_path)!r}")
    assert "the Hub cannot be reached" in said and len(hub.asked("GET", "models/acme/parts")) == 4
    hub.faults.clear()
    call = f"'acme/sae', cache_dir={str(tmp_path)!r}"
    hub.inject(Fault("GET", "sae/resolve/.*safetensors", status=503, times=2))
    assert load(client, call)[0] == 1
    hub.inject(Fault("GET", "sae/resolve/.*config", status=429))
    assert load(client, f"{call}, force_download=True")[0] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("'acme/private', token=False", "unknown SAE \"acme/private\": .* if it is private, run `hf auth login`"),
        (f"'acme/private', token={SECRET[:-1] + 'x'!r}", "with HTTP status 401: check your token"),
        ("'acme/gated', token=False", "SAE \"acme/gated\" is gated: accept its terms at"),
        ("'acme/wide'", r"has the shape \(30, 12\), d_in and d_sae of the config give \(1000000000, 12\)"),
        ("'acme/pickle'", "cannot load the SAE 'acme/pickle': it holds no model.safetensors; other formats"),
        ("'acme/llama'", "model_type='llama', expected 'selortho_sae'"),
        ("'acme/nothing'", "unknown SAE \"acme/nothing\": neither on the Hub nor a local path"),
        ("'acme/sae', revision='v3'", "has no revision \"v3\": choose a branch, tag or commit of https://"),
        ("'acme/layers'", "holds no config.json; .* subfolder where it has several"),
        ("'acme/layers', subfolder='layer_4'", "holds no layer_4/config.json; "),
        ("'acme/lens'", "holds no config.json; .* hf_selortho.load reads other formats"),
    ],
)  # fmt: skip
def test_what_is_refused_is_said_in_one_line(call, message, hub, client, tmp_path) -> None:
    said = refusal(client, f"{call}, cache_dir={str(tmp_path)!r}")
    assert re.search(message, said), said
    if "llama" in call:
        assert not hub.asked("GET", "safetensors")  # no weights of whatever it is
