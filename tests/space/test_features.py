"""What the page opens on, the table of all features and the concepts: they list what the index says, and only that."""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("gradio")  # the extra `space`, which the whole browser needs

from hf_selortho import SelOrthoConfig, SelOrthoError
from hf_selortho.browser.address import Address, parse_address
from hf_selortho.browser.catalog import CatalogEntry, open_catalog
from hf_selortho.browser.concept_view import concepts_of
from hf_selortho.browser.endpoints import Endpoints
from hf_selortho.browser.feature_table import FEATURE_COLUMNS, frequency_bars, sorted_features
from hf_selortho.browser.live_model import LiveModel
from hf_selortho.browser.page import Page
from hf_selortho.browser.pairs import pair_table
from hf_selortho.browser.rendering import percent, readable, score
from hf_selortho.browser.start_view import gallery
from hf_selortho.browser.steering_view import shown
from hf_selortho.browser.views import Views
from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.index_writer import FEATURE_SUMMARY
from hf_selortho.features.records import LABEL_SOURCES, PAIR_TABLE, ConceptRow
from hf_selortho.utils.names import RepoRef
from tests.space.test_views import links, words
from tests.space.written_run import CONCEPTS, DEAD, DENSE, FEATURES, label_of, record_of, write_run

RECORDS = [record_of(feature) for feature in range(FEATURES)]
UNNAMED = {"unclear": 1, "none": 2}
TABLE = Address(view="features")


def open_views(folder: Path) -> Views:
    catalog = open_catalog(str(folder), None)
    return Views(catalog, LiveModel(catalog, lm="none"))


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> Views:
    return open_views(write_run(tmp_path_factory.mktemp("page") / "run"))


@pytest.fixture(scope="module")
def index(views) -> FeatureIndex:
    return views.index("main")


def rows_of(page: str) -> list[int]:
    """The features that a table lists."""
    return [int(number) for number in re.findall(r'class="so-id">(\d+)</a></td>', page.split("<tbody>")[1])]


def test_the_page_opens_on_what_the_sae_is_and_twelve_features_of_every_kind(views) -> None:
    page = views.render(parse_address(""))
    text = words(page)
    assert f"{FEATURES} features of layer 2 of org/lm" in text and "trained on 640 tokens of org/texts" in text
    for here, twin in (("0.103", "0.123"), ("7.25", "7.25"), ("0.189", "0.214"), ("0.78", "0.73"), ("0.87", "0.82")):
        assert f"{here} its twin {twin}" in text
    for said in (
        "beside the twin baseline: the same run without the penalty",
        "6 sets of texts not in the corpus sae-probes",
    ):
        assert said in text
    cards = page.split('<li class="so-card">')[1:]
    assert len(cards) == 12 and {card.split("so-kind-")[1].split('"')[0] for card in cards[:5]} == {
        RECORDS[feature].label_source for feature in range(5)
    }
    assert all("so-peak" in card and "?view=feature&amp;id=" in card for card in cards)
    assert score(RECORDS[8].label_score) in text


def test_an_index_without_a_gallery_gets_one_of_its_best_labels(tmp_path) -> None:
    views = open_views(write_run(tmp_path / "run", gallery=False, concepts=False))
    cards = gallery(views.index("main"))
    assert len(cards) == 12 and not {card["source"] for card in cards} & {"unclear", "none"}
    assert all(RECORDS[card["feature"]].frequency < 0.01 and card["label"] != "↵" for card in cards)
    assert views.render(Address()).count('<li class="so-card">') == 12
    assert "selortho index ... --concepts quick" in words(views.render(Address(view="concepts")))


def test_an_index_of_the_first_version_is_shown() -> None:
    views = open_views(Path(__file__).parents[1] / "data/published_0_1_0/batchtopk")
    frequency = views.index("main").feature_table["frequency"].to_numpy()
    order = rows_of(views.render(TABLE))
    assert frequency[order].tolist() == sorted(frequency, reverse=True)[:50]
    for address in (Address(), Address(view="concepts"), Address(view="feature", id=order[0])):
        assert 'role="alert"' not in views.render(address)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("sort", ["", *(name for name in FEATURE_COLUMNS if name != "moved")])
