"""Attribution graphs: what is read of a file, what of it is drawn and listed, and which files are refused."""

from __future__ import annotations

import json
import re
import time

import pytest

pytest.importorskip("gradio")  # the extra `space`, which the whole browser needs

from hf_selortho import SelOrthoError
from hf_selortho.browser.address import Address
from hf_selortho.browser.catalog import open_catalog
from hf_selortho.browser.graph_file import read_graph
from hf_selortho.browser.graph_view import CUTS, EDGES, graph_page, open_graphs
from hf_selortho.browser.live_model import LiveModel
from hf_selortho.browser.views import Views
from tests.finished_run import save_run
from tests.space.written_graph import TOKENS, as_transcoder, graph_content, write_graph
from tests.space.written_run import HOSTILE, write_run


@pytest.fixture
def graph(tmp_path):
    return read_graph(write_graph(tmp_path / "graphs/demo.json"))


def test_nodes_and_edges_are_those_of_the_file(graph, tmp_path) -> None:
    content = graph_content()
    assert graph.tokens == tuple(TOKENS) and len(graph.nodes) == len(content["nodes"])
    for node, written in zip(graph.nodes, content["nodes"], strict=True):
        if node.kind == "feature":
            assert written["node_id"] == f"{node.layer}_{node.feature}_{node.position}"
    logit = next(number for number, node in enumerate(graph.nodes) if node.kind == "logit")
    edges = graph.edges(logit, into=True)
    wanted = [link["weight"] for link in content["links"] if link["target"] == content["nodes"][logit]["node_id"]]
    assert sorted(weight for _, weight, _ in edges) == sorted(wanted)
    sizes = [abs(weight) for _, weight, _ in edges]
    assert sizes == sorted(sizes, reverse=True) and sum(share for *_, share in edges) == pytest.approx(1)
    assert not graph.edges(logit, into=False)


def test_an_error_and_a_feature_of_one_id_are_told_apart(graph) -> None:
    shared = [number for number, node in enumerate(graph.nodes) if node.id == "0_1_3"]
    feature, error = shared
    assert [graph.nodes[number].kind for number in shared] == ["feature", "error"]
    assert not graph.edges(error, into=True) and graph.edges(feature, into=True)
    for number, least in ((feature, 1), (error, 2)):
        above = {n for n, node in enumerate(graph.nodes) if node.kind in ("feature", "logit")
                 and node.layer >= least and node.position >= 3}  # fmt: skip
        assert {other for other, *_ in graph.edges(number, into=False)} == above


def test_the_run_has_its_graphs_layers_and_figures(tmp_path) -> None:
    run = write_run(tmp_path / "run")
    as_transcoder(run / "layer_2")
    save_run(run / "layer_3", layer=3)
    write_graph(run / "graphs/demo.json")
    assert set(open_graphs(str(run), None, open_catalog(str(run), None)["main"]).layers) == {2}, (
        "an SAE is no transcoder"
    )
    as_transcoder(run / "layer_3")
    write_graph(run / "graphs/demo.json")
    (run / "graphs/graph-metadata.json").write_text('{"graphs": []}')
    catalog = open_catalog(str(run), None)
    graphs = open_graphs(str(run), str(write_graph(tmp_path / "x/other.json", seed=1)), catalog["main"])
    assert list(graphs.files) == ["other", "demo"]
    assert {layer: entry.key for layer, entry in graphs.layers.items()} == {2: "main", 3: "layer_3"}
    views = Views(catalog, LiveModel(catalog, "none"), graphs=graphs)
    assert "no evaluation with all MLPs replaced" in views.render(Address(view="graph"))
    assert "has no feature index" in views.render(Address(view="feature", sae="layer_3", id=1))
    (run / "metrics.json").write_text(json.dumps({"all_layers": {"": {"ce": 3.086, "ce_replaced": 4.655, "kl": 1.8}}}))
    graphs = open_graphs(str(run), None, catalog["main"])
    page = graph_page(Address(view="graph"), graphs)
    assert "<strong>4.66</strong>" in page and "beside CE, KL and top-1 agreement" in page
    assert "<strong>–</strong>" in page  # the top-1 agreement is not known
    assert HOSTILE not in page and "<script" not in page
    read = read_graph(graphs.files["demo"])
    chosen = max(n for n, node in enumerate(read.nodes) if node.kind == "feature" and node.layer == 3)
    page = graph_page(Address(view="graph", id=chosen, cut=0.3), graphs)
    assert f"the strongest {EDGES} of {len(read.edges(chosen, into=True))} edges" in page
    wanted = {read.nodes[other].feature for other, *_ in read.edges(chosen, into=True)[:EDGES]
              if read.nodes[other].kind == "feature" and read.nodes[other].layer == 2}  # fmt: skip
    assert wanted == {int(found) for found in re.findall(r"view=feature&amp;id=(\d+)", page)}
    assert page.count('class="so-node') < len(read.nodes) / 2
    for words, address in (("choose 0 to", Address(id=10**6)), ("shows demo", Address(graph="x"))):
        with pytest.raises(SelOrthoError, match=words):
            graph_page(address, graphs)


def test_a_large_graph_is_thinned(tmp_path) -> None:
    run = tmp_path / "run"
    save_run(run / "layer_2")
    write_graph(run / "graphs/large.json", at_a_token=40)
    graphs = open_graphs(str(run), None, open_catalog(str(run), None)["main"])
    graph = read_graph(graphs.files["large"])
    assert len(graph.nodes) > 1400 and len(graph.weights) > 100_000
    graph_page(Address(), graphs)
    start = time.perf_counter()
    page = graph_page(Address(), graphs)
    assert time.perf_counter() - start < 5 and len(page) < 500_000
    assert 30 < page.count('class="so-node') <= 300 + EDGES + 1
    assert len(graph_page(Address(cut=CUTS[-1]), graphs)) < 2_000_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("links"), "is no graph of circuit-tracer (KeyError: 'links')"),
        (lambda content: content.update(nodes=7), "is no graph of circuit-tracer (TypeError"),
        (lambda content: content["nodes"][3].update(ctx_idx=8), "nodes[3]: ctx_idx 8: expected a number from 0 to 7"),
        (lambda content: content["nodes"][3].update(feature=4), "nodes[3]: feature 4 is of layer 1, expected layer 0"),
        (lambda content: content["nodes"][3].update(layer="x"), "nodes[3]: layer 'x', expected a decoder layer"),
        (lambda content: content["nodes"][3].update(feature_type="x"), "nodes[3]: feature_type 'x', expected cross"),
        (lambda content: content["nodes"].append(content["nodes"][9]), "is that of 2 nodes: expected one"),
        (lambda content: content["links"][0].update(source="x"), "links[0]: {'source': 'x'"),
        (lambda content: content["links"][5].update(weight=float("nan")), "links[5]: weight nan: expected a finite"),
        (lambda content: content["metadata"].update(prompt_tokens=[]), "0 tokens, 162 nodes: expected 1 to 2048"),
    ],
)
def test_files_that_are_no_graphs_are_refused(tmp_path, change, words) -> None:
    content = graph_content()
    change(content)
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(SelOrthoError) as caught:
        read_graph(tmp_path / "x.json")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(SelOrthoError, match="at most 67,108,864 bytes"):
        read_graph(tmp_path / "x.json")
