"""What version 0.1.0 has published still loads: SAEs, their source for remote code, and a feature index.

The files of data/published_0_1_0 were written by that version and are never written anew; expected.json has what it
computed with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from hf_selortho import SelOrthoSAE
from hf_selortho.features import FeatureIndex
from tests.loopback_hub import LoopbackHub

PUBLISHED = Path(__file__).parent / "data" / "published_0_1_0"
EXPECTED: dict[str, Any] = json.loads((PUBLISHED / "expected.json").read_text(encoding="utf-8"))
LOADERS = {
    "package": SelOrthoSAE.from_pretrained,
    "auto": AutoModel.from_pretrained,
    "auto, trusted": lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True),
    "auto, not trusted": lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=False),
}


def check_outputs(name: str, h: torch.Tensor, x_hat: torch.Tensor) -> None:
    for output, expected in ((h, "encode"), (x_hat, "decode")):
        torch.testing.assert_close(output, torch.tensor(EXPECTED["saes"][name][expected]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", EXPECTED["saes"])
@torch.no_grad()
def test_a_published_sae_loads_and_computes_what_it_did(name: str, loader: str) -> None:
    sae = LOADERS[loader](PUBLISHED / name)
    assert type(sae) is SelOrthoSAE and not sae.training and sae.config.lm_name == "acme/tiny-gemma"
    x = torch.tensor(EXPECTED["input"])
    h = sae.encode(x)
    check_outputs(name, h, sae.decode(h))
    torch.testing.assert_close(sae(x).reconstruction, sae.decode(h))


def test_the_settings_of_a_published_sae_are_kept() -> None:
    batchtopk = SelOrthoSAE.from_pretrained(PUBLISHED / "batchtopk")
    assert (batchtopk.config.activation, batchtopk.config.k, batchtopk.config.d_sae) == ("batchtopk", 4, 32)
    assert float(batchtopk.threshold) > 0
    assert SelOrthoSAE.from_pretrained(PUBLISHED / "redundancy").config.penalty_space == "redundancy"


def test_the_published_source_computes_the_same_where_the_package_cannot_be_imported(tmp_path: Path) -> None:
    code = f"""
import json, sys
sys.modules["hf_selortho"] = None  # importing it fails
import torch
from transformers import AutoModel
try:
    AutoModel.from_pretrained("acme/batchtopk", trust_remote_code=False)
except ValueError as error:
    untrusted = str(error)
sae = AutoModel.from_pretrained("acme/batchtopk", trust_remote_code=True)
assert type(sae).__module__.startswith("transformers_modules."), type(sae).__module__
with torch.no_grad():
    h = sae.encode(torch.tensor(json.load(open({str(PUBLISHED / "expected.json")!r}))["input"]))
    print(json.dumps([untrusted, h.tolist(), sae.decode(h).tolist()]))
"""
    with LoopbackHub() as hub:
        hub.upload("acme/batchtopk", PUBLISHED / "batchtopk")
        done = hub.run(code, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    untrusted, h, x_hat = json.loads(done.stdout.splitlines()[-1])
    assert "trust_remote_code=True" in untrusted
    check_outputs("batchtopk", torch.tensor(h), torch.tensor(x_hat))


def test_a_published_feature_index_opens_and_says_what_it_did() -> None:
    index, expected = FeatureIndex.open(str(PUBLISHED / "batchtopk")), EXPECTED["index"]
    assert (len(index), index.pairs) == (expected["features"], expected["pairs"])
    assert [index.label(number) for number in range(len(index))] == expected["labels"]
    record = index.feature(expected["feature"])
    assert record.fires == expected["fires"]
    assert (record.label_score, record.labels, index.concepts()) == (None, [], [])  # version 1 had none
    assert record.max_activation == pytest.approx(expected["max_activation"], rel=1e-5)
    for context, before in zip(record.contexts, expected["contexts"], strict=False):
        assert list(context.tokens) == before["tokens"]
        assert list(context.activations) == pytest.approx(before["activations"], rel=1e-5)
    pair = index.pair(*expected["pair"])
    assert (pair.a, pair.b, pair.pair_class) == (*expected["pair"], expected["pair_class"])
    assert pair.correlation == pytest.approx(expected["correlation"], rel=1e-5)
