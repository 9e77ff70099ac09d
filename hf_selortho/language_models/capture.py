"""Residual-stream activations of a frozen language model: read them, or put something in their place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.contexts import Context, pad_batch
from ..errors import NonFiniteError, SelOrthoError
from .loading import LanguageModel, check_layer


class _LayerReached(Exception):  # noqa: N818 - control flow, not an error
    """Ends the language model's forward once the hooked layer has run: the layers above never run."""


@dataclass(frozen=True)
class TokenOrigins:
    """Where the tokens of some activations come from, each (tokens,) int64."""

    document_ids: Tensor
    positions: Tensor  # place in the context, BOS being 0
    token_ids: Tensor
    context_ids: Tensor  # number of the context among those harvested together

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, rows: Tensor | slice) -> TokenOrigins:
        return TokenOrigins(*(getattr(self, name)[rows] for name in ORIGIN_NAMES))

    @staticmethod
    def empty(tokens: int) -> TokenOrigins:
        """Room for so many tokens."""
        return TokenOrigins(*(torch.empty(tokens, dtype=torch.int64) for _ in ORIGIN_NAMES))

    @staticmethod
    def concatenate(parts: Sequence[TokenOrigins]) -> TokenOrigins:
        """Several in a row."""
        return TokenOrigins(*(torch.cat([getattr(part, name) for part in parts]) for name in ORIGIN_NAMES))


ORIGIN_NAMES = tuple(f.name for f in fields(TokenOrigins))


class NonFiniteActivationsError(NonFiniteError):
    """The language model produced NaN or infinity."""

    advice = "load the language model in bfloat16 or float32 (--lm_dtype), never float16"

    def __init__(self, message: str, origins: TokenOrigins, by_layer: Mapping[int, Tensor]) -> None:
        super().__init__(message)
        self.origins, self.by_layer = origins, by_layer  # of the tokens that it read at once


@dataclass(frozen=True)
class Harvest:
    """Activations of the kept tokens of some contexts, in the order in which the language model saw them."""

    by_layer: dict[int, Tensor]  # (tokens, d_in) each, in the dtype of the language model
    norms: Tensor  # (tokens, layers) float32, L2 norms of these activations
    origins: TokenOrigins
    dropped_special: int  # BOS and other special tokens left out
    dropped_sinks: int  # tokens left out because of their norm
    dropped_non_finite: int = 0  # tokens left out as NaN or infinity

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def activations(self) -> Tensor:
        """(tokens, d_in), where a single layer is read."""
        return only(self.by_layer)

    @property
    def document_ids(self) -> Tensor:
        """(tokens,) int64."""
        return self.origins.document_ids

    @property
    def positions(self) -> Tensor:
        """(tokens,) int64, place in the context, BOS being 0."""
        return self.origins.positions

    def without_sinks(self, max_norms: Sequence[float | None]) -> Harvest:
        """Only the tokens whose norm stays within each layer's limit, all of them where it is None."""
        kept = within_norms(self.norms, max_norms)
        dropped = int((~kept).sum())
        return self if dropped == 0 else replace(self.rows(kept), dropped_sinks=self.dropped_sinks + dropped)

    def rows(self, kept: Tensor) -> Harvest:
        """Only the tokens that are marked, (tokens,) bool."""
        by_layer = {layer: activations[kept.to(activations.device)] for layer, activations in self.by_layer.items()}
        return replace(self, by_layer=by_layer, norms=self.norms[kept], origins=self.origins[kept])


