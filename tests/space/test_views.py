"""The views as HTML: what they say is what the Python API says, and nothing of a text or a label becomes markup."""

from __future__ import annotations

import copy
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")  # the extra `space`, which the whole browser needs

import pyarrow as pa
import torch

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.browser.address import MAX_CHARACTERS, VIEWS, Address, parse_address
from hf_selortho.browser.catalog import CatalogEntry, card_markdown, open_catalog
from hf_selortho.browser.live_model import LiveModel
from hf_selortho.browser.page import Page
from hf_selortho.browser.pairs import find_pairs, holds_words, pair_table
from hf_selortho.browser.rendering import number, percent
from hf_selortho.browser.steering_view import DEFAULT_STRENGTH, OFFERED, offered, steers_of
from hf_selortho.browser.text_view import counterparts
from hf_selortho.browser.views import Views
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.features import FeatureIndex, Steer, inspect
from hf_selortho.features.build import IndexSettings, Sources, build_feature_index
from hf_selortho.features.index_writer import INDEX, IndexWriter
from hf_selortho.features.records import PAIR_TABLE
from hf_selortho.language_models.capture import ActivationCapture
from hf_selortho.modeling_selortho import ENCODER_NORMS

HOSTILE = '<img src=x onerror="document.title=1">'
LABELS = {3: HOSTILE, 5: "rivers & bridges", 7: "\u202eturned round"}
EXAMPLES = ("The old river measured two bridges.", HOSTILE)
SENTENCE = "A young engineer built two bridges near the coast."


