from __future__ import annotations

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.arguments import parse_arguments
from hf_selortho.training.layer_settings import parse_layer_settings
from hf_selortho.training.variants import run_members

ALLOWED = {"ortho_coefficient", "pair_fraction", "min_support", "penalty", "max_norm_ratio", "matryoshka_prefixes"}


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
