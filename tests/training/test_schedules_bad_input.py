from __future__ import annotations

import json
import math

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.arguments import parse_arguments
from hf_selortho.training.budget import FVUBudget, GradientShare, read_reference
from hf_selortho.training.layer_settings import parse_layer_settings
from hf_selortho.training.variants import run_members

ALLOWED = {"ortho_coefficient", "pair_fraction", "min_support", "penalty", "max_norm_ratio", "matryoshka_prefixes"}


def test_an_infinite_norm_leaves_the_coefficient() -> None:
    controller = GradientShare(0.1, share=0.05)
    controller.update(1.0, math.inf)
    assert controller.coefficient == 0.1


def test_the_coefficient_stays_between_its_ends() -> None:
    share, budget = GradientShare(0.1, 0.05, low=0.01, high=0.2), FVUBudget(0.1, 0.01, lambda step: 0.2, low=0.01)
    for step in range(500):
        share.update(1e-3, 10.0)
        budget.update(step, 0.9)
    assert share.coefficient == 0.2 and budget.coefficient == 0.01


def test_rows_in_any_order_and_rows_without_a_number(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "fvu": 1 / step} for step in range(10, 310, 10)]
    file.write_text("\n".join(map(json.dumps, rows)))
    expected = [read_reference(file)(step) for step in (1, 55, 150)]
    file.write_text("\n".join(map(json.dumps, [*rows[::-1], {"step": 35, "fvu": math.nan}])))
    assert [read_reference(file)(step) for step in (1, 55, 150)] == expected


@pytest.mark.parametrize("content", [b'\xff\xfe{"step": 1}', b'{"step": 1e400, "fvu": 0.2}'])
def test_files_that_are_no_metrics(content, tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(SelOrthoError):
        read_reference(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"5": {"ortho_coefficient": "high"}}', "expected float"),
        ('{"5": {"min_support": 2.5}}', "expected int"),
        ('{"5": {"min_support": true}}', "expected int"),
        ('{"5": {"max_norm_ratio": "4"}}', "expected float or None"),
        ('{"5": {"penalty": "all"}}', "expected one of 'selective'"),
        ('{"5": {"penalty": ["full"]}}', "expected one of 'selective'"),
        ('{"5": {"matryoshka_prefixes": 4}}', "expected list or None"),
        ('{"05": {}}', "a layer '05'"),
        ('{"5": {}, "5": {}}', "'5' twice"),
    ],
)
def test_values_that_do_not_fit(value, message) -> None:
    with pytest.raises(SelOrthoError, match=message):
        parse_layer_settings(value, ALLOWED)


def test_values_that_fit() -> None:
    value = '{"5": {"ortho_coefficient": 1, "max_norm_ratio": null, "matryoshka_prefixes": [2, 4], "penalty": "full"}}'
    assert len(parse_layer_settings(value, ALLOWED)[5]) == 4


def test_a_file_that_is_no_text(tmp_path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SelOrthoError, match="UTF-8"):
        parse_layer_settings(str(tmp_path / "x.json"), ALLOWED)


def test_the_command_line_names_a_wrong_type() -> None:
    with pytest.raises(SelOrthoError, match="max_norm_ratio"):
        run_members(
            parse_arguments(["--model", "m", "--layer", "5", "--layer_settings", '{"5": {"max_norm_ratio": "4"}}'])
        )