def save_small_sae(folder: Path, lm, seed: int, **settings) -> SelOrthoSAE:
    """Save an SAE of random weights that fires on some of the tokens, with what its training would have written."""
    config = SelOrthoConfig(
        d_in=32, d_sae=96, layer=1, hook_name="model.layers.1", lm_name=lm.name, lm_revision=lm.revision,
        context_length=32, min_support=2, pair_fraction=0.01, **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    sae = SelOrthoSAE(config)
    with torch.no_grad():
        sae.b_enc.fill_(-0.6 * ENCODER_NORMS[sae.config.activation])
        sae.set_input_statistics(torch.zeros(32), 3.0)
    sae.save_pretrained(folder)
    evaluation = {"fvu": 0.25 + seed / 100, "l0": 12.5, "loss_recovered": 0.9, "dead_features": 1}
    (folder / "metrics.json").write_text(json.dumps({"evaluation": evaluation}))
    rows = ({"step": step, "fvu": 1 / step, "l0": 50 - step, "dead_features": 0} for step in (1, 10, 20))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The card\n\n![p](p.png) ![q](../q.png)\n")
    (folder / "p.png").write_bytes(b"picture")
    (folder.parent / "q.png").write_bytes(b"of others")
    return sae.eval()


@pytest.fixture(scope="module")
def catalog(tiny_lm, sample_text_files, tmp_path_factory) -> dict[str, CatalogEntry]:
    """An SAE and its twin, `layer_1` and `layer_1_twin`, each with an index."""
    folder, lm = tmp_path_factory.mktemp("space") / "run", tiny_lm("gemma3")
    sae = save_small_sae(folder / "layer_1", lm, 0)
    twin = save_small_sae(folder / "layer_1_twin", lm, 1, penalty="none")
    documents = open_documents(TextSource(str(sample_text_files.csv), text_column="text", held_out_fraction=0.5))
    for name, one, beside in (("layer_1", sae, twin), ("layer_1_twin", twin, None)):
        sources = Sources(
            one, ActivationCapture(lm, 1), documents, name, "0" * 64, beside, "layer_1_twin", "1" * 64, labels=LABELS
        )
        with IndexWriter(folder / name / INDEX) as writer:
            build_feature_index(sources, IndexSettings(tokens=4000), writer, progress=False)
    return open_catalog(str(folder), None)


@pytest.fixture(scope="module")
def live(catalog) -> LiveModel:
    model = LiveModel(catalog)
    model.start_loading()
    return model


@pytest.fixture(scope="module")
def views(catalog, live) -> Views:
    return Views(catalog, live, EXAMPLES)


def words(page: str) -> str:
    """The text of a page, as a reader sees it."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def links(page: str) -> list[str]:
    return [html.unescape(href) for href in re.findall(r'href="([^"]*)"', page)]


def test_the_view_of_a_text_offers_examples(views) -> None:
    text = Address(view="text")
    assert links(views.render(text)) == [text.to(q=example).query() for example in EXAMPLES]


def test_a_text_shows_its_tokens_and_the_strongest_features(views, live) -> None:
    page = views.render(Address(view="text", q=SENTENCE))
    reading = live.capture(SENTENCE)
    shown = page.split('<div class="so-reading" dir="auto">')[1].split("</div>")[0]
    assert links(shown) == [Address(view="text", q=SENTENCE, token=place).query() for place in range(len(reading))]
    assert html.unescape(re.sub("<[^>]*>", "", shown)) == "".join(reading.tokens)
    first, *_ = re.findall(r"<tr><td>(.*?)</tr>", page, re.DOTALL)
    feature, activation = reading.strongest(1)[0]
    assert Address(view="text", q=SENTENCE, feature=feature).query() in links(first) and number(activation) in first
    assert Address(view="feature", id=feature).query() in links(first)
    assert "The hatched token is no input of the SAE" in page and "so-unread" in page
    api = inspect(live.sae(), SENTENCE)
    assert api.tokens == reading.tokens and api.strongest(10) == reading.strongest(10)


def test_a_token_lists_its_features(views, live) -> None:
    reading = live.capture(SENTENCE)
    page = views.render(Address(view="text", q=SENTENCE, token=3))
    fires = int((reading.feature_acts[3] > 0).sum())
    assert f"“{reading.tokens[3]}”: {fires} features fire" in words(page)
    feature, activation = reading.top(1)[3][0]
    assert links(page)[len(reading)] == Address(view="text", q=SENTENCE, token=3, feature=feature).query()
    assert number(activation) in page
    assert "the SAE does not read this token" in words(views.render(Address(view="text", q=SENTENCE, token=0)))


def test_a_chosen_feature_shades_the_text_and_opens_beside_it(views, live, catalog) -> None:
    feature, activation = live.capture(SENTENCE).strongest(2)[1]
    page = views.render(Address(view="text", q=SENTENCE, feature=feature))
    most = catalog["main"].index.feature(feature).max_activation
    assert f"shaded by feature {feature}" in page and number(most) in page.split("<aside")[1]
    shades = re.findall(r"--s:([\d.]+)", page.split('<div class="so-reading" dir="auto">')[1].split("</div>")[0])
    assert max(map(float, shades)) == pytest.approx(activation / max(most, activation), abs=1e-3)


def test_a_feature_shows_its_record(views, live, catalog) -> None:
    index = catalog["main"].index
    firing = index.firing_features()
    feature = next(f for f in firing if f > 10)
    record, page = index.feature(feature), views.render(Address(view="feature", id=feature))
    text = words(page)
    assert f"Feature {feature}" in text and f"{percent(record.frequency)} of tokens" in text
    assert all(f"{effect.logit:+.1f}" in text for effect in record.promoted + record.suppressed)
    for neighbour in record.nearest_by_cosine + record.nearest_by_correlation:
        assert Address(view="feature", id=neighbour.feature).query() in links(page)
    assert page.count('<li class="so-context">') == len(record.contexts)
    assert all(f"document {context.document_id}" in text for context in record.contexts)
    place = firing.index(feature)
    steps = [Address(view="feature", id=target).query() for target in (firing[place - 1], firing[place + 1])]
    assert [target for target in steps if target in links(page)] == steps
    strongest, activation = live.capture(SENTENCE).strongest(1)[0]
    page = words(views.render(Address(view="feature", id=strongest, q=SENTENCE)))
    assert "On your text" in page and f"at most {number(activation)}" in page


@pytest.mark.parametrize(
    ("sort", "up"), [("correlation", False), ("correlation", True), ("support", False), ("decoder_cosine", False)]
)
def test_the_table_of_pairs_is_sorted(views, catalog, sort, up) -> None:
    address = Address(view="pairs", sort=sort, up=up, hidden=True)
    rows = find_pairs(catalog["main"].index, address).rows
    values = [row[sort] for row in rows]
    assert len(values) > 3 and values == sorted(values, reverse=not up)
    assert f"{rows[0]['a']} – {rows[0]['b']}" in words(views.render(address).split("<tbody>")[1])[:40]


def test_the_table_of_pairs_is_filtered(views, catalog) -> None:
    index = catalog["main"].index
    some = index.pair_table.to_pylist()[0]
    rows = find_pairs(index, Address(view="pairs", q=str(some["a"]), hidden=True)).rows
    assert rows and all(some["a"] in (row["a"], row["b"]) for row in rows)
    only = Address(view="pairs", only=some["pair_class"], hidden=True)
    assert len(find_pairs(index, only).rows) == index.facts["pairs"]["classes"][some["pair_class"]]
    assert "aria-current" in views.render(only)


def test_a_pair_shows_both_features_and_the_twin(views, catalog) -> None:
    index = catalog["main"].index
    row = index.pair_table.to_pylist()[0]
    record = index.pair(row["a"], row["b"])
    page = views.render(Address(view="pairs", a=record.b, b=record.a))  # in the other order
    text = words(page)
    assert number(record.correlation) in text and number(record.twin_correlation) in text
    assert f"features {record.twin_a} and {record.twin_b}" in text and record.pair_class in text
    assert f"{record.support:,} tokens" in text
    for feature in (record.a, record.b):
        assert Address(view="feature", id=feature).query() in links(page)
    assert page.count("so-two") > 2 and "Only A fires" in text and "Only B fires" in text
    assert page.split("Both fire</h4>")[1].count('<li class="so-context">') == len(record.contexts)


def test_searches(views, catalog, live) -> None:
    index = catalog["main"].index
    assert Address(view="feature", id=5).query() in links(views.render(Address(view="search", q="& BRIDGES")))
    token = index.feature(5).promoted[0].token.strip()
    by_token = [summary.feature for summary in index.search_promoted(token)]
    by_phrase = [feature for feature, _ in live.capture(SENTENCE).strongest(30)]
    for q, by, features in ((token, "token", by_token), (SENTENCE, "phrase", by_phrase)):
        page = views.render(Address(view="search", q=q, by=by))
        assert [Address(view="feature", id=feature).query() for feature in features] == links(page) != []
    assert "No feature found" in views.render(Address(view="search", q="zebra crossing"))


def test_two_saes_on_one_sentence(views, live) -> None:
    page = views.render(Address(view="compare", q=SENTENCE))
    feature, activation = live.capture(SENTENCE).strongest(1)[0]
    saes, readings = (live.sae(), live.sae("twin")), (live.capture(SENTENCE), live.capture(SENTENCE, "twin"))
    first = counterparts(saes, readings, 1)[0]
    W, other = saes[0].W_dec.detach(), saes[1].W_dec.detach()
    assert first.cosine == pytest.approx(float((W[feature] @ other.T).max() / W[feature].norm()), abs=1e-4)
    row = words(page.split("<tbody>")[1].split("</tr>")[0])
    assert row.startswith(f"{feature} ") and number(activation) in row and f"{first.nearest} " in row
    assert Address(view="feature", sae="twin", id=first.nearest).query() in links(page)


def test_the_run_beside_its_twin(views) -> None:
    text = words(views.render(Address(view="run")))
    assert "0.250" in text and "0.260" in text and "run/layer_1_twin" in text and "loss recovered" in text
    assert "step 1 to 20" in text and "/tmp" not in text


def test_a_card_shows_its_own_pictures_only(catalog) -> None:
    card = card_markdown(catalog["main"])
    assert card.startswith("# The card") and "![p](data:image/png;base64,cGljdHVyZQ==) *q*" in card


@pytest.mark.parametrize("view", sorted(VIEWS.keys() - {"steer"}))
@pytest.mark.parametrize("feature", [3, 7])
def test_hostile_text_and_labels_stay_text(views, view, feature) -> None:
    page = views.render(Address(view=view, q=HOSTILE, id=feature, feature=feature, by="phrase"))
    assert "Something went wrong" not in page and "<img" not in page and "\u202e" not in page
    for tag in re.findall(r"<[^>]*>", page):
        assert 'onerror="' not in tag and "onerror='" not in tag
    if view == "feature":
        assert ("&lt;img src=x onerror=&#34;" if feature == 3 else "‹202E›turned round") in page


def test_without_a_language_model_all_but_live_text_works(catalog) -> None:
    views = Views(catalog, LiveModel(catalog, lm="none"))
    for view, by in (("text", "label"), ("compare", "label"), ("search", "phrase")):
        address = Address(view=view, q=SENTENCE, by=by)
        assert "there is no live text here: its owner has switched live text off" in words(views.render(address))
    assert "<tbody>" in views.render(Address(view="pairs"))
    page = words(views.render(Address(view="feature", id=5, q=SENTENCE)))
    assert "Feature 5" in page and "no live text" in page and "Nearest by" in page


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (Address(view="feature", id=96), "feature 96: expected a number from 0 to 95"),
        (Address(view="pairs", sort="colour"), "sort='colour'"),
        (Address(view="pairs", a=0, b=0), "are no pair of this index"),
        (Address(view="text", q="x" * (MAX_CHARACTERS + 1)), "this page reads at most 2,000"),
        (Address(view="text", q=" word" * 300), "tokens: this page reads at most 256"),
        (Address(view="text", sae="/etc"), "this page shows main and twin"),
        (Address(view="compare", q="x", other="org/other"), "unknown SAE 'org/other'"),
    ],
)
def test_mistakes_are_said_in_words(views, address, said) -> None:
    page = views.render(address)
    assert 'role="alert"' in page and said in words(page)


def with_pairs(index: FeatureIndex, pairs: list[dict[str, Any]], labels: list[str], often: list[float]) -> FeatureIndex:
    """The index with other pairs, and labels and frequencies of its first features."""
    columns = dict.fromkeys(PAIR_TABLE.names) | {"pair_class": "nested", "decoder_cosine": 0.0, "support": 1}
    other = copy.copy(index)
    other.pair_table = pa.Table.from_pylist([{**columns, **pair} for pair in pairs], schema=PAIR_TABLE)
    table = index.feature_table.to_pydict()
    table["label"][: len(labels)], table["frequency"][: len(often)] = labels, often
    other.feature_table = pa.table(table, schema=index.feature_table.schema)
    return other


def test_pairs_lead_with_the_largest_difference_to_the_twin_and_hide_dense_and_wordless_ones(catalog) -> None:
    labels = ["where, Where", "line break", "the", "東京", "↵, ␣, .", "rain"]
    pairs = [
        {"a": 0, "b": 3, "correlation": 0.5, "twin_correlation": 0.4},
        {"a": 3, "b": 5, "correlation": 0.2, "twin_correlation": 0.9},
        {"a": 0, "b": 5, "correlation": 0.6, "twin_correlation": 0.0, "twin_match_a": 0.9, "twin_match_b": 0.4},
        {"a": 0, "b": 1, "correlation": 0.9, "twin_correlation": 0.1},  # a line break
        {"a": 0, "b": 2, "correlation": 0.9, "twin_correlation": 0.1},  # dense
        {"a": 3, "b": 4, "correlation": 0.9, "twin_correlation": 0.1},  # white space and punctuation
    ]
    index = with_pairs(catalog["main"].index, pairs, labels, [0.01, 0.01, 0.11, 0.09, 0.01, 0.01])
    found = find_pairs(index, Address(view="pairs"))
    assert [(row["a"], row["b"]) for row in found.rows] == [(3, 5), (0, 3), (0, 5)]
    assert [row["difference"] for row in found.rows] == [pytest.approx(-0.7), pytest.approx(0.1), None]
    assert (found.hidden, found.classes["nested"]) == (3, 3)
    assert find_pairs(index, Address(view="pairs", hidden=True)).classes["nested"] == 6
    page = pair_table(Address(view="pairs"), index)
    assert (
        "3 pairs of dense features" in words(page) and "are hidden. Show them" in words(page) and "−0.70" in words(page)
    )
    assert Address(view="pairs", hidden=True).query() in links(page)
    alone = with_pairs(index, [{**pair, "twin_correlation": None} for pair in pairs], labels, [])
    page = words(pair_table(Address(view="pairs"), alone))
    assert [row["a"] for row in find_pairs(alone, Address(view="pairs")).rows] == [0, 0, 3]  # by the correlation
    assert "difference" not in page


@pytest.mark.parametrize(
    ("label", "expected"),
    [(text, True) for text in ("where", "7", "東京", "❤️", "€", "line break, where", "after a line break")]
    + [(text, False) for text in ("line break", "↵", ".", "␣␣", "—", "line break, ↵", "= +", "full stop, comma")],
)
def test_which_labels_hold_words(label, expected) -> None:
    assert holds_words(label) is expected


def test_strength_is_in_multiples_of_each_features_own_largest_activation(catalog) -> None:
    index = catalog["main"].index
    a, b = index.firing_features()[:2]
    found = steers_of(index, [a, None, f"{b} some label", ""], "peak", 3.0)
    assert [(s.feature, s.mode, s.value) for s in found] == [
        (f, "clamp", pytest.approx(3 * index.summary(f).max_activation)) for f in (a, b)
    ]
    assert steers_of(index, [a], "scale", -1.0) == [Steer(a, "scale", -1.0)]
    assert steers_of(None, [a], "clamp", 5.0) == [Steer(a, "clamp", 5.0)]
    assert steers_of(index, ["RIVERS & br"], "clamp", 5.0) == [Steer(5, "clamp", 5.0)]
    table = index.feature_table.to_pydict()
    silent, table["max_activation"][95] = 95, 0.0
    index = copy.copy(index)
    index.feature_table = pa.table(table, schema=index.feature_table.schema)
    for features, mode, said in (
        (["zebra"], "peak", "feature 'zebra': no label holds it; type a number, or a word of a label"),
        ([silent], "peak", f"the largest activation of feature {silent} is not known (it never fires"),
        ([96], "peak", "feature 96: expected a number from 0 to 95"),
        ([a], "peak", "activations are never negative"),
        ([a], "other", "mode 'other'"),
    ):
        with pytest.raises(SelOrthoError) as caught:
            steers_of(index, features, mode, -1.0)
        assert said in str(caught.value)
    with pytest.raises(SelOrthoError, match="there is no feature index"):
        steers_of(None, [a], "peak", 1.0)


def test_a_box_offers_features_for_what_is_typed(catalog) -> None:
    index = catalog["main"].index
    assert ("5 rivers & bridges", 5) in offered(index, "& BRIDGES")
    assert offered(index, "12")[0][1] == 12 and offered(index, "5 rivers")[0] == ("5 rivers & bridges", 5)
    assert offered(index, "7")[0] == ("7 ‹202E›turned round", 7) and offered(None, "x") == []
    start = [feature for _, feature in offered(index)]
    assert len(set(start)) == len(start) == OFFERED


@pytest.mark.parametrize(
    ("query", "mode", "value"),
    [("a=9", "peak", DEFAULT_STRENGTH), ("a=9&mode=clamp&value=5", "clamp", 5.0), ("a=9&value=5.5", "clamp", 5.5)]
    + [("a=9&mode=scale&value=0", "scale", 0.0), ("a=9&mode=peak&value=4", "peak", 4.0)],
)
def test_an_address_fills_in_the_form_of_steering(views, query, mode, value) -> None:
    page = Page(views)
    page.build()
    prompt, a, b, *rest = page._steer_values(parse_address(f"?view=steer&q=The+day&{query}"))
    assert (prompt, a.value, b.value, *rest) == ("The day", 9, None, mode, value, "main")


def test_steering_says_what_was_changed_and_writes_both_texts(views, live, catalog) -> None:
    index, page = catalog["main"].index, Page(views)
    feature = index.firing_features()[0]
    *_, last = page.generate("The old river", str(feature), None, "peak", 2.0, "main", 0.0, 5, 0)
    largest = index.summary(feature).max_activation
    assert f"held at {number(2 * largest)}, 2.00 × its largest activation" in words(last)
    assert last.count('class="so-reading"') == 2 and f"a={feature}&mode=peak&value=2" in html.unescape(last)
    *_, last = page.generate("The old river", "no such label", None, "peak", 2.0, "main", 0.0, 5, 0)
    assert "no label holds it" in words(last)
