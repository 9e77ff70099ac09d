"""The metrics as folders of `evaluate.load`: the same figures, the snippets of the cards, copies elsewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import evaluate
import pytest
import torch
import yaml

from hf_selortho.errors import SelOrthoError
from hf_selortho.evaluation import METRIC_MODULES, metric_path, metrics

CLASSES = {
    "correlation": metrics.CorrelationMetric,
    "cross_entropy": metrics.CrossEntropyMetric,
    "loss_recovered": metrics.LossRecoveredMetric,
    "reconstruction": metrics.ReconstructionMetric,
    "sparsity": metrics.SparsityMetric,
}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    x = torch.relu(torch.randn(400, 24))
    if name == "cross_entropy":
        return {"predictions": torch.randn(400, 24), "references": torch.randint(24, (400,))}
    if name == "loss_recovered":
        return {"predictions": x[:, 0] + 1, "references": x[:, 0], "ablations": x[:, 0] + 9}
    return {"predictions": x} if name in ("sparsity", "correlation") else {"predictions": x + 0.1, "references": x}


def test_every_metric_has_a_folder() -> None:
    declared = {value for value in vars(metrics).values() if isinstance(value, type)} & set(
        metrics.StreamingMetric.__subclasses__()
    )
    assert set(CLASSES.values()) == declared and tuple(CLASSES) == METRIC_MODULES
    folders = {path.name for path in Path(metric_path("sparsity")).parent.iterdir() if path.name[0] not in "._"}
    assert folders == set(METRIC_MODULES)


@pytest.mark.parametrize("name", METRIC_MODULES)
def test_it_computes_what_the_class_computes(name, tmp_path) -> None:
    elsewhere = tmp_path / name  # as it is on the Hub
    shutil.copytree(metric_path(name), elsewhere)
    given = inputs_of(name)
    expected = CLASSES[name]().compute(**given)
    for place in (metric_path(name), str(elsewhere)):
        metric = evaluate.load(place)
        assert type(metric) is CLASSES[name] and metric.compute(**given) == expected


@pytest.mark.parametrize("name", METRIC_MODULES)
def test_the_snippet_of_its_card_runs_as_it_stands(name) -> None:
    card = Path(metric_path(name), "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(snippet, name, "exec"), names)
    for key in names["result"]:  # every figure is explained
        assert re.search(rf"`{key}`", card.split("## Output values")[1].split("\n## ")[0]), key
    head = yaml.safe_load(card.split("---\n")[1])
    assert {"evaluate", "metric"} <= set(head["tags"]) and head["title"] and head["description"]
    assert f"# Metric card: {head['title']}\n" in card and "\n\n\n" not in card
    assert Path(metric_path(name), "requirements.txt").read_text() == "hf_selortho\n"


def test_settings_and_combinations() -> None:
    h = torch.relu(torch.randn(400, 24))
    metric = evaluate.load(metric_path("correlation"), batch_size=100, pair_fraction=0.1)
    assert metric.compute(predictions=h)["selected_pairs"] == 28  # ceil(0.1 * 276)
    both = evaluate.combine([evaluate.load(metric_path(name)) for name in ("reconstruction", "sparsity")])
    assert {"fvu", "l0"} <= both.compute(predictions=h, references=h).keys()


def test_unknown_metrics_are_named() -> None:
    with pytest.raises(SelOrthoError, match="metric 'fvu': expected one of correlation, cross_entropy, loss_recovered"):
        metric_path("fvu")
