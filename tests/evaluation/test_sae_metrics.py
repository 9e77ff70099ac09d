"""The metrics as a folder of `evaluate.load`: the pure functions, streamed and offline; the snippets of the card."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
import yaml

from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation import SAE_METRICS
from hf_selortho.evaluation.metrics import Correlations, CrossEntropy, LossRecovered, Reconstruction, Sparsity

H = torch.relu(torch.randn(400, 24, generator=torch.Generator().manual_seed(0)))
IDS = torch.arange(400) % 24
CORRELATIONS = Correlations()
CORRELATIONS += H
CASES = {
    "reconstruction": ({"predictions": H + 0.1, "references": H}, Reconstruction.of(H, H + 0.1)),
    "sparsity": ({"predictions": H}, Sparsity.of(H)),
    "correlation": ({"predictions": H}, CORRELATIONS),
    "cross_entropy": ({"predictions": H, "references": IDS}, CrossEntropy.of(H, IDS)),
    "loss_recovered": (
        {"predictions": H[:, 0] + 1, "references": H[:, 0], "ablations": H[:, 0] + 9},
        LossRecovered.of(H[:, 0], H[:, 0] + 1, H[:, 0] + 9),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_pure_function_at_once_and_in_batches(name, tmp_path) -> None:
    given, pure = CASES[name]
    elsewhere = tmp_path / "sae_metrics"  # as it is on the Hub
    shutil.copytree(SAE_METRICS, elsewhere)
    expected = pytest.approx(pure.figures(), rel=1e-6)
    metric = evaluate.load(str(elsewhere), name)
    for convert in (lambda values: values, torch.Tensor.numpy, torch.Tensor.tolist, list):
        assert metric.compute(**{key: convert(values) for key, values in given.items()}) == expected
    for part in (slice(3), slice(3, 400)):  # compute() has started anew
        metric.add_batch(**{key: values[part] for key, values in given.items()})
    assert len(metric) == 400 and metric.compute() == expected and len(metric) == 0


def test_single_tokens_settings_and_combinations() -> None:
    reconstruction, sparsity = (evaluate.load(SAE_METRICS, name) for name in ("reconstruction", "sparsity"))
    for x in H:
        reconstruction.add(prediction=x + 0.1, reference=x)
    assert reconstruction.compute() == pytest.approx(Reconstruction.of(H, H + 0.1).figures(), rel=1e-6)
    metric = evaluate.load(SAE_METRICS, "correlation", batch_size=100, pair_fraction=0.1)
    assert metric.compute(predictions=H)["selected_pairs"] == 28  # ceil(0.1 * 276)
    both = evaluate.combine([reconstruction, sparsity]).compute(predictions=H, references=H)
    assert both["fvu"] == 0 and both["l1"] == pytest.approx(H.sum(-1).mean().item())


def test_the_snippets_of_its_card_run_as_they_stand_and_every_figure_is_explained() -> None:
    card = Path(SAE_METRICS, "README.md").read_text(encoding="utf-8")
    names: dict = {}
    for name in CASES:
        section = card.split(f"\n## {name}\n")[1].split("\n## ")[0]
        (snippet,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        exec(compile(snippet, name, "exec"), names)
        assert f'"{name}"' in snippet and all(f"`{key}`" in section for key in names["result"]), name
    head = yaml.safe_load(card.split("---\n")[1])
    assert {"evaluate", "metric"} <= set(head["tags"]) and f"# Metric card: {head['title']}\n" in card
    assert Path(SAE_METRICS, "requirements.txt").read_text() == "hf_selortho\n"


def test_errors_say_what_was_expected_and_a_refused_batch_changes_nothing() -> None:
    with pytest.raises(SelOrthoError, match="metric 'fvu': expected one of reconstruction, sparsity, correlation, cro"):
        evaluate.load(SAE_METRICS, "fvu")
    with pytest.raises(SelOrthoError, match="one process"):
        evaluate.load(SAE_METRICS, "sparsity", num_process=2, process_id=0)
    metric = evaluate.load(SAE_METRICS, "reconstruction")
    with pytest.raises(SelOrthoError, match="reconstruction was given no tokens: .* or pass predictions, references"):
        metric.compute()
    metric.add_batch(predictions=torch.zeros(2, 3), references=torch.ones(2, 3))
    for given, message in (
        ({"predictions": torch.ones(2, 3)}, "reconstruction needs references"),
        ({"predictions": torch.ones(2, 3), "references": torch.ones(2, 4)}, "expected equal shapes"),
        ({"predictions": torch.ones(2, 3), "references": torch.ones(3, 3)}, "one row for each token"),
        ({"predictions": torch.ones(3), "references": torch.ones(3)}, r"expected \(tokens, width\)"),
    ):
        with pytest.raises(SelOrthoError, match=message):
            metric.add_batch(**given)
    assert len(metric) == 2 and metric.compute()["mse"] == 3


def test_nothing_is_downloaded_and_no_table_is_written(tmp_path) -> None:
    """In a fresh process with the Hub switched off and an empty cache."""
    code = (
        "import evaluate, torch\n"
        "from hf_selortho.evaluation import SAE_METRICS\n"
        "print(evaluate.load(SAE_METRICS, 'sparsity').compute(predictions=torch.ones(3, 2))['l0'])\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_METRICS_CACHE": str(tmp_path / "metrics")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2.0" and not (tmp_path / "metrics").exists()
