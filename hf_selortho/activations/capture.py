"""Residual-stream activations of a frozen language model at one layer: read them, or put something in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import SelOrthoError
from .lm import LanguageModel, check_layer
from .tokens import Context, pad_batch


class NonFiniteActivationsError(SelOrthoError):
    """The language model produced NaN or infinity."""


class _LayerReached(Exception):  # noqa: N818 - control flow, not an error
    """Ends the language model's forward once the hooked layer has run: the layers above never run."""


@dataclass(frozen=True)
class Harvest:
    """Activations of the kept tokens of some contexts, in the order in which the language model saw them."""

    activations: Tensor  # (tokens, d_in), in the dtype of the language model
    document_ids: Tensor  # (tokens,) int64
    positions: Tensor  # (tokens,) int64, place in the context, BOS being 0
    dropped_special: int  # BOS and other special tokens left out
    dropped_sinks: int  # tokens left out because of their norm

    def __len__(self) -> int:
        return len(self.activations)


class ActivationCapture:
    """Reads the residual stream after decoder layer `layer` of a language model.

    Args:
        lm: the frozen language model.
        layer: decoder layer, counted from 0; its output is read.
        max_norm: activations of a larger L2 norm ("sink" tokens) are left out; None keeps all.
        batch_tokens: padded tokens a forward pass of the language model takes at once; by default 2048 on a CPU, where
            more falls out of its caches (Gemma-3-270m: 3800 tokens/s at 2048, 2100 at 8192), and 16384 elsewhere.

    Raises:
        SelOrthoError: the layer is out of range; the message gives the range.
    """

    def __init__(
        self, lm: LanguageModel, layer: int, max_norm: float | None = None, batch_tokens: int | None = None
    ) -> None:
        check_layer(lm, layer)
        self.lm = lm
        self.layer = layer
        self.hook_name = f"{lm.layers_path}.{layer}"
        self.max_norm = max_norm
        self.batch_tokens = batch_tokens or (2048 if self.device.type == "cpu" else 16384)
        self._special_ids = torch.tensor(sorted(set(lm.tokenizer.all_special_ids)), dtype=torch.int64)

    @property
    def device(self) -> torch.device:
        """Where the language model computes."""
        return self.lm.model.device

    @torch.inference_mode()
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states (b, t, d_in) after the layer, for tokens (b, t); the layers above it do not run."""
        captured: list[Tensor] = []

        def stop(_module: Any, _inputs: Any, output: Any) -> None:
            captured.append(_hidden(output))
            raise _LayerReached

        handle = self.lm.layers[self.layer].register_forward_hook(stop)
        try:
            self.lm.model(
                input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device), use_cache=False
            )
        except _LayerReached:
            pass
        finally:
            handle.remove()
        return captured[0]

    def keep_mask(self, input_ids: Tensor, attention_mask: Tensor, hidden: Tensor) -> Tensor:
        """Which tokens (b, t) are activations to learn from: no padding, no special token, no sink."""
        return self._regular(input_ids, attention_mask).to(hidden.device) & self._within_norm(hidden)

    def harvest(self, contexts: Sequence[Context], progress: tqdm | None = None) -> Harvest:
        """Activations of the kept tokens of `contexts`, computed in batches of similar length.

        Args:
            contexts: what the language model reads. progress: a bar that advances by the tokens kept.

        Raises:
            NonFiniteActivationsError: the language model produced NaN or infinity; names the documents.
        """
        parts = []
        for batch in length_batches(contexts, self.batch_tokens):
            parts.append(self._harvest_batch(batch))
            if progress is not None:
                progress.update(len(parts[-1]))
        if not parts:
            raise SelOrthoError("no contexts to harvest: expected at least one")
        return concatenate(parts)

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

    def _within_norm(self, hidden: Tensor) -> Tensor:
        if self.max_norm is None:
            return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        return hidden.float().norm(dim=-1) <= self.max_norm

    def _harvest_batch(self, contexts: Sequence[Context]) -> Harvest:
        input_ids, attention_mask = pad_batch(contexts, self.lm.tokenizer.pad_token_id or 0)
        hidden = self.hidden_states(input_ids, attention_mask)  # (b, t, d_in)
        real = attention_mask.bool()
        regular = self._regular(input_ids, attention_mask)
        self._check_finite(hidden, regular.to(hidden.device), contexts)
        keep = (regular.to(hidden.device) & self._within_norm(hidden)).cpu()
        documents = torch.tensor([c.document_id for c in contexts])[:, None].expand(keep.shape)
        positions = torch.arange(keep.shape[1]).expand(keep.shape)
        return Harvest(
            activations=hidden[keep.to(hidden.device)],
            document_ids=documents[keep],
            positions=positions[keep],
            dropped_special=int((real & ~regular).sum()),
            dropped_sinks=int((regular & ~keep).sum()),
        )

    def _check_finite(self, hidden: Tensor, regular: Tensor, contexts: Sequence[Context]) -> None:
        bad = ~hidden.isfinite().all(-1) & regular  # (b, t)
        if bad.any():
            rows = bad.any(1).nonzero()[:, 0].tolist()
            documents = sorted({contexts[row].document_id for row in rows})
            raise NonFiniteActivationsError(
                f"NaN or infinity in the activations of {self.lm.name} at {self.hook_name}, on {int(bad.sum())} tokens "
                f"of documents {_listed(documents)}; load the model in bfloat16 or float32 (--lm_dtype), never float16"
            )


def concatenate(parts: Sequence[Harvest]) -> Harvest:
    """Several harvests as one; a single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    return Harvest(
        activations=torch.cat([p.activations for p in parts]),
        document_ids=torch.cat([p.document_ids for p in parts]),
        positions=torch.cat([p.positions for p in parts]),
        dropped_special=sum(p.dropped_special for p in parts),
        dropped_sinks=sum(p.dropped_sinks for p in parts),
    )


def length_batches(contexts: Sequence[Context], batch_tokens: int) -> Iterator[list[Context]]:
    """Batches of contexts of similar length, at most `batch_tokens` tokens each once padded."""
    batch: list[Context] = []
    for context in sorted(contexts, key=lambda c: len(c.input_ids), reverse=True):
        longest = len(batch[0].input_ids) if batch else len(context.input_ids)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(context)
    if batch:
        yield batch


def max_norm_from_ratio(median_norm: Tensor | float, ratio: float | None) -> float | None:
    """The norm above which a token counts as a sink; None if there is no `ratio`."""
    return None if ratio is None else ratio * float(median_norm)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _listed(items: Sequence[int], limit: int = 8) -> str:
    shown = ", ".join(map(str, items[:limit]))
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
