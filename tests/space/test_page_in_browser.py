"""The page as people use it: real Gemma, the demo's SAE and its index, a real Chromium, clients of its API.

Screenshots of every view are kept in the folder that SCREENSHOTS names, else in the temporary folder of the tests.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("gradio")  # the extra `space`, without which nothing here can run

from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, Page, expect, sync_playwright

from hf_selortho import SelOrthoSAE
from hf_selortho.browser.rendering import number, percent
from hf_selortho.features import FeatureIndex, inspect
from tests.space.served import CHROMIUM, ROOT, Served, chromium, serve

pytestmark = pytest.mark.slow

SENTENCE = "The function returns a list of the names in the current local scope."
HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
SHORTER = {"max_steps": 30, "buffer_contexts": 256, "refresh_every": 8, "eval_samples": 40, "eval_ce_samples": 4}


def python(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The demo with its twin, trained for fewer steps, and their feature indexes; one label is an attack."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    settings = [part for key, value in SHORTER.items() for part in (f"--{key}", str(value))]
    python("scripts/train.py", "--preset", "demo", "--twin", *settings, "--output_dir", str(folder))
    labels = folder / "labels.json"
    labels.write_text(json.dumps({"3": HOSTILE}), encoding="utf-8")
    build = ("scripts/build_feature_index.py", "--tokens", "7_000")
    python(*build, str(folder / "layer_8"), "--labels", str(labels))
    python(*build, str(folder / "layer_8_twin"))
    return folder


@pytest.fixture(scope="module")
def index(run) -> FeatureIndex:
    return FeatureIndex.open(run / "layer_8")


@pytest.fixture(scope="module")
def reading(run):
    """What the Python API says of the sentence."""
    return inspect(SelOrthoSAE.from_pretrained(run / "layer_8"), SENTENCE)


@pytest.fixture(scope="module")
def served(run, tmp_path_factory) -> Generator[Served, None, None]:
    with serve(tmp_path_factory.mktemp("served") / "app.log", "--sae", str(run)) as page:
        client = Client(page.url, verbose=False)
        client.predict("Wait until the language model is there.", api_name="/inspect_text")
        page.run = run
        yield page


@pytest.fixture(scope="module")
def browser() -> Generator[Browser, None, None]:
    expect.set_options(timeout=60_000)  # beside other tests, a machine may be slow
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM)
        yield running
        running.close()


@pytest.fixture
def page(browser, served) -> Generator[Page, None, None]:
    """A fresh window; an error of its script fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    window, errors = context.new_page(), []
    window.set_default_timeout(60_000)
    window.on("pageerror", lambda error: errors.append(str(error)))
    yield window
    context.close()
    assert errors == []


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """`keep(page, "text")`: a screenshot that outlives the test."""
    named = os.environ.get("SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)

    def shot(window: Page, name: str) -> None:
        path = folder / f"{name}.png"
        window.screenshot(path=path, full_page=True)
        assert path.stat().st_size > 5000

    return shot


def open_view(page: Page, served: Served, query: str) -> None:
    """Follow an address, and wait until the view is there."""
    page.goto(f"{served.url}/{query}")
    settled(page)


def settled(page: Page) -> None:
    """Wait until the server has answered what was asked last."""
    page.wait_for_function(
        "() => !document.body.hasAttribute('data-busy') && document.body.dataset.view && "
        "document.querySelector('#so-view-' + document.body.dataset.view + ' [data-address]')"
    )


def test_type_a_sentence_click_a_token_open_a_feature(page, served, reading, index, keep) -> None:
    open_view(page, served, "")
    expect(page.locator("#so-out-text .so-example")).to_have_count(3)
    box = page.get_by_label("Sentence").first
    box.fill(SENTENCE)
    box.press("Enter")
    tokens = page.locator("#so-out-text .so-reading button")
    expect(tokens).to_have_count(len(reading))
    settled(page)
    assert "".join(tokens.all_inner_texts()).replace("\n", "") == "".join(reading.tokens)
    assert f"q={quote(SENTENCE).replace('%20', '+')}" in page.url
    feature, activation = reading.strongest(1)[0]
    row = page.locator("#so-out-text tbody tr").first
    expect(row).to_contain_text(str(feature))
    expect(row).to_contain_text(number(activation))
    expect(row).to_contain_text(index.label(feature))
    keep(page, "text")

    tokens.nth(4).click()
    expect(page.locator("#so-out-text caption").first).to_contain_text("Token 4")
    settled(page)
    strongest = reading.top(1)[4][0]
    row = page.locator("#so-out-text tbody tr").first
    expect(row).to_contain_text(str(strongest.feature))
    expect(row).to_contain_text(number(strongest.activation))
    keep(page, "text-token")

    row.locator("a").first.click()  # shade by this feature
    expect(page.locator("#so-out-text aside")).to_contain_text(f"{strongest.feature}")
    settled(page)
    most = index.feature(strongest.feature).max_activation
    expect(page.locator("#so-out-text aside")).to_contain_text(number(most))
    keep(page, "text-shaded")

    page.locator("#so-out-text aside h3 a").click()
    expect(page.locator("#so-out-feature h2")).to_contain_text(f"Feature {strongest.feature}")
    settled(page)
    assert f"view=feature&id={strongest.feature}" in page.url
    page.go_back()
    expect(page.locator("#so-out-text aside")).to_be_visible()
    settled(page)


def test_a_feature_by_its_address_and_its_neighbours(page, served, index, keep) -> None:
    feature = index.firing_features()[20]
    record = index.feature(feature)
    open_view(page, served, f"?view=feature&id={feature}")
    shown = page.locator("#so-out-feature")
    expect(shown).to_contain_text(f"{percent(record.frequency)} of tokens")
    expect(shown).to_contain_text(number(record.max_activation))
    assert shown.locator(".so-context").count() == len(record.contexts)
    peak = record.contexts[0]
    token = shown.locator(".so-context").first.locator(".so-peak")
    assert number(peak.activation) in token.get_attribute("title")
    keep(page, "feature")
    neighbour = record.nearest_by_cosine[0].feature
    shown.locator("table a").first.click()
    expect(page.locator("#so-out-feature h2")).to_contain_text(f"Feature {neighbour}")
    settled(page)
    page.get_by_role("link", name="next ›").click()
    after = next(f for f in index.firing_features() if f > neighbour)
    expect(page.locator("#so-out-feature h2")).to_contain_text(f"Feature {after}")
    settled(page)
    page.get_by_label("Jump to feature").fill(str(feature))
    page.get_by_label("Try it on my text").fill(SENTENCE)
    page.locator("#so-view-feature").get_by_role("button", name="Show").click()
    expect(page.locator("#so-out-feature")).to_contain_text("On your text")
    settled(page)
    assert f"id={feature}" in page.url


def test_pairs_are_sorted_filtered_and_opened(page, served, index, keep) -> None:
    open_view(page, served, "?view=pairs")
    rows = index.pair_table.to_pylist()
    assert index.facts["pairs"]["source"] == "training" and rows
    best = max(rows, key=lambda row: row["score"])
    first = page.locator("#so-out-pairs tbody tr").first
    expect(first).to_contain_text(f"{best['a']} – {best['b']}")
    expect(page.locator("#so-out-pairs")).to_contain_text(f"at step {SHORTER['max_steps']}")
    keep(page, "pairs")
    page.locator("#so-out-pairs th a", has_text="cosine").click()
    alike = max(rows, key=lambda row: row["decoder_cosine"])
    expect(first).to_contain_text(f"{alike['a']} – {alike['b']}")
    settled(page)
    expect(first).to_contain_text(number(alike["decoder_cosine"], 2))
    page.get_by_label("Filter the table").fill(str(best["a"]))
    page.locator("#so-view-pairs").get_by_role("button", name="Filter").click()
    own = [row for row in rows if best["a"] in (row["a"], row["b"])]
    expect(page.locator("#so-out-pairs caption")).to_contain_text(f"{len(own)} pairs")
    settled(page)
    record = index.pair(best["a"], best["b"])
    page.locator("#so-out-pairs tbody a", has_text=f"{record.a} – {record.b}").click()
    shown = page.locator("#so-out-pairs")
    expect(shown.locator("h2")).to_contain_text(f"A {record.a}")
    settled(page)
    text = shown.inner_text()
    for value in (record.score, record.correlation, record.twin_correlation, record.decoder_cosine):
        assert number(value) in text
    assert record.pair_class in text and f"{record.support:,} tokens" in text
    assert shown.locator("polyline").count() >= 1 and shown.locator(".so-card").count() == 2
    assert "pairs" in page.url and f"a={record.a}" in page.url
    keep(page, "pair")


def test_a_deep_link_of_a_pair(page, served, index) -> None:
    row = index.pair_table.to_pylist()[0]
    open_view(page, served, f"?view=pair&a={row['a']}&b={row['b']}")
    expect(page.locator("#so-out-pairs h2")).to_contain_text(f"A {row['a']}")
    assert page.title().startswith(f"Pair {row['a']}, {row['b']}")


def test_searches(page, served, index, keep) -> None:
    open_view(page, served, "?view=search")
    feature = index.firing_features()[5]
    token = index.feature(feature).promoted[0].token
    page.locator("#so-q-search textarea, #so-q-search input").first.fill(token)
    page.get_by_label("token that it promotes").check()
    found = [one.feature for one in index.search_promoted(token)]
    assert feature in found
    expect(page.locator("#so-out-search tbody tr")).to_have_count(len(found))
    settled(page)
    page.locator("#so-q-search textarea, #so-q-search input").first.fill(SENTENCE)
    page.get_by_label("phrase on which it fires").check()
    expect(page.locator("#so-out-search caption")).to_contain_text("Features that fire on")
    settled(page)
    keep(page, "search")


def test_steering_writes_both_texts(page, served, reading, keep) -> None:
    feature = reading.strongest(1)[0].feature
    open_view(page, served, f"?view=steer&a={feature}&q={quote('The weather today')}&mode=scale&value=1")
    expect(page.get_by_label("Prompt")).to_have_value("The weather today")
    page.get_by_role("button", name="Generate").click()
    columns = page.locator("#so-out-steer .so-reading")
    expect(columns).to_have_count(2, timeout=120_000)
    expect(columns.nth(1).locator(".so-tok")).to_have_count(columns.nth(0).locator(".so-tok").count(), timeout=120_000)
    page.wait_for_timeout(500)
    same = columns.nth(0).inner_text() == columns.nth(1).inner_text()
    assert same  # times 1 changes nothing, by the same seed
    keep(page, "steer")


def test_two_saes_beside_each_other_and_the_run(page, served, reading, keep) -> None:
    open_view(page, served, f"?view=compare&q={quote(SENTENCE)}")
    columns = page.locator("#so-out-compare .so-two-columns > div")
    expect(columns).to_have_count(2)
    feature, activation = reading.strongest(1)[0]
    expect(columns.first.locator("tbody tr").first).to_contain_text(number(activation))
    keep(page, "compare")
    open_view(page, served, "?view=run")
    metrics = json.loads((Path(served.run) / "layer_8/metrics.json").read_text())["evaluation"]
    expect(page.locator("#so-out-run")).to_contain_text(number(metrics["fvu"]))
    page.get_by_text("Model card").click()
    expect(page.locator(".prose.so-model-card")).to_contain_text("How to use it")
    keep(page, "run")


def test_hostile_text_stays_text(page, served) -> None:
    for query in (f"?q={quote(HOSTILE)}", "?view=feature&id=3", f"?view=search&q={quote('<img')}"):
        open_view(page, served, query)
        page.wait_for_timeout(300)
        assert page.title() != "broken"
        view = page.locator(".so-view:visible").first
        expect(view).to_contain_text("<img src=x")
        assert page.locator("img[src='x']").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser, served, index, keep, scheme) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    row = index.pair_table.to_pylist()[0]
    queries = {
        "text": f"?q={quote(SENTENCE)}&token=4", "feature": f"?view=feature&id={row['a']}", "pairs": "?view=pairs",
        "pair": f"?view=pair&a={row['a']}&b={row['b']}", "steer": "?view=steer", "run": "?view=run",
    }  # fmt: skip
    for name, query in queries.items():
        open_view(page, served, query)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        keep(page, f"phone-{scheme}-{name}")
    assert page.evaluate(
        "document.body.classList.contains('dark') || document.documentElement.classList.contains('dark')"
    ) == (scheme == "dark")
    context.close()


