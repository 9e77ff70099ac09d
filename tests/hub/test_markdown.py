"""Foreign text cannot leave the place it is put into."""

from __future__ import annotations

import ast
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_selortho.hub.markdown import cell, code, duration, fence, literal, mask_tokens, number, one_line, render

HOSTILE = "a: b\n---\n<img src=x onerror=alert(1)> | ``x`` \u202e\u2028\x00"


@given(st.text(max_size=60))
@example(HOSTILE)
@example("`")
@example("``` `` `")
def test_code_is_one_closed_span(text):
    span = code(text)
    ticks = re.match("`*", span)[0]
    assert span.splitlines() == [span]
    if not ticks:
        assert span == "(empty)" and not one_line(text)
        return
    inner = span[len(ticks) : -len(ticks)]
    assert span.endswith(ticks) and len(inner) > 0
    # CommonMark: a span ends at the next run of exactly as many backticks, wherever runs are taken whole
    assert ticks not in re.findall("`+", inner)
    assert not inner.startswith("`") and not inner.endswith("`")
    assert inner.strip() == one_line(text) or inner == one_line(text)


@given(st.text(max_size=60))
@example("a|b\\|c")
def test_cell_has_no_bare_pipe(text):
    assert not re.search(r"(?<!\\)\|", cell(text))


@given(st.text(max_size=60))
@example(HOSTILE)
@example('it\'s "both"')
@example("\ud83d")
def test_literal_is_python_for_the_text(text):
    source = literal(text)
    assert source.isascii() and source.splitlines() == [source]
    assert ast.literal_eval(source) == text


def test_literal_looks_like_written_by_hand():
    assert literal("google/gemma-2-2b") == '"google/gemma-2-2b"'


@given(st.text(alphabet="`a\n", max_size=30))
def test_fence_is_longer_than_any_run(text):
    assert fence(text) not in text and len(fence(text)) >= 3


@given(st.text(max_size=60))
@example(HOSTILE)
@example("{{ 7 * 7 }}")
def test_what_a_template_prints_is_a_code_span(text):
    assert render("{{ x }}", {"x": text}) == f"{code(text)}\n"
    assert (
        render("{{ x | literal }} {{ n | percent }} {{ absent }}", {"x": text, "n": 0.5}) == f"{literal(text)} 50.0%\n"
    )


def test_access_tokens_are_masked():
    secret = "hf_" + "aB3" * 10
    assert secret not in mask_tokens(f"--token {secret} --x")
    assert secret not in code(secret)
    assert one_line("hf_selortho hf_hub_download") == "hf_selortho hf_hub_download"


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0, "", "0"),
        (1280, "", "1,280"),
        (0.10299213, "", "0.1030"),
        (244799.3, "", "244,799"),
        (0.000012345, "", "1.23e-05"),
        (0.8416, "percent", "84.2%"),
        (410.08, "count", "410"),
        (0.04, "exact", "0.04"),
    ],
)
def test_number(value, kind, text):
    assert number(value, kind) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.26, "4.3 s"), (119.7, "2 min 0 s"), (7300, "2 h 1 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
