"""What the stages of a run cost, for the time that is left."""

from __future__ import annotations

from collections.abc import Sequence

from ..configuration_selortho import SelOrthoConfig
from .arguments import TrainingArguments
from .data import LiveData, TrainingData

# Multiplications of a training step for each weight of the encoder and a token. Where few features fire, all that comes
# after the encoder is sparse.
_SPARSE_STEP, _DENSE_STEP = 1.0, 6.0
_PROBED = {
    "none": 0,
    "quick": 113_000,
    "all": 18_000_000,
}  # tokens that the probes read, counted with Gemma's tokenizer


def training_words(saes: int) -> str:
    """Describe the training of some SAEs in its progress bar."""
    return "training" if saes == 1 else f"training {saes} SAEs"


def stage_costs(
    data: TrainingData, arguments: TrainingArguments, configs: Sequence[SelOrthoConfig]
) -> dict[str, float]:
    """Estimate the multiplications of every stage of a run, by the description of its progress bar.

    What depends on the texts is guessed: contexts are taken to be half full.
    """
    run, evaluation = arguments.run, arguments.evaluation
    tokens = run.max_steps * run.batch_size * run.gradient_accumulation_steps
    context = arguments.sae.context_length / 2
    weights = [float((config.d_in or 0) * (config.d_sae or 0)) for config in configs]
    steps = (_SPARSE_STEP if config.k else _DENSE_STEP for config in configs)
    training = sum(n * step for n, step in zip(weights, steps, strict=True))  # a token
    filling = reading = whole_lm = 0.0
    if isinstance(data, LiveData):
        model, held = data.lm.model, data.source.capacity
        depth = model.config.get_text_config(decoder=True).num_hidden_layers
        body = model.num_parameters(exclude_embeddings=True)
        reading = body * (max(data.capture.layers) + 1) / depth  # a token
        whole_lm = body + data.lm.vocabulary * data.lm.d_model
        filling = reading * held
        tokens_read = tokens / arguments.data.buffer_reuse
    else:
        tokens_read = 0.0
    samples = len(data.held_out) * context
    losses = min(evaluation.eval_ce_samples, len(data.held_out)) * context * whole_lm * (2 + len(configs))
    return {
        "filling the buffer": filling,
        training_words(len(configs)): tokens * training + tokens_read * reading,
        "evaluating": samples * (reading + 4 * sum(weights)),
        "cross-entropy": losses,
        "probing": _PROBED[evaluation.probes] * reading if data.held_out else 0.0,
    }