def test_everything_is_reachable_by_keyboard(page, served, reading) -> None:
    open_view(page, served, f"?q={quote(SENTENCE)}")
    reached = set()
    page.locator("#so-nav a").first.focus()
    for _ in range(40):
        reached.add(
            page.evaluate("(({dataset, tagName}) => dataset.view || dataset.set || tagName)(document.activeElement)")
        )
        page.keyboard.press("Tab")
    assert {"text", "feature", "pairs", "search", "steer", "compare", "run", "token=0", "token=3"} <= reached
    page.locator("[data-set='token=3']").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#so-out-text caption").first).to_contain_text("Token 3")
    settled(page)


def test_every_named_endpoint(served, run, reading, index) -> None:
    client = Client(served.url, verbose=False)
    names = set(client.view_api(return_format="dict")["named_endpoints"])
    assert names == {"/inspect_text", "/feature", "/pair", "/pairs", "/search", "/steer", "/compare", "/run"}
    found = client.predict(SENTENCE, 3, api_name="/inspect_text")
    assert [token["token"] for token in found["tokens"]] == reading.tokens
    strongest = [(one["feature"], one["activation"]) for one in found["strongest"]]
    assert strongest == [(f, pytest.approx(a, rel=1e-6)) for f, a in reading.strongest(3)]
    feature = reading.strongest(1)[0].feature
    assert client.predict(feature, api_name="/feature")["fires"] == index.feature(feature).fires
    table = client.predict("correlation", False, "", "", 5, api_name="/pairs")
    assert table["total"] == index.pairs and len(table["pairs"]) == 5
    pair = client.predict(table["pairs"][0]["a"], table["pairs"][0]["b"], api_name="/pair")
    assert pair["correlation"] == pytest.approx(table["pairs"][0]["correlation"])
    assert client.predict("the", "label", api_name="/search")
    twin = client.predict(SENTENCE, 5, "twin", api_name="/inspect_text")
    assert twin["sae"].endswith("_twin") and twin["strongest"] != found["strongest"]
    steered = client.predict("The weather", [feature], "scale", 1.0, 6, 0.0, 0, api_name="/steer")
    assert steered["unchanged"] == steered["steered"] != ""
    assert set(client.predict(SENTENCE, 3, api_name="/compare")) == {"main", "twin"}
    assert client.predict(api_name="/run")["settings"]["d_sae"] == 1280


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("/feature", [99_999], "expected a number from 0 to 1279"),
        ("/inspect_text", ["x" * 3000], "this page reads at most 2,000"),
        ("/inspect_text", [""], "the text is empty"),
        ("/inspect_text", ["x", 5, "../../etc/passwd"], "this page shows main and twin"),
        ("/pair", [0, 0], "are no pair of this index"),
        ("/steer", ["x", [1], "clamp", -1.0], "activations are never negative"),
        ("/steer", ["x", [1], "clamp", 1.0, 1000], "this page writes 1 to 60"),
        ("/search", ["x", "colour"], "expected label, token or phrase"),
    ],
)
def test_mistakes_reach_callers_as_words(served, name, arguments, words) -> None:
    client = Client(served.url, verbose=False)
    with pytest.raises(AppError) as caught:
        client.predict(*arguments, api_name=name)
    assert words in str(caught.value) and "Traceback" not in str(caught.value) and str(ROOT) not in str(caught.value)


