"""Activations of a frozen language model: read them at hook sites, or put something in their place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import NonFiniteError, SelOrthoError
from ..utils.hub import listed
from ..utils.library_errors import one_line
from .contexts import Context, pad_batch, trained_mask
from .loading import LanguageModel
from .sites import HookSite, find_site

_PROBED = 8  # tokens of a row of the first forward pass


class _SitesRead(Exception):  # noqa: N818 - control flow, not an error
    """Ends the language model's forward pass once all sites have been read: the layers above never run."""


# Of language models: layer, site and target that a first forward pass has shown to be readable, with their widths.
_Probed = dict[tuple[int, str, str | None], tuple[int, int]]
_PROBED_SITES: WeakKeyDictionary[nn.Module, _Probed] = WeakKeyDictionary()


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

    def __init__(self, message: str, origins: TokenOrigins, by_layer: Mapping[Any, Tensor]) -> None:
        super().__init__(message)
        self.origins, self.by_layer = origins, by_layer  # of the tokens that it read at once


@dataclass(frozen=True)
class CapturedActivations:
    """Activations of the kept tokens of some contexts, in the order in which the language model saw them."""

    by_layer: dict[int, Tensor]  # (tokens, d_in) each, in the dtype of the language model
    norms: Tensor  # (tokens, layers) float32, L2 norms of these activations
    origins: TokenOrigins
    dropped_special: int = 0  # BOS and other special tokens left out, and those of a chat that are not trained on
    dropped_sinks: int = 0  # tokens left out because of their norm
    dropped_non_finite: int = 0  # tokens left out as NaN or infinity
    targets: dict[int, Tensor] = field(default_factory=dict)  # (tokens, d_out) each; none without a target site

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, rows: Tensor) -> CapturedActivations:
        by_layer, targets = (
            {layer: activations[rows.to(activations.device)] for layer, activations in of.items()}
            for of in (self.by_layer, self.targets)
        )
        return replace(self, by_layer=by_layer, targets=targets, norms=self.norms[rows], origins=self.origins[rows])


