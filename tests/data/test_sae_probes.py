"""The texts of the package sae-probes, as they are installed."""

from __future__ import annotations

import logging
import re
from collections import Counter
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pyarrow as pa
import pytest

from hf_selortho.data import sae_probes
from hf_selortho.data.sae_probes import (
    INSTALL,
    SOURCES,
    TRAINED_ON,
    VERSION,
    ProbeSet,
    probe_set_names,
    read_probe_set,
    sae_probes_texts,
)
from hf_selortho.data.text_source import TextSource
from hf_selortho.data.texts import open_documents
from hf_selortho.errors import SelOrthoError
from hf_selortho.training.arguments import parse_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture
def other_package(monkeypatch, tmp_path):
    """A package of this version with the files that a test puts into it."""

    class Package:
        version = VERSION

        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    package = Package()
    monkeypatch.setattr(sae_probes, "distribution", lambda name: package)
    probe_set_names.cache_clear()
    yield package
    probe_set_names.cache_clear()


def test_the_corpus_has_each_text_once_and_none_that_is_left_for_probing() -> None:
    texts, sources = sae_probes_texts()
    assert len(texts) == len(sources) == len(set(texts)) > 50_000
    clean = {text for name in probe_set_names() if name not in TRAINED_ON for text in read_probe_set(name).texts}
    assert not clean & set(texts)
    pieces = {line for text in texts for line in text.splitlines()}
    of_benchmark = {text for text in clean if len(text) > 30 and "\n" not in text}
    assert len(of_benchmark & pieces) < 0.001 * len(of_benchmark), "nor as a line of a longer text"
    of_sources = Counter[str]()
    for text, source in zip(texts, sources, strict=True):
        assert 0 < len(text) <= 2000
        of_sources[source] += len(text)
    assert set(of_sources) == set(SOURCES)
    assert max(of_sources.values()) <= 2_000_000 < sum(of_sources.values()) / 10
    assert max(Counter(sources[:1000]).values()) < 400, "not sorted by source"


def test_about_half_of_the_sets_is_never_trained_on() -> None:
    names = probe_set_names()
    assert len(names) == len(set(names)) == 113
    assert 40 <= sum(name in TRAINED_ON for name in names) <= 60
    outside = TRAINED_ON - set(names)
    assert outside == {"111_yelp_data"}, "no set of the benchmark"


def test_a_set_has_two_classes_in_the_order_of_their_names() -> None:
    probe_set = read_probe_set("36_sciq_tf")
    assert isinstance(probe_set, ProbeSet) and probe_set.classes == ("0", "1") and probe_set.trained_on
    assert len(probe_set.texts) == len(probe_set.labels) == 5000
    assert probe_set.labels.sum() == 2500
    assert read_probe_set("65_high-school").classes == ("bigram", "not_bigram")
    with pytest.raises(SelOrthoError, match="no probe set '65_high_school': expected one such as 5_hist"):
        read_probe_set("65_high_school")


def test_it_is_a_dataset_whose_sources_are_a_column() -> None:
    documents = open_documents(TextSource(dataset="sae-probes"))
    assert (documents.column, documents.fingerprint) == ("text", None)
    assert re.fullmatch(rf"{re.escape(VERSION)}-sha256:[0-9a-f]{{16}}", documents.revision)
    assert set(documents.dataset[:100]["source"]) <= set(SOURCES)
    held_out = sum(1 for _ in documents.held_out())
    assert 0.09 < held_out / documents.count < 0.11


def test_a_package_that_is_missing_old_or_damaged_says_the_line_to_type(other_package, monkeypatch, tmp_path) -> None:
    with pytest.raises(SelOrthoError, match=rf"MASTER.csv.zst of sae-probes is missing .*`{re.escape(INSTALL)}"):
        probe_set_names()
    table = tmp_path / "sae_probes/data/probing_datasets_MASTER.csv.zst"
    table.parent.mkdir(parents=True)
    for damaged in (b"not zstandard", pa.compress(b'Data type\n"no end', codec="zstd", asbytes=True)[:-2]):
        table.write_bytes(damaged)
        with pytest.raises(SelOrthoError, match=re.escape(INSTALL)):
            probe_set_names()
    other_package.version = "0.3.0"
    with pytest.raises(SelOrthoError, match=rf"sae-probes 0.3.0 is installed, 0.4.2 is read: run `{INSTALL}`"):
        probe_set_names()

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(sae_probes, "distribution", missing)
    with pytest.raises(SelOrthoError, match=f"sae-probes are not installed: run `{INSTALL}`"):
        sae_probes_texts.__wrapped__()


def test_the_demo_trains_on_the_documentation_of_python_without_them(monkeypatch, caplog) -> None:
    assert parse_arguments(["--preset", "demo"]).data.dataset == "sae-probes"
    monkeypatch.setattr("hf_selortho.training.arguments.is_installed", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert parse_arguments(["--preset", "demo"]).data.dataset == "python-docs"
    assert f"run `{INSTALL}`" in caplog.text
    asked_for = parse_arguments(["--preset", "demo", "--dataset", "sae-probes"])
    assert asked_for.data.dataset == "sae-probes", "whoever types it gets an error later, not other texts"


def test_make_and_readme_install_the_version_that_is_read() -> None:
    for file in ("Makefile", "README.md"):
        assert f"sae-probes=={VERSION}" in (ROOT / file).read_text("utf-8"), file
