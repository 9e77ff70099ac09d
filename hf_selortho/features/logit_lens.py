"""Logit lens: which tokens a direction of the residual stream makes the language model expect.

The directions of an SAE of another site come there through the module that follows ([`find_path`]), or not at all.
"""

from __future__ import annotations

import copy
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..checks import floats_of
from ..configuration_selortho import SelOrthoConfig
from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..language_models.loading import LanguageModel
from ..language_models.sites import find_site
from ..language_models.token_text import TokenTexts, special_ids
from ..modeling_selortho import SelOrthoSAE
from .records import TokenEffect

_CHUNK_BYTES = 48 * 2**20
_PLACEHOLDER = re.compile(
    r"[<\[]\|?(unused|reserved|extra|pad(ding)?)([ _-]?(special_)?(token|id))?[ _-]?\d+\|?[>\]]", re.IGNORECASE
)


_ADDED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")  # sites whose directions the stream holds


class LensPath(NamedTuple):
    """How the decoder directions of an SAE come to the residual stream; with neither, they lie in it."""

    through: tuple[str, ...] = ()  # modules between
    left_out: str = ""  # why they do not come there by a linear map

    def in_words(self) -> str:
        """Say it in a few words: "direct", "through model.layers.9.self_attn.o_proj", or why there is none."""
        if self.left_out:
            return f"left out: {self.left_out}"
        return f"through {', '.join(self.through)}" if self.through else "direct"


def find_path(config: SelOrthoConfig, capture: ActivationCapture) -> LensPath:
    """Find how what an SAE reconstructs comes to the residual stream.

    Outputs of attention heads (attn_z) go through the output projection and, where the architecture has one that is
    added with it (Gemma), the norm behind it. That norm divides by the size of the whole sum, which no single direction
    has: only its gain is taken along.

    Args:
        config: of the SAE. capture: the language model at its layer.
    """
    written = config.written_site
    if written in _ADDED:
        return LensPath()
    if written != "attn_z":
        return LensPath(left_out=f"{written} is not added to the residual stream")
    layer, lm = capture.layer, capture.lm
    projection, added = find_site(lm, layer, "attn_z").module, find_site(lm, layer, "attn_out").module
    norm = (added,) if "norm" in type(lm.model.get_submodule(added)).__name__.lower() else ()
    return LensPath((projection, *norm))


@torch.inference_mode()
def sae_logits(sae: SelOrthoSAE, capture: ActivationCapture, progress: bool = True) -> list[TopLogits]:
    """Find [`top_logits`] of the features of an SAE, through [`find_path`]; empty where it finds none."""
    path, directions = find_path(sae.config, capture), sae.raw_directions()
    if path.left_out:
        return [TopLogits([], [])] * len(directions)
    for module in path.through:
        directions = _without_bias(capture.lm.model.get_submodule(module), directions)
    return top_logits(capture.lm, directions, progress=progress)


class TopLogits(NamedTuple):
    """The tokens whose logits a direction raises and lowers most; both empty where the direction is zero."""

    positive: list[TokenEffect]  # the largest logit first
    negative: list[TokenEffect]  # the smallest logit first


