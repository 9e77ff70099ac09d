"""The start view, the table of features, the concepts and a graph in a real Chromium, over a small invented run."""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest

pytest.importorskip("gradio")  # the extra `space`, without which nothing here can run

from playwright.sync_api import Locator, Page, expect

from tests.space.served import Served, keep, serve
from tests.space.test_page_in_browser import SETTLED, open_view
from tests.space.written_graph import as_transcoder, write_graph
from tests.space.written_run import CONCEPTS, DENSE, FEATURES, record_of, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Generator[Served, None, None]:
    folder = tmp_path_factory.mktemp("served")
    run = write_run(folder / "run")
    write_graph(run / "graphs/demo.json")
    as_transcoder(run / "layer_2")
    as_transcoder(run / "layer_2_twin")
    with serve(folder / "app.log", "--sae", str(run), "--lm", "none") as page:
        yield page


def settle(page: Page) -> None:
    page.wait_for_function(SETTLED)


def first_row(page: Page) -> Locator:
    return page.locator("#so-out-features tbody tr").first


def test_the_start_view_leads_to_a_feature_and_back(page, served) -> None:
    open_view(page, served, "")
    shown = page.locator("#so-out-start")
    expect(shown.locator("h2")).to_contain_text(f"{FEATURES} features of org/lm, MLP of layer 2")
    expect(page.locator("#so-nav a[aria-current]")).to_have_text("Start")
    cards = shown.locator(".so-gallery li")
    expect(cards).to_have_count(12)
    cards.first.locator("a").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#so-out-feature h2")).to_contain_text("Feature 8")
    expect(page.locator("#so-nav a[aria-current]")).to_have_text("Features")
    settle(page)
    page.go_back()
    expect(cards.first).to_be_visible()
    settle(page)
    assert page.title().startswith("Start")


def test_features_are_sorted_and_filtered_and_the_back_button_undoes_it(page, served) -> None:
    open_view(page, served, "?view=feature")  # as the list was once called
    shown = page.locator("#so-out-features")
    shown.locator("th a", has_text="fires on").click()
    expect(first_row(page).locator(".so-id")).to_have_text(str(DENSE))
    settle(page)
    assert "view=features" in page.url and "sort=frequency" in page.url
    shown.locator("th a", has_text="number").focus()
    page.keyboard.press("Enter")
    expect(first_row(page).locator(".so-id")).to_have_text("0")
    settle(page)
    shown.get_by_role("link", name=re.compile("^concept ")).click()
    expect(first_row(page).locator(".so-id")).to_have_text("2")
    settle(page)
    shown.get_by_label("Label or number").fill(record_of(16).label.upper())
    shown.get_by_label("Label or number").press("Enter")
    expect(shown).to_contain_text("No feature is so")  # 16 is of another kind
    settle(page)
    page.go_back()
    expect(first_row(page).locator(".so-id")).to_have_text("2")
    settle(page)
    page.go_back()
    expect(first_row(page).locator(".so-id")).to_have_text("0")
    settle(page)
    address = page.url
    page.goto("about:blank")
    page.goto(address)  # a deep link
    settle(page)
    expect(first_row(page).locator(".so-id")).to_have_text("0")


def test_frequencies_are_brushed_by_mouse_and_by_keyboard(page, served) -> None:
    open_view(page, served, "?view=features")
    shown = page.locator("#so-out-features")
    bars, caption = shown.locator(".so-brush a"), shown.locator("caption")
    low, high = bars.nth(3).get_attribute("data-low"), bars.nth(6).get_attribute("data-high")
    start, end = bars.nth(6).bounding_box(), bars.nth(3).bounding_box()
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + 60)
    page.mouse.down()
    page.mouse.move(end["x"] + end["width"] / 2, end["y"] + 60, steps=6)
    assert shown.locator(".so-brush a.so-within").count() == 4
    page.mouse.up()  # backwards
    listed = sum(float(low) <= 100 * record_of(f).frequency < float(high) for f in range(FEATURES))
    expect(caption).to_contain_text(f"{listed} features")
    settle(page)
    assert f"low={low}&high={high}" in page.url
    expect(shown.get_by_label("at least")).to_have_value(low)

    shown.get_by_role("link", name="show all").click()
    expect(caption).to_contain_text(f"{FEATURES} features")
    settle(page)
    bars.nth(3).click()  # two clicks
    expect(shown.locator(".so-brush a.so-within")).to_have_count(1)
    settle(page)
    bars.nth(6).focus()
    page.keyboard.press("Enter")
    expect(caption).to_contain_text(f"{listed} features")
    settle(page)
    assert f"low={low}&high={high}" in page.url

    shown.get_by_label("at least").fill("10")
    shown.get_by_label("and less than").fill("")
    page.keyboard.press("Enter")
    expect(first_row(page)).to_contain_text("dense")
    expect(caption).to_contain_text("1 feature,")
    settle(page)
    page.go_back()
    expect(caption).to_contain_text(f"{listed} features")


def test_a_concept_is_chosen_and_its_features_stand_beside_the_twins(page, served) -> None:
    open_view(page, served, "?view=concepts")
    shown = page.locator("#so-out-concepts")
    expect(shown.locator("h2")).to_contain_text("Python code")
    expect(shown.locator(".so-found")).to_have_count(2)
    expect(shown.locator(".so-found").first.locator("tbody tr")).to_have_count(10)
    shown.locator("nav a", has_text="text of a model").click()
    expect(shown.locator("h2")).to_contain_text("text of a model in the corpus")
    settle(page)
    assert f"concept={list(CONCEPTS)[1]}" in page.url
    expect(shown).to_contain_text("Not measured for this SAE")
    page.locator(".so-switch button", has_text="its twin").click()
    settle(page)
    expect(shown.locator("h2")).to_contain_text("text of a model")
    page.go_back()
    first = shown.locator(".so-found a").first
    number = first.inner_text().split()[0]
    first.click()
    expect(page.locator("#so-out-feature h2")).to_contain_text(f"Feature {number}")


def test_a_node_of_a_graph_is_chosen_and_leads_to_its_feature(page, served) -> None:
    open_view(page, served, "?view=graph")
    shown = page.locator("#so-out-graph")
    expect(page.locator("#so-nav a[aria-current]")).to_have_text("Graph")
    expect(shown.locator("h3")).to_contain_text('Output "market"')
    shown.get_by_role("link", name=re.compile("^layer 3, feature")).first.focus()
    page.keyboard.press("Enter")
    expect(shown.locator("h3")).to_contain_text("layer 3, feature")
    expect(shown.locator("path.so-raises, path.so-lowers").first).to_be_visible()
    settle(page)
    keep(page, "graph")
    followed = shown.locator("td a[href*='view=feature&']").first
    number = re.search(r"id=(\d+)", followed.get_attribute("href"))[1]
    followed.click()
    expect(page.locator("#so-out-feature h2")).to_contain_text(f"Feature {number}")
    settle(page)
    page.go_back()
    expect(shown.locator("h3")).to_contain_text("layer 3, feature")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser, served, scheme) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    for query in (
        "",
        "?view=features",
        "?view=features&q=img",
        "?view=concepts&concept=7_x",
        "?view=feature&id=11",
        "?view=graph",
    ):
        open_view(page, served, query)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, query
        assert page.title() != "broken" and page.locator("img[src='x']").count() == 0
        keep(page, f"phone-{scheme}-{page.title()}")
    context.close()
