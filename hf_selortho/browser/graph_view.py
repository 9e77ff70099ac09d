"""The view of an attribution graph: nodes by layer and token, and the edges of one of them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SelOrthoError
from ..hub.run_folder import holds_sae
from ..training.run_folder import METRICS
from ..utils.hub import read_object
from ..utils.names import RepoRef
from .address import Address
from .catalog import CatalogEntry, open_entry
from .graph_file import EMBEDDING, AttributionGraph, Node, read_graph
from .rendering import note, view
from .start_view import number_of

FOLDER, LISTING = "graphs", "graph-metadata.json"  # in a run; what circuit-tracer writes beside its graphs
EDGES = 30  # of the chosen node, each way, that are listed and drawn
CUTS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)  # shares of the influence on the logits
_DRAWN = 300  # nodes that are drawn at most without a cut in the address
_MOST = 1500  # ... and with one
_STEP, _IN_A_ROW = 13, 6  # between nodes, in pixels; nodes side by side at one token
_LEFT, _TOP, _NARROWEST = 52, 10, 54  # of the picture
_FIGURES = {  # of the run's metrics.json, with all MLPs replaced: name and meaning
    "ce": ("CE", "of the language model"),
    "ce_replaced": ("CE, all MLPs replaced", "nats per token"),
    "kl": ("KL", "from the model to the replaced one"),
    "top1_agreement": ("top-1 agreement", "share of the tokens"),
}

load_graph = functools.lru_cache(4)(read_graph)


@dataclass(frozen=True)
class Graphs:
    """The graphs of a page, and the SAEs that their features belong to."""

    files: Mapping[str, Path] = field(default_factory=dict)  # by name
    layers: Mapping[int, CatalogEntry] = field(default_factory=dict)
    replaced: Mapping[str, Any] = field(default_factory=dict)  # metrics of the model with all MLPs replaced


class Place(NamedTuple):
    """A node in the picture."""

    number: int
    node: Node
    x: float
    y: float


def open_graphs(sae: str, graph: str | None, main: CatalogEntry) -> Graphs:
    """Find the graphs of a run, in its folder `graphs`, and the SAEs of its layers.

    Args:
        sae: folder of the run; another SAE has no graphs of its own.
        graph: file of a graph to show first; None: those of the run alone.
        main: the SAE that the page shows already.

    Raises:
        SelOrthoError: `graph` is no graph.
    """
    run = Path(sae)
    paths = sorted(path for path in (run / FOLDER).glob("*.json") if path.name != LISTING)
    if graph:
        load_graph(Path(graph))
        paths.insert(0, Path(graph))
    if not paths:
        return Graphs()
    entries = [main]
    for path in run.glob("layer_*"):
        if path.name.removeprefix("layer_").isdecimal() and path.name != main.key and holds_sae(path):
            entries.append(open_entry(path.name, RepoRef(str(path))))
    # the features of a graph are those of transcoders
    layers = {
        e.config.layer: e
        for e in reversed(entries)
        if e.config and e.config.is_transcoder and e.config.layer is not None
    }
    metrics = read_object(run / METRICS) if (run / METRICS).is_file() else {}
    by_variant = metrics.get("all_layers")
    replaced = by_variant.get("") if isinstance(by_variant, dict) else None  # "": the SAEs that are no variant
    files = {path.stem: path for path in reversed(paths)}
    return Graphs(dict(reversed(files.items())), layers, replaced if isinstance(replaced, dict) else {})


def graph_page(address: Address, graphs: Graphs) -> str:
    """Render a graph, by layers and tokens, and the strongest edges of the chosen node.

    Raises:
        SelOrthoError: there is no such graph or node, or the file is damaged.
    """
    if not graphs.files:
        words = "No attribution graph is here: pass one with --graph, or put it into the folder graphs of the run."
        return note(address, "Graph", f"{words} docs/circuits.md says how to make one.")
    name = address.graph or next(iter(graphs.files))
    if name not in graphs.files:
        raise SelOrthoError(f"graph={name!r:.50}: this page shows {', '.join(graphs.files)}")
    graph = load_graph(graphs.files[name])
    chosen = _first_logit(graph) if address.id is None else address.id
    if not 0 <= chosen < len(graph.nodes):
        raise SelOrthoError(
            f"id={chosen}: this graph has {len(graph.nodes):,} nodes, choose 0 to {len(graph.nodes) - 1}"
        )
    edges = {"into": graph.edges(chosen, into=True), "out": graph.edges(chosen, into=False)}
    cut = _cut(graph) if address.cut is None else address.cut
    near = {other for side in edges.values() for other, *_ in side[:EDGES]}
    by_influence = sorted(range(len(graph.nodes)), key=lambda one: graph.nodes[one].influence)
    shown = {one for one in by_influence[:_MOST] if graph.nodes[one].influence <= cut} | near | {chosen}
    picture = _lay_out(graph, shown)
    places = {place.number: place for place in picture["places"]}
    return view(
        "graph.html",
        address.to(graph=name),
        f"Graph: {graph.prompt[:40]}",
        graph=graph,
        names=list(graphs.files),
        chosen=chosen,
        cut=cut,
        cuts=CUTS,
        edges={way: side[:EDGES] for way, side in edges.items()},
        counts={way: len(side) for way, side in edges.items()},
        curves=_curves(
            places[chosen], [(places[other], weight) for s in edges.values() for other, weight, _ in s[:EDGES]]
        ),
        shown=len(shown),
        layers=graphs.layers,
        figures=[(*words, number_of(graphs.replaced, key)) for key, words in _FIGURES.items()],
        is_measured=any(number_of(graphs.replaced, key) is not None for key in _FIGURES),
        **picture,
    )


def _first_logit(graph: AttributionGraph) -> int:
    """The likeliest token of the output; the node of most influence where the file has none."""
    return max(
        range(len(graph.nodes)),
        key=lambda one: (graph.nodes[one].kind == "logit", graph.nodes[one].probability, -graph.nodes[one].influence),
    )


def _cut(graph: AttributionGraph) -> float:
    """The largest of the cuts that leaves a picture that can be looked at."""
    influences = [node.influence for node in graph.nodes]
    fitting = [cut for cut in CUTS if sum(influence <= cut for influence in influences) <= _DRAWN]
    return max(fitting, default=CUTS[0])


def _lay_out(graph: AttributionGraph, shown: Iterable[int]) -> dict[str, Any]:
    """Place nodes in rows of layers, the output above, and columns of tokens; as wide and high as they need."""
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in sorted(shown, key=lambda one: (graph.nodes[one].influence, one)):
        cells[graph.nodes[number].layer, graph.nodes[number].position].append(number)
    output = 1 + max((node.layer for node in graph.nodes if node.kind != "logit"), default=0)
    places, rows, columns, y, x = [], [], [], float(_TOP), float(_LEFT)
    widest, highest = defaultdict[int, int](int), defaultdict[int, int](int)
    for (layer, position), cell in cells.items():
        widest[position] = max(widest[position], len(cell))
        highest[layer] = max(highest[layer], -(-len(cell) // _IN_A_ROW))
    for position, text in enumerate(graph.tokens):
        most = widest[position]
        width = max(_NARROWEST, _STEP * min(most, _IN_A_ROW) + 10)
        columns.append((text, x, width))
        x += width
    for layer in range(output, EMBEDDING - 1, -1):
        lines = max(1, highest[layer])
        for position, (_, left, _) in enumerate(columns):
            for order, number in enumerate(cells.get((layer, position), ())):
                across, down = order % _IN_A_ROW, order // _IN_A_ROW
                places.append(Place(number, graph.nodes[number], left + _STEP * across + 10, y + _STEP * down + 9))
        name = "output" if layer == output else "tokens" if layer == EMBEDDING else f"layer {layer}"
        rows.append((name, y, _STEP * lines + 6))
        y += _STEP * lines + 6
    return {"places": places, "rows": rows, "columns": columns, "width": x, "height": y + 22}


def _curves(chosen: Place, others: list[tuple[Place, float]]) -> list[tuple[str, float, bool]]:
    """Paths between the chosen node and others, weakest first, with their widths and whether the effect is positive."""
    largest = max((abs(weight) for _, weight in others), default=0.0) or 1.0
    return [
        (
            f"M{one.x:.0f},{one.y:.0f} C{one.x:.0f},{(one.y + chosen.y) / 2:.0f} "
            f"{chosen.x:.0f},{(one.y + chosen.y) / 2:.0f} {chosen.x:.0f},{chosen.y:.0f}",
            0.6 + 3.4 * abs(weight) / largest,
            weight > 0,
        )
        for one, weight in sorted(others, key=lambda pair: abs(pair[1]))
    ]