@torch.inference_mode()
def top_logits(
    lm: LanguageModel, directions: Tensor, k: int = 10, progress: bool = True, chunk_bytes: int = _CHUNK_BYTES
) -> list[TopLogits]:
    """Find the tokens whose logits each direction raises most, and those whose logits it lowers most.

    The direction is read as if it were the whole residual stream ("logit lens"; nostalgebraist 2020):

        logits = head(norm(d)) - head(norm(0)), less their mean over the vocabulary

    with the final norm and the unembedding of the language model. The norm first brings every direction to the same
    size, so that numbers depend on where a direction points and not on how long it is: they compare between features
    of a language model, and are not what one unit of a feature adds to a prediction. Equal shifts of all logits change
    no probability, hence the mean.

    Not captured are the layers between the hook and the final norm, which may turn or cancel what the direction does:
    the earlier the layer, the less this says of the model's output. Scaling and soft capping of logits after the
    unembedding (Gemma 2) keep the order of the tokens and are left out.

    Left out of the vocabulary are special tokens and entries that no text contains: `<unused0>` and the like, and rows
    beyond the tokenizer's last one. The computation is in float32 whatever the language model's dtype: bfloat16 has
    so few digits that it makes ties of near logits. It takes about 200 MB.

    Args:
        lm: the language model.
        directions: (n, d_model), in the space of the raw activations, as the decoder rows of an SAE are.
        k: tokens at each end; a smaller vocabulary gives fewer.
        progress: show a bar.
        chunk_bytes: of embeddings, and of logits, held in float32 at once.

    Raises:
        SelOrthoError: directions of another width or not finite, or a language model without one final norm or without
            an unembedding.
    """
    _check(lm, directions)
    unembedding = _unembedding(lm)
    token_ids = written_tokens(lm.tokenizer, len(unembedding)).to(unembedding.device)
    x = _normalised(lm, directions).to(unembedding.device)  # (n, d_model)
    lens = _Lens(x, min(k, len(token_ids)))
    with tqdm(total=len(token_ids), desc="logit lens", unit="token", disable=not progress) as bar:
        for ids in token_ids.split(max(chunk_bytes // (4 * lm.d_model), 1)):
            lens.add(unembedding[ids].float(), ids, chunk_bytes)
            bar.update(len(ids))
    mean = lens.mean.tolist()
    texts = TokenTexts(lm.tokenizer)

    def effects(best: _Best, row: int, sign: int) -> list[TokenEffect]:
        ids, values = best.token_ids[row].tolist(), best.values[row].tolist()
        tokens = [texts.token(token_id) for token_id in ids]
        return [TokenEffect(n, t, sign * v - mean[row]) for n, t, v in zip(ids, tokens, values, strict=True)]

    return [
        TopLogits(effects(lens.largest, row, 1), effects(lens.smallest, row, -1)) if some else TopLogits([], [])
        for row, some in enumerate(directions.any(1).tolist())
    ]


class _Best(NamedTuple):
    """The k largest of some values so far and the tokens that they belong to, (n, k) each, the largest first."""

    values: Tensor
    token_ids: Tensor

    def keep_largest(self, rows: slice, values: Tensor, ids: Tensor) -> None:
        """Let the largest of `values` (rows, tokens) take their place."""
        k = self.values.shape[1]
        fresh, places = values.topk(min(k, values.shape[1]), dim=1)
        self.values[rows], order = torch.cat([self.values[rows], fresh], 1).topk(k, dim=1)
        self.token_ids[rows] = torch.cat([self.token_ids[rows], ids[places]], 1).gather(1, order)


class _Lens:
    """The extreme logits of normalised directions x (n, d_model), gathered a few tokens of the vocabulary at a time."""

    def __init__(self, x: Tensor, k: int) -> None:
        self._x, self._tokens = x, 0
        self._total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)  # of the embeddings
        self.largest, self.smallest = (
            _Best(x.new_full((len(x), k), -torch.inf), torch.zeros((len(x), k), dtype=torch.int64, device=x.device))
            for _ in range(2)
        )  # the second one of the logits' negatives

    def add(self, embeddings: Tensor, ids: Tensor, chunk_bytes: int) -> None:
        """Take tokens with their embeddings (tokens, d_model)."""
        self._tokens += len(ids)
        self._total += embeddings.sum(0, dtype=torch.float64)
        step = max(chunk_bytes // (4 * len(ids)), 1)
        for rows in (slice(start, start + step) for start in range(0, len(self._x), step)):
            logits = self._x[rows] @ embeddings.T  # (rows, tokens)
            self.largest.keep_largest(rows, logits, ids)
            self.smallest.keep_largest(rows, logits.neg_(), ids)

    @property
    def mean(self) -> Tensor:
        """Of the logits over all tokens, (n,)."""
        return self._x.double() @ (self._total / self._tokens)


def find_final_norm(lm: LanguageModel) -> nn.Module:
    """Find the norm between the last decoder layer and the unembedding, such as "model.norm" or "transformer.ln_f".

    It is the one that stands beside the list of decoder layers and after it.

    Raises:
        SelOrthoError: there is none, or there are several.
    """
    parent_path, _, own_name = lm.layers_path.rpartition(".")
    children = list(lm.model.get_submodule(parent_path).named_children())
    start = [name for name, _ in children].index(own_name)
    norms = {name: child for name, child in children[start + 1 :] if "norm" in type(child).__name__.lower()}
    if len(norms) != 1:
        found = ", ".join(norms) or "none"
        raise SelOrthoError(
            f'cannot tell which module of "{lm.name}" ({type(lm.model).__name__}) is its final norm: expected one norm '
            f"after {lm.layers_path}, found {found}; the tokens that a feature raises are known for models with one"
        )
    return next(iter(norms.values()))


def written_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Return which of the first `vocabulary` token ids a text may consist of, (tokens,) int64, rising.

    All but special tokens, `<unused0>` and other placeholders, and ids that the tokenizer does not know.
    """
    special = special_ids(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(tokenizer)))))
    kept = [
        token_id
        for token_id, name in enumerate(names)
        if token_id not in special and name is not None and not _PLACEHOLDER.fullmatch(name)
    ]
    return torch.tensor(kept, dtype=torch.int64)


def _check(lm: LanguageModel, directions: Tensor) -> None:
    if floats_of(directions, "directions", 2, finite=True).shape[1] != lm.d_model:
        raise SelOrthoError(
            f'directions of shape {tuple(directions.shape)}: expected (n, {lm.d_model}), the width of "{lm.name}"'
        )


def _unembedding(lm: LanguageModel) -> Tensor:
    """Return the unembedding, (vocabulary, d_model)."""
    head = lm.model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != lm.d_model:
        raise SelOrthoError(
            f'"{lm.name}" ({type(lm.model).__name__}) has no unembedding of width {lm.d_model}: expected a language '
            "model whose logits are a linear map of its last activations"
        )
    return weight


def _normalised(lm: LanguageModel, directions: Tensor) -> Tensor:
    """Return norm(d) - norm(0), (n, d_model) in float32; the difference is free of the norm's bias."""
    return _without_bias(find_final_norm(lm), directions)


def _without_bias(module: nn.Module, directions: Tensor) -> Tensor:
    """Return m(d) - m(0), (n, d_out) in float32, of a norm or a linear map, whose bias the difference is free of."""
    module = copy.deepcopy(module).float()
    d = directions.to(next(module.parameters()).device, torch.float32)
    d = nn.functional.normalize(d, dim=1) * d.shape[1] ** 0.5  # so long that a norm's epsilon does not matter
    return module(d) - module(torch.zeros_like(d[:1]))
