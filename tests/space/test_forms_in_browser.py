"""The forms of the views in a real Chromium: on one grid with the text, and features chosen by their labels."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("gradio")  # the extra `space`, without which nothing here can run

from playwright.sync_api import expect

from tests.space.test_features_in_browser import served  # noqa: F401
from tests.space.test_page_in_browser import open_view
from tests.space.written_run import FEATURES, WORDS, label_of

pytestmark = pytest.mark.slow

# Left and right edges of header, text and rows of the form; bottoms of the boxes and the button of each row
# (the small number above a slider aside).
PLACES = """() => {
  const view = document.querySelector("#so-view-" + document.body.dataset.view);
  const box = (element) => element.getBoundingClientRect();
  const rows = [...view.querySelectorAll(".so-inputs")].map((row) => {
    const fields = [...row.querySelectorAll("textarea, input:not([type=range], [type=radio]), button.primary")];
    const drawn = fields.filter((field) => !field.closest(".tab-like-container"));
    const boxes = drawn.map((field) => box(field.closest(".wrap-inner")?.parentElement || field));
    return { left: Math.min(...boxes.map((b) => b.left)), right: Math.max(...boxes.map((b) => b.right)),
      bottoms: boxes.map((b) => b.bottom), tops: boxes.map((b) => b.top) };
  });
  const header = box(document.querySelector(".so-top")), text = box(view.querySelector(".so-view"));
  return { header: [header.left, header.right], text: [text.left, text.right], rows };
}"""


@pytest.mark.parametrize("view", ["text", "feature&id=9", "pairs", "search", "steer", "compare&q=x"])
@pytest.mark.parametrize("width", [1280, 390])
def test_header_form_and_text_stand_on_one_grid(page, served, view, width) -> None:  # noqa: F811
    page.set_viewport_size({"width": width, "height": 900})
    open_view(page, served, f"?view={view}")
    places: dict[str, Any] = page.evaluate(PLACES)
    left, right = places["text"]
    assert places["header"] == pytest.approx([left, right], abs=1)
    assert places["rows"]
    for row in places["rows"]:
        assert row["left"] == pytest.approx(left, abs=1)
        assert row["right"] <= right + 1
        if width == 1280:  # one line of boxes, and the button on it
            assert row["bottoms"] == pytest.approx([row["bottoms"][0]] * len(row["bottoms"]), abs=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_feature_is_chosen_by_words_of_its_label(page, served) -> None:  # noqa: F811
    open_view(page, served, "?view=steer")
    box = page.get_by_label("Feature", exact=True)
    assert box.input_value().split()[0].isdecimal()  # an example
    word = WORDS[0]
    found = [feature for feature in range(FEATURES) if word in label_of(feature)]
    box.fill("")
    box.press_sequentially(word)
    options = page.locator("#so-view-steer ul[role=listbox] li:visible")
    for _ in range(100):  # between two lists none is there for a moment
        texts = options.all_inner_texts()
        if texts and all(word in text for text in texts):
            break
        page.wait_for_timeout(100)
    offered = {int(text.replace("✓", "").split()[0]) for text in texts}
    assert offered <= set(found) and len(offered) > 3
    options.nth(1).click()
    assert int(box.input_value().split()[0]) in found
    open_view(page, served, "?view=steer&a=9&b=11&value=5&mode=clamp&q=Hello")
    expect(box).to_have_value(re.compile(rf"9 (unclear: )?{label_of(9)} ?"))
    expect(page.get_by_label("Strength")).to_have_value("5")
    expect(page.get_by_label("Its activation becomes")).to_have_value("this value")
