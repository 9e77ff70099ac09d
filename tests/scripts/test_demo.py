"""The demo preset as a user runs it, only shorter: real Gemma, real processes, the snippet of the card it writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from hf_selortho import SelOrthoSAE
from hf_selortho.activations.capture import ActivationCapture
from hf_selortho.activations.tokens import Context

ROOT = Path(__file__).parents[2]
SHORTER = {
    "max_steps": 40, "buffer_contexts": 320, "refresh_every": 8, "eval_samples": 60, "eval_ce_samples": 6, "seed": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Folder of a short run of `accelerate launch scripts/train.py --preset demo`."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    settings = [part for key, value in SHORTER.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "accelerate.commands.launch", "scripts/train.py", "--preset", "demo", *settings]
    result = subprocess.run(
        [*command, "--output_dir", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loss recovered" in result.stdout and "Next:" in result.stdout
    return folder


@pytest.mark.slow
def test_it_learns_something_of_the_real_gemma(run) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    evaluation = metrics["evaluation"]
    assert evaluation["fvu"] < 0.4  # 40 steps; the whole preset reaches 0.1
    assert evaluation["dead_fraction"] < 0.2
    assert evaluation["ce_clean"] < evaluation["ce_reconstruction"] < evaluation["ce_zero_ablation"]
    assert evaluation["ce_clean"] < 5 and evaluation["loss_recovered"] > 0.4
    assert metrics["data"]["dropped_sinks"] < 0.01 * metrics["data"]["tokens_kept"]


@pytest.mark.slow
def test_both_ways_of_loading_give_the_same_outputs(run, embedded_lm) -> None:
    ids = embedded_lm.tokenizer("Return a list of the names in the current local scope.")["input_ids"]
    activations = ActivationCapture(embedded_lm, 8).harvest([Context(0, ids)]).activations
    sae, auto = SelOrthoSAE.from_pretrained(run), AutoModel.from_pretrained(run)
    assert sae.config.lm_revision == embedded_lm.revision
    with torch.no_grad():
        ours, theirs = sae(activations.float()), auto(activations.float())
    assert torch.equal(ours.reconstruction, theirs.reconstruction) and torch.equal(ours.loss, theirs.loss)


@pytest.mark.slow
def test_the_snippet_of_the_card_runs_as_it_stands(run, tmp_path) -> None:
    snippet = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippet is not None
    script = tmp_path / "snippet.py"
    script.write_text(snippet.group(1), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Tower" in result.stdout and len(result.stdout.splitlines()) > 10
