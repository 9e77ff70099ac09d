from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_selortho.features.records import BINS, bin_edges
from hf_selortho.features.render import (
    curves_html,
    escape,
    histogram_html,
    label_html,
    number,
    pair_tokens_html,
    percent,
    token_html,
    tokens_html,
    visible,
)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (0.12, "0.120"), (1, "1.00"), (99.97, "100"), (1234.6, "1235"), (0.00042, "4.20e-04"),
        (float("nan"), "–"), (float("inf"), "–"), (None, "–"), (-0.5, "-0.500"), (2.5e6, "2.50e+06"),
    ],
)  # fmt: skip
def test_numbers(value, said) -> None:
    assert number(value) == said


@pytest.mark.parametrize(
    ("share", "said"), [(0, "0%"), (0.0004, "0.04%"), (0.5, "50%"), (0.2917, "29.2%"), (None, "–")]
)
def test_shares(share, said) -> None:
    assert percent(share) == said


def test_invisible_characters_are_shown() -> None:
    assert visible(" a\n\tb") == " a↵⇥b"
    assert visible("\u202eabc\u200b\x00\ud800") == "‹202E›abc‹200B›‹0000›‹D800›"


@given(st.text(max_size=30), st.floats(-1, 2))
def test_no_token_becomes_markup(token, shade) -> None:
    for made in (token_html(token, shade, token), label_html(token), pair_tokens_html([token], [1.0], [0.5], (1, 1))):
        text = re.sub(r"<(/?)(span|bdi|br)( class=\"[\w -]*\"| style=\"[\w.;:-]*\"| title=\"[^\"<>]*\")*>", "", made)
        assert "<" not in text and ">" not in text
        made.encode()  # nothing that cannot be sent


@given(st.text(min_size=1, max_size=20).filter(lambda text: visible(text) == text))
def test_a_plain_token_is_shown_as_it_is(token) -> None:
    inner = re.search(r">(.*)</span>", token_html(token, 0.5, ""), re.DOTALL)[1]
    assert html.unescape(inner) == token


def test_shades_are_shares_of_the_scale() -> None:
    made = tokens_html(["a", "b", "c"], [0.0, 1.0, 4.0], 2.0, peak=2)
    assert re.findall(r"--s:([\d.]+)", made) == ["0.500", "1.000"]
    assert made.count("so-peak") == 1 and made.index("so-peak") > made.index(">b<")
    assert "'c': 4.00" in html.unescape(made)
    assert "--s" not in tokens_html(["a"], [1.0], 0.0)


def test_a_histogram_has_a_bar_for_each_filled_bin() -> None:
    counts = [0] * BINS
    counts[40], counts[42] = 7, 3500
    made = histogram_html(counts)
    edges = bin_edges()
    assert made.count("<rect") == 2 and "3,500 tokens" in made
    assert f"{number(edges[42])} to {number(edges[43])}" in made
    assert "never fired" in histogram_html([0] * BINS)


def test_edges_of_histograms_rise_threefold_in_a_doubling() -> None:
    edges = bin_edges()
    assert len(edges) == BINS + 1 and edges[3] / edges[0] == pytest.approx(2)
    assert edges == sorted(edges)


def test_curves_have_gaps_where_nothing_is_known() -> None:
    made = curves_html({"a": [(1, 0.5), (2, None), (3, 0.25), (4, 0.75)], "<b>": [(1, 1.0)]}, "step", "T & U", low=0.0)
    assert made.count("<polyline") == 3 and "step 1 to 4" in made
    assert "&lt;b&gt;" in made and "T &amp; U" in made and "<b>" not in made
    assert curves_html({"a": [(1, None), (2, float("nan"))]}, "step", "T") == ""


def test_escape_is_for_attributes_too() -> None:
    assert escape("\"'<&>") == "&quot;&#x27;&lt;&amp;&gt;"
