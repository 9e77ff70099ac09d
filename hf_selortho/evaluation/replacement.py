"""What a language model predicts with something in the place of its activations, beside the untouched one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..language_models.capture import ActivationCapture, length_batches
from ..language_models.contexts import Context, pad_batch, trained_mask
from ..modeling_selortho import SelOrthoSAE
from ..utils.progress import Bar
from .metrics import Divergence, Figures, LossRecovered, Prediction, cross_entropy

logger = logging.getLogger(__name__)

# Logits of one forward pass, in the language model's dtype. More is not faster.
_LOGITS_BYTES = 256 * 2**20


def layer_of(sae: SelOrthoSAE, layers: Sequence[int]) -> int:
    """Return which of the layers the SAE reads; the only one where its config says none of them."""
    wanted = sae.config.layer
    if wanted is not None and wanted in layers:
        return wanted
    (layer,) = layers
    return layer


def next_token_losses(capture: ActivationCapture, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Negative log-likelihood of every token (b, t) that follows another one: flat (tokens,) float32, in nats."""
    return _predict(capture, input_ids, attention_mask).losses


@dataclass(frozen=True)
class _Predictions:
    """What a language model says of the tokens of some contexts that follow another one."""

    logits: Tensor  # (b t, vocabulary)
    index: Tensor  # (tokens,), the rows of these tokens
    losses: Tensor  # (tokens,), in nats


def _predict(capture: ActivationCapture, input_ids: Tensor, attention_mask: Tensor) -> _Predictions:
    """Call the whole model, so that whatever an architecture does to its logits (the softcapping of Gemma 2, the
    scaling of Granite) is done; only the log-softmax is taken in chunks."""
    lm, device = capture.lm.model, capture.device
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    logits = lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (b, t, vocabulary)
    row, column = attention_mask[:, 1:].bool().nonzero(as_tuple=True)  # token column + 1 is predicted at column
    index, logits = row * input_ids.shape[1] + column, logits.flatten(0, 1)
    return _Predictions(logits, index, cross_entropy(logits, input_ids[row, column + 1], index))


class _Untouched(NamedTuple):
    """Some contexts as tokens, and what the untouched language model says of them; its logits are gone."""

    tokens: tuple[Tensor, Tensor]  # input_ids and attention_mask, (b, t)
    trained: Tensor  # (b, t), which of them are trained on
    losses: Tensor  # (tokens,), in nats
    prediction: Prediction


def _predict_untouched(
    capture: ActivationCapture, contexts: Sequence[Context], title: str, progress: bool
) -> Iterator[_Untouched]:
    """Let the untouched language model read contexts of two tokens at least, some at a time, with a bar."""
    batch_tokens = _LOGITS_BYTES // (capture.lm.vocabulary * capture.lm.model.dtype.itemsize)
    with Bar(title, total=len(contexts), unit="context", disable=not progress) as bar:
        for numbers in length_batches(contexts, batch_tokens):
            batch = [contexts[number] for number in numbers]
            tokens = pad_batch(batch, capture.lm.pad_id)
            clean = _predict(capture, *tokens)
            losses, prediction = clean.losses, Prediction.of(clean.logits, clean.index)
            del clean  # with its logits
            yield _Untouched(tokens, trained_mask(batch), losses, prediction)
            bar.update(len(numbers))


def measure_cross_entropy(
    saes: Sequence[SelOrthoSAE], capture: ActivationCapture, contexts: Sequence[Context], progress: bool
) -> list[Figures]:
    """Measure the cross-entropies and the divergence with each SAE's reconstruction in the place of what it stands for.

    Args:
        saes: each with its `layer` in its config. capture: the language model at these layers. contexts: held-out text.
        progress: whether to show a bar.
    """
    contexts = [c for c in contexts if len(c.input_ids) > 1]
    if not contexts:
        return [{} for _ in saes]
    totals, divergences = [LossRecovered() for _ in saes], [Divergence() for _ in saes]
    sites = [capture.at(layer_of(sae, capture.layers)) for sae in saes]
    for clean in _predict_untouched(capture, contexts, "cross-entropy", progress):
        ablated: dict[int, Tensor] = {}  # the same for all SAEs of a layer
        for number, (sae, site) in enumerate(zip(saes, sites, strict=True)):
            if site.layer not in ablated:
                ablated[site.layer] = _predict_with([(site, _zeros)], clean).losses
            spliced = _predict_with([(site, _reconstruction_of(sae))], clean)
            totals[number] += LossRecovered.of(clean.losses, spliced.losses, ablated[site.layer])
            divergences[number] += Divergence.of(clean.prediction, spliced.logits)
    both = zip(totals, divergences, strict=True)
    return [{"ce_samples": len(contexts)} | total.figures() | moved.figures() for total, moved in both]