def test_the_table_is_sorted_as_the_records_are(index, sort, up) -> None:
    column = sort or "label_score"

    def key(record):
        value = getattr(record, column)
        if column == "label":
            value = value.lower()
        elif column == "label_source":
            value = LABEL_SOURCES.index(value)
        last = UNNAMED.get(record.label_source, 0) if column == "label_score" else 0
        return last, value

    order = sorted_features(index, TABLE.to(sort=sort, up=up)).tolist()
    assert sorted(order) == list(range(FEATURES))
    groups: dict[int, list] = {}
    for feature in order:
        last, value = key(RECORDS[feature])
        groups.setdefault(last, []).append(value)
    assert list(groups) == sorted(groups)
    for values in groups.values():
        assert values == sorted(values, reverse=not up)
    assert column != "label_score" or order[-1] == DEAD


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"only": "concept"}, lambda record: record.label_source == "concept"),
        ({"q": "RIVER"}, lambda record: "river" in record.label),
        ({"score": 0.9}, lambda record: record.label_score is not None and record.label_score >= 0.9),
        ({"q": "17"}, lambda record: record.feature == 17 or "17" in record.label),
        ({"low": 1.0, "high": 2.5}, lambda record: 0.01 <= record.frequency < 0.025),
        ({"low": 10.0, "high": 100.0}, lambda record: record.feature == DENSE),
        ({"only": "token", "high": 1.0}, lambda record: record.label_source == "token" and record.frequency < 0.01),
    ],
)  # fmt: skip
def test_the_table_is_filtered_by_kind_label_number_and_frequency(views, index, changes, kept) -> None:
    expected = {record.feature for record in RECORDS if kept(record)}
    order = sorted_features(index, TABLE.to(**changes)).tolist()
    assert set(order) == expected != set()
    page = views.render(TABLE.to(**changes))
    assert rows_of(page) == order[:50] and f"{len(order)} feature" in words(page)
    if len(order) > 50:
        assert rows_of(views.render(TABLE.to(page=2, **changes))) == order[50:100]


def test_the_histogram_counts_what_each_of_its_bars_lists(index) -> None:
    bars = frequency_bars(index, TABLE)
    assert sum(bar.features for bar in bars) == FEATURES - 1 and all(bar.within for bar in bars)
    assert all(bar.high == after.low for bar, after in zip(bars, bars[1:], strict=False))
    for bar in bars:
        assert len(sorted_features(index, TABLE.to(low=bar.low, high=bar.high))) == bar.features


def test_a_click_selects_a_bar_the_second_one_all_between_and_the_same_one_nothing(index) -> None:
    bars = frequency_bars(index, TABLE)
    one = parse_address(bars[6].query)
    assert (one.low, one.high) == (bars[6].low, bars[6].high)
    beside = frequency_bars(index, one)
    assert [bar.within for bar in beside] == [place == 6 for place in range(len(bars))]
    for end in (2, 9):
        several = parse_address(beside[end].query)
        assert (several.low, several.high) == (bars[min(end, 6)].low, bars[max(end, 6)].high)
    assert parse_address(beside[6].query) == TABLE
    assert parse_address(frequency_bars(index, several)[4].query).high == bars[4].high  # begins anew


def test_dense_and_unclear_features_are_marked(views) -> None:
    page = views.render(TABLE.to(sort="frequency"))
    first, second = page.split("<tbody>")[1].split("</tr>")[:2]
    assert f">{DENSE}</a>" in first and "dense" in first and "dense" not in second and percent(0.2) in first
    assert "unclear" in words(views.render(TABLE.to(only="unclear")).split("<tbody>")[1])
    assert "dense only (1)" in words(page) and "1 never fired" in words(page)


def test_a_feature_says_how_its_label_was_got(views) -> None:
    for feature in (5, 4):  # a token; unclear
        record, text = RECORDS[feature], words(views.render(Address(view="feature", id=feature)))
        assert f"Feature {feature} {'unclear: ' if feature == 4 else ''}{record.label}" in text
        assert f"{record.label_source} {score(record.label_score)} {record.labels[0].detail}" in text
        assert f"1 other label considered context {score(record.labels[1].score)} {record.labels[1].text}" in text
    assert "never fired it never fired on the text" in words(views.render(Address(view="feature", id=DEAD)))


@pytest.mark.parametrize(
    ("label", "words"),
    [("↵", "line break"), ("↵↵↵, ⇥", "line break, tab"), ("  ", "white space"), ("import, as", "import, as"), ("", "")],
)
def test_a_label_of_white_space_is_a_word(label, words) -> None:
    assert readable(label) == words


