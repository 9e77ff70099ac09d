"""Activations of a frozen language model: read them at hook sites, or put something in their place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import NonFiniteError, SelOrthoError
from ..utils.hub import listed
from ..utils.library_errors import one_line
from .contexts import Context, pad_batch
from .loading import LanguageModel
from .sites import decoder_layer_output

_PROBED = 8  # tokens of a row of the first forward pass


class _SitesRead(Exception):  # noqa: N818 - control flow, not an error
    """Ends the language model's forward pass once all sites have been read: the layers above never run."""


# Language models whose activations a first forward pass has shown to be readable, with the layers.
_PROBED_LAYERS: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenOrigins:
    """Where the tokens of some activations come from."""

    table: Tensor  # (tokens, 4) int64, a column for each of these:
    document_ids = property(lambda self: self.table[:, 0])
    positions = property(lambda self: self.table[:, 1])  # in the context, BOS being 0
    token_ids = property(lambda self: self.table[:, 2])
    context_ids = property(lambda self: self.table[:, 3])  # number of the context among those captured together

    @staticmethod
    def of(document_ids: Tensor, positions: Tensor, token_ids: Tensor, context_ids: Tensor) -> TokenOrigins:
        """Put the columns together."""
        columns = (document_ids, positions, token_ids, context_ids)
        return TokenOrigins(torch.stack([column.long() for column in columns], dim=1))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows: Tensor | slice) -> TokenOrigins:
        return TokenOrigins(self.table[rows])


ORIGIN_NAMES = ("document_ids", "positions", "token_ids", "context_ids")


class NonFiniteActivationsError(NonFiniteError):
    """The language model produced NaN or infinity."""

    advice = "load the language model in bfloat16 or float32 (--lm_dtype), never float16"

    def __init__(self, message: str, origins: TokenOrigins, by_layer: Mapping[int, Tensor]) -> None:
        super().__init__(message)
        self.origins, self.by_layer = origins, by_layer  # of the tokens that it read at once


@dataclass(frozen=True)
class CapturedActivations:
    """Activations of the kept tokens of some contexts, in the order in which the language model saw them."""

    by_layer: dict[int, Tensor]  # (tokens, d_in) each, in the dtype of the language model
    norms: Tensor  # (tokens, layers) float32, L2 norms of these activations
    origins: TokenOrigins
    dropped_special: int = 0  # BOS and other special tokens left out
    dropped_sinks: int = 0  # tokens left out because of their norm
    dropped_non_finite: int = 0  # tokens left out as NaN or infinity

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, rows: Tensor) -> CapturedActivations:
        by_layer = {layer: activations[rows.to(activations.device)] for layer, activations in self.by_layer.items()}
        return replace(self, by_layer=by_layer, norms=self.norms[rows], origins=self.origins[rows])