class ActivationCapture:
    """Reads a site of one or several decoder layers of a language model, and its target if any, in one pass.

    Args:
        lm: the frozen language model.
        layer: decoder layer, counted from 0, or several. Layers above the highest never run.
        max_norm: activations of a larger L2 norm ("sink" tokens) are left out; None keeps all. With several layers,
            one norm for each; a token that is a sink at one of them is left out at all of them.
        batch_tokens: padded tokens a forward pass of the language model takes at once; by default 1024 on a CPU, where
            more falls out of its caches, and 16384 elsewhere.
        site: what is read, see [`find_site`]. Of a module, `layer` (a single one) is only the key of the results.
        target: the site that a transcoder reconstructs from it, read in the same pass; None: there is none.

    Attributes:
        sites, target_sites: the hook site of each layer, whose `module` is its name, such as "model.layers.8".
        widths, target_widths: the length of an activation there.
        on_non_finite: called with activations that are not finite, whose tokens are then left out; None: the error is
            raised.

    Raises:
        SelOrthoError: a layer is out of range, there is no such site, or a first short forward pass shows that it
            cannot be read, or that the target comes before it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int | Sequence[int],
        max_norm: float | None | Sequence[float | None] = None,
        batch_tokens: int | None = None,
        *,
        site: str = "resid_post",
        target: str | None = None,
    ) -> None:
        self.lm, self.site, self.target = lm, site, target
        self.layers: tuple[int, ...] = (layer,) if isinstance(layer, int) else tuple(layer)
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise SelOrthoError(f"layers {list(self.layers)}: expected at least one, and none twice")
        if module := next((name for name in (site, target) if name and ":" in name and len(self.layers) > 1), None):
            raise SelOrthoError(f"layers {list(self.layers)}: expected a single one with the module {module}")
        self.sites = {number: find_site(lm, number, site) for number in self.layers}
        self.target_sites = {number: find_site(lm, number, target) for number in self.layers} if target else {}
        limits = [max_norm] * len(self.layers) if max_norm is None or isinstance(max_norm, (int, float)) else max_norm
        self.max_norms: tuple[float | None, ...] = tuple(limits)
        self.batch_tokens = batch_tokens or (1024 if self.device.type == "cpu" else 16384)
        self.on_non_finite: Callable[[NonFiniteActivationsError], None] | None = None
        self._special_ids = torch.tensor(sorted(set(lm.tokenizer.all_special_ids)), dtype=torch.int64)
        probed = _PROBED_SITES.setdefault(lm.model, {})
        if any((number, site, target) not in probed for number in self.layers):
            probed.update(self._probe())
        self.widths = {number: probed[number, site, target][0] for number in self.layers}
        self.target_widths = {number: probed[number, site, target][1] for number in self.target_sites}

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

    @property
    def row_width(self) -> int:
        """Numbers that are read of a token, over all layers, targets included."""
        return sum(self.widths.values()) + sum(self.target_widths.values())

    def at(self, layer: int) -> ActivationCapture:
        """Make a capture of a single one of the layers."""
        capture = copy.copy(self)
        capture.layers = (layer,)
        for name in ("sites", "target_sites", "widths", "target_widths"):
            setattr(capture, name, {key: value for key, value in getattr(self, name).items() if key == layer})
        capture.max_norms = (self.max_norms[self.layers.index(layer)],)
        return capture

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> dict[int, Tensor]:
        """Read the site (b, t, d_in) by layer, for tokens (b, t); the layers above the highest do not run."""
        read = self._read_sites(list(self.sites.values()), input_ids, attention_mask)
        return {layer: read[site] for layer, site in self.sites.items()}

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Read the site as [`hidden_states`] does, and in the same pass its target (b, t, d_out), if there is one."""
        if not self.target_sites:
            return self.hidden_states(input_ids, attention_mask), {}
        read = self._read_sites([*self.sites.values(), *self.target_sites.values()], input_ids, attention_mask)
        x, y = ({layer: read[at] for layer, at in of.items()} for of in (self.sites, self.target_sites))
        return x, y

    @torch.inference_mode()
    def _read_sites(self, sites: Sequence[HookSite], ids: Tensor, attention_mask: Tensor) -> dict[HookSite, Tensor]:
        """Read sites in the order of their computation; what comes after the last one does not run."""
        captured: dict[HookSite, Tensor] = {}
        expected = len(set(sites))

        def read(site: HookSite, hidden: Tensor) -> None:
            captured[site] = hidden
            if len(captured) == expected:
                raise _SitesRead

        # Padding on the right is never attended to by what precedes it, so causal attention needs no mask; without one
        # it runs on faster kernels.
        padded_right = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
        mask = None if padded_right else attention_mask.to(self.device)
        with ExitStack() as hooks, suppress(_SitesRead):
            for site in dict.fromkeys(sites):
                hooks.enter_context(site.hook(self.lm.model, partial(read, site)))
            self.lm.model(input_ids=ids.to(self.device), attention_mask=mask, use_cache=False)
        if absent := [site.module for site in sites if site not in captured]:
            raise SelOrthoError(
                f'module {absent[0]} of "{self.lm.name}" takes no part in its computation: choose another'
            )
        return captured

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
            targets={layer: torch.cat([part.targets[layer] for part in parts]) for layer in self.target_sites},
        )

    def capture_batches(self, contexts: Sequence[Context]) -> Iterator[CapturedActivations]:
        """Read activations as [`capture_all`] does, one forward pass of the language model at a time."""
        for numbers in length_batches(contexts, self.batch_tokens):
            yield self._capture([contexts[number] for number in numbers], numbers)

    def splice(self, replace: Callable[[Tensor], Tensor]) -> ExitStack:
        """Put `replace(y)` in the place of the target y (b, t, d_out), of the site where there is no target.

        The language model then runs whole: `with capture.splice(torch.zeros_like):`.
        """
        name, site = (self.target, self.target_sites) if self.target else (self.site, self.sites)
        hooks = ExitStack()
        if name != "resid_mid":
            hooks.enter_context(site[self.layer].hook(self.lm.model, replace))
            return hooks
        # The residual stream passes by the module that reads it, so that the sum after the MLP is made again.
        mlp_out, resid_post = (find_site(self.lm, self.layer, name) for name in ("mlp_out", "resid_post"))
        parts: list[Tensor] = []

        def start(hidden: Tensor) -> Tensor:
            parts[:] = [replace(hidden)]
            return parts[0]

        hooks.enter_context(site[self.layer].hook(self.lm.model, start))
        hooks.enter_context(mlp_out.hook(self.lm.model, parts.append))
        hooks.enter_context(resid_post.hook(self.lm.model, lambda _hidden: parts[0] + parts[1]))
        return hooks

    def splice_from(self, replace: Callable[[Tensor, Tensor], Tensor]) -> ExitStack:
        """Put `replace(x, y)` in the place of y as [`splice`] does, x being the site's activations in the same pass."""
        if not self.target_sites:
            return self.splice(lambda y: replace(y, y))
        read: dict[str, Tensor] = {}
        hooks = ExitStack()
        hooks.enter_context(self.sites[self.layer].hook(self.lm.model, lambda x: read.update(x=x)))
        hooks.enter_context(self.splice(lambda y: replace(read["x"], y)))
        return hooks

    @torch.inference_mode()
    def _probe(self) -> _Probed:
        """Read two rows of tokens that differ in the last one; refuse what is no vector a token, or not causal."""
        lm, config = self.lm, self.lm.model.config
        input_ids = torch.arange(5, 5 + _PROBED).repeat(2, 1) % lm.vocabulary  # (2, t)
        input_ids[1, -1] = 4
        names = {at: (str(self.target), layer) for layer, at in self.target_sites.items()}
        names |= {at: (self.site, layer) for layer, at in self.sites.items()}
        try:
            with ExitStack() as hooks:
                for site, (name, _) in names.items():
                    if ":" in name and site.side == "output":  # of a named site, it is known what else there is
                        hooks.enter_context(self._refuse_tuple(site.module))
                read = self._read_sites(list(names), input_ids, torch.ones_like(input_ids))
        except SelOrthoError:
            raise
        except Exception as error:  # whatever the code of an architecture raises
            raise SelOrthoError(
                f'"{lm.name}" ({config.model_type}) cannot read a text ({type(error).__name__}: {one_line(error)}); '
                "choose another language model"
            ) from error
        for site, h in read.items():
            name, layer = names[site]
            shape: object = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            width = lm.d_model if name.startswith("resid_") or not isinstance(h, Tensor) else h.shape[-1]
            if shape != (*input_ids.shape, width):
                where = name if ":" in name else f"{name} of layer {layer}"
                raise SelOrthoError(
                    f'{where} of "{lm.name}" ({config.model_type}) gives {shape} for {tuple(input_ids.shape)} tokens, '
                    f"expected {(*input_ids.shape, width)}: one vector a token; choose another site or language model"
                )
            if _sees_later_tokens(h, strict=getattr(config, "is_decoder", None) is False):
                raise SelOrthoError(
                    f'"{lm.name}" ({config.model_type}) reads its text in both directions; choose a decoder-only '
                    "language model"
                )
        order = list(read)
        for layer, target in self.target_sites.items():
            if order.index(target) <= order.index(self.sites[layer]):
                raise SelOrthoError(
                    f"target {self.target} of layer {layer} is the site {self.site} itself or computed before it: "
                    "choose one that comes after it"
                )
        y = self.target_sites
        return {
            (layer, self.site, self.target): (read[x].shape[-1], read[y[layer]].shape[-1] if y else 0)
            for layer, x in self.sites.items()
        }

    def _refuse_tuple(self, path: str) -> RemovableHandle:
        """Raise a SelOrthoError in the next forward pass if the module, no decoder layer, returns several things."""

        def check(module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, (tuple, list)) and module not in list(self.lm.layers):
                raise SelOrthoError(
                    f'module {path} of "{self.lm.name}" gives a tuple of {len(output)}: choose --site attn_out or a '
                    "module within it"
                )

        return self.lm.model.get_submodule(path).register_forward_hook(check)

    def _regular(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return attention_mask.bool() & ~torch.isin(input_ids, self._special_ids.to(input_ids.device))

    def _capture(self, contexts: Sequence[Context], numbers: Sequence[int]) -> CapturedActivations:
        input_ids, attention_mask = pad_batch(contexts, self.lm.pad_id)
        regular = self._regular(input_ids, trained_mask(contexts))  # (b, t)
        rows = regular.flatten().nonzero()[:, 0]
        by_layer, targets = (
            {layer: h.flatten(0, 1)[rows.to(h.device)] for layer, h in read.items()}  # (tokens, width) each
            for read in self.read(input_ids, attention_mask)
        )
        norms = torch.stack([h.float().norm(dim=1) for h in by_layer.values()], dim=1).cpu()  # (tokens, layers)
        document_ids = torch.tensor([c.document_id for c in contexts])[:, None].expand(regular.shape)
        positions = torch.arange(regular.shape[1]).expand(regular.shape)
        context_ids = torch.tensor(numbers)[:, None].expand(regular.shape)
        origins = TokenOrigins.of(*(ids[regular] for ids in (document_ids, positions, input_ids, context_ids)))
        dropped = int(attention_mask.sum() - regular.sum())
        captured = CapturedActivations(by_layer, norms, origins, dropped, targets=targets)

        # Where the norms are finite, the activations are.
        finite = torch.stack([*norms.isfinite().T, *(y.isfinite().all(1).cpu() for y in targets.values())])
        if not finite.all():
            self._handle_non_finite(captured, finite)
            captured = replace(captured[finite.all(0)], dropped_non_finite=int((~finite.all(0)).sum()))
        kept = within_norms(captured.norms, self.max_norms)
        return captured if kept.all() else replace(captured[kept], dropped_sinks=int((~kept).sum()))

    def _handle_non_finite(self, captured: CapturedActivations, finite: Tensor) -> None:
        """Report what is not finite (sites and targets, tokens)."""
        tokens = ~finite.all(0)
        site = [*self.sites.values(), *self.target_sites.values()][int((~finite.all(1)).nonzero()[0])]
        documents = listed(map(str, captured.origins.document_ids[tokens].unique().tolist()))
        message = (
            f"NaN or infinity in the activations of {self.lm.name} at {site.module}, on "
            f"{int(tokens.sum())} tokens of documents {documents}"
        )
        read: dict[Any, Tensor] = {
            **captured.by_layer,
            **{f"target.{layer}": rows for layer, rows in captured.targets.items()},
        }
        if self.on_non_finite is None:
            message = f"{message}; {NonFiniteActivationsError.advice}"
            raise NonFiniteActivationsError(message, captured.origins, read)
        self.on_non_finite(NonFiniteActivationsError(message, captured.origins, read))


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
