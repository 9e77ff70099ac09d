"""An attribution graph as circuit-tracer 0.5 writes it, invented: five layers, a hostile prompt, shared ids."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.space.written_run import HOSTILE

LAYERS = 5
TOKENS = ["<bos>", "The", " old", " river", HOSTILE, " of", "\u202e", " bridges"]


def paired(layer: int, feature: int) -> int:
    """The number of a feature of a layer."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def graph_content(seed: int = 0, at_a_token: int = 3) -> dict[str, Any]:
    """The content of the file.

    Args:
        seed: of what is invented. at_a_token: features of each layer at each token but the first.
    """
    rng, last = random.Random(seed), len(TOKENS) - 1

    def node(id: str, kind: str, layer: str, position: int, **more: Any) -> dict[str, Any]:
        given = {"influence": rng.uniform(0.2, 0.99), "activation": None, "token_prob": 0.0, "clerp": "", "feature": -1}
        return {"node_id": id, "feature_type": kind, "layer": layer, "ctx_idx": position, **given, **more}

    nodes = []
    for layer in range(LAYERS):
        for position in range(1, len(TOKENS)):
            # feature 1 of layer 0 has the id of the error of layer 1
            for feature in sorted(rng.sample(range(2, 200), at_a_token) + ([1] if layer == 0 else [])):
                about = {"feature": paired(layer, feature), "activation": rng.uniform(1, 9)}
                nodes.append(
                    node(f"{layer}_{feature}_{position}", "cross layer transcoder", str(layer), position, **about)
                )
    for layer in range(LAYERS):
        for position in range(len(TOKENS)):
            nodes.append(node(f"0_{layer}_{position}", "mlp reconstruction error", str(layer), position))
    nodes += [node(f"E_{n}_{n}", "embedding", "E", n, feature=n) for n in range(len(TOKENS))]
    for token, probability in (("market", 0.4), (HOSTILE, 0.1)):
        about = {"token_prob": probability, "influence": None, "clerp": f'Output "{token}" (p={probability})'}
        nodes.append(node(f"{LAYERS + 1}_{len(nodes)}_{last}", "logit", str(LAYERS + 1), last, **about))

    def row(of: dict[str, Any]) -> int:
        return -1 if of["layer"] == "E" else int(of["layer"])

    links = [
        {"source": one["node_id"], "target": other["node_id"], "weight": rng.gauss(0, 1)}
        for other in nodes
        if other["feature_type"] in ("cross layer transcoder", "logit")
        for one in nodes
        if row(one) < row(other) and one["ctx_idx"] <= other["ctx_idx"] and one["feature_type"] != "logit"
    ]
    metadata = {"slug": "demo", "scan": "x", "prompt_tokens": TOKENS, "prompt": "".join(TOKENS), "schema_version": 1}
    return {"metadata": metadata, "qParams": {}, "nodes": nodes, "links": links}


def write_graph(path: Path, **settings: int) -> Path:
    """Write the file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(graph_content(**settings)))
    return path


def as_transcoder(folder: Path) -> None:
    """Let an SAE say that it is one; the page does not load its weights."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"site": "mlp_in", "target": "mlp_out"}))
