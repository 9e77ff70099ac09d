"""The page as people use it: real Gemma, the demo's SAE and its index, a real Chromium, clients of its API.

Screenshots go to the folder that SCREENSHOTS names, if it names one.
"""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest

pytest.importorskip("gradio")  # the extra `space`, without which nothing here can run

from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Page, expect

from hf_selortho import SelOrthoSAE
from hf_selortho.browser.address import VIEWS
from hf_selortho.browser.rendering import number, percent
from hf_selortho.features import FeatureIndex, inspect
from tests.space.served import ROOT, Served, keep, serve

pytestmark = pytest.mark.slow

SENTENCE = "The function returns a list of the names in the current local scope."
HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
SETTLED = """() => !document.body.hasAttribute('data-busy') && document.body.dataset.view &&
    document.querySelector('#so-view-' + document.body.dataset.view + ' [data-address]')"""


def python(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def run(demo_run) -> Path:
    """The demo with its twin and their feature indexes; one label is an attack."""
    labels = demo_run / "labels.json"
    labels.write_text(json.dumps({"3": HOSTILE}), encoding="utf-8")
    build = ("-m", "hf_selortho", "index", "--tokens", "6_000")
    python(*build, str(demo_run / "layer_9"), "--labels", str(labels))
    python(*build, str(demo_run / "layer_9_twin"))
    return demo_run


@pytest.fixture(scope="module")
def index(run) -> FeatureIndex:
    return FeatureIndex.open(run / "layer_9")


@pytest.fixture(scope="module")
def reading(run):
    """What the Python API says of the sentence."""
    return inspect(SelOrthoSAE.from_pretrained(run / "layer_9"), SENTENCE)


@pytest.fixture(scope="module")
def served(run, tmp_path_factory) -> Generator[Served, None, None]:
    with serve(tmp_path_factory.mktemp("served") / "app.log", "--sae", str(run)) as page:
        Client(page.url, verbose=False).predict("Wait until the language model is there.", api_name="/inspect_text")
        yield page


def open_view(page: Page, served: Served, query: str) -> None:
    """Follow an address, and wait until the view is there."""
    page.goto(f"{served.url}/{query}")
    page.wait_for_function(SETTLED)


def test_type_a_sentence_click_a_token_open_a_feature(page, served, reading, index) -> None:
    open_view(page, served, "?view=text")
    shown = page.locator("#so-out-text")
    expect(shown.locator(".so-example")).to_have_count(3)
    page.get_by_label("Sentence").first.fill(SENTENCE)
    page.get_by_label("Sentence").first.press("Enter")
    tokens, row = shown.locator(".so-reading a"), shown.locator("tbody tr").first
    expect(tokens).to_have_count(len(reading))
    page.wait_for_function(SETTLED)
    assert "".join(tokens.all_inner_texts()).replace("\n", "") == "".join(reading.tokens)
    assert f"q={quote(SENTENCE).replace('%20', '+')}" in page.url
    feature, activation = reading.strongest(1)[0]
    for part in (str(feature), number(activation), index.label(feature)):
        expect(row).to_contain_text(part)

    tokens.nth(4).click()
    expect(shown.locator("caption").first).to_contain_text("Token 4")
    page.wait_for_function(SETTLED)
    feature, activation = reading.top(1)[4][0]
    expect(row).to_contain_text(str(feature))
    expect(row).to_contain_text(number(activation))

    row.locator("a").first.click()  # shade by this feature
    expect(shown.locator("aside")).to_contain_text(number(index.feature(feature).max_activation))
    page.wait_for_function(SETTLED)
    shown.locator("aside h3 a").click()
    expect(page.locator("#so-out-feature h2")).to_contain_text(f"Feature {feature}")
    page.wait_for_function(SETTLED)
    assert f"view=feature&id={feature}" in page.url
    page.go_back()
    expect(shown.locator("aside")).to_be_visible()


def test_a_feature_by_its_address_and_its_neighbours(page, served, index) -> None:
    feature = index.firing_features()[20]
    record = index.feature(feature)
    open_view(page, served, f"?view=feature&id={feature}")
    shown = page.locator("#so-out-feature")
    expect(shown).to_contain_text(f"{percent(record.frequency)} of tokens")
    assert shown.locator(".so-context").count() == len(record.contexts)
    peak = shown.locator(".so-context").first.locator(".so-peak")
    assert number(record.contexts[0].activation) in peak.get_attribute("title")
    neighbour = record.nearest_by_cosine[0].feature
    shown.locator("table a").first.click()
    expect(shown.locator("h2")).to_contain_text(f"Feature {neighbour}")
    page.wait_for_function(SETTLED)
    page.get_by_role("link", name="next ›").click()
    after = next(f for f in index.firing_features() if f > neighbour)
    expect(shown.locator("h2")).to_contain_text(f"Feature {after}")
    page.wait_for_function(SETTLED)
    page.get_by_label("Jump to feature").fill(str(feature))
    page.get_by_label("Try it on my text").fill(SENTENCE)
    page.locator("#so-view-feature").get_by_role("button", name="Show").click()
    expect(shown).to_contain_text("On your text")
    page.wait_for_function(SETTLED)
    assert f"id={feature}" in page.url


def test_pairs_are_sorted_filtered_and_opened(page, served, index) -> None:
    open_view(page, served, "?view=pairs&sort=score&hidden=1")
    rows = index.pair_table.to_pylist()
    best, alike = (max(rows, key=lambda row: row[column]) for column in ("score", "decoder_cosine"))
    shown = page.locator("#so-out-pairs")
    expect(shown.locator("tbody tr").first).to_contain_text(f"{best['a']} – {best['b']}")
    expect(shown).to_contain_text(f"at step {index.facts['pairs']['step']}")
    shown.locator("th a", has_text="cosine").click()
    expect(shown.locator("tbody tr").first).to_contain_text(f"{alike['a']} – {alike['b']}")
    page.wait_for_function(SETTLED)
    page.get_by_label("Filter the table").fill(str(best["a"]))
    page.locator("#so-view-pairs").get_by_role("button", name="Filter").click()
    own = [row for row in rows if best["a"] in (row["a"], row["b"])]
    expect(shown.locator("caption")).to_contain_text(f"{len(own)} pairs")
    page.wait_for_function(SETTLED)
    record = index.pair(best["a"], best["b"])
    shown.locator("tbody a", has_text=f"{record.a} – {record.b}").click()
    expect(shown.locator("h2")).to_contain_text(f"A {record.a}")
    page.wait_for_function(SETTLED)
    text = shown.inner_text()
    for value in (record.score, record.correlation, record.twin_correlation, record.decoder_cosine):
        assert number(value) in text
    assert shown.locator("polyline").count() >= 1 and shown.locator(".so-card").count() == 2
    open_view(page, served, f"?view=pair&a={record.b}&b={record.a}")  # as somebody may have sent it
    expect(shown.locator("h2")).to_contain_text(f"A {record.a}")
    assert page.title().startswith(f"Pair {record.a}, {record.b}")


def test_searches(page, served, index) -> None:
    open_view(page, served, "?view=search")
    token = index.feature(index.firing_features()[5]).promoted[0].token
    box = page.locator("#so-q-search textarea, #so-q-search input").first
    box.fill(token)
    page.get_by_label("token that it promotes").check()
    expect(page.locator("#so-out-search tbody tr")).to_have_count(len(index.search_promoted(token)))
    page.wait_for_function(SETTLED)
    box.fill(SENTENCE)
    page.get_by_label("phrase on which it fires").check()
    expect(page.locator("#so-out-search caption")).to_contain_text("Features that fire on")


def test_steering_writes_both_texts(page, served, reading) -> None:
    feature = reading.strongest(1)[0].feature
    open_view(page, served, f"?view=steer&a={feature}&q={quote('The weather today')}&mode=scale&value=1")
    expect(page.get_by_label("Prompt")).to_have_value("The weather today")
    page.get_by_role("button", name="Generate").click()
    columns = page.locator("#so-out-steer .so-reading")
    expect(columns).to_have_count(2, timeout=120_000)
    expect(columns.nth(1).locator(".so-tok")).to_have_count(columns.nth(0).locator(".so-tok").count(), timeout=120_000)
    page.wait_for_timeout(500)
    assert columns.nth(0).inner_text() == columns.nth(1).inner_text()  # times 1 changes nothing, by the same seed


def test_steering_has_an_example_ready_to_run(page, served) -> None:
    open_view(page, served, "?view=steer")
    page.get_by_role("button", name="Generate").click()
    columns = page.locator("#so-out-steer .so-reading")
    expect(columns).to_have_count(2, timeout=120_000)
    expect(page.locator("#so-out-steer h3").nth(1)).to_contain_text("1.00 × its largest activation")
    expect(columns.nth(1).locator(".so-tok")).to_have_count(columns.nth(0).locator(".so-tok").count(), timeout=120_000)
    assert columns.nth(0).inner_text() != columns.nth(1).inner_text()
    page.wait_for_function(SETTLED)
    assert "mode=peak&value=1" in page.url


def test_two_saes_beside_each_other_and_the_run(page, served, run, reading) -> None:
    open_view(page, served, f"?view=compare&q={quote(SENTENCE)}")
    columns = page.locator("#so-out-compare .so-two-columns > div")
    expect(columns).to_have_count(2)
    expect(columns.first.locator("tbody tr").first).to_contain_text(number(reading.strongest(1)[0].activation))
    open_view(page, served, "?view=run")
    metrics = json.loads((run / "layer_9/metrics.json").read_text())["evaluation"]
    expect(page.locator("#so-out-run")).to_contain_text(number(metrics["fvu"]))
    page.get_by_text("Model card").click()
    expect(page.locator(".prose.so-model-card")).to_contain_text("How to use it")


def test_hostile_text_stays_text(page, served) -> None:
    for query in (f"?q={quote(HOSTILE)}", "?view=feature&id=3", f"?view=search&q={quote('<img')}"):
        open_view(page, served, query)
        page.wait_for_timeout(300)
        assert page.title() != "broken" and page.locator("img[src='x']").count() == 0
        expect(page.locator(".so-view:visible").first).to_contain_text("<img src=x")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser, served, index, scheme) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    a, b = (index.pair_table[side][0].as_py() for side in "ab")
    text, feature, pair = f"?q={quote(SENTENCE)}&token=4", f"?view=feature&id={a}", f"?view=pair&a={a}&b={b}"
    for query in (text, feature, "?view=pairs", pair, "?view=steer", "?view=run"):
        open_view(page, served, query)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, query
        keep(page, f"phone-{scheme}-{page.title()}")
    assert page.evaluate("document.querySelector('body.dark, html.dark') !== null") == (scheme == "dark")
    context.close()