def test_a_concept_lists_its_features_here_and_in_the_twin(views) -> None:
    first, second, _ = CONCEPTS
    page = views.render(Address(view="concepts"))
    assert [link for link in links(page) if "concept=" in link] == [
        Address(view="concepts", concept=concept).query() for concept in CONCEPTS
    ]
    chosen = page.split("<h2>")[1]
    for sae in ("main", "twin"):
        for feature in range(10):
            assert Address(view="feature", sae=sae, id=feature).query() in links(chosen)
    text = words(chosen)
    assert (
        text.startswith("Python code not in the corpus sae-probes")
        and text.count("the other class") == 2
        and "0.95" in text
    )
    text = words(views.render(Address(view="concepts", concept=second)).split("<h2>")[1])
    assert text.startswith("text of a model in the corpus sae-probes") and "Not measured for this SAE" in text
    assert first in [concept for concept in concepts_of(views.catalog["twin"])]


def test_the_other_class_is_the_one_that_the_best_feature_does_not_mark(views) -> None:
    rows = [
        ConceptRow("x", "not code", False, 0, 5, 0.8, True),
        ConceptRow("x", "code", False, 1, 6, 0.7, False),
        ConceptRow("x", "not code", False, 2, 8, 0.9, True),
    ]
    catalog = dict(views.catalog)
    for key, kept in (("main", rows), ("twin", rows[1:2])):
        index = copy.copy(catalog[key].index)
        index._concepts = kept
        catalog[key] = dataclasses.replace(catalog[key], index=index)
    views = Views(catalog, views.live)
    here, twin = views.render(Address(view="concepts")).split("<h2>")[1].split("<h4>")[1:]
    marks = [re.findall(r"<td>(it|the other class)</td>", side) for side in (here, twin)]
    assert marks == [["it", "it", "the other class"], ["the other class"]]
    features = Endpoints(views).concepts()["features"]
    assert [(row["feature"], row["negated"]) for row in features] == [(8, False), (5, False), (6, True)]


def test_the_twin_is_shown_beside_the_sae_with_the_penalty(views) -> None:
    text = words(views.render(Address(sae="twin")))
    assert "beside the same run with the penalty" in text and "0.123 with the penalty 0.103" in text
    page = views.render(Address(view="concepts", sae="twin"))
    assert re.findall(r'<th scope="col">(.*?)</th>', page)[:3] == ["concept", "best AUC", "with the penalty"]


def test_sets_are_not_trained_on_where_the_training_read_the_corpus_sae_probes(views) -> None:
    entry = views.catalog["main"]
    assert entry.read(trained_on=False) == "not in the corpus sae-probes"
    entry = dataclasses.replace(
        entry, config=SelOrthoConfig(**{**entry.config.own_settings(), "dataset": "sae-probes"})
    )
    assert (entry.read(trained_on=False), entry.read(trained_on=True)) == ("not trained on", "trained on")


def test_metrics_of_other_types_are_left_out(views) -> None:
    evaluation = {"fvu": "low", "l0": [1], "loss_recovered": 10**400, "top_correlation": True, "dead_features": 3}
    rows = [{"step": 1, "fvu": "x"}, {"step": 10**400, "fvu": 1.0}, {"step": 2, "fvu": 0.5}]
    entry = dataclasses.replace(views.catalog["main"], metrics={"evaluation": evaluation}, rows=rows)
    views = Views({"main": entry}, views.live)
    text = words(views.render(Address(view="run")))
    assert "dead features" in text and "loss recovered" not in text and "step 2 to 2" in text
    assert "Something went wrong" not in views.render(Address())


def test_an_unclear_label_says_so_wherever_it_is_shown(views, index) -> None:
    feature = next(record.feature for record in RECORDS if record.label_source == "unclear")
    label = f"unclear: {label_of(feature)}"
    assert label in words(views.render(Address(view="search", q=label_of(feature)))) and label in shown(index, feature)
    index = copy.copy(index)
    index.pair_table = pa.Table.from_pylist(
        [{**index.pair_table.to_pylist()[0], "b": feature}], schema=index.pair_table.schema
    )
    assert label in words(pair_table(Address(view="pairs"), index))


def test_without_a_rare_labelled_feature_the_gallery_takes_more_frequent_ones(tmp_path) -> None:
    index = copy.copy(open_views(write_run(tmp_path / "run", gallery=False)).index("main"))
    table = index.feature_table.to_pydict()
    table["frequency"] = [max(0.02, frequency) for frequency in table["frequency"]]
    index.feature_table = pa.table(table, schema=index.feature_table.schema)
    assert len(gallery(index)) == 12 and DENSE not in {card["feature"] for card in gallery(index)}


def test_an_sae_without_an_index_steers_by_activations(views) -> None:
    alone = Views({"main": dataclasses.replace(views.catalog["main"], index=None)}, views.live)
    assert "An example is filled in" not in alone.render(Address(view="steer"))
    assert "An example is filled in" in views.render(Address(view="steer"))
    assert Page(alone)._steer_values(Address(view="steer", a=3))[3] == "clamp"