class ActivationCapture:
    """Reads the residual stream after one or several decoder layers of a language model, in one pass.

    Args:
        lm: the frozen language model.
        layer: decoder layer, counted from 0, or several; their outputs are read. Layers above the highest never run.
        max_norm: activations of a larger L2 norm ("sink" tokens) are left out; None keeps all. With several layers,
            one norm for each; a token that is a sink at one of them is left out at all of them.
        batch_tokens: padded tokens a forward pass of the language model takes at once; by default 1024 on a CPU, where
            more falls out of its caches (Gemma-3-270m: 2050 tokens/s at 1024, 1850 at 2048, 1550 at 4096), and 16384
            elsewhere.

    Raises:
        SelOrthoError: a layer is out of range; the message gives the range.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int | Sequence[int],
        max_norm: float | None | Sequence[float | None] = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.lm = lm
        self.layers: tuple[int, ...] = (layer,) if isinstance(layer, int) else tuple(layer)
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise SelOrthoError(f"layers {list(self.layers)}: expected at least one, and none twice")
        for number in self.layers:
            check_layer(lm, number)
        limits = [max_norm] * len(self.layers) if max_norm is None or isinstance(max_norm, (int, float)) else max_norm
        self.max_norms: tuple[float | None, ...] = tuple(limits)
        self.batch_tokens = batch_tokens or (1024 if self.device.type == "cpu" else 16384)
        self.forward_seconds = 0.0  # spent in the language model so far
        # told of activations that are not finite, whose tokens are then left out; None: the error is raised
        self.on_non_finite: Callable[[NonFiniteActivationsError], None] | None = None
        self._special_ids = torch.tensor(sorted(set(lm.tokenizer.all_special_ids)), dtype=torch.int64)

    @property
    def layer(self) -> int:
        """The layer, where a single one is read."""
        (layer,) = self.layers
        return layer

    @property
    def hook_name(self) -> str:
        """Module whose output is read, where it is a single one."""
        return self.hook_name_of(self.layer)

    def hook_name_of(self, layer: int) -> str:
        """Module of the language model that is this layer, such as "model.layers.8"."""
        return f"{self.lm.layers_path}.{layer}"

    def at(self, layer: int) -> ActivationCapture:
        """The same at a single one of the layers."""
        return ActivationCapture(self.lm, layer, self.max_norms[self.layers.index(layer)], self.batch_tokens)

    @property
    def device(self) -> torch.device:
        """Where the language model computes."""
        return self.lm.model.device

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states (b, t, d_in) after the single layer, for tokens (b, t); the layers above it do not run."""
        return only(self.all_hidden_states(input_ids, attention_mask))

    @torch.inference_mode()
    def all_hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> dict[int, Tensor]:
        """Hidden states (b, t, d_in) after each layer, for tokens (b, t); the layers above the highest do not run."""
        captured: dict[int, Tensor] = {}
        highest = max(self.layers)

        def keep(layer: int) -> Callable[[Any, Any, Any], None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                captured[layer] = _hidden(output)
                if layer == highest:
                    raise _LayerReached

            return hook

        handles = [self.lm.layers[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        try:
            # Padding on the right is never attended to by what precedes it, so causal attention needs no mask; without
            # one it runs on faster kernels.
            mask = None if _padded_on_the_right(attention_mask) else attention_mask.to(self.device)
            self.lm.model(input_ids=input_ids.to(self.device), attention_mask=mask, use_cache=False)
        except _LayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {layer: captured[layer] for layer in self.layers}

    def keep_mask(self, input_ids: Tensor, attention_mask: Tensor, hidden: Tensor) -> Tensor:
        """Which tokens (b, t) are activations of the single layer to learn from: no padding, special token or sink."""
        regular = self._regular(input_ids, attention_mask).to(hidden.device)
        return regular & within_norms(hidden.float().norm(dim=-1)[..., None], self.max_norms)

    def harvest(self, contexts: Sequence[Context], progress: tqdm | None = None) -> Harvest:
        """Activations of the kept tokens of `contexts`, computed in batches of similar length.

        Args:
            contexts: what the language model reads. progress: a bar that advances by the tokens kept.

        Raises:
            NonFiniteActivationsError: the language model produced NaN or infinity; names the documents.
        """
        parts = []
        for part in self.harvest_batches(contexts):
            parts.append(part)
            if progress is not None:
                progress.update(len(part))
        if not parts:
            raise SelOrthoError("no contexts to harvest: expected at least one")
        return concatenate(parts)

    def harvest_batches(self, contexts: Sequence[Context]) -> Iterator[Harvest]:
        """[`harvest`] a forward pass of the language model at a time."""
        for numbers in _length_batches([len(context.input_ids) for context in contexts], self.batch_tokens):
            yield self._harvest_batch([contexts[number] for number in numbers], numbers)

    @contextmanager
    def splice(self, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within it, the language model runs whole and the layer's hidden states h (b, t, d_in) become `replace(h)`."""

        def substitute(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = replace(_hidden(output))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.lm.layers[self.layer].register_forward_hook(substitute)
        try:
            yield
        finally:
            handle.remove()

    def _regular(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return attention_mask.bool() & ~torch.isin(input_ids, self._special_ids.to(input_ids.device))

    def _harvest_batch(self, contexts: Sequence[Context], numbers: Sequence[int]) -> Harvest:
        input_ids, attention_mask = pad_batch(contexts, self.lm.tokenizer.pad_token_id or 0)
        real = attention_mask.bool()
        regular = self._regular(input_ids, attention_mask)  # (b, t)
        rows = regular.flatten().nonzero()[:, 0]
        started = time.perf_counter()
        hidden = self.all_hidden_states(input_ids, attention_mask)  # (b, t, d_in) each
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the norms below wait for the GPU anyway
        self.forward_seconds += time.perf_counter() - started
        by_layer = {layer: h.flatten(0, 1)[rows.to(h.device)] for layer, h in hidden.items()}
        norms = torch.stack([h.float().norm(dim=1) for h in by_layer.values()], dim=1).cpu()  # (tokens, layers)
        documents = torch.tensor([c.document_id for c in contexts])[:, None].expand(regular.shape)
        positions = torch.arange(regular.shape[1]).expand(regular.shape)
        places = torch.tensor(numbers)[:, None].expand(regular.shape)
        origins = TokenOrigins(documents[regular], positions[regular], input_ids[regular], places[regular])
        special = int((real & ~regular).sum())
        return self._finite(Harvest(by_layer, norms, origins, special, 0)).without_sinks(self.max_norms)

    def _finite(self, harvest: Harvest) -> Harvest:
        """The tokens whose activations are finite at all layers, where somebody wants to go on without the others."""
        bad = ~harvest.norms.isfinite()  # where they are finite, the activations are
        if not bad.any():
            return harvest
        tokens = bad.any(1)
        documents = harvest.origins.document_ids[tokens].unique().tolist()
        layer = self.layers[int(bad.any(0).nonzero()[0])]
        found = (
            f"NaN or infinity in the activations of {self.lm.name} at {self.hook_name_of(layer)}, on "
            f"{int(tokens.sum())} tokens of documents {_listed(documents)}"
        )
        if self.on_non_finite is None:
            advice = NonFiniteActivationsError.advice
            raise NonFiniteActivationsError(f"{found}; {advice}", harvest.origins, harvest.by_layer)
        self.on_non_finite(NonFiniteActivationsError(found, harvest.origins, harvest.by_layer))
        return replace(harvest.rows(~tokens), dropped_non_finite=int(tokens.sum()))


def only(by_layer: Mapping[int, Tensor]) -> Tensor:
    """The activations of the single layer that there is."""
    (activations,) = by_layer.values()
    return activations


def within_norms(norms: Tensor, limits: Sequence[float | None]) -> Tensor:
    """Which of the norms (..., layers) stay within the limit of every layer: (...) bool. None is no limit."""
    bounds = torch.tensor([math.inf if limit is None else limit for limit in limits], device=norms.device)
    return (norms <= bounds).all(-1)


def concatenate(parts: Sequence[Harvest]) -> Harvest:
    """Several harvests as one; a single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    return Harvest(
        by_layer={layer: torch.cat([p.by_layer[layer] for p in parts]) for layer in parts[0].by_layer},
        norms=torch.cat([p.norms for p in parts]),
        origins=TokenOrigins.concatenate([p.origins for p in parts]),
        dropped_special=sum(p.dropped_special for p in parts),
        dropped_sinks=sum(p.dropped_sinks for p in parts),
        dropped_non_finite=sum(p.dropped_non_finite for p in parts),
    )


def length_batches(contexts: Sequence[Context], batch_tokens: int) -> Iterator[list[Context]]:
    """Batches of contexts of similar length, at most `batch_tokens` tokens each once padded."""
    for numbers in _length_batches([len(context.input_ids) for context in contexts], batch_tokens):
        yield [contexts[number] for number in numbers]


def _length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n], reverse=True):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def max_norm_from_ratio(median_norm: Tensor | float, ratio: float | None) -> float | None:
    """The norm above which a token counts as a sink; None if there is no `ratio`."""
    return None if ratio is None else ratio * float(median_norm)


def _padded_on_the_right(attention_mask: Tensor) -> bool:
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _listed(items: Sequence[int], limit: int = 8) -> str:
    shown = ", ".join(map(str, items[:limit]))
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
