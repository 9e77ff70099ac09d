from __future__ import annotations

import json
from typing import Any

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.arguments import parse_arguments
from hf_selortho.training.layer_settings import parse_layer_settings, settings_of
from hf_selortho.training.variants import run_members

ALLOWED = {"ortho_coefficient", "pair_fraction"}
SETTINGS = {"5": {"ortho_coefficient": 0.05}, "12": {"pair_fraction": 0.0005}}


def test_settings_by_layer_from_json_or_a_file(tmp_path) -> None:
    (tmp_path / "layers.json").write_text(json.dumps(SETTINGS))
    for value in (json.dumps(SETTINGS), str(tmp_path / "layers.json")):
        settings = parse_layer_settings(value, ALLOWED)
        assert settings_of(5, settings) == {"ortho_coefficient": 0.05}
        assert settings_of(7, settings) == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{5: 1}", "not valid JSON"),
        ("[1]", "an object of settings for each layer"),
        ('{"5": 1}', "an object of settings for each layer"),
        ('{"five": {}}', "a layer 'five'"),
        ('{"5": {"ortho_coeficient": 1}}', "did you mean ortho_coefficient"),
        ("nowhere.json", "expected a JSON file"),
    ],
)
def test_bad_settings_are_named(value, message) -> None:
    with pytest.raises(SelOrthoError, match=message):
        parse_layer_settings(value, ALLOWED)


def test_the_command_line_takes_those_of_its_layer() -> None:
    argv = ["--model", "some/model", "--layer_settings", json.dumps(SETTINGS)]

    def settings_at(*arguments: str) -> Any:
        (member,) = run_members(parse_arguments(arguments))
        return member.arguments.sae

    assert settings_at(*argv, "--layer", "5").ortho_coefficient == 0.05
    assert settings_at(*argv, "--layer", "12").pair_fraction == 0.0005
    assert settings_at(*argv, "--layer", "6").ortho_coefficient == 0.03
    with pytest.raises(SelOrthoError, match="pair_fraction=7"):
        settings_at(*argv[:2], "--layer", "5", "--layer_settings", '{"5": {"pair_fraction": 7}}')