def test_everything_is_reachable_by_keyboard(page, served) -> None:
    open_view(page, served, f"?q={quote(SENTENCE)}")
    reached = set()
    page.locator("#so-nav a").first.focus()
    for _ in range(40):
        reached.add(page.evaluate("document.activeElement.dataset.view || document.activeElement.innerText"))
        page.keyboard.press("Tab")
    shown = set(VIEWS) - {"feature", "graph"}  # one of the features, and of graphs there is none
    assert {*shown, "The", " function"} <= reached
    page.locator(".so-reading a").nth(3).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#so-out-text caption").first).to_contain_text("Token 3")


def test_every_view_is_a_named_endpoint_and_a_tool(served, reading, index) -> None:
    client = Client(served.url, verbose=False)
    names = set("start inspect_text feature features concepts pair pairs search steer compare run".split())
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {f"/{name}" for name in names}
    with urlopen(f"{served.url}/gradio_api/mcp/schema") as answer:
        tools = json.load(answer)  # of its MCP server
    assert len(tools) == len(names) and all(any(tool["name"].endswith(name) for tool in tools) for name in names)
    assert all(tool["description"] for tool in tools) and "256 tokens" in json.dumps(tools)

    text = client.predict(SENTENCE, 3, api_name="/inspect_text")
    assert [token["token"] for token in text["tokens"]] == reading.tokens
    strongest = [(one["feature"], one["activation"]) for one in text["strongest"]]
    assert strongest == [(feature, pytest.approx(activation, rel=1e-6)) for feature, activation in reading.strongest(3)]
    twin = client.predict(SENTENCE, 5, "twin", api_name="/inspect_text")
    assert twin["sae"].endswith("_twin") and twin["strongest"] != text["strongest"]
    feature = strongest[0][0]
    assert client.predict(feature, api_name="/feature")["fires"] == index.feature(feature).fires
    table = client.predict("correlation", False, "", "", 5, "main", True, api_name="/pairs")
    assert table["total"] == index.pairs and len(table["pairs"]) == 5
    pair = client.predict(table["pairs"][0]["a"], table["pairs"][0]["b"], api_name="/pair")
    assert pair["correlation"] == pytest.approx(table["pairs"][0]["correlation"])
    assert client.predict("the", "label", api_name="/search")
    steered = client.predict("The weather", [feature], "scale", 1.0, 6, 0.0, 0, api_name="/steer")
    assert steered["unchanged"] == steered["steered"] != ""
    compared = client.predict(SENTENCE, 3, api_name="/compare")
    assert compared["main"]["strongest"][0].keys() == {"feature", "activation", "nearest", "cosine"}
    assert client.predict(api_name="/run")["settings"]["d_sae"] == 4096


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("/feature", [99_999], "expected a number from 0 to 4095"),
        ("/inspect_text", ["x" * 3000], "this page reads at most 2,000"),
        ("/inspect_text", ["x", 5, "../../etc/passwd"], "this page shows main and twin"),
        ("/steer", ["x", [1], "clamp", -1.0], "activations are never negative"),
        ("/steer", ["x", [1], "clamp", 1.0, 1000], "this page writes 1 to 60"),
        ("/search", ["x", "colour"], "expected label, token or phrase"),
    ],
)
def test_mistakes_reach_callers_as_words(served, name, arguments, words) -> None:
    with pytest.raises(AppError) as caught:
        Client(served.url, verbose=False).predict(*arguments, api_name=name)
    assert words in str(caught.value) and "Traceback" not in str(caught.value) and str(ROOT) not in str(caught.value)


def test_eight_visitors_at_once_get_their_own_answers(served) -> None:
    end = time.monotonic() + 10

    def visit(visitor: int) -> int:
        client, asked = Client(served.url, verbose=False), 0
        while time.monotonic() < end:
            word = f"visitor{visitor}x{asked}"
            text = client.predict(f"My name is {word}.", 1, api_name="/inspect_text")
            assert word in "".join(token["token"] for token in text["tokens"])
            assert client.predict(visitor, api_name="/feature")["feature"] == visitor
            asked += 1
        return asked

    with concurrent.futures.ThreadPoolExecutor(8) as visitors:
        assert min(visitors.map(visit, range(8))) >= 1
    assert "Traceback" not in served.log
