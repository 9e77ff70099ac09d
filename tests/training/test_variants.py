from __future__ import annotations

import json

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.arguments import parse_arguments
from hf_selortho.training.variants import Variant, all_settings, make_variants, parse_settings

SETTINGS = {"5": {"ortho_coefficient": 0.05}, "12": {"pair_fraction": 0.0005}}


def variants_of(*argv: str) -> list[Variant]:
    return make_variants(parse_arguments(["--model", "some/model", *argv]))


def test_settings_by_layer_from_json_or_a_file(tmp_path) -> None:
    (tmp_path / "layers.json").write_text(json.dumps(SETTINGS))
    for value in (json.dumps(SETTINGS), str(tmp_path / "layers.json")):
        assert parse_settings("--layer_settings", value) == SETTINGS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{5: 1}", "not valid JSON"),
        ('{"5": 1}', "an object of settings for each layer"),
        ('{"five": {}}', "a layer 'five'"),
        ('{"5": {"ortho_coeficient": 1}}', "did you mean ortho_coefficient"),
        ('{"5": {"max_norm_ratio": 3}}', "all read the same tokens"),
        ("nowhere.json", "No such file"),
        ("bytes.json", "is not valid JSON .'utf-8' codec"),
    ],
)
def test_bad_settings_are_named(value, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SelOrthoError, match=message):
        parse_settings("--layer_settings", value)


@pytest.mark.parametrize(
    "settings",
    [
        {"ortho_coefficient": "high"},
        {"min_support": True},
        {"penalty": "all"},
        {"pair_fraction": 7},
    ],
)
def test_settings_that_make_no_configuration(settings) -> None:
    (name,) = settings
    with pytest.raises(SelOrthoError, match=f"^layer_5: .*{name}"):
        variants_of("--layers", "5", "--layer_settings", json.dumps({"5": settings}))


def test_each_layer_takes_its_settings_and_each_variant_its_own_on_top() -> None:
    settings = {**SETTINGS, "5": {"ortho_coefficient": 1, "penalty": "full"}}
    argv = ["--layer_settings", json.dumps(settings)]
    (alone,) = variants_of("--layer", "12", *argv)
    assert (alone.name, alone.layer, alone.arguments.sae.pair_fraction) == ("", 12, 0.0005)
    variants = variants_of(
        "--layers", "5", "6", "--twin", "--variants", '{"top-4": {"activation": "topk", "k": 4}}', *argv
    )
    names = ["layer_5", "layer_5_twin", "layer_5_top-4", "layer_6", "layer_6_twin", "layer_6_top-4"]
    assert [variant.name for variant in variants] == names
    assert [variant.arguments.sae.ortho_coefficient for variant in variants] == [1, 0, 1, 0.03, 0, 0.03]
    assert [variant.arguments.sae.k for variant in variants] == [None, None, 4] * 2
    assert all_settings(variants[0].arguments, variants)["layer_6_top-4.k"] == 4


def test_a_setting_goes_from_the_command_line_to_the_configuration() -> None:
    (variant,) = variants_of("--layer", "3", "--min_support", "7", "--correlation", "pearson")
    config = variant.config(d_in=32, lm_name="org/lm")
    assert (config.layer, config.min_support, config.correlation, config.lm_name) == (3, 7, "pearson", "org/lm")
    assert config.d_sae == 32, "the paper's 1:1"
