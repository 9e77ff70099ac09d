"""Read an attribution graph as circuit-tracer writes it for its page; a file of others, of which nothing is trusted."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checks import finite_number, text_of, whole_number
from ..errors import ConfigError, SelOrthoError
from ..utils.hub import read_object

LARGEST = 64 << 20  # bytes of a file
KINDS = {  # what the file calls them
    "cross layer transcoder": "feature",
    "mlp reconstruction error": "error",
    "embedding": "token",
    "logit": "logit",
}
EMBEDDING = -1  # the layer of tokens
_MOST_TOKENS, _MOST_LAYERS = 2048, 256  # a picture of more would take minutes


class Node(NamedTuple):
    """A feature, an error of the reconstruction, a token or a logit, at one token of the prompt."""

    id: str
    kind: str  # one of the values of KINDS
    layer: int  # of logits: one above the last
    position: int  # of its token
    feature: int | None  # number in the transcoder of its layer
    label: str
    influence: float  # 0 to 1: the share that it has on the logits together with all that have more; 0 for logits
    activation: float | None
    probability: float  # of a logit's token


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Nodes, and the direct effects between them."""

    prompt: str
    tokens: tuple[str, ...]
    nodes: tuple[Node, ...]
    sources: np.ndarray  # (edges,), number of the node
    targets: np.ndarray  # (edges,)
    weights: np.ndarray  # (edges,), signed

    def edges(self, node: int, into: bool) -> list[tuple[int, float, float]]:
        """Return the edges into or out of a node, strongest first: the other node, the weight, its share of all."""
        here, there = (self.targets, self.sources) if into else (self.sources, self.targets)
        found = np.flatnonzero(here == node)
        sizes = np.abs(self.weights[found])
        order = np.argsort(-sizes, kind="stable")
        whole = float(sizes.sum()) or 1.0
        others, weights = there[found][order].tolist(), self.weights[found][order].tolist()
        return [(other, weight, abs(weight) / whole) for other, weight in zip(others, weights, strict=True)]


def read_graph(path: Path) -> AttributionGraph:
    """Read the file of a graph.

    Raises:
        SelOrthoError: it cannot be read, has more than 64 MB, or is no graph; the message says where.
    """
    content = read_object(path, LARGEST)
    try:
        about, nodes, links = content["metadata"], content["nodes"], content["links"]
        prompt, texts = text_of(about["prompt"], "prompt"), about["prompt_tokens"]
        tokens = tuple(text_of(text, f"prompt_tokens[{number}]") for number, text in enumerate(texts))
        if not 0 < len(tokens) <= _MOST_TOKENS or not nodes:
            raise SelOrthoError(
                f"{len(tokens)} tokens, {len(nodes)} nodes: expected 1 to {_MOST_TOKENS} and at least 1"
            )
        found = [_node(node, f"nodes[{number}]", len(tokens)) for number, node in enumerate(nodes)]
        output = 1 + max((node.layer for node in found if node.kind != "logit"), default=0)
        found = [node._replace(layer=output) if node.kind == "logit" else node for node in found]
        edges = _edges(links, found)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{path} is no graph of circuit-tracer ({type(error).__name__}: {error!s:.80})") from error
    except SelOrthoError as error:
        raise ConfigError(f"{path} is no graph of circuit-tracer: {error}") from error
    return AttributionGraph(prompt, tokens, tuple(found), *edges)


def _node(node: dict[str, Any], where: str, tokens: int) -> Node:
    kind = KINDS.get(node["feature_type"])
    if kind is None:
        raise SelOrthoError(f"{where}: feature_type {node['feature_type']!r:.50}, expected {' or '.join(KINDS)}")
    text = node["layer"]
    layer = EMBEDDING if kind == "token" else int(text) if str(text).isdecimal() and len(str(text)) < 5 else None
    if layer is None or layer > _MOST_LAYERS:
        raise SelOrthoError(f"{where}: layer {text!r:.50}, expected a decoder layer, 0 to {_MOST_LAYERS}")
    feature = None
    if kind == "feature":  # a number pairs layer and feature, by Cantor: (l + f)(l + f + 1)/2 + f
        paired = whole_number(node["feature"], f"{where}: feature", end=1 << 62)
        both = (math.isqrt(8 * paired + 1) - 1) // 2
        feature = paired - both * (both + 1) // 2
        if both - feature != layer:
            raise SelOrthoError(f"{where}: feature {paired} is of layer {both - feature}, expected layer {layer}")
    influence, activation = node.get("influence"), node.get("activation")
    return Node(
        id=text_of(node["node_id"], f"{where}: node_id"),
        kind=kind,
        layer=layer,
        position=whole_number(node["ctx_idx"], f"{where}: ctx_idx", end=tokens),
        feature=feature,
        label=text_of(node.get("clerp") or "", f"{where}: clerp"),
        influence=0.0 if influence is None else finite_number(influence, f"{where}: influence"),
        activation=None if activation is None else finite_number(activation, f"{where}: activation"),
        probability=finite_number(node.get("token_prob", 0.0), f"{where}: token_prob"),
    )


def _edges(links: list[dict[str, Any]], nodes: list[Node]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources, targets and weights of the links, by the numbers of the nodes.

    In files of version 0.5, the error of layer l and feature l of layer 0 have one id. Nothing leads to an error, so
    a target is the feature. Links to a target come in the order of the nodes, so a source that would come before the
    one of the last link is the error, and so is one that is not below its target otherwise.
    """
    named: dict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(nodes):
        named[node.id].append(number)
    for name, numbers in named.items():
        if len(numbers) > 1 and sorted(nodes[one].kind for one in numbers) != ["error", "feature"]:
            raise SelOrthoError(f"node_id {name!r:.50} is that of {len(numbers)} nodes: expected one")
    ends, last = [], (-1, -1)  # target and source of the link before
    for number, link in enumerate(links):
        if link["source"] not in named or link["target"] not in named:
            raise SelOrthoError(f"links[{number}]: {link!r:.80} leads to no node")
        target = min(named[link["target"]], key=lambda one: nodes[one].kind == "error")
        after = last[1] if last[0] == target else -1
        fitting = [one for one in named[link["source"]] if one > after and nodes[one].layer < nodes[target].layer]
        last = (target, (fitting or named[link["source"]])[0])
        ends.append(last)
    weights = [finite_number(link["weight"], f"links[{number}]: weight") for number, link in enumerate(links)]
    targets, sources = np.array(ends, int).reshape(-1, 2).T
    return sources, targets, np.array(weights, float)
