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
from huggingface_hub import ModelCard
from transformers import AutoModel

from hf_selortho import SelOrthoSAE
from hf_selortho.hub.card_results import METRICS
from hf_selortho.hub.markdown import number
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.language_models.contexts import Context
from hf_selortho.language_models.embedded import embedded_model_dir
from hf_selortho.language_models.loading import load_language_model
from tests.bare_environment import make_bare_environment
from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(demo_run) -> Path:
    return demo_run / "layer_9"


@pytest.mark.slow
def test_it_learns_something_of_the_real_gemma(run) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    evaluation = metrics["evaluation"]
    assert evaluation["fvu"] < 0.4  # 40 steps; the whole preset reaches 0.1
    assert evaluation["dead_fraction"] < 0.7  # 40 contexts are few for 4,096 features; the whole preset has 0.01
    assert evaluation["ce_clean"] < evaluation["ce_reconstruction"] < evaluation["ce_zero_ablation"]
    assert evaluation["ce_clean"] < 5 and evaluation["loss_recovered"] > 0.4
    assert metrics["data"]["dropped_sinks"] < 0.01 * metrics["data"]["tokens_kept"]


@pytest.mark.slow
def test_both_ways_of_loading_give_the_same_outputs(run, embedded_lm) -> None:
    ids = embedded_lm.tokenizer("Return a list of the names in the current local scope.")["input_ids"]
    activations = ActivationCapture(embedded_lm, 9).capture_all([Context(0, ids)]).by_layer[9]
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


@pytest.mark.slow
def test_it_is_published_and_everybody_can_use_it(run, tmp_path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    home = tmp_path / "home"
    home.mkdir()
    (home / "hf_selortho").symlink_to(embedded_model_dir().parent)  # Gemma, converted once
    with LoopbackHub() as hub:
        push = ["scripts/push_to_hub.py", str(run), "--repo_id", "org/demo", "--license", "gemma"]
        for said in ("in one commit", "has all of this already"):
            done = hub.run(push, home)
            assert done.returncode == 0 and said in done.stdout, done.stderr[-2000:]
        card = hub.files("org/demo")["README.md"].decode()
        assert_numbers_are_those_of(metrics, card)

        snippets = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
        assert [re.search(r"^from \w+ import (\w+)$", text, re.MULTILINE)[1] for text in snippets] == [
            "SelOrthoSAE", "AutoModel", "SAE"
        ]  # fmt: skip
        show = "\nprint(repr(text.token_ids.tolist()), text.feature_acts.sum().item())\n"
        done = hub.run(snippets[0] + show, home)
        assert done.returncode == 0 and "Tower" in done.stdout, done.stderr[-2000:]
        assert len(done.stdout.splitlines()) > 10

        bare_python = make_bare_environment(tmp_path / "bare")
        check = "\nprint(tuple(h.shape), tuple(x_hat.shape), bool((h > 0).any()))\n"
        done = hub.run(snippets[1] + check, tmp_path / "home-2", bare_python=bare_python)
        assert done.stdout == "(3, 4096) (3, 640) True\n", done.stderr[-2000:]

        activations = tmp_path / "x.pt"
        torch.save(real_activations(), activations)
        compare = f"""
import torch
x = torch.load({str(activations)!r})
own = SelOrthoSAE.from_pretrained({str(run)!r})
"""
        new = "sae = SelOrthoSAE.from_pretrained('org/demo')\n"
        equal = "print(all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), own.state_dict().values())), "
        equal += "torch.equal(sae.encode(x), own.encode(x)), torch.equal(sae(x).reconstruction, own(x).reconstruction))"
        ours = "from hf_selortho import SelOrthoSAE\n"
        done = hub.run(ours + compare + new + equal, home)
        assert done.stdout == "True True True\n", done.stderr[-2000:]

        close = """
h, x_hat = sae.encode(x), sae.decode(sae.encode(x))
print((h - own.encode(x)).abs().max().item() < 1e-5)
print((x_hat - own.decode(own.encode(x))).abs().max().item() < 1e-5 * x.abs().max().item())
"""
        done = hub.run(ours + snippets[2] + compare + close, home)
        assert done.stdout == "True\nTrue\n", done.stderr[-2000:]


def real_activations() -> torch.Tensor:
    lm = load_language_model("gemma-3-270m")
    ids = lm.tokenizer("The minister built two bridges near the coast, and a company sold cheap phones.")["input_ids"]
    return ActivationCapture(lm, 9).capture_all([Context(0, ids)]).by_layer[9].float()


def assert_numbers_are_those_of(metrics: dict, card: str) -> None:
    """The table and the metadata of a card say what metrics.json says."""
    rows = [line[2:].split(" | ") for line in card.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) > 1]
    table = {row[0]: row[1] for row in reversed(rows)}  # the first table that has a row, not that beside the twin
    evaluation, compared = metrics["evaluation"], 0
    for metric in METRICS:
        if metric.key in evaluation:
            assert table[metric.name].split(" (")[0] == number(evaluation[metric.key], metric.kind), metric.name
            compared += 1
    assert compared >= 16
    index = {result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results}
    assert index == {metric.key: evaluation[metric.key] for metric in METRICS if metric.key in evaluation}
    assert f"{metrics['training']['tokens']:,} tokens in {metrics['training']['steps']} steps" in card
    assert f"{metrics['training_start']['top_correlation']:.4f} in the first 100 steps" in card