def test_a_mistake_is_shown_in_the_view_that_was_asked_for(views) -> None:
    page = Page(views)
    page.build()
    for query, view in (("?view=features&low=abc", "features"), ("?view=pairs&page=x", "pairs"), ("?view=x", "start")):
        shown_in = dict(zip(page._shown, page.navigate(query), strict=False))
        assert 'role="alert"' in shown_in.pop(view) and not any(isinstance(one, str) for one in shown_in.values())
    *_, last = page.generate("The day", "99999", None, "clamp", 2.0, "main", 0.0, 5, 0)
    assert "feature 99999: expected a number from 0 to 239" in words(last)
    assert 'role="alert"' not in views.render(Address(view="pairs", q="9" * 5000))


@pytest.mark.parametrize("view", ["start", "features", "concepts", "feature"])
def test_labels_titles_and_details_of_strangers_stay_text(views, view) -> None:
    fields = {"features": {"q": "img"}, "concepts": {"concept": "7_x"}, "feature": {"id": 11}}
    page = views.render(Address(view=view, **fields.get(view, {})))
    assert "&lt;img src=x" in page and "<img" not in page and "<script" not in page


def test_programs_get_the_same_rows(views, index) -> None:
    api = Endpoints(views)
    answer = api.features(kind="token", limit=3)
    assert answer["total"] == sum(record.label_source == "token" for record in RECORDS)
    assert [row["feature"] for row in answer["features"]] == sorted_features(index, TABLE.to(only="token")).tolist()[:3]
    assert answer["features"][0].keys() == {*FEATURE_COLUMNS, "fires", "dense"} - {"moved"}
    assert api.features("frequency", low=10.0)["features"][0]["dense"] is True
    assert api.features(score=0.9, limit=1)["total"] == sum((record.label_score or 0) >= 0.9 for record in RECORDS)
    answer = api.start("twin")
    assert answer["saes"] == ["run/layer_2_twin", "run/layer_2"] and len(answer["features"]) == 12
    assert answer["figures"][0]["name"] == "FVU" and answer["figures"][0]["values"] == pytest.approx([0.123, 0.103])
    answer = api.concepts("110_aimade")
    assert [one["concept"] for one in answer["concepts"]] == list(CONCEPTS) and len(answer["features"]) == 10
    assert answer["features"][2]["negated"] and answer["features"][0]["label"] == label_of(10)
    with pytest.raises(SelOrthoError, match="only='colour': expected one of token"):
        api.features(kind="colour")
    with pytest.raises(SelOrthoError, match="concept='x': expected one of 158_code_Python"):
        api.concepts("x")
    for number, said in ((-1, "-1: expected a number from 0 to 239"), (12.5, "12.5: expected a whole"), (True, "True")):
        with pytest.raises(SelOrthoError, match=f"feature {said}"):
            api.steer("x", [number])


def test_65536_features_are_shown_in_under_a_second(views_of_a_large_index) -> None:
    views = views_of_a_large_index
    for address in (TABLE, TABLE.to(sort="label"), TABLE.to(only="token", q="river", low=0.1, high=1.6)):
        start = time.perf_counter()
        page = views.render(address)
        assert time.perf_counter() - start < 1 and len(rows_of(page)) == 50


@pytest.fixture
def views_of_a_large_index() -> Views:
    """An index of 65,536 features whose records cannot be read: the table alone must do."""
    many, rng = 1 << 16, np.random.default_rng(0)
    frequency = 10 ** rng.uniform(-5.5, -0.5, many)
    columns = {
        "feature": np.arange(many),
        "label": [f"{label_of(feature % FEATURES)} {feature}" for feature in range(many)],
        "label_source": [LABEL_SOURCES[kind] for kind in rng.integers(0, 5, many)],
        "label_score": rng.uniform(0, 1, many),
        "fires": (1e6 * frequency).astype(int),
        "frequency": frequency,
        "max_activation": rng.uniform(1, 9, many),
        "mean_activation": np.ones(many),
        "promotes": [[] for _ in range(many)],
    }
    table = pa.table({column.name: pa.array(columns[column.name], column.type) for column in FEATURE_SUMMARY})
    facts = {part: {} for part in ("sae", "lm", "text", "features", "pairs")}
    index = FeatureIndex(facts, range(many), range(0), (table, PAIR_TABLE.empty_table()), [])
    catalog = {"main": CatalogEntry("main", "large", RepoRef("large"), index=index)}
    return Views(catalog, LiveModel(catalog, lm="none"))
