"""Build an attribution graph with circuit-tracer and compare edges with plain hooks; run in an environment of its own.

python build_graph.py MODEL_FOLDER TRANSCODER_FOLDER OUTPUT_FOLDER PROMPT MAX_FEATURES

Writes OUTPUT_FOLDER/graph.json, and counts and differences to OUTPUT_FOLDER/checks.json.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.utils.create_graph_files import create_graph_files
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.gemma3 import modeling_gemma3


@contextmanager
def frozen():
    """Let gradients pass neither attention patterns nor the denominators of norms."""
    softmax, norm = torch.nn.functional.softmax, modeling_gemma3.Gemma3RMSNorm._norm

    def scaled(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()

    torch.nn.functional.softmax = lambda *args, **kwargs: softmax(*args, **kwargs).detach()
    modeling_gemma3.Gemma3RMSNorm._norm = scaled
    try:
        yield
    finally:
        torch.nn.functional.softmax, modeling_gemma3.Gemma3RMSNorm._norm = softmax, norm


def effects(model, transcoders, tokens, target, of_sources):
    """Direct effects on a target, a function of (MLP inputs by layer, logits), of vectors added at (layer, position).

    Layer -1 is the embedding. MLP outputs are constants, but for the skip of a transcoder.
    """
    inputs, places = {}, {-1: torch.zeros(1, len(tokens), model.config.hidden_size, requires_grad=True)}
    handles = [model.model.embed_tokens.register_forward_hook(lambda m, i, out: out.detach() + places[-1])]
    for number, layer in enumerate(model.model.layers):
        places[number] = torch.zeros_like(places[-1], requires_grad=True)

        def keep(module, args, out, number=number):
            inputs[number] = out

        def replace(module, args, out, number=number):
            passed = inputs[number] @ transcoders[number].get("W_skip", torch.zeros(out.shape[-1], out.shape[-1])).T
            return out.detach() + passed - passed.detach() + places[number]

        handles.append(layer.pre_feedforward_layernorm.register_forward_hook(keep))
        handles.append(layer.post_feedforward_layernorm.register_forward_hook(replace))
    with frozen():
        logits = model(tokens[None]).logits[0, -1]
    for handle in handles:
        handle.remove()
    order = list(places)
    found = torch.autograd.grad(target(inputs, logits), [places[one] for one in order], allow_unused=True)
    gradients = {one: gradient for one, gradient in zip(order, found, strict=True) if gradient is not None}
    return [
        float(gradients[layer][0, position] @ vector) if layer in gradients else 0.0
        for layer, position, vector in of_sources
    ]


def compare(graph, model, transcoders, targets):
    """The largest difference between columns of the graph and plain hooks, absolute, for some features and logits."""
    tokens = graph.input_tokens.cpu()
    chosen = graph.active_features[graph.selected_features].tolist()  # layer, position, feature
    values = graph.activation_values[graph.selected_features].tolist()
    embedding = model.get_input_embeddings()
    columns = len(chosen) + model.config.num_hidden_layers * len(tokens)
    with torch.no_grad():
        vectors = [
            (layer, position, value * transcoders[layer]["W_dec"][feature])
            for (layer, position, feature), value in zip(chosen, values, strict=True)
        ]
        vectors += [(-1, position, vector) for position, vector in enumerate(embedding(tokens))]
    selected = [*range(len(chosen)), *range(columns, columns + len(tokens))]  # errors are between them
    unembedding = model.get_output_embeddings().weight
    differences, sizes = [], []
    for row in targets:
        if row < len(chosen):
            layer, position, feature = chosen[row]
            direction = transcoders[layer]["W_enc"][feature]

            def target(inputs, logits, layer=layer, position=position, direction=direction):
                return inputs[layer][0, position] @ direction

        else:
            token = graph.logit_targets[row - columns - len(tokens)].vocab_idx

            def target(inputs, logits, token=token):
                return logits[token] - logits.mean()

        assert unembedding.shape[0] == model.config.vocab_size
        expected = torch.tensor(effects(model, transcoders, tokens, target, vectors))
        found = graph.adjacency_matrix[row, selected].float()
        differences.append(float((found - expected).abs().max()))
        sizes.append(float(expected.abs().max()))
    return max(differences), max(sizes)


def main(model_folder, transcoder_folder, output, prompt, max_features):
    """Build the graph, compare and write."""
    replaced = ReplacementModel.from_pretrained(
        model_folder, transcoder_folder, backend="nnsight", dtype=torch.float32, device=torch.device("cpu")
    )
    # Gemma 3 scales its embeddings within the module: without this line, edges from tokens are too small
    replaced.embed_weight = replaced.embed_weight * replaced.cfg.d_model**0.5
    graph = attribute(prompt, replaced, max_n_logits=3, batch_size=16, max_feature_nodes=int(max_features))
    create_graph_files(graph, slug="graph", output_path=output)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    names = sorted(Path(transcoder_folder).glob("layer_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
    transcoders = [{key: tensor.float() for key, tensor in load_file(name).items()} for name in names]
    features = len(graph.selected_features)
    logits = len(graph.adjacency_matrix) - len(graph.logit_targets)
    difference, size = compare(graph, model, transcoders, [0, features // 2, features - 1, logits])
    checks = {
        "features": features,
        "active": len(graph.active_features),
        "layers": int(replaced.cfg.n_layers),
        "tokens": len(graph.input_tokens),
        "logits": len(graph.logit_targets),
        "nodes": len(graph.adjacency_matrix),
        "difference": difference,
        "largest": size,
    }
    Path(output, "checks.json").write_text(json.dumps(checks))


if __name__ == "__main__":
    main(*sys.argv[1:])