@torch.inference_mode()
def replace_all_layers(
    saes: Sequence[SelOrthoSAE], capture: ActivationCapture, contexts: Sequence[Context], progress: bool = True
) -> Figures:
    """Measure the language model with the outputs of several layers replaced at once, each by its SAE's.

    Every transcoder reads what the replaced layers below have made of its input. Positions that are not trained on stay
    as they are. Compare the figures with those of zeros and of the mean outputs in the same places.

    Args:
        saes: one a layer. capture: the language model at their layers. contexts: held-out text, all of it is read.

    Returns:
        `layers`, `ce` untouched, `ce_replaced`, `ce_zero`, `ce_mean` (where the SAEs know the mean), `kl` and
        `top1_agreement` of the replaced model, `loss_recovered` against zeros and `loss_recovered_mean`.
    """
    contexts = [c for c in contexts if len(c.input_ids) > 1]
    if not contexts:
        return {}
    sites = [capture.at(layer_of(sae, capture.layers)) for sae in saes]
    kinds: dict[str, list[_Replacement]] = {"replaced": [_reconstruction_of(sae) for sae in saes]}
    kinds["zero"] = [_zeros] * len(saes)
    if all(sae.config.input_normalization == "standard" for sae in saes):  # others do not know the mean
        kinds["mean"] = [_mean_of(sae) for sae in saes]
    losses, moved, samples = dict.fromkeys(("clean", *kinds), 0.0), Divergence(), 0
    for clean in _predict_untouched(capture, contexts, "all layers replaced", progress):
        losses["clean"] += float(clean.losses.double().sum())
        samples += len(clean.losses)
        for kind, replacements in kinds.items():
            predicted = _predict_with(list(zip(sites, replacements, strict=True)), clean)
            losses[kind] += float(predicted.losses.double().sum())
            if kind == "replaced":
                moved += Divergence.of(clean.prediction, predicted.logits)
    ce = {kind: total / samples for kind, total in losses.items()}
    figures = {"layers": len(saes), "ce": ce["clean"], **{f"ce_{kind}": ce[kind] for kind in kinds}, **moved.figures()}
    for name, kind in {"loss_recovered": "zero", "loss_recovered_mean": "mean"}.items():
        if kind in ce:
            damage = ce[kind] - ce["clean"]
            figures[name] = (ce[kind] - ce["replaced"]) / damage if damage else math.nan
    return defined({**figures, "ce_samples": len(contexts), "ce_tokens": samples})


# What takes the place of activations y (tokens, d_out) where x (tokens, d_in) is read.
_Replacement = Callable[[Tensor, Tensor], Tensor]


def _reconstruction_of(sae: SelOrthoSAE) -> _Replacement:
    return lambda x, y: sae.reconstruct(x.to(sae.device).float())


def _zeros(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


def _mean_of(sae: SelOrthoSAE) -> _Replacement:
    mean = sae.output_mean if sae.config.is_transcoder else sae.input_mean
    return lambda x, y: mean.expand(len(y), -1)


def _predict_with(replacements: Sequence[tuple[ActivationCapture, _Replacement]], clean: _Untouched) -> _Predictions:
    def replacing(capture: ActivationCapture, replacement: _Replacement) -> Callable[[Tensor, Tensor], Tensor]:
        def replace(x: Tensor, y: Tensor) -> Tensor:
            keep = capture.keep_mask(clean.tokens[0], clean.trained, x)
            spliced = y.clone()
            spliced[keep] = replacement(x[keep], y[keep]).to(y)
            return spliced

        return replace

    with ExitStack() as hooks:
        for capture, replacement in replacements:
            hooks.enter_context(capture.splice_from(replacing(capture, replacement)))
        return _predict(replacements[0][0], *clean.tokens)


def defined(metrics: Figures) -> Figures:
    """Leave NaN and infinity out, which JSON does not have, with a warning that names the figures."""
    undefined = [name for name, value in metrics.items() if not math.isfinite(value)]
    if undefined:
        logger.warning("left out of the metrics, as this data does not define them: %s", ", ".join(undefined))
    return {name: value for name, value in metrics.items() if name not in undefined}


def replace_by_variant(
    names: Sequence[str], saes: Sequence[SelOrthoSAE], capture: ActivationCapture, contexts: Sequence[Context]
) -> dict[str, Figures]:
    """Measure [`replace_all_layers`] of the transcoders of a run, those of each variant together.

    Args:
        names: of the SAEs, "layer_3" or "layer_3_twin". saes, capture, contexts: as there.

    Returns:
        Figures by variant, "" being the SAEs that are none; nothing where there are no transcoders of several layers.
    """
    groups: dict[str, list[SelOrthoSAE]] = {}
    for name, sae in zip(names, saes, strict=True):
        if sae.config.is_transcoder:
            groups.setdefault(name.removeprefix(f"layer_{sae.config.layer}").strip("_"), []).append(sae)
    return {
        variant: replace_all_layers(group, capture, contexts) for variant, group in groups.items() if len(group) > 1
    }
