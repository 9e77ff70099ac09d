"""Numbers, tokens and charts as the templates show them: whatever a text or a label holds stays text."""

from __future__ import annotations

import html
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")  # the extra `space`, which the whole browser needs

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_selortho.browser.address import Address
from hf_selortho.browser.charts import curves, histogram
from hf_selortho.browser.rendering import _environment, number, percent, share_of
from hf_selortho.features.records import BINS, FeatureContext, JointContext, bin_edges
from hf_selortho.utils.characters import visible

components = _environment().get_template("components.html").module


@pytest.mark.parametrize(
    ("value", "formatted"),
    [
        (0, "0"), (0.12, "0.120"), (1, "1.00"), (99.97, "100"), (1234.6, "1235"), (0.00042, "4.20e-04"),
        (float("nan"), "–"), (float("inf"), "–"), (None, "–"), (-0.5, "-0.500"), (2.5e6, "2.50e+06"),
    ],
)  # fmt: skip
def test_a_number_has_three_significant_digits(value, formatted) -> None:
    assert number(value) == formatted


def test_a_share_is_a_percentage() -> None:
    assert [percent(share) for share in (0, 0.0004, 0.5, 0.2917, None)] == ["0%", "0.04%", "50%", "29.2%", "–"]
    assert [share_of(value, 2.0) for value in (-1, 1, 5)] == [0.0, 0.5, 1.0] and share_of(1.0, 0.0) == 0.0


def test_invisible_characters_are_shown() -> None:
    assert visible(" a\n\tb") == " a↵⇥b"
    assert visible("\u202eabc\u200b\x00\ud800") == "‹202E›abc‹200B›‹0000›‹D800›"


@given(st.text(max_size=30), st.floats(-1, 2))
def test_no_token_becomes_markup(token, activation) -> None:
    reading = SimpleNamespace(tokens=[token], trained_on=torch.tensor([True]))
    joint = JointContext("both", 0, 0, 0, [token], [activation], [0.5])
    for page in (
        components.text(reading, [activation], 1.0, Address(view="text", q="x")),
        components.joint_context(joint, (1.0, 1.0)),
        components.label(token),
        components.token_code(token),
    ):
        tag = r"<(/?)(span|bdi|br|div|li|code|a)( (class|style|title|href|dir)=\"[^\"<>]*\")*>"
        rest = re.sub(tag, "", page)
        assert "<" not in rest and ">" not in rest
        page.encode()  # nothing that cannot be sent


@given(st.text(min_size=1, max_size=20).filter(lambda text: visible(text) == text))
def test_a_plain_token_is_shown_as_it_is(token) -> None:
    inner = re.search(r">(.*)</span>", components.token(token, "", 0.5), re.DOTALL)[1]
    assert html.unescape(inner) == token


def test_shades_are_shares_of_the_scale() -> None:
    page = components.context(FeatureContext("top", 0, 0, 2, 4.0, 1.0, ["a", "b", "c"], [0.0, 1.0, 4.0]), 2.0)
    assert re.findall(r"--s:([\d.]+)", page) == ["0.500", "1.000"]
    assert page.count("so-peak") == 1 and page.index("so-peak") > page.index(">b<")
    assert "'c': 4.00" in html.unescape(page)


def test_a_histogram_has_a_bar_for_each_filled_bin() -> None:
    counts = [0] * BINS
    counts[40], counts[42] = 7, 3500
    edges, chart = bin_edges(), histogram(counts)
    assert [(bar.low, bar.high, bar.tokens) for bar in chart.bars] == [(*edges[40:42], 7), (*edges[42:44], 3500)]
    assert chart.mode == edges[42] and chart.bars[1].height == 96
    assert histogram([0] * BINS) is None
    assert len(edges) == BINS + 1 and edges == sorted(edges) and edges[3] / edges[0] == pytest.approx(2)


def test_curves_have_gaps_where_nothing_is_known() -> None:
    lines = {"a": [(1, 0.5), (2, None), (3, 0.25), (4, 0.75)], "<b>": [(1, 1.0), (2, float("nan"))]}
    page = components.chart("T & U", curves(lines, low=0.0), "step")
    assert page.count("<polyline") == 3 and "step 1 to 4" in page and "from 0 to 1.00" in page
    assert "&lt;b&gt;" in page and "T &amp; U" in page and "<b>" not in page
    assert curves({"a": [(1, None), (2, float("nan"))]}) is None
