"""Every number of a feature index against the whole text held in memory."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from hf_selortho import SelOrthoConfig, SelOrthoError, SelOrthoSAE
from hf_selortho.data.pair_history import PairSnapshot
from hf_selortho.features.build import IndexSettings, build_feature_index
from hf_selortho.features.feature_statistics import FeatureStatistics, bins_of, uniform_draws
from hf_selortho.features.index import FeatureIndex
from hf_selortho.features.index_writer import FILES, IndexWriter
from hf_selortho.features.neighbours import CorrelationSample
from hf_selortho.features.pair_statistics import class_of
from hf_selortho.features.records import BINS, bin_edges
from hf_selortho.features.text_pass import TextPass
from hf_selortho.features.top_contexts import AFTER, BEFORE
from hf_selortho.pair_selection import select_pairs
from tests.features.index_sources import CONTEXT_LENGTH, make_sae, make_sources, read_everything

TOKENS = 4000
D_SAE = 48


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return tiny_lm("gemma3")


@pytest.fixture(scope="module")
def sources(lm, sample_text_files):
    return make_sources(lm, sample_text_files.txt, twin=make_sae(lm, seed=1), twin_name="other")


@pytest.fixture(scope="module")
def whole(sources):
    return read_everything(sources, TOKENS)


@pytest.fixture(scope="module")
def index(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "feature_index"
    write(sources, folder)
    return FeatureIndex.open(folder)


def write(sources, folder, **settings):
    with IndexWriter(folder) as writer:
        return build_feature_index(sources, IndexSettings(**{"tokens": TOKENS, **settings}), writer, progress=False)


def test_facts(index, whole, sources) -> None:
    text = index.facts["text"]
    tokens = whole.tokens
    assert text["tokens"] == len(tokens) >= TOKENS - CONTEXT_LENGTH
    assert text["contexts"] == text["dropped_special"] == len(whole.contexts) and text["dropped_sinks"] == 0
    assert text["documents"] == len({context.document_id for context in whole.contexts})
    assert index.facts["features"]["never_fired"] == int((tokens.amax(0) == 0).sum()) >= 1
    assert index.facts["pairs"]["source"] == "held_out" and index.facts["pairs"]["step"] is None
    assert sum(index.facts["pairs"]["classes"].values()) == index.facts["pairs"]["kept"] == index.pairs
    assert index.facts["twin"]["name"] == "other"
    assert index.facts["correlation_sample_tokens"] == len(tokens)


def test_how_often_and_how_strongly_features_fire(index, whole) -> None:
    tokens = whole.tokens
    edges = torch.tensor(bin_edges()[1:-1])
    for number in range(D_SAE):
        record, h = index.feature(number), tokens[:, number]
        fired = h[h > 0]
        assert record.fires == len(fired) and record.frequency == pytest.approx(len(fired) / len(tokens))
        assert record.max_activation == pytest.approx(h.max().item(), rel=1e-4)
        assert record.mean_activation == pytest.approx(fired.mean().item() if len(fired) else 0.0, rel=1e-4)
        counts = torch.bucketize(fired, edges, right=True).bincount(minlength=BINS)
        assert sum(record.histogram) == record.fires
        assert (torch.tensor(record.histogram) - counts).abs().sum() <= 2  # rounding at an edge


def test_top_contexts_are_the_strongest_of_different_documents(index, whole) -> None:
    for number in range(D_SAE):
        found = [context for context in index.feature(number).contexts if context.kind == "top"]
        peaks: dict[int, float] = {}
        for context, h in zip(whole.contexts, whole.h, strict=True):
            peaks[context.document_id] = max(peaks.get(context.document_id, 0.0), h[:, number].max().item())
        expected = sorted((peak for peak in peaks.values() if peak > 0), reverse=True)[:10]
        assert [context.activation for context in found] == pytest.approx(expected, rel=1e-4)
        assert len({context.document_id for context in found}) == len(found)
        for context in found:
            assert context.activation == pytest.approx(peaks[context.document_id], rel=1e-4)


def test_windows_show_the_text_and_nothing_on_bos(index, whole, lm) -> None:
    seen = 0
    for number in range(D_SAE):
        for shown in index.feature(number).contexts:
            place = shown.start + shown.peak
            matches = [
                (c, h)
                for c, h in zip(whole.contexts, whole.h, strict=True)
                if c.document_id == shown.document_id
                and len(c.input_ids) > place
                and h[place, number].item() == pytest.approx(shown.activation, rel=1e-4)
            ]
            start, end = max(0, place - BEFORE), place + AFTER + 1
            spelt = [[lm.tokenizer.decode([i]) for i in c.input_ids[start:end]] for c, _ in matches]
            assert shown.tokens in spelt and shown.start == start
            h = matches[spelt.index(shown.tokens)][1][start:end, number]
            torch.testing.assert_close(torch.tensor(shown.activations), h, atol=1e-5, rtol=1e-4)
            assert shown.activations[shown.peak] == shown.activation > 0
            if shown.tokens[0] == "<bos>":
                seen += 1
                assert shown.activations[0] == 0
    assert seen


def test_samples_span_the_distribution(index, whole) -> None:
    tokens = whole.tokens
    spread = []
    for number in range(D_SAE):
        record, fired = index.feature(number), tokens[:, number][tokens[:, number] > 0]
        samples = [context for context in record.contexts if context.kind == "sample"]
        assert [s.activation for s in samples] == sorted((s.activation for s in samples), reverse=True)
        bands = [min(int(s.quantile * 5), 4) for s in samples]
        assert all(bands.count(band) <= 4 for band in range(5))
        assert bool(samples) == (len(fired) > 0)
        for context in record.contexts:
            bins, own = bins_of(fired), bins_of(torch.tensor([context.activation]))
            below, within = ((found < own).float().mean().item() for found in (bins, bins - 1))
            # within a bin the share is spread evenly
            assert below - 0.01 <= context.quantile <= within + 0.01 and 0 < context.quantile <= 1
            if context.activation == record.max_activation:
                assert context.quantile == 1
        if len(fired) > 200:
            spread += bands
    assert {0, 1, 2, 3, 4} <= set(spread)


def test_neighbours(index, whole, sources) -> None:
    tokens, W_dec = whole.tokens, sources.sae.W_dec.detach()
    norms = tokens.norm(dim=0)
    correlation = torch.where(norms[:, None] * norms > 0, tokens.T @ tokens / (norms[:, None] * norms), 0)
    fired = (tokens > 0).float()
    support = fired.T @ fired
    cosine = torch.nn.functional.normalize(W_dec, dim=1) @ torch.nn.functional.normalize(W_dec, dim=1).T
    for number in range(D_SAE):
        record = index.feature(number)
        others = [n for n in range(D_SAE) if n != number]
        by_cosine = sorted((cosine[number, n].item() for n in others), reverse=True)[:10]
        assert [n.cosine for n in record.nearest_by_cosine] == pytest.approx(by_cosine, abs=1e-5)
        able = [n for n in others if support[number, n] >= 4]
        by_correlation = sorted((correlation[number, n].item() for n in able), reverse=True)[:10]
        assert [n.correlation for n in record.nearest_by_correlation] == pytest.approx(by_correlation, abs=1e-4)
        for near in (*record.nearest_by_cosine, *record.nearest_by_correlation):
            assert near.feature != number and near.support == support[number, near.feature]
            assert near.cosine == pytest.approx(cosine[number, near.feature].item(), abs=1e-5)
            assert near.correlation == pytest.approx(correlation[number, near.feature].item(), abs=1e-4)
    assert index.feature(8).nearest_by_cosine[0].feature == 9


def test_pairs_of_a_text_without_history(index, whole) -> None:
    tokens = whole.tokens
    expected = select_pairs(tokens, 0.05, 4)  # the text is shorter than what pairs are chosen from
    rows = index.pair_table.to_pylist()
    assert {(row["a"], row["b"]) for row in rows} == set(zip(expected.i.tolist(), expected.j.tolist(), strict=True))
    assert index.facts["pairs"]["selected"] == len(expected) == math.ceil(0.05 * D_SAE * (D_SAE - 1) / 2)
    for row in rows:
        check_pair(row, tokens)
        assert row["score"] is None
    classes = {(row["a"], row["b"]): row["pair_class"] for row in rows}
    assert classes[8, 9] == "duplicate"


def check_pair(row, tokens) -> None:
    a, b = tokens[:, row["a"]], tokens[:, row["b"]]
    assert row["fires_a"] == int((a > 0).sum()) and row["fires_b"] == int((b > 0).sum())
    assert row["support"] == int(((a > 0) & (b > 0)).sum())
    if a.norm() * b.norm() > 0:
        assert row["correlation"] == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-4)
    else:
        assert row["correlation"] is None


def test_twin(index, whole, sources) -> None:
    twin = sources.twin
    with torch.inference_mode():
        h = torch.cat([twin.encode(x[read]) for x, read in zip(whole.x, whole.read, strict=True)])
    mine, other = (torch.nn.functional.normalize(sae.W_dec.detach(), dim=1) for sae in (sources.sae, twin))
    cosine = mine @ other.T
    for row in index.pair_table.to_pylist():
        matched = cosine[row["a"]].argmax().item(), cosine[row["b"]].argmax().item()
        assert (row["twin_a"], row["twin_b"]) == matched
        assert row["twin_match_a"] == pytest.approx(cosine[row["a"]].max().item(), abs=1e-5)
        assert row["twin_match_b"] == pytest.approx(cosine[row["b"]].max().item(), abs=1e-5)
        a, b = (h[:, feature] for feature in matched)
        assert row["twin_decoder_cosine"] == pytest.approx((other[matched[0]] @ other[matched[1]]).item(), abs=1e-5)
        if matched[0] == matched[1]:
            assert row["twin_correlation"] == 1
        elif a.norm() * b.norm() == 0:
            assert row["twin_correlation"] is None
        else:
            assert row["twin_correlation"] == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-4)


def test_joint_contexts(index, whole) -> None:
    kinds = set()
    for row in index.pair_table.to_pylist():
        a, b = row["a"], row["b"]
        record = index.pair(a, b)
        best: dict[str, dict[int, float]] = {"both": {}, "a": {}, "b": {}}
        for context, h in zip(whole.contexts, whole.h, strict=True):
            top_a, top_b, both = h[:, a].max().item(), h[:, b].max().item(), (h[:, a] * h[:, b]).max().item()
            keys = {"both": both, "a": top_a if top_b == 0 else 0.0, "b": top_b if top_a == 0 else 0.0}
            for kind, key in keys.items():
                best[kind][context.document_id] = max(best[kind].get(context.document_id, 0.0), key)
        for kind, of_document in best.items():
            expected = sorted((key for key in of_document.values() if key > 0), reverse=True)[:4]
            shown = [context for context in record.contexts if context.kind == kind]
            at = [(c.activations_a[c.peak], c.activations_b[c.peak]) for c in shown]
            keys = [{"both": x * y, "a": x, "b": y}[kind] for x, y in at]
            assert keys == pytest.approx(expected, rel=1e-3)
            if kind != "both":
                silent = [c.activations_b if kind == "a" else c.activations_a for c in shown]
                assert all(max(values) == 0 for values in silent)
            kinds |= {kind} if shown else set()
    assert kinds == {"both", "a", "b"}


def test_pairs_of_a_training(lm, sample_text_files, tmp_path) -> None:
    snapshots = [
        PairSnapshot(10, torch.tensor([1, 8]), torch.tensor([2, 9]), torch.tensor([0.9, -0.5]), 2),
        PairSnapshot(30, torch.tensor([8, 3, 0]), torch.tensor([9, 5, 7]), torch.tensor([0.8, -0.7, 0.1]), 60),
    ]
    sources = make_sources(lm, sample_text_files.txt, history=snapshots)
    write(sources, tmp_path / "feature_index", max_pairs=2)
    index, whole = FeatureIndex.open(tmp_path / "feature_index"), read_everything(sources, TOKENS)
    pairs = index.facts["pairs"]
    assert (pairs["source"], pairs["step"], pairs["selected"], pairs["kept"]) == ("training", 30, 60, 2)
    silent, duplicate = index.pair(3, 5), index.pair(8, 9)
    assert index.pairs == 2 and (silent.score, duplicate.score) == pytest.approx((-0.7, 0.8))
    assert duplicate.history_steps == silent.history_steps == [10, 30]
    assert duplicate.history == pytest.approx([-0.5, 0.8])
    assert silent.history[0] is None and silent.history[1] == pytest.approx(-0.7)
    assert (silent.pair_class, silent.correlation, duplicate.pair_class) == ("unmeasured", None, "duplicate")
    assert silent.twin_a is None and silent.twin_correlation is None and index.facts["twin"] is None
    for row in index.pair_table.to_pylist():
        check_pair(row, whole.tokens)


def test_the_same_sources_give_the_same_bytes_and_another_seed_other_samples(sources, index, tmp_path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        write(sources, tmp_path / name, seed=seed)
    for name in set(FILES) - {"concepts.parquet", "moved.parquet"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    number = max(range(D_SAE), key=lambda n: index.feature(n).fires)
    record, other = index.feature(number), FeatureIndex.open(tmp_path / "other").feature(number)
    assert record.histogram == other.histogram
    drawn, again = ([c for c in one.contexts if c.kind == "sample"] for one in (record, other))
    assert drawn != again


def test_an_index_may_hold_no_pairs_and_labels_given_by_hand(sources, index, tmp_path) -> None:
    labelled = dataclasses.replace(sources, labels={3: "bridges & rivers", 5: "silent"})
    facts = write(labelled, tmp_path / "index", tokens=500, max_pairs=0)
    other = FeatureIndex.open(tmp_path / "index")
    assert facts["pairs"]["source"] == "none" and other.pairs == 0
    assert (other.feature(3).label, other.feature(3).label_source) == ("bridges & rivers", "file")
    assert other.feature(5).label_source == "file"
    assert (index.feature(5).label, index.feature(5).label_source) == ("", "none")
    named = [index.feature(n) for n in range(D_SAE) if index.feature(n).fires]
    assert all(record.label and record.label_source in ("token", "context", "unclear") for record in named)


def test_sinks_are_not_read(lm, sample_text_files, tmp_path) -> None:
    norms = torch.cat([x.norm(dim=1)[1:] for x in read_everything(make_sources(lm, sample_text_files.txt), 1000).x])
    sae = make_sae(lm, max_norm=norms.median().item())
    sources = make_sources(lm, sample_text_files.txt, sae)
    facts = write(sources, tmp_path / "feature_index", tokens=1000)
    assert facts["text"]["dropped_sinks"] == pytest.approx(len(norms) / 2, abs=3)
    index, whole = FeatureIndex.open(tmp_path / "feature_index"), read_everything(sources, 1000)
    assert facts["text"]["tokens"] == len(whole.tokens)
    test_how_often_and_how_strongly_features_fire(index, whole)
    test_windows_show_the_text_and_nothing_on_bos(index, whole, lm)


def test_large_saes_are_read_in_parts(sources, index, whole) -> None:
    statistics = FeatureStatistics(D_SAE, CONTEXT_LENGTH, 10, 0, torch.device("cpu"))
    batches = 0
    for batch in TextPass(sources.sae, sources.capture, largest_batch=40 * D_SAE).read(whole.contexts, TOKENS):
        statistics.add(batch)
        batches += 1
        assert len(batch.activations) <= 40 + CONTEXT_LENGTH
    assert batches > TOKENS // (40 + CONTEXT_LENGTH)
    for number in range(D_SAE):
        record = index.feature(number)
        assert statistics.histogram[number].tolist() == record.histogram
        top = [c.start + c.peak for c in record.contexts if c.kind == "top"]
        assert [window.start + window.peak for window in statistics.top.of(number)] == top


@pytest.mark.parametrize(
    ("fraction", "settings", "twin", "message"),
    [
        (0.0, {}, {}, "no held-out context"),
        (0.5, {"max_norm": 1e-6}, {}, "no held-out token"),
        (0.5, {}, {"layer": 1}, "twin other has layer=1, the SAE layer=2"),
    ],
)
def test_sources_that_give_no_index(lm, sample_text_files, tmp_path, fraction, settings, twin, message) -> None:
    sae, other = make_sae(lm, **settings), make_sae(lm, **twin)
    sources = make_sources(lm, sample_text_files.txt, sae, fraction, twin=other, twin_name="other")
    with pytest.raises(SelOrthoError, match=message):
        write(sources, tmp_path / "feature_index", tokens=300)
    assert not list(tmp_path.iterdir())


def test_the_end_of_the_text_is_said(lm, sample_text_files, tmp_path, caplog) -> None:
    facts = write(make_sources(lm, sample_text_files.txt), tmp_path / "feature_index", tokens=10**6)
    assert f"exhausted: {facts['text']['tokens']} tokens" in caplog.text


@pytest.mark.parametrize(
    ("fires_a", "fires_b", "support", "cosine", "expected"),
    [
        (100, 100, 50, 0.5, "duplicate"),
        (100, 100, 50, 0.49, "co-occurring"),
        (100, 100, 49, 0.9, "co-occurring"),
        (100, 10, 8, 0.9, "nested"),
        (100, 10, 7, 0.9, "co-occurring"),
        (10, 10, 8, 0.1, "co-occurring"),
        (100, 3, 3, 0.9, "unmeasured"),
        (0, 0, 0, 0.9, "unmeasured"),
    ],
)
def test_classes(fires_a, fires_b, support, cosine, expected) -> None:
    assert class_of(fires_a, fires_b, support, cosine, 4) == expected
    assert class_of(fires_b, fires_a, support, cosine, 4) == expected


def test_the_correlation_sample_is_thinned_out(sources, whole) -> None:
    sample = CorrelationSample(D_SAE, limit=3000)
    for batch in TextPass(sources.sae, sources.capture).read(whole.contexts, TOKENS):
        sample.add(batch)
    active, stride = sample.active(), math.ceil(len(whole.tokens) / sample.tokens)
    assert len(active.cols) <= 3000 and stride > 1 and sample.tokens == active.tokens
    rows = {tuple(round(v, 3) for v in row) for row in whole.tokens.tolist()}
    near = sum(tuple(round(v, 3) for v in row) in rows for row in active.to_dense().tolist())
    assert near > 0.9 * active.tokens  # but for rounding


def test_draws_are_even_and_independent() -> None:
    tokens, features = torch.arange(5000), torch.arange(40)[:, None]
    draws = uniform_draws(tokens, features, 0)  # (features, tokens)
    assert draws.min() > 0 and draws.max() <= 1
    for quarter in range(4):
        inside = ((draws > quarter / 4) & (draws <= (quarter + 1) / 4)).double().mean(1)
        torch.testing.assert_close(inside, torch.full_like(inside, 0.25), atol=0.03, rtol=0)
    assert (torch.corrcoef(draws) - torch.eye(40)).abs().max() < 0.08
    assert torch.corrcoef(torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()]))[0, 1].abs() < 0.02
    other = uniform_draws(tokens, features, 1)
    assert torch.corrcoef(torch.stack([draws.flatten(), other.flatten()]))[0, 1].abs() < 0.02


@pytest.mark.slow
def test_the_real_model(embedded_lm, sample_text_files, tmp_path) -> None:
    named = {"lm_name": embedded_lm.name, "lm_revision": embedded_lm.revision, "layer": 8, "context_length": 64}
    sae = SelOrthoSAE(SelOrthoConfig(d_in=embedded_lm.d_model, d_sae=256, **named)).eval()
    sae.set_input_statistics(torch.zeros(embedded_lm.d_model), 2000.0)
    sources = make_sources(embedded_lm, sample_text_files.txt, sae)
    write(sources, tmp_path / "feature_index", tokens=2000)
    index, whole = FeatureIndex.open(tmp_path / "feature_index"), read_everything(sources, 2000)
    tokens = whole.tokens
    for number in range(0, 256, 16):
        record = index.feature(number)
        # in bfloat16 what is read depends a little on the batch
        assert record.fires == pytest.approx(int((tokens[:, number] > 0).sum()), abs=0.02 * len(tokens))
        assert len(record.promoted) == len(record.suppressed) == 10
