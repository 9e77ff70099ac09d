"""The feature index: whole or not there, read a record at a time, from a folder and from a Hub over real HTTP."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_selortho import SelOrthoConfig, SelOrthoError
from hf_selortho.features import FeatureIndex, FeatureRecord, PairRecord
from hf_selortho.features.index_writer import FILES, INDEX, ROWS_IN_GROUP, IndexWriter
from hf_selortho.features.records import (
    BINS,
    ConceptRow,
    FeatureContext,
    JointContext,
    Label,
    Neighbour,
    TokenEffect,
)
from hf_selortho.features.records import (
    CONCEPTS as CONCEPT_TABLE,
)
from tests.hub_client import HubClient
from tests.loopback_hub import LoopbackHub

FEATURES = 3 * ROWS_IN_GROUP + 7
WORDS = [" the", " import", "<b>", "é", "\n", "", "🙂", " of"]
FACTS = {
    "sae": {"d_sae": FEATURES}, "lm": {"name": "org/lm"}, "text": {}, "features": {"never_fired": 1},
    "pairs": {"source": "training", "selected": 500},
    "gallery": [{"feature": 3, "label": "where", "source": "token", "score": 0.9, "tokens": ["a", " where"],
                 "activations": [0.0, 2.0], "peak": 1}],
}  # fmt: skip
CONCEPTS = [ConceptRow("159_code_Python", "Python code", True, rank, 7 - rank, 0.75, rank == 1) for rank in range(2)]


def exact(value: float) -> float:
    """As float32 holds it."""
    return float(np.float32(value))


def source_of(number: int) -> str:
    return "none" if number == 9 else "unclear" if number % 100 == 29 else "token"


def feature_record(number: int) -> FeatureRecord:
    rng = random.Random(number)
    tokens = [rng.choice(WORDS) for _ in range(20)]
    acts = [exact(rng.random()) if rng.random() < 0.2 else 0.0 for _ in tokens]
    contexts = [FeatureContext(kind, number, 3, 5, exact(0.5), 1.0, tokens, acts) for kind in ("top", "sample")]
    promoted = [TokenEffect(rank, f" word{(number + rank) % 10}", float(9 - rank)) for rank in range(4)]
    near = [Neighbour((number + 1) % FEATURES, exact(0.3), exact(0.2), 17)]
    fires = 0 if number == 9 else number + 1
    return FeatureRecord(
        number, f"Label {number}" if fires else "", source_of(number), fires, exact(fires / 10_000),
        2.0, 1.0, [rng.randint(0, 5) for _ in range(BINS)], promoted, [TokenEffect(7, "x", -1.0)], near, near, contexts,
        label_score=exact(0.8) if fires else None, labels=[Label("context", "after 'of'", 0.75, "on 3 of 4")] * 2,
    )  # fmt: skip


def pair_record(a: int, b: int) -> PairRecord:
    context = JointContext("both", 4, 0, 1, ["a", "b"], [0.0, 1.0], [1.0, 0.5])
    return PairRecord(
        a, b, "nested", exact(0.7), exact(0.1), None, 5, None, exact(0.9), None, 0.25, None, 40, 0, 10,
        [12, 24], [None, exact(0.6)], [context],
    )  # fmt: skip


PAIRS = [(a, a + 1) for a in range(0, FEATURES - 1, 2)]


def write(folder: Path, label: str = "Label") -> Path:
    with IndexWriter(folder) as writer:
        for start in range(0, FEATURES, 50):
            numbers = range(start, min(start + 50, FEATURES))
            writer.add_features(replace(feature_record(n), label=f"{label} {n}" if n != 9 else "") for n in numbers)
        writer.add_pairs(pair_record(a, b) for a, b in PAIRS)
        writer.facts, writer.concepts = FACTS, CONCEPTS
    return folder


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory) -> Path:
    """An SAE's config with an index beside it."""
    folder = tmp_path_factory.mktemp("index") / "sae"
    SelOrthoConfig(d_in=8, d_sae=FEATURES).save_pretrained(folder)
    write(folder / INDEX)
    return folder


