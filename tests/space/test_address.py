from __future__ import annotations

import pytest

pytest.importorskip("gradio")  # the extra `space`, which the whole browser needs

from hypothesis import given
from hypothesis import strategies as st

from hf_selortho import SelOrthoError
from hf_selortho.browser.address import MAX_CHARACTERS, VIEWS, Address, parse_address, view_of

numbers = st.none() | st.integers(0, 10**6)


@given(
    st.builds(
        Address,
        view=st.sampled_from(list(VIEWS)),
        q=st.text(max_size=200).filter(lambda text: "\ud800" not in text),
        id=numbers,
        token=numbers,
        a=numbers,
        b=numbers,
        up=st.booleans(),
        low=st.none() | st.floats(0, 100),
        score=st.none() | st.floats(0, 1),
        concept=st.text(max_size=20).filter(lambda text: "\ud800" not in text),
        value=st.none() | st.floats(-1e6, 1e6),
    )
)
def test_an_address_comes_back_as_it_was(address) -> None:
    if address.view == "feature" and address.id is None:  # the table of all
        address = address.to(view="features")
    assert parse_address(address.query()) == address


@pytest.mark.parametrize(
    ("query", "address"),
    [
        ("", Address()),
        ("?", Address()),
        ("?q=a+text", Address(view="text", q="a text")),
        ("?view=feature&sae=twin", Address(view="features", sae="twin")),
        ("?view=pair&a=3&b=7", Address(view="pairs", a=3, b=7)),
        ("?view=run&utm_source=x&__theme=dark", Address(view="run")),
    ],
)
def test_what_an_address_means(query, address) -> None:
    assert parse_address(query) == address


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?view=secrets", "there is no view 'secrets': choose start, text, features"),
        ("?view=feature&id=seven", "id='seven' in the address: expected a number"),
        ("?view=feature&id=99999999999", "expected a smaller number"),
        ("?view=steer&value=nan", "expected a smaller number"),
        ("?q=" + "x" * 20_000, "shorten its text"),
    ],
)
def test_mistakes_are_said(query, words) -> None:
    with pytest.raises(SelOrthoError) as caught:
        parse_address(query)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("query", "view"),
    [("?view=features&low=abc", "features"), ("?view=pairs&page=x", "pairs"), ("?view=pair&a=x", "pairs")]
    + [
        ("?view=secrets", "start"),
        ("?view=feature&id=seven", "feature"),
        ("?q=" + "x" * 20_000, "text"),
        ("", "start"),
    ],
)
def test_a_query_names_a_view_whatever_else_is_wrong_with_it(query, view) -> None:
    assert view_of(query) == view


def test_a_text_of_the_most_characters_fits_into_an_address() -> None:
    address = Address(view="text", q="河" * MAX_CHARACTERS, token=17, feature=65_535, sae="twin")
    assert parse_address(address.query()) == address
