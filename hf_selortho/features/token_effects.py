"""Which tokens a direction of the residual stream makes the language model expect: its direct effect on the logits."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.contexts import spelling
from ..errors import SelOrthoError
from ..language_models.loading import LanguageModel
from .records import TokenEffect

_CHUNK_BYTES = 48 * 2**20  # of embeddings, and of logits, held in float32 at once
_PLACEHOLDER = re.compile(
    r"[<\[]\|?(unused|reserved|extra|pad(ding)?)([ _-]?(special_)?(token|id))?[ _-]?\d+\|?[>\]]", re.IGNORECASE
)


class _Extremes(NamedTuple):
    """The largest of some values and where they are, (n, k) each, the largest first."""

    values: Tensor
    token_ids: Tensor


@torch.inference_mode()
def token_effects(
    lm: LanguageModel, directions: Tensor, k: int = 10, progress: bool = True
) -> list[tuple[list[TokenEffect], list[TokenEffect]]]:
    """The tokens whose logits each direction raises most, and those whose logits it lowers most.

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

    Returns:
        For each direction the raised tokens, the largest logit first, and the lowered ones, the smallest first. Both
        are empty where the direction is zero.

    Raises:
        SelOrthoError: directions of another width or not finite, k below 1, or a language model without one final norm
            or without an unembedding.
    """
    _check(lm, directions, k)
    unembedding = _unembedding(lm)
    token_ids = written_tokens(lm.tokenizer, len(unembedding)).to(unembedding.device)
    x = _normalised(lm, directions)  # (n, d_model)
    raised, lowered, mean = _extremes(x, unembedding, token_ids, min(k, len(token_ids)), progress)
    spellings: dict[int, str] = {}

    def listed(row: int, extremes: _Extremes, sign: float) -> list[TokenEffect]:
        if not directions[row].any():
            return []
        effects = []
        for token_id, value in zip(extremes.token_ids[row].tolist(), extremes.values[row].tolist(), strict=True):
            if token_id not in spellings:
                spellings[token_id] = spelling(lm.tokenizer, token_id)
            effects.append(TokenEffect(token_id, spellings[token_id], sign * value - mean[row]))
        return effects

    return [(listed(row, raised, 1.0), listed(row, lowered, -1.0)) for row in range(len(directions))]


def find_final_norm(lm: LanguageModel) -> nn.Module:
    """The norm between the last decoder layer and the unembedding, such as "model.norm" or "transformer.ln_f".

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
    """Which of the first `vocabulary` token ids a text may consist of, (tokens,) int64, rising.

    All but special tokens, `<unused0>` and other placeholders, and ids that the tokenizer does not know.
    """
    special = set(tokenizer.all_special_ids)
    special |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    count = min(vocabulary, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(range(count)))
    kept = [
        token_id
        for token_id, name in enumerate(names)
        if token_id not in special and name is not None and not _PLACEHOLDER.fullmatch(name)
    ]
    return torch.tensor(kept, dtype=torch.int64)


def _check(lm: LanguageModel, directions: Tensor, k: int) -> None:
    if directions.ndim != 2 or directions.shape[1] != lm.d_model:
        raise SelOrthoError(
            f'directions of shape {tuple(directions.shape)}: expected (n, {lm.d_model}), the width of "{lm.name}"'
        )
    if not directions.isfinite().all():
        rows = (~directions.isfinite().all(1)).nonzero()[:, 0].tolist()
        raise SelOrthoError(
            f"{len(rows)} directions hold NaN or infinity, the first is number {rows[0]}: expected finite numbers; "
            "check the weights of the SAE"
        )
    if k < 1:
        raise SelOrthoError(f"k={k}: expected at least 1 token")


def _unembedding(lm: LanguageModel) -> Tensor:
    """(vocabulary, d_model)."""
    head = lm.model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != lm.d_model:
        raise SelOrthoError(
            f'"{lm.name}" ({type(lm.model).__name__}) has no unembedding of width {lm.d_model}: expected a language '
            "model whose logits are a linear map of its last activations"
        )
    return weight


def _normalised(lm: LanguageModel, directions: Tensor) -> Tensor:
    """norm(d) - norm(0), (n, d_model) in float32; the difference is free of the norm's bias."""
    norm = copy.deepcopy(find_final_norm(lm)).float()
    device = next(norm.parameters()).device
    d = directions.to(device, torch.float32)
    d = nn.functional.normalize(d, dim=1) * lm.d_model**0.5  # so long that the norm's epsilon does not matter
    return norm(d) - norm(torch.zeros_like(d[:1]))


def _extremes(
    x: Tensor, unembedding: Tensor, token_ids: Tensor, k: int, progress: bool
) -> tuple[_Extremes, _Extremes, list[float]]:
    """Of the logits x @ unembedding[token_ids].T the k largest, the k largest of their negatives, and the mean (n,)."""
    n, d_model = x.shape
    x = x.to(unembedding.device)
    best = [_Extremes(x.new_full((n, k), -torch.inf), token_ids.new_zeros((n, k))) for _ in range(2)]
    total = torch.zeros(d_model, dtype=torch.float64, device=x.device)
    with tqdm(total=len(token_ids), desc="token effects", unit="token", disable=not progress) as bar:
        for ids in token_ids.split(max(_CHUNK_BYTES // (4 * d_model), 1)):
            weights = unembedding[ids].float()  # (tokens, d_model)
            total += weights.sum(0, dtype=torch.float64)
            for rows in _row_chunks(n, len(ids)):
                logits = x[rows] @ weights.T  # (rows, tokens)
                for extremes in best:
                    _keep_largest(extremes, rows, logits, ids)
                    logits.neg_()
            bar.update(len(ids))
    mean = x.double() @ (total / len(token_ids))
    return best[0], best[1], mean.tolist()


def _row_chunks(n: int, tokens: int) -> Iterator[slice]:
    step = max(_CHUNK_BYTES // (4 * tokens), 1)
    return (slice(start, start + step) for start in range(0, n, step))


def _keep_largest(best: _Extremes, rows: slice, logits: Tensor, ids: Tensor) -> None:
    """Let the largest of `logits` (rows, tokens) take their place among the best ones so far."""
    k = best.values.shape[1]
    fresh, places = logits.topk(min(k, logits.shape[1]), dim=1)
    values, order = torch.cat([best.values[rows], fresh], 1).topk(k, dim=1)
    best.values[rows] = values
    best.token_ids[rows] = torch.cat([best.token_ids[rows], ids[places]], 1).gather(1, order)
