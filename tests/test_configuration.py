from __future__ import annotations

import json

import pytest

from hf_selortho import ConfigError, SelOrthoConfig
from hf_selortho.configuration_selortho import CONFIG_VERSION


def test_defaults_are_the_papers_where_it_says() -> None:
    config = SelOrthoConfig(d_in=8, d_sae=16)
    assert (config.activation, config.l1_coefficient) == ("relu", 0.04)
    assert config.ortho_coefficient == 0.03, "not the paper's 0.1: RESULTS.md"
    assert (config.penalty, config.pair_fraction, config.correlation) == ("selective", 0.001, "cosine")
    assert (config.context_length, config.prepend_bos) == (128, True)


def test_every_setting_is_described() -> None:
    assert {"d_in", "d_sae", "layer", "lm_revision", "min_support"} <= set(SelOrthoConfig.describe())
    assert all(len(text) > 10 for text in SelOrthoConfig.describe().values())


def test_round_trip_through_json(tmp_path) -> None:
    config = SelOrthoConfig(
        d_in=8,
        d_sae=16,
        activation="topk",
        k=4,
        penalty="full",
        reduction="sum",
        lm_name="org/lm",
        layer=3,
        max_norm=7.5,
    )
    config.save_pretrained(tmp_path)
    assert SelOrthoConfig.from_pretrained(tmp_path).own_settings() == config.own_settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_in": None}, "d_in is missing"),
        ({"d_sae": 0}, "d_sae=0: expected a whole number of at least 1"),
        ({"d_sae": "64"}, "d_sae='64': expected int or None"),
        ({"activation": "gelu"}, "activation='gelu': expected one of 'relu', 'topk'"),
        ({"activation": "topk"}, "k=None: activation='topk' needs k"),
        ({"k": 4}, "k=4: only activation='topk' and 'batchtopk' take k, not 'relu'"),
        ({"activation": "topk", "k": 17}, "k=17: expected at most d_sae=16"),
        ({"penalty": "some"}, "penalty='some': expected one of 'selective', 'full', 'ortsae', 'none'"),
        ({"ortho_coefficient": -1.0}, "ortho_coefficient=-1.0: expected a finite number of at least 0"),
        ({"l1_coefficient": float("nan")}, "l1_coefficient=nan: expected a finite number"),
        ({"pair_fraction": 0}, r"pair_fraction=0: expected a number in \(0, 1\]"),
        ({"pair_fraction": 1.5}, "pair_fraction=1.5"),
        ({"correlation": "kendall"}, "correlation='kendall': expected one of 'cosine', 'pearson'"),
        ({"reduction": "max"}, "reduction='max': expected one of 'mean', 'sum'"),
        ({"min_support": 0}, "min_support=0: expected a whole number of at least 1"),
        ({"min_support": True}, "min_support=True: expected int"),
        ({"layer": -1}, "layer=-1: expected a whole number of at least 0"),
        ({"context_length": 1}, "context_length=1: expected a whole number of at least 2"),
        ({"max_norm_ratio": 1.0}, "max_norm_ratio=1.0: expected a finite number above 1"),
        ({"input_normalization": "unit"}, "input_normalization='unit': expected one of 'standard', 'none'"),
        ({"l1_coefficient": 10**400}, "l1_coefficient=1.*0: expected a finite number of at least 0"),
        ({"d_sae": 10**30}, "d_sae=10*: expected a whole number of at least 1"),
        ({"matryoshka_prefixes": [4, 16]}, r"matryoshka_prefixes=\[4, 16\]: only activation='batchtopk' takes them"),
        (
            {"activation": "batchtopk", "k": 2, "matryoshka_prefixes": [8, 4, 16]},
            r"matryoshka_prefixes=\[8, 4, 16\]: expected rising numbers up to d_sae=16",
        ),
        ({"carry_decay": 0.5, "correlation": "pearson"}, "carry_decay=0.5: only pairs selected by the cosine"),
        ({"carry_decay": 0.5, "penalty_space": "decoder"}, "carry_decay=0.5: .* set carry_decay=0"),
        ({"dtype": "int8"}, "dtype='int8': expected one of bfloat16"),
        (
            {"ortho_coeficient": 0.2},
            "ortho_coeficient is not a setting of SelOrthoConfig; did you mean ortho_coefficient",
        ),
    ],
)
def test_bad_values_are_named(settings, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SelOrthoConfig(**{"d_in": 8, "d_sae": 16, **settings})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_whole_numbers_are_floats_where_these_are_due_and_later_values_are_checked_too() -> None:
    config = SelOrthoConfig(d_in=8, d_sae=16, l1_coefficient=1)
    config.max_norm = 3
    assert [type(value) for value in (config.l1_coefficient, config.max_norm)] == [float, float]
    with pytest.raises(ConfigError, match="l1_coefficient=-1: expected a finite number of at least 0"):
        config.l1_coefficient = -1


def test_settings_of_earlier_versions_are_read() -> None:
    config = SelOrthoConfig(d_in=8, d_sae=16, penalty_space="redundancy", selection_space="redundancy")
    assert config.selects_by == "redundancy"


def test_a_config_of_a_newer_version_is_refused(tmp_path) -> None:
    SelOrthoConfig(d_in=8, d_sae=16).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    assert content["config_version"] == CONFIG_VERSION
    path.write_text(json.dumps({**content, "config_version": 99}))
    with pytest.raises(ConfigError, match="saved by a newer hf_selortho .*pip install -U"):
        SelOrthoConfig.from_pretrained(tmp_path)
