"""circuit-tracer loads what is written for it, and builds graphs whose edges are those of plain hooks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hf_selortho.browser.graph_file import AttributionGraph, read_graph
from hf_selortho.formats.convert import convert
from tests.transcoder_run import save_transcoders

BUILD = Path(__file__).with_name("build_graph.py")


def build(
    folder: Path, lm: Path, prompt: str, features: int, **settings: Any
) -> tuple[dict[str, Any], AttributionGraph]:
    """What was counted and compared, and the graph's file as the page reads it."""
    run = save_transcoders(folder / "run", lm, **settings)
    convert(str(run), folder / "set", "circuit-tracer")
    command = [os.environ["CIRCUITS_PYTHON"], BUILD, lm, folder / "set", folder / "graphs", prompt, features]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "graphs/checks.json").read_text()), read_graph(folder / "graphs/graph.json")


@pytest.mark.parametrize("kind", [{"skip": True}, {"activation": "jumprelu"}])
def test_a_graph_of_a_tiny_gemma(tiny_lm_dir, tmp_path, kind) -> None:
    lm = shutil.copytree(tiny_lm_dir("gemma3"), tmp_path / "lm")
    config = lm / "tokenizer_config.json"  # transformers before version 5 does not know the name of its class
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    checks, graph = build(tmp_path, lm, "The old river measured two bridges", 150, **kind)
    assert (checks["layers"], checks["features"], checks["logits"]) == (4, 150, 3) and checks["active"] > 150
    assert checks["nodes"] == 150 + (4 + 1) * checks["tokens"] + 3
    assert checks["difference"] < 1e-5 * max(1, checks["largest"])
    assert len(graph.tokens) == checks["tokens"]
    kinds = {kind: [node for node in graph.nodes if node.kind == kind] for kind in ("feature", "token", "logit")}
    assert len(kinds["token"]) == checks["tokens"] and len(kinds["logit"]) == 3 and kinds["feature"]
    assert all(node.feature < 48 and node.layer < 4 and node.position for node in kinds["feature"])


@pytest.mark.slow
def test_a_graph_of_the_embedded_gemma(tmp_path) -> None:
    from hf_selortho.language_models.embedded import embedded_model_dir

    checks, graph = build(tmp_path, embedded_model_dir(), "The capital of France is", 300, layers=18, d_in=640)
    assert checks["tokens"] == 6 and checks["nodes"] == 300 + (18 + 1) * 6 + 3
    assert checks["difference"] < 1e-4 * max(1, checks["largest"])
    assert graph.tokens[-1] == " is"