def assert_it_is_whole(index: FeatureIndex) -> None:
    assert len(index) == FEATURES and index.pairs == len(PAIRS)
    for number in (0, ROWS_IN_GROUP - 1, ROWS_IN_GROUP, FEATURES - 1):
        assert index.feature(number) == feature_record(number)
    assert index.pair(*PAIRS[-1]) == pair_record(*PAIRS[-1])
    assert index.pair(1, 0) == pair_record(0, 1)
    assert index.concepts() == CONCEPTS and index.facts["gallery"] == FACTS["gallery"]
    assert (index.summary(5).label_source, index.summary(5).label_score) == ("token", exact(0.8))


def test_what_was_written_is_read(sae_folder) -> None:
    for place in (sae_folder, sae_folder / INDEX):
        assert_it_is_whole(FeatureIndex.open(place))
    assert_it_is_whole(FeatureIndex.open(sae_folder.parent, subfolder="sae"))


def test_tables_and_searches(sae_folder) -> None:
    index = FeatureIndex.open(sae_folder)
    assert index.label(5) == "Label 5" and index.label(9) == ""
    assert index.firing_features() == [n for n in range(FEATURES) if n != 9]
    found = [s.feature for s in index.search_labels("bel 12")]  # the most frequent first, but the unclear 129 last
    assert found == [128, 127, 126, 125, 124, 123, 122, 121, 120, 12, 129]
    assert [s.feature for s in index.most_frequent(1000)][-2:] == [129, 29]
    assert len(index.search_labels("LABEL", k=7)) == 7 and index.search_labels(" ") == []
    found = [s.feature for s in index.search_promoted("WORD3", k=1000)]
    rank = {n: (3 - n) % 10 for n in found}
    assert sorted(found) == [n for n in range(FEATURES) if (3 - n) % 10 < 4]
    assert [rank[n] for n in found] == sorted(rank.values())
    assert index.summary(7).fires == 8 and index.pairs_of(3) == [(2, 3)]
    assert index.has_pair(3, 2) and not index.has_pair(1, 2)


@pytest.mark.parametrize("number", [-1, FEATURES, True, 1.0, "3"])
def test_no_such_feature(sae_folder, number) -> None:
    with pytest.raises(SelOrthoError, match=f"expected a (whole )?number from 0 to {FEATURES - 1}"):
        FeatureIndex.open(sae_folder).feature(number)


def test_no_such_pair(sae_folder) -> None:
    with pytest.raises(SelOrthoError, match=f"no pair of this index: it holds the {len(PAIRS)} strongest of 500"):
        FeatureIndex.open(sae_folder).pair(1, 2)


def test_an_index_is_replaced_whole_or_not_at_all(tmp_path) -> None:
    folder = write(tmp_path / INDEX)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == set(FILES) - {"moved.parquet"}  # of an SAE that was trained from another one
    with pytest.raises(RuntimeError), IndexWriter(folder) as writer:
        writer.add_features([feature_record(0)])
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]
    write(folder, "Other")
    assert FeatureIndex.open(folder).label(3) == "Other 3"
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]


def test_nothing_else_is_replaced(tmp_path) -> None:
    (tmp_path / INDEX).mkdir()
    (tmp_path / INDEX / "thesis.txt").write_text("mine")
    with pytest.raises(SelOrthoError, match="thesis.txt, which is no part of a feature index"):
        IndexWriter(tmp_path / INDEX)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SelOrthoError, match="is a file"):
        IndexWriter(tmp_path / "file")


