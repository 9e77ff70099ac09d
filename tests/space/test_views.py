"""The views as HTML: what they say is what the Python API says, and nothing of a text or a label becomes markup."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("gradio")  # the extra `space`, which the whole browser needs

import torch

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.browser.address import MAX_CHARACTERS, VIEWS, Address
from hf_selortho.browser.catalog import CatalogEntry, card_markdown, open_catalog
from hf_selortho.browser.live_model import LiveModel
from hf_selortho.browser.pairs import sorted_pairs
from hf_selortho.browser.rendering import number, percent
from hf_selortho.browser.text_view import counterparts
from hf_selortho.browser.views import Views
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.features import inspect
from hf_selortho.features.build import IndexSettings, Sources, build_feature_index
from hf_selortho.features.index_writer import INDEX, IndexWriter
from hf_selortho.language_models.capture import ActivationCapture

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
        sae.b_enc.fill_(-0.6)
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
    address = Address(view="pairs", sort=sort, up=up)
    rows = sorted_pairs(catalog["main"].index, address)
    values = [row[sort] for row in rows]
    assert len(values) > 3 and values == sorted(values, reverse=not up)
    assert f"{rows[0]['a']} – {rows[0]['b']}" in words(views.render(address).split("<tbody>")[1])[:40]


def test_the_table_of_pairs_is_filtered(views, catalog) -> None:
    index = catalog["main"].index
    some = index.pair_table.to_pylist()[0]
    rows = sorted_pairs(index, Address(view="pairs", q=str(some["a"])))
    assert rows and all(some["a"] in (row["a"], row["b"]) for row in rows)
    only = Address(view="pairs", only=some["pair_class"])
    assert len(sorted_pairs(index, only)) == index.facts["pairs"]["classes"][some["pair_class"]]
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