def test_eight_visitors_at_once_get_their_own_answers(served) -> None:
    """For as many seconds as VISITORS_SECONDS says."""
    end = time.monotonic() + float(os.environ.get("VISITORS_SECONDS", "20"))

    def visit(number: int) -> int:
        client, asked = Client(served.url, verbose=False), 0
        while time.monotonic() < end:
            word = f"visitor{number}x{asked}"
            found = client.predict(f"My name is {word}.", 1, api_name="/inspect_text")
            assert word in "".join(token["token"] for token in found["tokens"])
            assert client.predict(number, api_name="/feature")["feature"] == number
            asked += 1
        return asked

    with concurrent.futures.ThreadPoolExecutor(8) as visitors:
        counts = [future.result() for future in [visitors.submit(visit, number) for number in range(8)]]
    assert min(counts) >= 1


def test_memory_stays_where_it_is(served, index) -> None:
    """Over as many mixed requests as MIXED_REQUESTS says."""
    client = Client(served.url, verbose=False)
    requests, features = int(os.environ.get("MIXED_REQUESTS", "120")), index.firing_features()

    def some(first: int, last: int) -> None:
        for turn in range(first, last):
            if turn % 10 == 0:
                client.predict(f"Sentence number {turn} about something else.", api_name="/inspect_text")
            elif turn % 10 == 1:
                client.predict("correlation", api_name="/pairs")
            else:
                client.predict(features[turn % len(features)], api_name="/feature")

    some(0, requests // 2)
    before = served.memory
    some(requests // 2, requests)
    assert served.memory < before + 60 * 2**20
    assert "Traceback" not in served.log


def test_tools_over_mcp_have_descriptions(served) -> None:
    from urllib.request import urlopen

    with urlopen(f"{served.url}/gradio_api/mcp/schema") as answer:
        tools = json.load(answer)
    named = {re.sub(r"^.*?_(?=inspect_text$|feature$)", "", tool["name"]): tool for tool in tools}
    assert len(tools) == 8 and all(tool["description"] for tool in tools)
    tool = next(tool for name, tool in named.items() if name.endswith("inspect_text"))
    assert "256 tokens" in json.dumps(tool)
