"""A text, its tokens, and what fires on each: with the language model, layer and contexts of the SAE's training."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import name_of, text_of, texts_of, whole_number
from ..configuration_selortho import SITES, SelOrthoConfig
from ..data.contexts import Cutter
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture, length_batches
from ..language_models.contexts import Context, pad_batch
from ..language_models.loading import LanguageModel, check_context_length, load_language_model
from ..language_models.token_text import TokenTexts
from ..modeling_selortho import SelOrthoSAE

logger = logging.getLogger(__name__)


class FiringFeature(NamedTuple):
    """A feature that fires on a token."""

    feature: int
    activation: float


@dataclass(frozen=True)
class TokenFeatures:
    """The tokens of a text, in the order in which the language model reads them, and the features that fire on each.

    A text of more tokens than the SAE's contexts have is read in several contexts, each with a BOS of its own.
    """

    text: str
    token_ids: Tensor  # (tokens,) int64
    tokens: list[str]  # as text, see [`TokenTexts`]
    positions: Tensor  # (tokens,) int64, place in the context, BOS being 0
    trained_on: Tensor  # (tokens,) bool; False: BOS, another special token or a sink, on which the SAE says nothing
    feature_acts: Tensor  # (tokens, d_sae), on the CPU

    def __len__(self) -> int:
        return len(self.tokens)

    def top(self, k: int = 5) -> list[list[FiringFeature]]:
        """For each token, its at most `k` strongest features, the strongest first; none where nothing can be said."""
        k = whole_number(k, "k", 1)
        values, features = self.feature_acts.topk(min(k, self.feature_acts.shape[1]), dim=1)
        values = values.where(self.trained_on[:, None], 0)
        return [
            [FiringFeature(f, v) for f, v in zip(row_f, row_v, strict=True) if v > 0]
            for row_f, row_v in zip(features.tolist(), values.tolist(), strict=True)
        ]

    def strongest(self, k: int = 10) -> list[FiringFeature]:
        """The at most `k` features with the largest activation on any token, the strongest first."""
        k = whole_number(k, "k", 1)
        peaks = self.feature_acts.where(self.trained_on[:, None], 0).amax(0)  # (d_sae,)
        values, features = peaks.topk(min(k, len(peaks)))
        return [FiringFeature(f, v) for f, v in zip(features.tolist(), values.tolist(), strict=True) if v > 0]

    def on(self, feature: int) -> Tensor:
        """Activations (tokens,) of a feature."""
        return self.feature_acts[:, whole_number(feature, "feature", end=self.feature_acts.shape[1])]


class FeatureCapture:
    """From texts to feature activations, as the SAE was trained: hook, contexts, BOS.

    Args:
        sae: a trained SAE.
        lm: the language model, loaded or by name; default: the one of the training, at the very commit.
        token: access token of the Hub; without it, the stored one or HF_TOKEN.

    Raises:
        SelOrthoError: the SAE does not say which language model and layer it reads, or the model cannot be loaded.
    """

    def __init__(self, sae: SelOrthoSAE, lm: LanguageModel | str | None = None, token: str | None = None) -> None:
        config = SelOrthoSAE.checked(sae).config
        check_site(config)
        if config.layer_of_site is None:
            raise SelOrthoError(
                "layer=None in the SAE's config: it does not say which activations it reads; use sae.encode on yours"
            )
        lm = language_model_of(sae, lm, token)
        warn_of_other_lm(config, lm)
        check_centering(config, lm)
        check_context_length(lm, config.context_length)
        self.sae, self.lm = sae, lm
        self.activations = open_capture(config, lm, config.layer_of_site or 0)
        self._texts = TokenTexts(lm.tokenizer)
        self.cutter = Cutter(lm.tokenizer, config.context_length, config.prepend_bos, min_tokens=1)

    @torch.inference_mode()
    def capture(self, texts: Sequence[str]) -> list[TokenFeatures]:
        """Tokens and feature activations of each text.

        Raises:
            SelOrthoError: a text holds no token, or is none.
        """
        texts = texts_of(texts)
        contexts = self.cutter.cut(list(enumerate(texts)))
        empty = set(range(len(texts))) - {context.document_id for context in contexts}
        if empty:
            raise SelOrthoError(f"text {min(empty)} of {len(texts)} holds no token: {texts[min(empty)][:80]!r}")
        read: dict[int, tuple[Tensor, Tensor]] = {}
        for numbers in length_batches(contexts, self.activations.batch_tokens):
            read.update(zip(numbers, self._read([contexts[number] for number in numbers]), strict=True))
        parts: list[list[tuple[Context, Tensor, Tensor]]] = [[] for _ in texts]
        for number, context in enumerate(contexts):
            parts[context.document_id].append((context, *read[number]))
        return [self._joined(text, own) for text, own in zip(texts, parts, strict=True)]

    def _read(self, contexts: Sequence[Context]) -> list[tuple[Tensor, Tensor]]:
        """Of each context which tokens (t,) the SAE was trained on, and the feature activations (t, d_sae)."""
        input_ids, mask = pad_batch(contexts, self.lm.pad_id)
        hidden = self.activations.hidden_states(input_ids, mask)[self.activations.layer]  # (b, t, d_in)
        kept = self.activations.keep_mask(input_ids, mask, hidden).cpu()
        shown = kept.to(hidden.device)[..., None] | hidden.isfinite()  # what is hidden may be infinite, as in float16
        feature_acts = self.sae.encode(hidden.where(shown, 0).to(self.sae.device)).float().cpu()
        return [
            (kept[row, : len(c.input_ids)], feature_acts[row, : len(c.input_ids)]) for row, c in enumerate(contexts)
        ]

    def _joined(self, text: str, parts: Sequence[tuple[Context, Tensor, Tensor]]) -> TokenFeatures:
        ids = [token for context, _, _ in parts for token in context.input_ids]
        return TokenFeatures(
            text=text,
            token_ids=torch.tensor(ids, dtype=torch.int64),
            tokens=self._texts.of(ids, text),
            positions=torch.cat([torch.arange(len(context.input_ids)) for context, _, _ in parts]),
            trained_on=torch.cat([kept for _, kept, _ in parts]),
            feature_acts=torch.cat([acts for _, _, acts in parts]),
        )


def inspect(
    sae: SelOrthoSAE, text: str, lm: LanguageModel | str | None = None, token: str | None = None
) -> TokenFeatures:
    """The tokens of one text and the features that fire on them; the arguments and errors of [`FeatureCapture`].

    The language model stays in memory for the next call.
    """
    return FeatureCapture(sae, lm, token).capture([text_of(text, "text")])[0]


def language_model_of(sae: SelOrthoSAE, lm: LanguageModel | str | None, token: str | None) -> LanguageModel:
    """Take a language model, or load it by its name, by default that of the training; the last one stays in memory.

    Raises:
        SelOrthoError: neither says which, or it cannot be loaded.
    """
    config = sae.config
    if isinstance(lm, LanguageModel):
        return lm
    if lm is None and config.lm_name is None:
        raise SelOrthoError("lm_name=None in the SAE's config: pass the language model, as in lm='google/gemma-2-2b'")
    name, revision = (config.lm_name, config.lm_revision) if lm is None else (name_of(lm, "lm"), None)
    return _language_model(str(name), revision, str(sae.device), token)


def warn_of_other_lm(config: SelOrthoConfig, lm: LanguageModel) -> None:
    """Warn, with both names, if a language model or its commit is not the one that the SAE was trained on."""
    trained = (config.lm_name, config.lm_revision)
    if config.lm_name is None or (lm.revision is not None and config.lm_revision == lm.revision):
        return
    if config.lm_name == lm.name and config.lm_revision is None:
        return
    logger.warning(
        "this SAE was trained on %s, and is used on %s: features may mean something else there, and its figures do not "
        "hold",
        _named(*trained),
        _named(lm.name, lm.revision),
    )


def open_capture(config: SelOrthoConfig, lm: LanguageModel, layer: int) -> ActivationCapture:
    """Hook a language model where an SAE reads and, of a transcoder, at what it reconstructs; sinks as in training.

    Raises:
        SelOrthoError: the language model lacks the layer or the site, or its activations there have another width.
    """
    capture = ActivationCapture(lm, layer, config.max_norm, site=config.site, target=config.target)
    places = [("reads d_in", config.d_in, capture.sites[layer], capture.widths[layer])]
    if config.target is not None:
        target = capture.target_sites[layer], capture.target_widths[layer]
        places.append(("reconstructs d_out", config.width_out, *target))
    for verb, expected, site, width in places:
        if width != expected:
            raise SelOrthoError(
                f'the {site.side} of {site.module} of "{lm.name}" is {width} wide, the SAE {verb}={expected}: '
                f"take the language model of its training{f', {config.lm_name}' if config.lm_name else ''}"
            )
    return capture


def check_site(config: SelOrthoConfig) -> None:
    """See that an SAE reads a site that is known here, or does not say what it reads.

    Raises:
        SelOrthoError: it names a hook of another library that is none, such as one within a norm.
    """
    if config.layer_of_site is None and config.hook_name is not None:
        raise SelOrthoError(
            f"this SAE reads {config.hook_name}, which is no site that is read here ({', '.join(SITES)}, or a module), "
            "whatever --layer says: choose an SAE of such a site, or encode activations of yours with it"
        )


def check_centering(config: SelOrthoConfig, lm: LanguageModel) -> None:
    """See that a language model does without the mean over d_model that the activations of a `centered` SAE lack.

    Raises:
        SelOrthoError: its norms are no LayerNorms, so that the mean counts.
    """
    if config.centered and not any(isinstance(module, nn.LayerNorm) for module in lm.layers.modules()):
        raise SelOrthoError(
            f'this SAE reads activations less their mean (centered=true in its config), and "{lm.name}" has no '
            "LayerNorm, which would take the mean away: give the language model of its training (--model), or, as "
            "TransformerLens centres none without, set centered (center_writing_weights in a cfg.json) to false"
        )


def _named(name: str | None, revision: str | None) -> str:
    return f'"{name}"' + (f" at {revision}" if revision else "")


@functools.lru_cache(maxsize=1)
def _language_model(name: str, revision: str | None, device: str, token: str | None) -> LanguageModel:
    return load_language_model(name, revision, device=device, token=token)
