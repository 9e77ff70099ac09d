"""Published SAEs where hf_selortho is not installed: with the code of their repository, if the user trusts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import hf_selortho
from hf_selortho import SelOrthoSAE
from hf_selortho.hub.publication import SOURCE, publish_run
from hf_selortho.hub.run_folder import read_run
from tests.bare_environment import make_bare_environment
from tests.finished_run import save_run
from tests.loopback_hub import LoopbackHub

KINDS = {"relu": {}, "topk": {"activation": "topk", "k": 3}, "batchtopk": {"activation": "batchtopk", "k": 3}}
KINDS["jumprelu"] = {"activation": "jumprelu"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """One repository with an SAE at the top, and one with an SAE of each kind in a folder."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "one")
    for number, settings in enumerate(KINDS.values()):
        save_run(folder / f"several/layer_{number}", seed=number, layer=number, **settings)
    with LoopbackHub() as hub:
        for name in ("one", "several"):
            publication = folder / f"{name}-published"
            publish_run(read_run(folder / name), publication, f"acme/{name}")
            hub.upload(f"acme/{name}", publication)
        hub.folder = folder
        yield hub


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    return make_bare_environment(tmp_path_factory.mktemp("bare") / "environment")


def test_the_package_is_not_needed(hub, bare_python, tmp_path) -> None:
    code = """
import importlib.util, json, torch
assert importlib.util.find_spec("hf_selortho") is None
from transformers import AutoConfig, AutoModel

trusted = {"trust_remote_code": True}
results = {}
for place in [("acme/one", ""), *(("acme/several", f"layer_{n}") for n in range(4))]:
    config = AutoConfig.from_pretrained(place[0], subfolder=place[1], **trusted)
    sae = AutoModel.from_pretrained(place[0], subfolder=place[1], **trusted)
    assert type(sae).__module__.startswith("transformers_modules."), type(sae).__module__
    x = torch.linspace(-9, 9, 160).view(20, 8)
    with torch.no_grad():
        h = sae.encode(x)
        results["/".join(place)] = [config.layer, h.tolist(), sae.decode(h).tolist()]
output = sae.train()(x)
assert output.loss is None and output.reconstruction.shape == x.shape
try:
    sae.capture(["text"])
except Exception as error:
    results["capture"] = str(error)
sae.save_pretrained(OUT)
try:
    AutoModel.from_pretrained("acme/one", trust_remote_code=False)
except ValueError as error:
    results["untrusted"] = str(error)
print(json.dumps(results))
"""
    done = hub.run(code.replace("OUT", repr(str(tmp_path / "saved"))), tmp_path / "home", bare_python=bare_python)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    x = torch.linspace(-9, 9, 160).view(20, 8)
    for place, folder in (("acme/one/", "one"), *((f"acme/several/layer_{n}", f"several/layer_{n}") for n in range(4))):
        sae = SelOrthoSAE.from_pretrained(hub.folder / folder)
        with torch.no_grad():
            h = sae.encode(x)
            assert results[place] == [sae.config.layer, h.tolist(), sae.decode(h).tolist()]
    assert "SelOrthoSAE.capture needs the package: pip install hf_selortho" in results["capture"]
    assert "trust_remote_code=True" in results["untrusted"]
    assert SelOrthoSAE.from_pretrained(tmp_path / "saved").config.layer == 3  # what it saves is ours


def test_with_the_package_no_code_of_the_repository_is_fetched(hub, tmp_path) -> None:
    hub.requests.clear()
    code = """
from transformers import AutoConfig, AutoModel
import hf_selortho
for trusted in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
    assert type(AutoConfig.from_pretrained("acme/one", **trusted)) is hf_selortho.SelOrthoConfig
    assert type(AutoModel.from_pretrained("acme/one", **trusted)) is hf_selortho.SelOrthoSAE
"""
    done = hub.run(code, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.asked("GET", "config.json") and not hub.asked("GET", r"\.py$") and not hub.asked("HEAD", r"\.py$")


@pytest.mark.slow
def test_code_of_the_repository_works_beside_a_package_that_nobody_has_imported(hub, tmp_path) -> None:
    code = """
import torch
from transformers import AutoModel
sae = AutoModel.from_pretrained("acme/one", trust_remote_code=True)
from hf_selortho import SelOrthoSAE
x = torch.randn(3, sae.config.d_in)
assert torch.equal(sae.encode(x), SelOrthoSAE.from_pretrained("acme/one").encode(x))
assert SelOrthoSAE.checked(sae) is sae
"""
    done = hub.run(code, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_repository_carries_the_files_that_the_model_imports_and_no_other() -> None:
    package = Path(hf_selortho.__file__).parent
    files = {name.removesuffix(".py"): (package / name).read_text(encoding="utf-8") for name in SOURCE}
    imported = {name for text in files.values() for name in re.findall(r"^\s*from \.([\w.]*) import", text, re.M)}
    assert files.keys() == {"modeling_selortho", *imported} and len(files) == 3


@pytest.mark.slow
@torch.no_grad()
def test_sae_lens_loads_them_from_the_repository(hub, tmp_path) -> None:
    pytest.importorskip("sae_lens")
    code = """
import json, torch
from sae_lens import SAE
x = torch.linspace(-9, 9, 160).view(20, 8)
with torch.no_grad():
    saes = [SAE.from_pretrained("acme/several", f"layer_{n}/saelens") for n in range(4)]
    print(json.dumps([[sae.encode(x).tolist(), sae.decode(sae.encode(x)).tolist()] for sae in saes]))
"""
    done = hub.run(code, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    x = torch.linspace(-9, 9, 160).view(20, 8)
    for number, (h, x_hat) in enumerate(json.loads(done.stdout.splitlines()[-1])):
        sae = SelOrthoSAE.from_pretrained(hub.folder / f"several/layer_{number}")
        own = sae.encode(x)
        torch.testing.assert_close(torch.tensor(h), own, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(x_hat), sae.decode(own), atol=1e-5, rtol=1e-5)