def damaged(folder: Path, how: str) -> str:
    """Damage an index; what the error says of it."""
    if how == "no facts":
        (folder / "index.json").unlink()
        return "has no feature index"
    if how == "another version":
        facts = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**facts, "schema_version": 99}))
        return "has schema_version 99, this hf_selortho reads 1 to 3"
    if how == "other facts":
        (folder / "index.json").write_text('{"kind": "feature_index", "schema_version": 1}')
        return "lacks 'sae'"
    if how == "gallery":
        facts = json.loads((folder / "index.json").read_text())
        facts["gallery"][0]["peak"] = 2
        (folder / "index.json").write_text(json.dumps(facts))
        return "has a damaged gallery"
    if how == "concepts":
        rows = [{**vars(CONCEPTS[0]), "feature": FEATURES}]
        pq.write_table(pa.Table.from_pylist(rows, CONCEPT_TABLE), folder / "concepts.parquet", store_schema=False)
        return "concepts.parquet .* is damaged"
    if how == "cut":
        data = (folder / "features.parquet").read_bytes()
        (folder / "features.parquet").write_bytes(data[: len(data) // 2])
        return "features.parquet is damaged"
    if how == "other columns":
        pq.write_table(pa.table({"x": [1]}), folder / "pairs.parquet")
        return "has other columns than a feature index"
    if how == "other build":
        table = pq.read_table(folder / "pair_table.parquet")
        pq.write_table(table.slice(0, 3), folder / "pair_table.parquet", store_schema=False)
        return "files of several builds"
    (folder / "feature_table.parquet").unlink()
    return "lacks feature_table.parquet"


@pytest.mark.parametrize(
    "how",
    [
        "no facts",
        "another version",
        "other facts",
        "gallery",
        "concepts",
        "cut",
        "other columns",
        "other build",
        "gone",
    ],
)
def test_damage_is_named(sae_folder, tmp_path, how) -> None:
    shutil.copytree(sae_folder / INDEX, tmp_path / INDEX)
    said = damaged(tmp_path / INDEX, how)
    with pytest.raises(SelOrthoError, match=said):
        FeatureIndex.open(tmp_path)


def test_damage_within_a_record_is_named(sae_folder, tmp_path) -> None:
    shutil.copytree(sae_folder / INDEX, tmp_path / INDEX)
    file = tmp_path / INDEX / "features.parquet"
    data = bytearray(file.read_bytes())
    data[3000:3400] = bytes(400)
    file.write_bytes(data)
    index, refused = FeatureIndex.open(tmp_path), 0
    for number in range(ROWS_IN_GROUP):
        try:
            index.feature(number)
        except SelOrthoError as error:
            assert "build it again" in str(error) or "build the feature index again" in str(error)
            refused += 1
    assert refused > 0


def test_links_lead_nowhere_else(sae_folder, tmp_path) -> None:
    shutil.copytree(sae_folder / INDEX, tmp_path / "sae" / INDEX)
    (tmp_path / "sae" / INDEX / "features.parquet").rename(tmp_path / "elsewhere.parquet")
    (tmp_path / "sae" / INDEX / "features.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(SelOrthoError, match="leads out of"):
        FeatureIndex.open(tmp_path / "sae")


def test_from_the_hub_a_feature_is_one_small_request(sae_folder, tmp_path) -> None:
    with LoopbackHub() as hub:
        hub.upload("acme/sae", sae_folder)
        hub.create_repo("acme/plain")
        with HubClient(hub.environment(tmp_path / "home")) as client:
            opening = 'from hf_selortho.features import FeatureIndex\nindex = FeatureIndex.open("acme/sae")\n'
            client.run(opening)
            file = f"{INDEX}/features.parquet"
            before = len(hub.served(file))
            found = client.run(opening + "print(index.feature(150).label, index.feature(151).fires)\n")
            assert found == "Label 150 152\n"
            footer, record = hub.served(file)[before:]  # the end of the file, once, and then the row group of both
            start, end = json.loads((sae_folder / INDEX / "index.json").read_text())["row_groups"]["features.parquet"][
                2:4
            ]
            assert footer.status == record.status == 206
            assert record.range == f"bytes={start}-{end - 1}" and record.sent == end - start
            assert client.run(opening + "print(index.pair(1, 0).support)\n") == "10\n"
            failure = client.failure('from hf_selortho.features import FeatureIndex\nFeatureIndex.open("acme/plain")')
            assert "SelOrthoError" in failure and "feature index" in failure
            unknown = client.failure('from hf_selortho.features import FeatureIndex\nFeatureIndex.open("acme/none")')
            assert 'unknown SAE "acme/none"' in unknown