class ActivationCapture:
    """Reads the residual stream after one or several decoder layers of a language model, in one pass.

    Args:
        lm: the frozen language model.
        layer: decoder layer, counted from 0, or several; their outputs are read. Layers above the highest never run.
        max_norm: activations of a larger L2 norm ("sink" tokens) are left out; None keeps all. With several layers,
            one norm for each; a token that is a sink at one of them is left out at all of them.
        batch_tokens: padded tokens a forward pass of the language model takes at once; by default 1024 on a CPU, where
            more falls out of its caches, and 16384 elsewhere.

    Attributes:
        sites: the hook site of each layer, whose `module` is its name, such as "model.layers.8".
        on_non_finite: called with activations that are not finite, whose tokens are then left out; None: the error is
            raised.

    Raises:
        SelOrthoError: a layer is out of range, or a first short forward pass shows that its activations cannot be read.
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
        self.sites = {number: decoder_layer_output(lm, number) for number in self.layers}
        limits = [max_norm] * len(self.layers) if max_norm is None or isinstance(max_norm, (int, float)) else max_norm
        self.max_norms: tuple[float | None, ...] = tuple(limits)
        self.batch_tokens = batch_tokens or (1024 if self.device.type == "cpu" else 16384)
        self.on_non_finite: Callable[[NonFiniteActivationsError], None] | None = None
        self._special_ids = torch.tensor(sorted(set(lm.tokenizer.all_special_ids)), dtype=torch.int64)
        probed = _PROBED_LAYERS.setdefault(lm.model, set())
        if not probed.issuperset(self.layers):
            self._probe()
            probed.update(self.layers)

    @property
    def layer(self) -> int:
        """The layer, where a single one is read; else a SelOrthoError."""
        if len(self.layers) != 1:
            raise SelOrthoError(f"layers {list(self.layers)}: expected a single one; use capture.at(layer)")
        return self.layers[0]

    @property
    def device(self) -> torch.device:
        """Where the language model computes."""
        return self.lm.model.device

    def at(self, layer: int) -> ActivationCapture:
        """Make a capture of a single one of the layers."""
        capture = copy.copy(self)
        capture.layers, capture.sites = (layer,), {layer: self.sites[layer]}
        capture.max_norms = (self.max_norms[self.layers.index(layer)],)
        return capture

    @torch.inference_mode()
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> dict[int, Tensor]:
        """Read hidden states (b, t, d_in) by layer, for tokens (b, t); the layers above the highest do not run."""
        captured: dict[int, Tensor] = {}

        def read(layer: int, hidden: Tensor) -> None:
            captured[layer] = hidden
            if len(captured) == len(self.layers):
                raise _SitesRead

        # Padding on the right is never attended to by what precedes it, so causal attention needs no mask; without one
        # it runs on faster kernels.
        padded_right = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
        mask = None if padded_right else attention_mask.to(self.device)
        with ExitStack() as hooks, suppress(_SitesRead):
            for layer, site in self.sites.items():
                hooks.enter_context(site.hook(self.lm.model, partial(read, layer)))
            self.lm.model(input_ids=input_ids.to(self.device), attention_mask=mask, use_cache=False)
        if absent := [layer for layer in self.layers if layer not in captured]:
            raise SelOrthoError(
                f'layer {absent[0]} of "{self.lm.name}" takes no part in its computation: choose another'
            )
        return {layer: captured[layer] for layer in self.layers}

    def keep_mask(self, input_ids: Tensor, attention_mask: Tensor, hidden: Tensor) -> Tensor:
        """Mark the tokens (b, t) whose activations are learnt from: no padding, special token or sink (one layer)."""
        regular = self._regular(input_ids, attention_mask).to(hidden.device)
        return regular & within_norms(hidden.float().norm(dim=-1)[..., None], self.max_norms)

    def capture_all(self, contexts: Sequence[Context]) -> CapturedActivations:
        """Read the activations of the kept tokens of `contexts`, computed in batches of similar length.

        Raises:
            NonFiniteActivationsError: the language model produced NaN or infinity; names the documents.
        """
        parts = list(self.capture_batches(contexts))
        if not parts:
            raise SelOrthoError("no contexts to read: expected at least one")
        return CapturedActivations(
            by_layer={layer: torch.cat([part.by_layer[layer] for part in parts]) for layer in self.layers},
            norms=torch.cat([part.norms for part in parts]),
            origins=TokenOrigins(torch.cat([part.origins.table for part in parts])),
            dropped_special=sum(part.dropped_special for part in parts),
            dropped_sinks=sum(part.dropped_sinks for part in parts),
            dropped_non_finite=sum(part.dropped_non_finite for part in parts),
        )

    def capture_batches(self, contexts: Sequence[Context]) -> Iterator[CapturedActivations]:
        """Read activations as [`capture_all`] does, one forward pass of the language model at a time."""
        for numbers in length_batches(contexts, self.batch_tokens):
            yield self._capture([contexts[number] for number in numbers], numbers)

    def splice(self, replace: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Replace the layer's hidden states h (b, t, d_in) by `replace(h)`: `with capture.splice(torch.zeros_like):`.

        The language model then runs whole.
        """
        return self.sites[self.layer].hook(self.lm.model, replace)

    @torch.inference_mode()
    def _probe(self) -> None:
        """Read two rows of tokens that differ in the last one, and refuse what is no causal residual stream."""
        lm, config = self.lm, self.lm.model.config
        input_ids = torch.arange(5, 5 + _PROBED).repeat(2, 1) % lm.vocabulary  # (2, t)
        input_ids[1, -1] = 4
        try:
            hidden = self.hidden_states(input_ids, torch.ones_like(input_ids))
        except SelOrthoError:
            raise
        except Exception as error:  # whatever the code of an architecture raises
            raise SelOrthoError(
                f'"{lm.name}" ({config.model_type}) cannot read a text ({type(error).__name__}: {one_line(error)}); '
                "choose another language model"
            ) from error
        expected = (*input_ids.shape, lm.d_model)
        for layer, h in hidden.items():
            if not isinstance(h, Tensor) or h.shape != expected:
                shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
                raise SelOrthoError(
                    f'layer {layer} of "{lm.name}" ({config.model_type}) gives {shape} for {tuple(input_ids.shape)} '
                    f"tokens, expected {expected}: one vector of hidden_size a token; choose another language model"
                )
            if _sees_later_tokens(h, strict=getattr(config, "is_decoder", None) is False):
                raise SelOrthoError(
                    f'"{lm.name}" ({config.model_type}) reads its text in both directions; choose a decoder-only '
                    "language model"
                )

    def _regular(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return attention_mask.bool() & ~torch.isin(input_ids, self._special_ids.to(input_ids.device))

    def _capture(self, contexts: Sequence[Context], numbers: Sequence[int]) -> CapturedActivations:
        input_ids, attention_mask = pad_batch(contexts, self.lm.pad_id)
        regular = self._regular(input_ids, attention_mask)  # (b, t)
        rows = regular.flatten().nonzero()[:, 0]
        hidden = self.hidden_states(input_ids, attention_mask)  # (b, t, d_in) each
        by_layer = {layer: h.flatten(0, 1)[rows.to(h.device)] for layer, h in hidden.items()}
        norms = torch.stack([h.float().norm(dim=1) for h in by_layer.values()], dim=1).cpu()  # (tokens, layers)
        document_ids = torch.tensor([c.document_id for c in contexts])[:, None].expand(regular.shape)
        positions = torch.arange(regular.shape[1]).expand(regular.shape)
        context_ids = torch.tensor(numbers)[:, None].expand(regular.shape)
        origins = TokenOrigins.of(*(ids[regular] for ids in (document_ids, positions, input_ids, context_ids)))
        captured = CapturedActivations(by_layer, norms, origins, int(attention_mask.sum() - regular.sum()))

        finite = norms.isfinite().all(1)  # where the norms are finite, the activations are
        if not finite.all():
            self._handle_non_finite(captured)
            captured = replace(captured[finite], dropped_non_finite=int((~finite).sum()))
        kept = within_norms(captured.norms, self.max_norms)
        return captured if kept.all() else replace(captured[kept], dropped_sinks=int((~kept).sum()))

    def _handle_non_finite(self, captured: CapturedActivations) -> None:
        bad = ~captured.norms.isfinite()  # (tokens, layers)
        tokens, layer = bad.any(1), self.layers[int(bad.any(0).nonzero()[0])]
        documents = listed(map(str, captured.origins.document_ids[tokens].unique().tolist()))
        message = (
            f"NaN or infinity in the activations of {self.lm.name} at {self.sites[layer].module}, on "
            f"{int(tokens.sum())} tokens of documents {documents}"
        )
        if self.on_non_finite is None:
            message = f"{message}; {NonFiniteActivationsError.advice}"
            raise NonFiniteActivationsError(message, captured.origins, captured.by_layer)
        self.on_non_finite(NonFiniteActivationsError(message, captured.origins, captured.by_layer))


def _sees_later_tokens(hidden: Tensor, strict: bool) -> bool:
    """Tell whether the last token, the only one that differs, changes what comes out (2, t, d_in) at those before it.

    So it does in BERT and its kind, which load as causal models too and say `is_decoder=False` (as GPT-NeoX does, which
    is one). Of other models in half precision, rows that are rounded in other ways pass, unless `strict`.
    """
    size = hidden.float().abs().amax((0, 2)).clamp_min(1e-30)  # of each position: that of a sink is a thousandfold
    *earlier, last = ((hidden[0] - hidden[1]).float().abs().amax(-1) / size).tolist()
    return bool(max(earlier) > last * (1e-4 if strict else max(1e-4, 4 * torch.finfo(hidden.dtype).eps)))


def only(by_layer: Mapping[int, Tensor]) -> Tensor:
    """Take the activations of the single layer that there is."""
    (activations,) = by_layer.values()
    return activations


def within_norms(norms: Tensor, limits: Sequence[float | None]) -> Tensor:
    """Mark which of the norms (..., layers) stay within the limit of every layer: (...) bool. None is no limit."""
    bounds = torch.tensor([math.inf if limit is None else limit for limit in limits], device=norms.device)
    return (norms <= bounds).all(-1)


def length_batches(contexts: Sequence[Context], batch_tokens: int) -> Iterator[list[int]]:
    """Group contexts of similar length, by their numbers, at most `batch_tokens` tokens a batch once padded."""
    batch: list[int] = []
    for number in sorted(range(len(contexts)), key=lambda n: len(contexts[n].input_ids), reverse=True):
        if batch and len(contexts[batch[0]].input_ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
